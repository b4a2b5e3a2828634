"""Labels of texts, given by a person or a model, and how they are divided into what trains, calibrates and tests."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from davinci_jax.errors import DataError

PARTS = ("train", "calibration", "heldout")
# Of ten texts eight train, one sets the temperature, one measures.
_BORDERS = (8, 9, 10)


@dataclasses.dataclass(frozen=True)
class LabelledText:
    """A text with its label.

    Attributes:
      text: the text.
      label: its class, such as "3" or "mathematics".
      group: texts of one group go to the same part; the text itself where there is none.
    """

    text: str
    label: str
    group: str = ""

    @property
    def part(self) -> str:
        """Which of `PARTS` it belongs to: a function of its group alone, so it stays there when texts are added."""
        digest = hashlib.sha256((self.group or self.text).encode("utf-8", "surrogatepass")).digest()
        draw = int.from_bytes(digest[:8], "big") % _BORDERS[-1]
        return next(part for part, border in zip(PARTS, _BORDERS, strict=True) if draw < border)


def read_labels(path: str | os.PathLike, field: str = "label") -> list[LabelledText]:
    """Reads labels from JSON lines, or from the documents that the operation `annotate` leaves.

    A line is an object with "text" and the label, which stands in it or in its "metadata" under the name `field`: a
    text or an integer. "group", or else "id", keeps texts of one origin together.

    Args:
      path: a .jsonl or .jsonl.gz file, or a folder of them.
      field: name of the label.

    Raises:
      DataError: no file, or a line that is no labelled text, told by file and line.
    """
    path = pathlib.Path(path)
    files = sorted(path.rglob("*.jsonl*")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise DataError("labels", str(path), "is no JSONL file and no folder of them", "give a file of labelled texts")
    return [label for file in files for label in _read(file, field)]


def _read(file: pathlib.Path, field: str) -> Iterator[LabelledText]:
    with gzip.open(file, "rb") if file.name.endswith(".gz") else file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _parse(line, field, f"{file}:{number}")


def _parse(line: bytes, field: str, place: str) -> LabelledText:
    try:
        record: Any = json.loads(line)
    except ValueError as error:
        raise DataError("labels", place, f"is not JSON ({error})", "write one JSON object a line") from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise DataError("labels", place, 'has no "text"', 'write {"text": ..., "label": ...}')
    metadata = record.get("metadata")
    label = record.get(field, metadata.get(field) if isinstance(metadata, dict) else None)
    if isinstance(label, bool) or not isinstance(label, (str, int)) or label == "":
        raise DataError("labels", place, f"has no label {field!r}", "give a text or an integer")
    group = record.get("group") or record.get("id") or ""
    return LabelledText(record["text"], str(label), str(group))


def divide(labels: Sequence[LabelledText]) -> Mapping[str, list[LabelledText]]:
    """Returns the texts of each of `PARTS`; raises `DataError` where a part is too small to learn or measure from."""
    parts = {part: [label for label in labels if label.part == part] for part in PARTS}
    classes = {label.label for label in labels}
    if len(classes) < 2:
        raise DataError("labels", sorted(classes), "is fewer than two classes", "label texts of each class")
    missing = classes - {label.label for label in parts["train"]}
    if missing:
        raise DataError("labels", sorted(missing), "has no text to train from", "label more texts of it")
    if min(map(len, parts.values())) < len(classes):
        raise DataError(
            "labels", len(labels), "is too few texts to train, calibrate and measure", "label some hundreds"
        )
    return parts
