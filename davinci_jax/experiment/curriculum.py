"""A stage joins tokens, batch ramp, learning rate and mixture (the report's table 5)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from davinci_jax.errors import ConfigError
from davinci_jax.experiment import checks

SHAPES = ("constant", "cosine", "linear", "wsd")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """A piece of a stage's batch ramp.

    Attributes:
      size: sequences per step, over all devices and hosts.
      steps: how long it lasts; `None`, for the last piece only, means to the end of the stage.
    """

    size: int
    steps: int | None = None

    def __post_init__(self):
        checks.positive("curriculum.batch", size=self.size, steps=self.steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearningRate:
    """The learning rate over one stage: a linear warm-up to `peak`, then a shape that ends at `final`.

    Attributes:
      peak: value after the warm-up.
      shape: "constant" stays at `peak`; "cosine" and "linear" fall to `final` over the rest of the stage;
        "wsd" stays at `peak` and falls linearly to `final` over the last `decay` of the stage
        (warmup-stable-decay, Hu et al. 2024, arXiv 2404.06395).
      final: value at the end of the stage; unused, and so refused, with "constant".
      warmup_steps: steps of linear warm-up at the start of the stage.
      warmup_from: value before the first warm-up step; the last warm-up step has `peak`. Refused without a warm-up.
      decay: share of the stage's steps that "wsd" decays over; refused with another shape.
    """

    peak: float
    shape: str = "constant"
    final: float | None = None
    warmup_steps: int = 0
    warmup_from: float = 0.0
    decay: float = 0.1

    def __post_init__(self):
        section = "curriculum.learning_rate"
        checks.positive(section, peak=self.peak, decay=self.decay)
        checks.one_of(section, SHAPES, shape=self.shape)
        checks.within(section, 0, 1, decay=self.decay)
        checks.within(
            section, 0, float("inf"), warmup_steps=self.warmup_steps, warmup_from=self.warmup_from, final=self.final
        )
        if self.shape != "wsd" and self.decay != type(self).decay:
            raise ConfigError(
                f"{section}.decay",
                self.decay,
                f"does nothing with the shape {self.shape!r}",
                "leave it out or use 'wsd'",
            )
        if self.warmup_from and not self.warmup_steps:
            raise ConfigError(
                f"{section}.warmup_from", self.warmup_from, "does nothing without a warm-up", "give warmup_steps too"
            )
        if self.shape == "constant" and self.final is not None:
            raise ConfigError(
                f"{section}.final",
                self.final,
                "does nothing with a constant shape",
                "leave it out or choose a shape that decays",
            )
        if self.shape != "constant" and self.final is None:
            raise ConfigError(
                f"{section}.final",
                None,
                f"is needed by the shape {self.shape!r}",
                "name the value at the end of the stage",
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of a run.

    Attributes:
      name: unique name, such as "1-1"; sources refer to it.
      tokens: length of the stage in tokens; rounded up to whole steps.
      batch: the batch ramp, in order; all pieces but the last say how many steps they last.
      learning_rate: the stage's learning rate.
      mixture: domain -> share; normalised to 1, so a table's percentages may be written as printed.
    """

    name: str
    tokens: float
    batch: tuple[Batch, ...]
    learning_rate: LearningRate
    mixture: Mapping[str, float]

    def __post_init__(self):
        checks.text("curriculum", name=self.name)
        section = f"curriculum[{self.name}]"
        checks.positive(section, tokens=self.tokens)
        if not self.name or set("/=.") & set(self.name):
            raise ConfigError(
                f"{section}.name", self.name, "cannot be part of a dotted name", "use letters, digits, '-' and '_'"
            )
        checks.list_of(Batch, f"{section}.batch", self.batch)
        if not self.batch:
            raise ConfigError(f"{section}.batch", (), "is empty", "give at least one batch size")
        for piece in self.batch[:-1]:
            if piece.steps is None:
                raise ConfigError(
                    f"{section}.batch.steps",
                    None,
                    "only the last piece may leave out its steps",
                    "say how many steps it lasts",
                )
        if self.batch[-1].steps is not None:
            raise ConfigError(
                f"{section}.batch.steps",
                self.batch[-1].steps,
                "the last piece lasts to the end of the stage",
                "leave it out",
            )
        for domain, share in self.mixture.items():
            checks.within(f"{section}.mixture", 0, float("inf"), **{domain: share})
        if not sum(self.mixture.values()) > 0:
            raise ConfigError(
                f"{section}.mixture",
                dict(self.mixture),
                "adds up to nothing",
                "give at least one domain a positive share",
            )
