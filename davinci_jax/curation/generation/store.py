"""Raw generations, kept for good: what a request was and what came back, apart from all that is made of it."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from davinci_jax.errors import DataError
from davinci_jax.files import write_atomically


def request_key(payload: Mapping[str, Any]) -> str:
    """Returns what tells a request from every other: a digest of all that the server is given, model included."""
    text = json.dumps(payload, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class GenerationStore:
    """A folder of JSON lines, one generation each: {"key", "label", "request", "response"}.

    Every process that writes has a file of its own and only appends, so there is nothing to lock, on any file system.
    A line is handed to the operating system before its answer is used: a process killed at any moment loses no answer
    that it had received. A line that a kill cut short is left out when the folder is read.

    Args:
      folder: made if it is not there; one for each combination of model, parameters and prompt.
      settings: what the folder is for, written to its settings.json once, for people.

    Raises:
      DataError: the folder cannot be written.
    """

    def __init__(self, folder: str | os.PathLike, settings: Mapping[str, Any] | None = None):
        self.folder = pathlib.Path(folder)
        self._places: dict[bytes, tuple[pathlib.Path, int]] = {}
        self._out = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if settings is not None and not (self.folder / "settings.json").exists():
                text = json.dumps(settings, indent=1, ensure_ascii=False) + "\n"
                write_atomically(self.folder / "settings.json", text)
        except OSError as error:
            raise DataError("store", str(folder), f"cannot be written ({error.strerror})", "name a folder") from error
        for file in sorted(self.folder.glob("*.jsonl")):
            for place, record in _read(file):
                self._places.setdefault(bytes.fromhex(record["key"]), (file, place))

    def __len__(self) -> int:
        return len(self._places)

    def get(self, key: str) -> dict[str, Any] | None:
        """Returns the response that is kept for a request, or `None`."""
        found = self._places.get(bytes.fromhex(key))
        if found is None:
            return None
        with found[0].open("rb") as file:
            file.seek(found[1])
            return json.loads(file.readline())["response"]

    def put(self, key: str, label: str, request: Mapping[str, Any], response: Mapping[str, Any]) -> None:
        """Keeps a response; `label` says for what it was asked.

        Raises:
          DataError: the disk is full or the folder gone; the answer is lost and the run must not go on paying.
        """
        record = {"key": key, "label": label, "request": request, "response": response}
        # Escapes keep lone surrogates, which UTF-8 has no bytes for.
        line = json.dumps(record).encode() + b"\n"
        try:
            if self._out is None:
                file = self.folder / f"{os.getpid()}-{uuid.uuid4().hex[:12]}.jsonl"
                self._out = (file, file.open("xb", buffering=0))
            file, out = self._out
            place = out.tell()
            _write_whole(out, line, place)
        except OSError as error:
            raise DataError(
                "store", str(self.folder), f"cannot keep a generation ({error.strerror})", "make room, then run again"
            ) from error
        self._places[bytes.fromhex(key)] = (file, place)

    def records(self) -> Iterator[dict[str, Any]]:
        """Yields every generation that is kept, in an order that depends on the files alone."""
        for file in sorted(self.folder.glob("*.jsonl")):
            for _, record in _read(file):
                yield record

    def close(self) -> None:
        """Forces what was written to disk."""
        if self._out is not None:
            os.fsync(self._out[1].fileno())
            self._out[1].close()
            self._out = None


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


def _read(file: pathlib.Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (place in bytes, record) of the whole lines of a file."""
    with file.open("rb") as lines:
        place = 0
        for line in lines:
            try:
                record = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                record = None
            if isinstance(record, dict) and {"key", "request", "response"} <= record.keys():
                yield place, record
            place += len(line)
