"""Documents: what curation writes and `davinci shard` reads, one JSON object a line."""

from __future__ import annotations

import base64
import dataclasses
import gzip
import io
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from davinci_jax.errors import DataError
from davinci_jax.experiment import DataConfig, Source

BUILTIN_SCHEME = "python-installation:"
CURATED = "curated"  # folder below the root of a curation, one folder a source in it
SUFFIXES = (".jsonl", ".jsonl.gz")


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """One document on its way through the levels.

    Attributes:
      id: stable name, unique in its source; never a path of this machine.
      text: the text; empty until an extraction has read `raw`.
      group: documents cut from the same material, such as a file and the docstrings in it, share a group;
        held-out documents are chosen by group, or the held-out text of one would be trained on in another.
      level: the highest Darwin level among the operations that made it.
      lineage: the operations, oldest first: name, level, parameters.
      licence: SPDX expression where it is known.
      questions: characters [start, end) that are a question, not an answer.
      parts: (name, start, end) of the pieces that an extraction joined, in characters.
      metadata: what is known of it as JSON values: url, path, language, time, title, scores.
      raw: the bytes as acquired; dropped by the extraction that reads them.
    """

    id: str
    text: str = ""
    group: str = ""
    level: str = "L0"
    lineage: tuple[dict[str, Any], ...] = ()
    licence: str | None = None
    questions: tuple[tuple[int, int], ...] = ()
    parts: tuple[tuple[str, int, int], ...] = ()
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    raw: bytes = b""

    @property
    def key(self) -> str:
        """What tells duplicates: the text without the names that an extraction put between its parts."""
        return "\n\n".join(self.text[start:end] for _, start, end in self.parts) if self.parts else self.text

    @property
    def size(self) -> int:
        """UTF-8 bytes of the text, or raw bytes before there is one."""
        return len(self.text.encode()) if self.text else len(self.raw)

    def with_text(self, text: str, **changes: Any) -> Document:
        """Returns the document with another text, without the raw bytes and the spans that belonged to the old one."""
        return dataclasses.replace(self, **{"text": text, "raw": b"", "questions": (), "parts": (), **changes})

    def to_json(self) -> str:
        """Returns the line that stands for the document in a documents file; `from_json` gives the same back.

        A number that is none (NaN, infinity), such as a gap in a column of Parquet, becomes null.
        """
        fields: dict[str, Any] = {"id": self.id, "text": self.text, "level": self.level, "group": self.group}
        if self.licence:
            fields["licence"] = self.licence
        for name in ("questions", "parts"):
            if getattr(self, name):
                fields[name] = [list(span) for span in getattr(self, name)]
        if self.metadata:
            fields["metadata"] = dict(self.metadata)
        if self.raw:
            fields["raw"] = base64.b64encode(self.raw).decode()
        fields["lineage"] = list(self.lineage)
        return json_line(fields)

    @classmethod
    def from_json(cls, line: str) -> Document:
        """Returns the document that `to_json` wrote."""
        fields = json.loads(line)
        fields["lineage"] = tuple(fields["lineage"])
        for name in ("questions", "parts"):
            if name in fields:
                fields[name] = tuple(tuple(span) for span in fields[name])
        if "raw" in fields:
            fields["raw"] = base64.b64decode(fields["raw"])
        return cls(**fields)


def json_line(value: Any, default: Callable[[Any], Any] | None = None) -> str:
    """Returns a value as JSON that every reader takes: NaN and infinity, for which it has no word, become null.

    Raises:
      TypeError, ValueError, RecursionError: it holds what is no JSON, unless `default` makes something of it.
    """
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, default=default)
    except ValueError:
        finite = json.loads(json.dumps(value, default=default), parse_constant=lambda name: None)
        return json.dumps(finite, ensure_ascii=False)


def documents_path(data: DataConfig, source: Source) -> pathlib.Path:
    """Returns the file or folder that holds the documents of a source, whether or not it is there yet."""
    root = pathlib.Path(data.root)
    if source.documents is None:
        return root / "documents" / source.name
    if source.documents.startswith(BUILTIN_SCHEME):
        return root / CURATED / source.name / "current" / "documents"
    return root / source.documents


def document_files(data: DataConfig, source: Source) -> list[pathlib.Path]:
    """Returns the documents files of a source in a fixed order; raises `DataError` if there are none."""
    path = documents_path(data, source)
    if path.is_file():
        return [path]
    files = sorted(file for file in path.rglob("*") if file.name.endswith(SUFFIXES) and file.is_file())
    if not files:
        raise DataError(
            f"data.sources[{source.name}].documents",
            str(path),
            "holds no .jsonl or .jsonl.gz file" if path.exists() else "does not exist",
            "put documents there (docs/data.md), or run `davinci curate` for a built-in source",
        )
    return files


class GzipText(io.TextIOWrapper):
    """A compressed text file whose bytes depend on what is written alone; forced to disk when it is closed.

    Half of a surrogate pair, which UTF-8 cannot hold and JSON may, becomes a question mark.
    """

    def __init__(self, file: pathlib.Path):
        self._raw = file.open("wb")
        compressed = gzip.GzipFile(filename="", mode="wb", compresslevel=1, fileobj=self._raw, mtime=0)
        super().__init__(compressed, encoding="utf-8", errors="replace", newline="\n")

    def close(self) -> None:
        if self._raw.closed:
            return
        try:
            super().close()
            self._raw.flush()
            os.fsync(self._raw.fileno())
        finally:
            self._raw.close()


def read_documents(file: pathlib.Path) -> Iterator[Document]:
    """Yields the documents that curation wrote into a compressed file."""
    with gzip.open(file, "rt", encoding="utf-8", newline="\n") as lines:
        for line in lines:
            yield Document.from_json(line)
