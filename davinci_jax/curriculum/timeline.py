"""The curriculum compiled: step -> stage, batch size, first sequence and learning rate, in constant time.

Steps count from 0: `at(0)` describes the first update, the one that an optax schedule calls count 0.

A stage runs through its batch ramp in order, and its last piece lasts until the stage's tokens are reached, rounded
up to whole steps. With N steps, W of them warm-up, step i of the stage (i = 0 .. N-1) has the learning rate

    i < W:  from + (peak - from) (i + 1) / W            so that the last warm-up step has `peak`,
    else:   final + (peak - final) shape((N - 1 - i) / D)   so that step W has `peak` and the last step `final`,

where the argument is clipped to [0, 1]. D is N - 1 - W for "cosine" and "linear", and the number of decaying steps
for "wsd"; shape(u) is sin^2(pi u / 2), the half cosine of Loshchilov & Hutter 2017 (arXiv 1608.03983), for "cosine"
and u for the others. A constant stage has final = peak.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from davinci_jax.errors import ConfigError
from davinci_jax.experiment import LearningRate, Stage

# In steps: token counts are floats, and a rounding in their last digit must not add a step.
_TOLERANCE = 1e-6


class StepInfo(NamedTuple):
    """One step of the run.

    Attributes:
      step: 0-based.
      stage: position of its stage in the curriculum.
      batch_size: sequences of the step, over all devices and hosts.
      first_sequence: global index of its first sequence; it takes `batch_size` in a row.
      learning_rate: of its update, float64.
    """

    step: int
    stage: int
    batch_size: int
    first_sequence: int
    learning_rate: float


class Piece(NamedTuple):
    """Consecutive steps of one stage with one batch size."""

    stage: int
    first_step: int
    num_steps: int
    first_sequence: int
    batch_size: int


class _Rate(NamedTuple):
    """A stage's learning rate in the symbols of the module's formula; one leaf per symbol."""

    first_step: Any
    steps: Any
    warmup: Any
    start: Any
    peak: Any
    final: Any
    decay: Any
    is_cosine: Any


@dataclasses.dataclass(frozen=True)
class Timeline:
    """All steps of a run. Build it with `compile`; it is small and can be pickled.

    Attributes:
      sequence_length: tokens per sequence.
      pieces: the batch ramps of all stages, in order.
      rates: the learning rate of each stage.
    """

    sequence_length: int
    pieces: tuple[Piece, ...]
    rates: tuple[_Rate, ...]

    @classmethod
    def compile(cls, curriculum: tuple[Stage, ...], sequence_length: int) -> Timeline:
        """Returns the timeline of the stages, in order.

        Raises:
          ConfigError: a ramp that holds more tokens than its stage, or a warm-up longer than its stage.
        """
        pieces, rates, step, sequence = [], [], 0, 0
        for position, stage in enumerate(curriculum):
            first_step = step
            for size, steps in _ramp(stage, sequence_length):
                pieces.append(Piece(position, step, steps, sequence, size))
                step, sequence = step + steps, sequence + steps * size
            rates.append(_rate(stage, first_step, step - first_step))
        return cls(sequence_length, tuple(pieces), tuple(rates))

    @property
    def num_stages(self) -> int:
        """Stages of the run."""
        return len(self.rates)

    @property
    def num_steps(self) -> int:
        """Steps of the whole run."""
        return self.pieces[-1].first_step + self.pieces[-1].num_steps

    @property
    def num_sequences(self) -> int:
        """Sequences of the whole run."""
        return self.pieces[-1].first_sequence + self.pieces[-1].num_steps * self.pieces[-1].batch_size

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole run, padding included."""
        return self.num_sequences * self.sequence_length

    def steps_of(self, stage: int) -> range:
        """Returns the steps of the stage at this position of the curriculum."""
        rate = self.rates[stage]
        return range(rate.first_step, rate.first_step + rate.steps)

    def sequences_of(self, stage: int) -> range:
        """Returns the global sequence indices of the stage at this position of the curriculum."""
        pieces = [piece for piece in self.pieces if piece.stage == stage]
        return range(pieces[0].first_sequence, pieces[-1].first_sequence + pieces[-1].num_steps * pieces[-1].batch_size)

    def at(self, step: int) -> StepInfo:
        """Returns one step; raises `IndexError` outside [0, num_steps)."""
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} is outside the run of {self.num_steps} steps")
        piece = self.pieces[bisect.bisect_right(self.pieces, step, key=lambda piece: piece.first_step) - 1]
        first_sequence = piece.first_sequence + (step - piece.first_step) * piece.batch_size
        rate = float(_learning_rate(np, self.rates[piece.stage], step))
        return StepInfo(step, piece.stage, piece.batch_size, first_sequence, rate)

    def tokens_before(self, step: int) -> int:
        """Returns the tokens that the first `step` steps consume, for step in [0, num_steps]."""
        return self.num_tokens if step == self.num_steps else self.at(step).first_sequence * self.sequence_length

    def learning_rates(self) -> Callable[[jax.typing.ArrayLike], jax.Array]:
        """Returns the learning rate as an optax schedule: int32 step, also traced, -> float32 scalar.

        Steps past the end have the rate of the last step.
        """
        first_steps = np.array([rate.first_step for rate in self.rates], np.int32)
        narrow = {np.dtype(np.float64): np.float32, np.dtype(np.int64): np.int32, np.dtype(bool): np.bool_}
        columns = [np.array(column) for column in zip(*self.rates, strict=True)]
        table = _Rate(*(column.astype(narrow[column.dtype]) for column in columns))
        last_step = self.num_steps - 1

        def schedule(step: jax.typing.ArrayLike) -> jax.Array:
            step = jnp.clip(jnp.asarray(step, jnp.int32), 0, last_step)
            stage = jnp.searchsorted(jnp.asarray(first_steps), step, side="right") - 1
            rate = _Rate(*(jnp.asarray(column)[stage] for column in table))
            return _learning_rate(jnp, rate, step).astype(jnp.float32)

        return schedule


def _learning_rate(xp: Any, rate: _Rate, step: Any) -> Any:
    """Evaluates the module's formula with NumPy in float64 or with jax.numpy in float32.

    Steps are subtracted as integers, and the half cosine is a squared sine of the steps that are left: neither
    loses digits in float32, however long the run is and however close to its end.
    """
    i = step - rate.first_step
    warming = rate.start + (rate.peak - rate.start) * ((i + 1) / xp.maximum(rate.warmup, 1))
    left = xp.clip((rate.steps - 1 - i) / rate.decay, 0, 1)
    left = xp.where(rate.is_cosine, xp.sin(np.pi / 2 * left) ** 2, left)
    return xp.where(i < rate.warmup, warming, rate.final + (rate.peak - rate.final) * left)


def _ramp(stage: Stage, sequence_length: int) -> list[tuple[int, int]]:
    """Returns (batch size, steps) of the stage's ramp."""
    fixed = [(piece.size, piece.steps) for piece in stage.batch[:-1]]
    spent = sum(size * steps for size, steps in fixed) * sequence_length
    last = stage.batch[-1].size
    steps = (stage.tokens - spent) / (last * sequence_length)
    if fixed and steps <= _TOLERANCE:
        terms = " + ".join(f"{count} x {size}" for size, count in fixed)
        raise ConfigError(
            f"curriculum[{stage.name}].batch",
            None,
            f"its fixed pieces hold ({terms}) sequences x {sequence_length} = {spent:.4g} tokens, and the stage has "
            f"{stage.tokens:.4g}, so nothing is left for the last piece",
            "shorten the pieces or lengthen the stage",
        )
    return [*fixed, (last, max(1, math.ceil(steps - _TOLERANCE)))]


def _rate(stage: Stage, first_step: int, steps: int) -> _Rate:
    config: LearningRate = stage.learning_rate
    warmup = config.warmup_steps
    if warmup > steps or (warmup == steps and config.shape != "constant"):
        raise ConfigError(
            f"curriculum[{stage.name}].learning_rate.warmup_steps",
            warmup,
            f"does not fit the stage, which has {steps} steps",
            "shorten the warm-up or lengthen the stage",
        )
    decay = round(config.decay * steps) if config.shape == "wsd" else steps - 1 - warmup
    return _Rate(
        first_step=first_step,
        steps=steps,
        warmup=warmup,
        start=float(config.warmup_from),
        peak=float(config.peak),
        final=float(config.peak if config.final is None else config.final),
        decay=min(max(1, decay), max(1, steps - warmup)),
        is_cosine=config.shape == "cosine",
    )
