"""Reading ArrayRecord files: many files under a limit of open ones, and damage told in one line."""

from __future__ import annotations

import collections
import resource
import threading
from collections.abc import Sequence
from typing import NamedTuple

from array_record.python import array_record_module

from davinci_jax.errors import DataError

# No read-ahead: rows are drawn at random.
_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_BUFFER_BYTES = 32768
_MOST_OPEN = 1024

# What array_record raises on a file that it cannot read.
_DAMAGE = (RuntimeError, ValueError, IndexError, OSError)


class FileKey(NamedTuple):
    """A file as it was when its set was opened: path, size in bytes, time of change in ns."""

    path: str
    size: int
    changed: int


class ReaderCache:
    """The readers used last, shared by all threads of the process.

    A reader keeps a file descriptor and the file's index open, so only some are kept: a quarter of the descriptors
    that the process may have, at most 1024. One that falls out is closed when the last thread lets go of it.
    """

    def __init__(self, capacity: int | None = None):
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self.capacity = capacity or max(8, min(_MOST_OPEN, limit // 4))
        self._readers: collections.OrderedDict[FileKey, array_record_module.ArrayRecordReader] = (
            collections.OrderedDict()
        )
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._readers)

    def get(self, key: FileKey, num_records: int) -> array_record_module.ArrayRecordReader:
        """Returns the reader of a file; raises `DataError` if it cannot be opened or has other than `num_records`."""
        with self._lock:
            reader = self._readers.get(key)
            if reader is not None:
                self._readers.move_to_end(key)
                return reader
        reader = _open(key.path, num_records)
        with self._lock:
            reader = self._readers.setdefault(key, reader)
            self._readers.move_to_end(key)
            while len(self._readers) > self.capacity:
                self._readers.popitem(last=False)
        return reader

    def read(self, key: FileKey, num_records: int, positions: Sequence[int]) -> list[bytes]:
        """Returns records of a file by position, in the order asked for.

        Raises:
          DataError: the file is missing or damaged; names it and the record.
        """
        reader = self.get(key, num_records)
        try:
            # Takes all positions at once: array_record spreads them over its threads.
            return reader.read(positions)
        except _DAMAGE:
            for position in positions:
                _read_one(reader, key.path, position)
            raise


READERS = ReaderCache()


def _open(path: str, num_records: int) -> array_record_module.ArrayRecordReader:
    try:
        reader = array_record_module.ArrayRecordReader(path, options=_OPTIONS, file_reader_buffer_size=_BUFFER_BYTES)
        found = reader.num_records()
    except _DAMAGE as error:
        raise damaged(path, None, _reason(error)) from error
    if found != num_records:
        raise damaged(path, None, f"holds {found} records where the manifest counts {num_records}")
    return reader


def _read_one(reader: array_record_module.ArrayRecordReader, path: str, position: int) -> None:
    try:
        reader.read([position])
    except _DAMAGE as error:
        raise damaged(path, position, _reason(error)) from error


def _reason(error: Exception) -> str:
    return f"cannot be read ({str(error).splitlines()[0].split(';')[0][:160]})"


def damaged(path: str, record: int | None, problem: str) -> DataError:
    """Returns the error for a file of a shard set that cannot be used."""
    where = path if record is None else f"{path}, record {record}"
    return DataError(where, None, problem, "restore the file from a copy, or remove its folder and run `davinci shard`")
