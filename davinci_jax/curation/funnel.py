"""What became of a source: counts of all its tasks added up, samples to read, its card."""

from __future__ import annotations

import collections
import copy
import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from davinci_jax.curation.account import merge_samples
from davinci_jax.curation.pipeline import add_counts
from davinci_jax.files import write_atomically

FUNNEL_FILE, CARD_FILE = "funnel.json", "card.json"
SAMPLES = 8  # of an operation and a way out of it
_ADDED = (
    "documents_in",
    "bytes_in",
    "tokens_in",
    "documents_out",
    "bytes_out",
    "tokens_out",
    "rejected",
    "seconds",
)
# What is read of each file; one of an earlier version may have less.
_CARD = {
    *("name", "domain", "level", "level_reached", "documents", "tokens", "tokens_by", "licences"),
    *("inputs", "recipe", "recipe_hash", "made"),
}
_INPUT = {"kind", "label", "path", "licence", "options"}
_FUNNEL = {"documents", "bytes", "tokens", "tokens_by", "levels", "licences", "steps"}
_STEP = {"operation", "level", "parameters", *_ADDED}
_SAMPLED = {
    "kept": {"id", "text"},
    "removed": {"id", "text", "operation", "reason"},
    "changed": {"id", "text", "operation", "before"},
    "found": {"id", "operation", "found"},
}


def add_steps(counts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the rows of a stage, each the sum of what its tasks counted."""
    rows = [{**step, "counts": copy.deepcopy(step["counts"])} for step in counts[0]["steps"]]
    for task in counts[1:]:
        for row, step in zip(rows, task["steps"], strict=True):
            for name in _ADDED:
                row[name] += step[name]
            add_counts(row["counts"], step["counts"])
    return rows


def summarise(rows: Sequence[dict[str, Any]], last: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the funnel of a source: documents, bytes, tokens, pairs, licences, levels, a row for each operation.

    Args:
      rows: of all stages, in order.
      last: counts of the tasks of the last stage.
    """
    licences, levels = collections.Counter(), collections.Counter()
    for task in last:
        licences.update(task["licences"])
        levels.update(task["levels"])
    end = rows[-1]
    return {
        "documents": end["documents_out"],
        "bytes": end["bytes_out"],
        "tokens": round(end["tokens_out"]),
        "pairs": sum(task["pairs"] for task in last),
        "licences": dict(sorted(licences.items())),
        "levels": dict(sorted(levels.items())),
        "steps": [
            {
                name: round(value, 3) if name == "seconds" else _whole(value)
                for name, value in row.items()
                if name != "counts" or value  # few operations count more than documents
            }
            for row in rows
        ],
    }


def write_samples(folder: pathlib.Path, stages: Sequence[Sequence[dict[str, Any]]]) -> None:
    """Writes samples/kept.jsonl, and removed.jsonl, changed.jsonl and found.jsonl with the operation of each.

    Each of these names its row of the funnel as well, since a recipe may have an operation twice.

    Args:
      folder: of the source's result.
      stages: counts of the tasks, stage by stage.
    """
    target = folder / "samples"
    target.mkdir(exist_ok=True)
    _write(target / "kept.jsonl", merge_samples([task["kept"] for task in stages[-1]], SAMPLES))
    for name in ("removed", "changed", "found"):
        _write(target / f"{name}.jsonl", _by_operation(stages, name))


def link_rejects(folder: pathlib.Path, before: Sequence[pathlib.Path]) -> None:
    """Puts links to the documents that earlier stages dropped beside those of the last, so that one folder has all."""
    target = folder / "rejects"
    target.mkdir(exist_ok=True)
    for stage in before:
        for label in sorted((stage / "rejects").iterdir()) if (stage / "rejects").is_dir() else ():
            if not label.is_symlink() and not (target / label.name).exists():
                (target / label.name).symlink_to(pathlib.Path("..", "..", stage.name, "rejects", label.name))


def point(link: pathlib.Path, name: str) -> None:
    """Makes a link beside a folder point to it, in one step."""
    new = link.with_name(f".{link.name}.{os.getpid()}")
    new.unlink(missing_ok=True)
    new.symlink_to(name)
    os.replace(new, link)


def read_json(file: pathlib.Path) -> dict[str, Any] | None:
    """Returns a JSON file of a result, `None` where it is not there or not whole."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def read_card(folder: pathlib.Path) -> dict[str, Any] | None:
    """Returns the card of a result, `None` where it is not there or not as this version writes it."""
    card = read_json(folder / CARD_FILE)
    return card if _has(card, _CARD) and all(_has(given, _INPUT) for given in card["inputs"]) else None


def read_funnel(folder: pathlib.Path) -> dict[str, Any] | None:
    """Returns the funnel of a result, `None` where it or samples beside it are not as this version writes them."""
    funnel = read_json(folder / FUNNEL_FILE)
    whole = _has(funnel, _FUNNEL) and all(_has(step, _STEP) for step in funnel["steps"])
    return funnel if whole and all(read_samples(folder, name) is not None for name in _SAMPLED) else None


def read_samples(folder: pathlib.Path, name: str) -> list[dict[str, Any]] | None:
    """Returns samples of a result, `None` where they are not as this version writes them.

    Args:
      folder: of the result.
      name: "kept", "removed", "changed" or "found".
    """
    try:
        lines = (folder / "samples" / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
        records = [json.loads(line) for line in lines if line]
    except (OSError, ValueError):
        return None
    return records if all(_has(record, _SAMPLED[name]) for record in records) else None


def write_json(file: pathlib.Path, value: dict[str, Any]) -> None:
    """Writes an indented JSON file, whole or not at all."""
    write_atomically(file, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def show_funnel(steps: Sequence[dict[str, Any]]) -> str:
    """Returns the funnel as a table of one line an operation."""
    width = max(len("operation"), *(len(step["operation"]) for step in steps))
    head = f"  {'level':5} {'operation':{width}} {'documents':>21} {'megabytes':>21} {'M tokens':>9} {'rejected':>9}"
    lines = [f"{head} {'seconds':>8}"]
    for step in steps:
        documents = f"{step['documents_in']:>9} -> {step['documents_out']:>8}"
        size = f"{step['bytes_in'] / 1e6:>9.2f} -> {step['bytes_out'] / 1e6:>8.2f}"
        lines.append(
            f"  {step['level']:5} {step['operation']:{width}} {documents:>21} {size:>21} "
            f"{step['tokens_out'] / 1e6:>9.2f} {step['rejected']:>9} {step['seconds']:>8.1f}"
        )
    return "\n".join(lines)


def _by_operation(stages: Sequence[Sequence[dict[str, Any]]], name: str) -> Iterator[dict[str, Any]]:
    before = 0
    for tasks in stages:
        for n, step in enumerate(tasks[0]["steps"]):
            for record in merge_samples([task[name][n] for task in tasks], SAMPLES):
                yield {"operation": step["operation"], "step": before + n, **record}
        before += len(tasks[0]["steps"])


def _write(file: pathlib.Path, records: Any) -> None:
    write_atomically(file, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def _has(value: Any, fields: set[str]) -> bool:
    return isinstance(value, dict) and fields <= value.keys()


def _whole(value: Any) -> Any:
    return round(value) if isinstance(value, float) else value
