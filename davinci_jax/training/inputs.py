"""What a run reads: tokenizer, shard sets, mixture index and loader, opened and checked against the experiment."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from jax.sharding import Mesh

from davinci_jax.curriculum.budget import make_budget, mixture_index
from davinci_jax.curriculum.shares import stage_shares
from davinci_jax.curriculum.timeline import Timeline
from davinci_jax.data.loader import TrainLoader
from davinci_jax.data.rows import Rows, open_rows
from davinci_jax.data.tokenizer import Tokenizer, load_tokenizer
from davinci_jax.errors import CheckpointError, DataError
from davinci_jax.evaluation.heldout import Heldout
from davinci_jax.experiment import Experiment
from davinci_jax.training.layout import BatchLayout


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Everything that a run reads.

    Attributes:
      timeline: the compiled curriculum.
      rows: training rows of each source, in config order; `None` for a source that no stage draws from.
      loader: gives the batches of every step.
      heldout: evaluates on the held-out split; `None` where the run does not evaluate.
    """

    timeline: Timeline
    rows: tuple[Rows | None, ...]
    loader: TrainLoader
    heldout: Heldout | None

    def close(self) -> None:
        """Stops the loader."""
        self.loader.close()


def check_unchanged(rows: Sequence[Rows | None], experiment: Experiment, saved: Mapping[str, str]) -> None:
    """Raises `CheckpointError` unless the shards are those of a run so far, source -> fingerprint in `saved`."""
    now = shard_fingerprints(rows, experiment)
    changed = [name for name, value in saved.items() if now.get(name) != value]
    if changed:
        raise CheckpointError(
            experiment.run.path,
            None,
            f"was trained on other shards of {', '.join(changed)}, so its data order cannot be continued or traced",
            "bring back the shard sets it was started with, or start another run",
        )


def shard_fingerprints(rows: Sequence[Rows | None], experiment: Experiment) -> dict[str, str]:
    """Returns source -> fingerprint of its shard set, for the sources that a stage draws from."""
    sources = experiment.data.sources
    return {sources[reader.source].name: reader.shards.fingerprint for reader in rows if reader is not None}


def tokenizer_path(experiment: Experiment) -> pathlib.Path:
    """Returns where the tokenizer lies."""
    return pathlib.Path(experiment.data.root) / experiment.data.tokenizer


def open_inputs(experiment: Experiment, layout: BatchLayout) -> Inputs:
    """Opens and checks everything that the run reads, before anything is computed.

    Raises:
      DataError: a tokenizer or shard set that is missing, damaged, or does not fit the model or each other.
      ConfigError: a source that is drawn more often than its `max_epochs` allows, with the arithmetic.
    """
    data = experiment.data
    tokenizer = open_tokenizer(experiment)
    timeline = Timeline.compile(experiment.curriculum, data.sequence_length)
    rows = open_all_rows(experiment, "train", tokenizer)
    counts = [reader.num_rows if reader else 0 for reader in rows]
    make_budget(experiment, timeline, counts).check()
    index = mixture_index(experiment, timeline, counts)
    loader = TrainLoader(
        rows=rows,
        index=index,
        timeline=timeline,
        micro_rows=layout.micro_rows,
        local_rows=layout.local_rows,
        workers=data.workers,
        prefetch=data.prefetch,
    )
    evaluates = experiment.evaluation.every_steps is not None
    return Inputs(timeline, rows, loader, open_heldout(experiment, layout.mesh, tokenizer) if evaluates else None)


def open_tokenizer(experiment: Experiment) -> Tokenizer:
    """Returns the run's tokenizer; raises `DataError` if it is missing or has more ids than the model."""
    tokenizer = load_tokenizer(tokenizer_path(experiment))
    if tokenizer.vocab_size > experiment.model.vocab_size:
        raise DataError(
            "model.vocab_size",
            experiment.model.vocab_size,
            f"is below the {tokenizer.vocab_size} ids of {tokenizer_path(experiment)}",
            f"use {tokenizer.vocab_size} or more",
        )
    return tokenizer


def open_all_rows(experiment: Experiment, split: str, tokenizer: Tokenizer) -> tuple[Rows | None, ...]:
    """Returns the rows of every source in config order, checked against tokenizer, model and labels.

    A source that no stage draws from needs no shards and gives `None`.
    """
    drawn = np.any(np.array(stage_shares(experiment)) > 0, axis=0)
    rows = tuple(open_rows(experiment.data, n, split) if used else None for n, used in enumerate(drawn))
    for reader in rows:
        if reader is not None:
            reader.shards.require(tokenizer.fingerprint, experiment.model.vocab_size)
            reader.shards.require_labels(experiment.data.sources[reader.source])
    return rows


def open_heldout(experiment: Experiment, mesh: Mesh, tokenizer: Tokenizer | None = None) -> Heldout:
    """Returns the evaluation on the held-out splits of all sources that a stage draws from."""
    tokenizer = tokenizer or open_tokenizer(experiment)
    return Heldout(experiment, open_all_rows(experiment, "heldout", tokenizer), tokenizer, mesh)
