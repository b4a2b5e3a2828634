"""`davinci trace`: from a step of a run to the documents that it saw."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
from rich.console import Console

from davinci_jax.curriculum.budget import mixture_index
from davinci_jax.curriculum.timeline import Timeline
from davinci_jax.data.lineage import trace
from davinci_jax.errors import ConfigError
from davinci_jax.experiment import Experiment
from davinci_jax.training.inputs import check_unchanged, open_all_rows, open_tokenizer
from davinci_jax.training.load import sealed_meta
from davinci_jax.training.units import printable


def trace_step(experiment: Experiment, step: int) -> list[dict[str, Any]]:
    """Returns one record for each document of each row of a step, in the order of the global batch.

    A record has "sequence" (global index), "source", "epoch", "row", and what `data.lineage` tells of the document.

    Args:
      experiment: the run.
      step: 1 is the first.

    Raises:
      ConfigError: the run has no such step.
    """
    timeline = Timeline.compile(experiment.curriculum, experiment.data.sequence_length)
    if not 1 <= step <= timeline.num_steps:
        raise ConfigError("--step", step, "is outside the run", f"give a step from 1 to {timeline.num_steps}")
    rows = open_all_rows(experiment, "train", open_tokenizer(experiment))
    saved = sealed_meta(experiment)
    if saved is not None:
        check_unchanged(rows, experiment, saved["shards"])
    index = mixture_index(experiment, timeline, [reader.num_rows if reader else 0 for reader in rows])
    info = timeline.at(step - 1)
    sequences = np.arange(info.first_sequence, info.first_sequence + info.batch_size)
    found = index.lookup(sequences)
    return [
        {
            "sequence": int(sequence),
            "source": experiment.data.sources[source].name,
            "epoch": int(epoch),
            "row": int(row),
            **document._asdict(),
        }
        for sequence, source, epoch, row in zip(sequences, *found, strict=True)
        for document in trace(rows[source], int(row))
    ]


def print_trace(experiment: Experiment, step: int, as_json: bool) -> None:
    """Prints the documents of a step: a line each, or one JSON object a line."""
    records = trace_step(experiment, step)
    if as_json:
        for record in records:
            print(json.dumps(record, ensure_ascii=False))
        return
    console = Console(highlight=False, soft_wrap=True, emoji=False)
    for (sequence, source, epoch, row), documents in itertools.groupby(
        records, key=lambda r: (r["sequence"], r["source"], r["epoch"], r["row"])
    ):
        console.print(f"[bold]sequence {sequence:,}[/]  {source}, epoch {epoch}, row {row:,}")
        for document in documents:
            last = document["first_column"] + document["num_tokens"]
            part = (
                ""
                if document["num_tokens"] == document["document_tokens"]
                else (
                    f"  (tokens {document['first_token']:,} to {document['first_token'] + document['num_tokens']:,} "
                    f"of {document['document_tokens']:,})"
                )
            )
            place = f"  columns {document['first_column']:>5} to {last:>5}  {document['level']}  "
            licence = f"  {document['licence']}" if document["licence"] else ""
            console.print(printable(f"{place}{document['id']}{part}{licence}"), markup=False)
