"""Raw generations, kept for good: what a request was and what came back, apart from all that is made of it."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import uuid
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from davinci_jax.errors import DataError
from davinci_jax.files import write_atomically

# An entry of a file of keys: the request's key, then the first byte of its line.
_ENTRY = np.dtype([("key", ">u8"), ("rest", "V24"), ("place", ">u8")])


def request_key(payload: Mapping[str, Any]) -> str:
    """Returns what tells a request from every other: a digest of all that the server is given, model included."""
    text = json.dumps(payload, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class _Out(NamedTuple):
    """The files that a process appends to: answers, and where each begins."""

    file: pathlib.Path
    lines: BinaryIO
    keys: BinaryIO


class _Seen(NamedTuple):
    """How far a file of answers has been read.

    Attributes:
      number: of the file in its store.
      size: of the file.
      entries: of its keys.
      last: where its last answer begins.
    """

    number: int
    size: int = -1
    entries: int = 0
    last: int = -1


class GenerationStore:
    """A folder of JSON lines, one generation each: {"key", "label", "request", "response"}.

    Every process that writes has a file of its own and only appends, so there is nothing to lock, on any file system.
    A line is handed to the operating system before its answer is used: a process killed at any moment loses no answer
    that it had received. A line that a kill cut short is left out when the folder is read.

    All tasks of an operation share the folder, since a document may come to another task in the next run. So that each
    can look up what any of them was told, a process keeps 20 bytes in memory for an answer of others, and finds those
    in a file of keys beside each file of answers; what a kill kept out of the keys is read from the answers.

    Args:
      folder: made if it is not there; one for each combination of model, parameters and prompt.
      settings: what the folder is for, written to its settings.json once, for people.

    Raises:
      DataError: the folder cannot be written.
    """

    def __init__(self, folder: str | os.PathLike, settings: Mapping[str, Any] | None = None):
        self.folder = pathlib.Path(folder)
        self._out: _Out | None = None
        self._own: dict[bytes, tuple[pathlib.Path, int]] = {}
        self._own_files: set[pathlib.Path] = set()
        self._seen: dict[pathlib.Path, _Seen] = {}
        # Of the answers of others, in the order of the first: 8 bytes of the key, number of the file, place in it.
        self._columns = np.array([], np.uint64), np.array([], np.uint32), np.array([], np.int64)
        self._files: list[pathlib.Path] = []
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if settings is not None and not (self.folder / "settings.json").exists():
                text = json.dumps(settings, indent=1, ensure_ascii=False) + "\n"
                write_atomically(self.folder / "settings.json", text)
        except OSError as error:
            raise DataError("store", str(folder), f"cannot be written ({error.strerror})", "name a folder") from error
        self.refresh()

    def refresh(self) -> None:
        """Reads what other processes have kept since."""
        found = [self._columns]
        for file in sorted(self.folder.glob("*.jsonl")):
            seen = self._seen.get(file, _Seen(len(self._seen)))
            if file not in self._own_files and file.stat().st_size != seen.size:
                keys, places, self._seen[file] = _news(file, seen)
                found.append((keys, np.full(len(keys), seen.number, np.uint32), places))
        if len(found) > 1:
            keys, numbers, places = map(np.concatenate, zip(*found, strict=True))
            order = np.argsort(keys, kind="stable")
            self._columns, self._files = (keys[order], numbers[order], places[order]), list(self._seen)

    def get(self, key: str) -> dict[str, Any] | None:
        """Returns the response that is kept for a request, or `None`."""
        for file, place in self._candidates(bytes.fromhex(key)):
            with file.open("rb") as lines:
                lines.seek(place)
                record = _record(lines.readline())
            # A crash of the machine may leave a key without its answer, and eight bytes are not the whole key.
            if record is not None and record["key"] == key:
                return record["response"]
        return None

    def put(self, key: str, label: str, request: Mapping[str, Any], response: Mapping[str, Any]) -> None:
        """Keeps a response; `label` says for what it was asked.

        Raises:
          DataError: the disk is full or the folder gone; the answer is lost and the run must not go on paying.
        """
        record = {"key": key, "label": label, "request": request, "response": response}
        # Escapes keep lone surrogates, which UTF-8 has no bytes for.
        line = json.dumps(record).encode() + b"\n"
        try:
            file, lines, keys = self._out = self._out or self._open_own()
            place = lines.tell()
            _write_whole(lines, line, place)
            _write_whole(keys, bytes.fromhex(key) + place.to_bytes(8), keys.tell())
        except OSError as error:
            self._out = None  # an answer without its key is found if it is the last of its file
            raise DataError(
                "store", str(self.folder), f"cannot keep a generation ({error.strerror})", "make room, then run again"
            ) from error
        self._own[bytes.fromhex(key)] = (file, place)

    def records(self) -> Iterator[dict[str, Any]]:
        """Yields every generation that is kept, in an order that depends on the files alone."""
        for file in sorted(self.folder.glob("*.jsonl")):
            for _, record in _read(file):
                yield record

    def close(self) -> None:
        """Forces what was written to disk."""
        if self._out is not None:
            for file in (self._out.lines, self._out.keys):
                os.fsync(file.fileno())
                file.close()
            self._out = None

    def _open_own(self) -> _Out:
        file = self.folder / f"{os.getpid()}-{uuid.uuid4().hex[:12]}.jsonl"
        self._own_files.add(file)
        return _Out(file, file.open("xb", buffering=0), _keys_of(file).open("xb", buffering=0))

    def _candidates(self, key: bytes) -> Iterator[tuple[pathlib.Path, int]]:
        """Yields (file, place) where the answer to a request may lie."""
        if key in self._own:
            yield self._own[key]
        (keys, numbers, places), start = self._columns, np.uint64(_begin(key))
        n = int(np.searchsorted(keys, start))
        while n < len(keys) and keys[n] == start:
            yield self._files[numbers[n]], int(places[n])
            n += 1


def _write_whole(out, line: bytes, place: int) -> None:
    """Appends a line; takes back what a full disk let through of it."""
    done = 0
    try:
        while done < len(line):
            done += out.write(line[done:])
    except OSError:
        out.truncate(place)
        out.seek(place)
        raise


def _keys_of(file: pathlib.Path) -> pathlib.Path:
    return file.with_suffix(".keys")


def _begin(key: bytes) -> int:
    return int.from_bytes(key[:8])


def _news(file: pathlib.Path, seen: _Seen) -> tuple[np.ndarray, np.ndarray, _Seen]:
    """Returns (beginnings of the keys, places, how far it is read now) of what was appended to a file of answers."""
    size, entries = file.stat().st_size, _entries(file, seen.entries)
    count = seen.entries + len(entries)
    places = entries["place"].astype(np.int64)
    entries, places = entries[places > seen.last], places[places > seen.last]
    last = int(places[-1]) if len(places) else seen.last
    # The last answers may have been kept without their keys, or before there were any.
    more = [(_begin(bytes.fromhex(record["key"])), n) for n, record in _read(file, max(last, 0)) if n > last]
    keys = np.concatenate([entries["key"].astype(np.uint64), np.array([key for key, _ in more], np.uint64)])
    places = np.concatenate([places, np.array([place for _, place in more], np.int64)])
    return keys, places, _Seen(seen.number, size, count, int(places[-1]) if len(places) else last)


def _entries(file: pathlib.Path, start: int) -> np.ndarray:
    """Returns the whole entries of the keys of a file of answers from a number on."""
    keys = _keys_of(file)
    if not keys.exists():
        return np.empty(0, _ENTRY)
    with keys.open("rb") as entries:
        entries.seek(start * _ENTRY.itemsize)
        found = entries.read()
    return np.frombuffer(found, _ENTRY, len(found) // _ENTRY.itemsize)


def _read(file: pathlib.Path, place: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (place in bytes, record) of the whole lines of a file from a place on."""
    with file.open("rb") as lines:
        lines.seek(place)
        for line in lines:
            record = _record(line)
            if record is not None:
                yield place, record
            place += len(line)


def _record(line: bytes) -> dict[str, Any] | None:
    """Returns what a line holds, `None` if it is cut short."""
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return record if isinstance(record, dict) and {"key", "request", "response"} <= record.keys() else None
