"""L2: documents that are too short or too long."""

from __future__ import annotations

import dataclasses
import math

from davinci_jax.curation.documents import Document
from davinci_jax.curation.rules import Rule
from davinci_jax.errors import ConfigError
from davinci_jax.experiment import checks


@dataclasses.dataclass(frozen=True)
class KeepSizes(Rule):
    """Keeps documents of some size; below 8 kB, as published for books and papers, a text is a fragment.

    Attributes:
      min_bytes: UTF-8 bytes of the text, at least.
      max_bytes: at most; 0 for no bound.
    """

    min_bytes: int = 8192
    max_bytes: int = 0
    name = "keep-sizes"

    def __post_init__(self):
        checks.within(self.name, 0, math.inf, min_bytes=self.min_bytes, max_bytes=self.max_bytes)
        if 0 < self.max_bytes < self.min_bytes:
            raise ConfigError("keep-sizes.max_bytes", self.max_bytes, f"is below {self.min_bytes}", "raise it, or 0")

    def reason(self, document: Document) -> str | None:
        size = len(document.text.encode("utf-8", "surrogatepass"))
        if size < self.min_bytes:
            return f"{size} bytes, below {self.min_bytes}"
        if 0 < self.max_bytes < size:
            return f"{size} bytes, above {self.max_bytes}"
        return None
