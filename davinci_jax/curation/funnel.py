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
from davinci_jax.curation.documents import json_line
from davinci_jax.curation.figures import show_bytes, show_tokens
from davinci_jax.curation.pipeline import add_counts
from davinci_jax.experiment.data import LEVELS
from davinci_jax.files import write_atomically

FUNNEL_FILE, CARD_FILE = "funnel.json", "card.json"
_REASON_CHARACTERS = 200  # of one that is told in a line
_ADDED = (
    "documents_in",
    "bytes_in",
    "tokens_in",
    "documents_out",
    "bytes_out",
    "tokens_out",
    "rejected",
    "failed",
    "seconds",
)
_NUMBER, _MAYBE = (int, float), (str, type(None))
# What is read of each file, and what it must be; one of an earlier version may have less.
_CARD = {
    **dict.fromkeys(("name", "domain", "level", "tokens_by", "recipe_hash", "made"), str),
    **dict.fromkeys(("inputs", "recipe"), list),
    "level_reached": _MAYBE,
    "documents": int,
    "tokens": _NUMBER,
    "licences": dict,
}
_INPUT = {"kind": str, "label": str, "path": str, "licence": _MAYBE, "options": dict}
_ROW = {"operation": str, "level": str, "parameters": dict}
_FUNNEL = {
    **dict.fromkeys(("documents", "bytes"), int),
    **dict.fromkeys(("levels", "licences"), dict),
    "tokens": _NUMBER,
    "tokens_by": str,
    "steps": list,
}
_STEP = {**_ROW, **dict.fromkeys(_ADDED, _NUMBER)}
_SAMPLED = {
    "kept": {"id": str, "text": str},
    "removed": {"id": str, "text": str, "operation": str, "reason": str},
    "changed": {"id": str, "text": str, "operation": str, "before": str},
    "found": {"id": str, "operation": str, "found": list},
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
    _write(target / "kept.jsonl", merge_samples([task["kept"] for task in stages[-1]]))
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
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def read_card(folder: pathlib.Path) -> dict[str, Any] | None:
    """Returns the card of a result, `None` where it is not there or not as this version writes it."""
    card = read_json(folder / CARD_FILE)
    whole = _is(card, _CARD) and _are(card["inputs"], _INPUT) and _are(card["recipe"], _ROW)
    whole = whole and _are_counts(card["licences"]) and {step["level"] for step in card["recipe"]} <= set(LEVELS)
    return card if whole else None


def read_funnel(folder: pathlib.Path) -> dict[str, Any] | None:
    """Returns the funnel of a result, `None` where it or samples beside it are not as this version writes them."""
    funnel = read_json(folder / FUNNEL_FILE)
    whole = _is(funnel, _FUNNEL) and funnel["steps"] and _are(funnel["steps"], _STEP)
    whole = whole and _are_counts(funnel["licences"]) and _are_counts(funnel["levels"])
    whole = whole and all(read_samples(folder, name) is not None for name in _SAMPLED)
    return funnel if whole and set(funnel["levels"]) <= set(LEVELS) else None


def read_samples(folder: pathlib.Path, name: str) -> list[dict[str, Any]] | None:
    """Returns samples of a result, `None` where they are not as this version writes them.

    Args:
      folder: of the result.
      name: "kept", "removed", "changed" or "found".
    """
    try:
        lines = (folder / "samples" / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
        records = [json.loads(line) for line in lines if line]
    except (OSError, ValueError, RecursionError):
        return None
    return records if _are(records, _SAMPLED[name]) else None


def write_json(file: pathlib.Path, value: dict[str, Any]) -> None:
    """Writes an indented JSON file, whole or not at all."""
    write_atomically(file, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def why_empty(folder: pathlib.Path, funnel: dict[str, Any]) -> str:
    """Returns why a result has no document: what most were rejected for, going by the samples of one operation."""
    steps = funnel["steps"]
    total = sum(step["rejected"] for step in steps)
    if not total:
        return "no document is left, and none was rejected"
    most = max(range(len(steps)), key=lambda n: steps[n]["rejected"])
    removed = read_samples(folder, "removed") or ()
    kinds: dict[str, list[str]] = {}
    for record in removed:
        if record.get("step") == most:  # what stands behind a colon differs from document to document
            kinds.setdefault(record["reason"].split(":")[0], []).append(record["reason"])
    often = f" ({_one_line(max(kinds.values(), key=len)[0])})" if kinds else ""
    rejects = folder / "rejects"
    return f"no document is left: {total:,} rejected, most often by {steps[most]['operation']}{often}; see {rejects}"


def show_funnel(steps: Sequence[dict[str, Any]]) -> str:
    """Returns the funnel as a table of one line an operation."""
    rows = [("level", "operation", *("documents", "bytes", "tokens"), "rejected", "failed", "seconds")]
    rows += map(_shown, steps)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for level, operation, *numbers in rows:  # words begin, numbers end in one column
        cells = [level.ljust(widths[0]), operation.ljust(widths[1]), *map(str.rjust, numbers, widths[2:])]
        lines.append(f"  {'  '.join(cells)}")
    return "\n".join(lines)


def _shown(step: dict[str, Any]) -> tuple[str, ...]:
    return (
        step["level"],
        step["operation"],
        f"{step['documents_in']:,} -> {step['documents_out']:>7,}",
        f"{show_bytes(step['bytes_in'])} -> {show_bytes(step['bytes_out']):>8}",
        f"{show_tokens(step['tokens_in'])} -> {show_tokens(step['tokens_out']):>6}",
        f"{step['rejected']:,}",
        f"{step['failed']:,}",
        f"{step['seconds']:.1f}",
    )


def _by_operation(stages: Sequence[Sequence[dict[str, Any]]], name: str) -> Iterator[dict[str, Any]]:
    before = 0
    for tasks in stages:
        for n, step in enumerate(tasks[0]["steps"]):
            for record in merge_samples([task[name][n] for task in tasks]):
                yield {"operation": step["operation"], "step": before + n, **record}
        before += len(tasks[0]["steps"])


def _write(file: pathlib.Path, records: Any) -> None:
    write_atomically(file, "".join(json_line(record) + "\n" for record in records))


def _one_line(reason: str) -> str:
    return " ".join(reason.split())[:_REASON_CHARACTERS]


def _is(value: Any, fields: dict[str, Any]) -> bool:
    """Whether a value is a table that has all fields, each of its type."""
    return isinstance(value, dict) and all(
        name in value and isinstance(value[name], kind) for name, kind in fields.items()
    )


def _are(values: Sequence[Any], fields: dict[str, Any]) -> bool:
    return all(_is(value, fields) for value in values)


def _are_counts(table: dict[str, Any]) -> bool:
    return all(isinstance(count, int) for count in table.values())


def _whole(value: Any) -> Any:
    return round(value) if isinstance(value, float) else value
