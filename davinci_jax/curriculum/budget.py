"""What the stages draw from each source, against what the source has."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from davinci_jax.curriculum.shares import stage_shares
from davinci_jax.curriculum.timeline import Timeline
from davinci_jax.data.mixture import MixtureIndex
from davinci_jax.errors import ConfigError
from davinci_jax.experiment import Experiment


@dataclasses.dataclass(frozen=True)
class Budget:
    """Sequences drawn from every source by every stage.

    Attributes:
      experiment: the run.
      draws: sequences that each stage draws from each source, int64 [stages, sources].
      rows: rows of each source, int64 [sources].
    """

    experiment: Experiment
    draws: np.ndarray
    rows: np.ndarray

    @property
    def tokens(self) -> np.ndarray:
        """Tokens that each stage draws from each source, int64 [stages, sources]."""
        return self.draws * self.experiment.data.sequence_length

    @property
    def pool(self) -> np.ndarray:
        """Tokens in the rows of each source, int64 [sources]."""
        return self.rows * self.experiment.data.sequence_length

    @property
    def epochs(self) -> np.ndarray:
        """How often each stage goes through each source, float64 [stages, sources]."""
        return self.draws / np.maximum(self.rows, 1)

    def check(self) -> None:
        """Raises `ConfigError` with the arithmetic if a source is drawn more often than its `max_epochs` allows."""
        total = self.draws.sum(axis=0)
        for number, source in enumerate(self.experiment.data.sources):
            # In rows, so that a source whose every row is drawn once is within one epoch to the last digit.
            if total[number] > source.max_epochs * self.rows[number]:
                self._refuse(number, int(total[number]))

    def _refuse(self, number: int, drawn: int) -> None:
        source, length = self.experiment.data.sources[number], self.experiment.data.sequence_length
        rows = int(self.rows[number])
        stages = [
            stage.name for stage, count in zip(self.experiment.curriculum, self.draws, strict=True) if count[number]
        ]
        if not rows:
            problem, enough = f"has no sequence to give, and stages {', '.join(stages)} draw {drawn}", None
        else:
            enough = math.ceil(drawn / rows * 100) / 100
            problem = (
                f"allows {source.max_epochs:g} x {rows * length:.4g} tokens, and stages {', '.join(stages)} draw "
                f"{drawn * length:.4g}, which is {drawn / rows:.4g} epochs"
            )
        remedy = f"raise it to {enough:g}, " if enough else "give it more documents, "
        raise ConfigError(
            f"data.sources.{source.name}.max_epochs",
            source.max_epochs,
            problem,
            f"{remedy}shorten the stages, or lower the share of {source.domain} in their mixtures",
        )


def mixture_index(experiment: Experiment, timeline: Timeline, rows: Sequence[int]) -> MixtureIndex:
    """Returns the address book of the run.

    Args:
      experiment: the run.
      timeline: its compiled curriculum.
      rows: rows of each source, in the order of the pool.

    Raises:
      DataError: a stage draws from a source without rows.
    """
    sources = experiment.data.sources
    stages = [(len(timeline.sequences_of(n)), shares) for n, shares in enumerate(stage_shares(experiment))]
    return MixtureIndex(
        stages,
        rows,
        experiment.run.seed,
        names=[source.name for source in sources],
        groups=[source.domain for source in sources],
    )


def declared_rows(experiment: Experiment) -> list[int]:
    """Returns the rows of each source that its declared tokens fill."""
    return [int(source.tokens // experiment.data.sequence_length) for source in experiment.data.sources]


def make_budget(
    experiment: Experiment,
    timeline: Timeline,
    rows: Sequence[int | None] | None = None,
    sequences: int | None = None,
) -> Budget:
    """Returns what the run draws from its sources.

    Args:
      experiment: the run.
      timeline: its compiled curriculum.
      rows: rows of each source, as its shards have them; `None`, also for one source, takes the declared tokens.
      sequences: what the first so many sequences draw; `None` for the whole run.
    """
    declared = declared_rows(experiment)
    rows = [says if have is None else have for have, says in zip(rows or declared, declared, strict=True)]
    index = mixture_index(experiment, timeline, np.maximum(rows, 1))
    stops = [timeline.sequences_of(n).stop for n in range(timeline.num_stages)]
    ends = [index.draws(stop if sequences is None else min(stop, sequences)) for stop in stops]
    return Budget(experiment, np.diff(ends, axis=0, prepend=0), np.asarray(rows, np.int64))
