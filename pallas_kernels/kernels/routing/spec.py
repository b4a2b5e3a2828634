"""How experts are chosen: the static part of a call of `route`."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class RoutingSpec:
    """The arguments of `route`, which says what they mean."""

    top_k: int
    score: Literal["softmax", "sigmoid"]
    groups: tuple[int, int] | None
    threshold: float | None
    normalize: bool
    scale: float
    capacity: int | None
