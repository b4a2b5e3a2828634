"""`davinci trace`: from a step of a run to the documents that it saw."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
from rich.console import Console

from davinci_jax.curation.documents import documents_path
from davinci_jax.curation.origin import find_origin
from davinci_jax.curriculum.budget import mixture_index
from davinci_jax.curriculum.timeline import Timeline
from davinci_jax.data.lineage import trace
from davinci_jax.errors import ConfigError
from davinci_jax.experiment import Experiment
from davinci_jax.training.inputs import check_unchanged, open_all_rows, open_tokenizer
from davinci_jax.training.load import sealed_meta
from davinci_jax.training.metrics import read_metrics
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


def trace_token(experiment: Experiment, step: int, sequence: int, column: int) -> dict[str, Any]:
    """Returns the whole way of one token, from its place in a step back to the file that its document was read from.

    Args:
      experiment: the run.
      step: 1 is the first.
      sequence: global index of the sequence.
      column: place of the token in it.

    Returns:
      What `trace_step` tells of its document, with "column", "token" (id), "shard" (file), "token_of_document", and
      "origin": place, state and L0 record, `None` where the lineage does not say.

    Raises:
      ConfigError: the step has no such sequence, or the sequence no such token.
    """
    records = [record for record in trace_step(experiment, step) if record["sequence"] == sequence]
    if not records:
        raise ConfigError("--sequence", sequence, f"is not in step {step}", "give one that the step's trace shows")
    for record in records:
        if record["first_column"] <= column < record["first_column"] + record["num_tokens"]:
            return _token(experiment, record, column)
    length = experiment.data.sequence_length
    raise ConfigError("--column", column, "has no token", f"give a column from 0 to {length - 1} that holds text")


def _token(experiment: Experiment, record: dict[str, Any], column: int) -> dict[str, Any]:
    number, source = next((n, s) for n, s in enumerate(experiment.data.sources) if s.name == record["source"])
    reader = open_all_rows(experiment, "train", open_tokenizer(experiment))[number]
    row = np.array([record["row"]])
    ranges, left = reader.ranges(row), column
    for start, stop in zip(ranges.start.tolist(), ranges.stop.tolist(), strict=True):
        if left < stop - start:
            break
        left -= stop - start
    files = [(entry.file, entry.bytes, entry.sha256) for entry in reader.shards.manifest.inputs]
    origin = find_origin(documents_path(experiment.data, source), record["lineage"], files)
    return {
        **record,
        "column": column,
        "token": int(reader.read(row).tokens[0][column]),
        "shard": str(reader.shards.file_of(start + left)),
        "token_of_document": record["first_token"] + column - record["first_column"],
        "origin": origin._asdict() if origin else None,
    }


def print_token(experiment: Experiment, step: int, sequence: int, column: int, as_json: bool) -> None:
    """Prints the way of one token: shard, row, document, operations, source file."""
    found = trace_token(experiment, step, sequence, column)
    if as_json:
        print(json.dumps(found, ensure_ascii=False))
        return
    console = Console(highlight=False, soft_wrap=True, emoji=False)
    licence = f", {found['licence']}" if found["licence"] else ""
    lines = [
        ("token", f"{found['token']}, column {column} of sequence {sequence:,} in step {step:,}"),
        ("row", f"{found['row']:,} of {found['source']}, epoch {found['epoch']}"),
        ("shard", found["shard"]),
        ("document", f"{found['id']}, {found['level']}{licence}"),
        ("", f"token {found['token_of_document']:,} of {found['document_tokens']:,}"),
    ]
    for n, record in enumerate(found["lineage"]):
        lines.append(("operations" if n == 0 else "", _operation(record)))
    origin = found["origin"]
    lines.append(("source file", f"{origin['place']}: {origin['state']}" if origin else "the lineage does not name it"))
    for label, text in lines:
        console.print(printable(f"{label:12s} {text}"), markup=False)


def _operation(record: Any) -> str:
    """Returns a record of a lineage on one line; documents from elsewhere may hold anything."""
    if not isinstance(record, dict):
        return str(record)
    parameters = record.get("parameters") or {}
    shown = ", ".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in parameters.items())
    chunk = f" of {record['from']}" if "from" in record else ""
    return f"{record.get('level', '')} {record.get('operation', record.get('name', ''))}{chunk}  {shown}".strip()


def print_trace(experiment: Experiment, step: int, as_json: bool) -> None:
    """Prints the documents of a step: a line each, or one JSON object a line."""
    records = trace_step(experiment, step)
    if as_json:
        for record in records:
            print(json.dumps(record, ensure_ascii=False))
        return
    console = Console(highlight=False, soft_wrap=True, emoji=False)
    reached = max((line["step"] for line in read_metrics(experiment.run.path).train), default=0)
    if step > reached:
        console.print(f"the run has logged steps up to {reached:,}; this is what step {step:,} is or will be given")
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
