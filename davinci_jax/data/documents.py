"""Reading documents files for sharding: what cannot be used is rejected with its file, line and reason."""

from __future__ import annotations

import gzip
import hashlib
import json
import operator
import pathlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from davinci_jax.errors import DataError
from davinci_jax.experiment.data import LEVELS


class Document(NamedTuple):
    """A document as its line in a JSONL file tells it.

    Attributes:
      id: its name, unique in the source.
      text: the text, not empty.
      text_bytes: its UTF-8 bytes.
      group: documents of one group are held out together; the id where the line names none.
      level: Darwin level, L0 to L9.
      lineage: the operations that made it, oldest first.
      licence: SPDX expression, `None` where the line names none.
      questions: int64 [m, 2], characters [start, end) that are no targets when a source trains on answers only.
      file, line: where it was read, the line counted from 1.
    """

    id: str
    text: str
    text_bytes: int
    group: str
    level: str
    lineage: list[Any]
    licence: str | None
    questions: np.ndarray
    file: str
    line: int


class Reject(NamedTuple):
    """A line that is no document: where it stands, the document's id where that is known, and why."""

    file: str
    line: int
    id: str | None
    reason: str


class DocumentReader:
    """Iterates over the documents of files, in order.

    Args:
      files: .jsonl and .jsonl.gz files.
      folder: names in rejects are relative to it.
      level: of documents that name none.
      on_reject: is given every line that is no document.

    Attributes:
      bytes_read: how far the files have been read, compressed bytes as they lie on disk.
    """

    def __init__(
        self, files: Sequence[pathlib.Path], folder: pathlib.Path, level: str, on_reject: Callable[[Reject], None]
    ):
        self._files, self._folder, self._level, self._on_reject = files, folder, level, on_reject
        self._bytes_done = 0
        self._raw: BinaryIO | None = None

    @property
    def bytes_read(self) -> int:
        return self._bytes_done + (self._raw.tell() if self._raw is not None else 0)

    def __iter__(self) -> Iterator[Document]:
        """Yields documents; raises `DataError` on a compressed file that is damaged or cut off."""
        for file in self._files:
            name = str(file.relative_to(self._folder))
            with file.open("rb") as raw:
                self._raw = raw
                for number, line in _lines(file, raw):
                    try:
                        document = _parse(line, name, number, self._level)
                    except _Unfit as unfit:
                        self._on_reject(Reject(name, number, unfit.id, unfit.reason))
                    else:
                        if document is not None:
                            yield document
                self._bytes_done += raw.seek(0, 2)
                self._raw = None


class SeenIds:
    """A set of ids, 8 bytes each: sorted arrays of hashes, merged when two have like lengths.

    Two of n ids share a hash with probability below n^2 / 2^65; the second would be taken for a repeat.
    """

    def __init__(self):
        self._sorted: list[np.ndarray] = []

    def add(self, ids: Sequence[str]) -> np.ndarray:
        """Adds ids; returns bool [n]: whether each was new."""
        hashes = np.array([_hash64(name) for name in ids], np.uint64)
        distinct, first = np.unique(hashes, return_index=True)
        new = np.ones(len(distinct), bool)
        for known in self._sorted:
            at = np.minimum(np.searchsorted(known, distinct), len(known) - 1)
            new &= known[at] != distinct
        added = distinct[new]
        while self._sorted and len(self._sorted[-1]) <= 2 * len(added):
            added = np.sort(np.concatenate([self._sorted.pop(), added]))
        if len(added):
            self._sorted.append(added)
        is_new = np.zeros(len(hashes), bool)
        is_new[first[new]] = True
        return is_new


def is_held_out(group: str, share: float) -> bool:
    """Whether documents of a group belong to the held-out split: a hash of its name, the same for ever."""
    return _hash64(group) < share * 2.0**64


def _hash64(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, person=b"davinci-document").digest())


class _Unfit(Exception):
    def __init__(self, reason: str, id: str | None = None):
        super().__init__(reason)
        self.reason, self.id = reason, id


def _lines(file: pathlib.Path, raw: BinaryIO) -> Iterator[tuple[int, bytes]]:
    number = 0
    try:
        for number, line in enumerate(gzip.GzipFile(fileobj=raw) if file.name.endswith(".gz") else raw, 1):
            yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{file}, line {number + 1}", None, f"is damaged or cut off ({error})", "write the file again"
        ) from error


def _parse(line: bytes, file: str, number: int, level: str) -> Document | None:
    """Returns the document of a line, `None` for a blank line; raises `_Unfit`."""
    if not line.strip():
        return None
    try:
        fields = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise _Unfit("not UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise _Unfit("not JSON") from error
    if not isinstance(fields, dict):
        raise _Unfit("not a JSON object")
    name, text = fields.get("id"), fields.get("text")
    if not isinstance(name, str) or not name:
        raise _Unfit("no id")
    if _utf8_length(name) is None:
        raise _Unfit("not UTF-8")
    if not isinstance(text, str):
        raise _Unfit("no text", name)
    if not text.strip():
        raise _Unfit("empty", name)
    group, own_level = fields.get("group") or name, fields.get("level") or level
    text_bytes = _utf8_length(text)
    if text_bytes is None:
        raise _Unfit("not UTF-8", name)
    if not isinstance(group, str) or _utf8_length(group) is None:
        raise _Unfit("bad group", name)
    if own_level not in LEVELS:
        raise _Unfit("no Darwin level", name)
    questions = _questions(fields.get("questions") or (), len(text))
    if questions is None:
        raise _Unfit("bad question spans", name)
    lineage = fields.get("lineage") or []
    lineage = lineage if isinstance(lineage, list) else [lineage]
    licence = fields.get("licence")
    if licence is not None and (not isinstance(licence, str) or _utf8_length(licence) is None):
        raise _Unfit("bad licence", name)
    return Document(name, text, text_bytes, group, own_level, lineage, licence, questions, file, number)


def _utf8_length(text: str) -> int | None:
    """Returns the UTF-8 bytes of a string, `None` if it cannot be written: JSON may hold half of a surrogate pair."""
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        return None


def _questions(given: object, length: int) -> np.ndarray | None:
    """Returns question spans sorted and merged, int64 [m, 2], or `None` if they are no spans of the text."""
    try:
        spans = sorted((operator.index(start), operator.index(end)) for start, end in given)
    except (TypeError, ValueError):
        return None
    merged: list[list[int]] = []
    for start, end in spans:
        if not 0 <= start <= end <= length:
            return None
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(end, merged[-1][1])
        elif start < end:
            merged.append([start, end])
    return np.array(merged, np.int64).reshape(-1, 2)
