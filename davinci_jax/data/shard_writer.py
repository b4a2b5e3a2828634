"""Writing one split of a shard set: documents go in one by one, blocks come out, memory stays constant."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from array_record.python import array_record_module

from davinci_jax.data import blocks
from davinci_jax.data.blocks import Block
from davinci_jax.data.manifest import DocumentsEntry, FileEntry, ShardEntry, SplitEntry, file_entry
from davinci_jax.errors import DataError

BLOCK_TOKENS = 4096
SHARD_BYTES = 256 * 2**20  # of tokens before compression
_DOCUMENTS_PER_FILE = 2**20
_FLUSH_BLOCKS = 64
# One record a group, so that a block is read alone; documents are read rarely and compress better together.
_BLOCK_OPTIONS = "group_size:1,zstd:1"
_DOCUMENT_OPTIONS = "group_size:32,zstd:3"


class SplitWriter:
    """Writes the shards, the document table and the document offsets of a split into a folder.

    Args:
      folder: an existing folder.
      split: name of the split; the files' names begin with it.
      dtype: "uint16" or "uint32".
      block_tokens: tokens of a block.
      shard_bytes: bound on the tokens of a shard, in bytes before compression; a shard holds at least one block.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        split: str,
        dtype: str,
        block_tokens: int = BLOCK_TOKENS,
        shard_bytes: int = SHARD_BYTES,
    ):
        self.dtype, self.block_tokens = np.dtype(dtype), block_tokens
        blocks_per_shard = max(1, shard_bytes // (block_tokens * self.dtype.itemsize))
        self._blocks = _RollingFile(folder, f"{split}-{{:05d}}.array_record", _BLOCK_OPTIONS, blocks_per_shard)
        self._table = _RollingFile(
            folder, f"{split}-documents-{{:05d}}.array_record", _DOCUMENT_OPTIONS, _DOCUMENTS_PER_FILE
        )
        self._offsets = _OffsetsFile(folder / f"{split}-offsets.npy")
        self.num_tokens = self.num_documents = 0
        # What is not in a block yet: tokens, and the documents and spans that reach into them.
        self._pending: list[np.ndarray] = []
        self._pending_first = 0
        self._starts, self._spans = [], []

    def add(self, tokens: np.ndarray, spans: np.ndarray, record: Mapping[str, Any]) -> None:
        """Appends a document.

        Args:
          tokens: the document's tokens [n], end of text included, n > 0.
          spans: int [m, 2], ascending positions [start, end) in the document that are masked as targets.
          record: its fields of the document table; position and length are added.
        """
        first, count = self.num_tokens, len(tokens)
        self._offsets.append(first)
        self._table.write(json.dumps({**record, "first_token": first, "num_tokens": count}).encode())
        self._starts.append(first)
        self._spans += (np.asarray(spans, np.int64).reshape(-1, 2) + first).tolist()
        self._pending.append(tokens.astype(self.dtype))
        self.num_tokens, self.num_documents = first + count, self.num_documents + 1
        if self.num_tokens - self._pending_first > _FLUSH_BLOCKS * self.block_tokens:
            self._flush(final=False)

    def close(self) -> SplitEntry:
        """Writes what is left and returns what the split holds."""
        if self.num_tokens:
            self._flush(final=True)
        offsets = self._offsets.close(self.num_tokens)
        shards, first = [], 0
        for entry, count in self._blocks.close():
            tokens = min(count * self.block_tokens, self.num_tokens - first)
            shards.append(ShardEntry(entry.file, entry.bytes, entry.sha256, count, tokens))
            first += tokens
        table = [DocumentsEntry(entry.file, entry.bytes, entry.sha256, count) for entry, count in self._table.close()]
        return SplitEntry(
            tokens=self.num_tokens,
            documents=self.num_documents,
            blocks=sum(shard.blocks for shard in shards),
            shards=tuple(shards),
            documents_files=tuple(table),
            offsets=offsets,
        )

    def _flush(self, final: bool) -> None:
        """Writes the blocks that are full and whose look-ahead token is known; at the end, all that is left."""
        stream = np.concatenate(self._pending)
        if final:
            # The stream's end is a document start, and the look-ahead of the last block is never a label.
            stream = np.append(stream, self.dtype.type(0))
            self._starts.append(self.num_tokens)
        starts, spans = np.array(self._starts, np.int64), np.array(self._spans, np.int64).reshape(-1, 2)
        begin = 0
        while len(stream) - begin > (1 if final else self.block_tokens):
            tokens = stream[begin : begin + self.block_tokens + 1]
            self._blocks.write(blocks.encode(self._block(self._pending_first + begin, tokens, starts, spans)))
            begin += len(tokens) - 1
        if final:
            return
        self._pending, self._pending_first = [stream[begin:]], self._pending_first + begin
        passed = int(np.searchsorted(starts, self._pending_first, side="right")) - 1
        self._starts = self._starts[passed:]
        self._spans = spans[spans[:, 1] > self._pending_first].tolist()

    def _block(self, first: int, tokens: np.ndarray, starts: np.ndarray, spans: np.ndarray) -> Block:
        last = first + len(tokens) - 1  # the look-ahead token
        low, high = np.searchsorted(starts, first), np.searchsorted(starts, last, side="right")
        inside = spans[(spans[:, 1] > first) & (spans[:, 0] <= last)]
        return Block(
            index=first // self.block_tokens,
            tokens=tokens,
            starts=starts[low:high] - first,
            spans=np.clip(inside, first, last + 1) - first,
        )


class _RollingFile:
    """ArrayRecord files of at most `limit` records, each under a temporary name until it is whole."""

    def __init__(self, folder: pathlib.Path, pattern: str, options: str, limit: int):
        self._folder, self._pattern, self._options, self._limit = folder, pattern, options, limit
        self._done: list[tuple[FileEntry, int]] = []
        self._writer: array_record_module.ArrayRecordWriter | None = None
        self._count = 0

    def write(self, record: bytes) -> None:
        if self._count == self._limit:
            self._finish()
        with self._failures_told():
            if self._writer is None:
                self._writer = array_record_module.ArrayRecordWriter(f"{self._file}.tmp", self._options)
            self._writer.write(record)
        self._count += 1

    def close(self) -> list[tuple[FileEntry, int]]:
        """Returns each file with its number of records."""
        if self._count:
            self._finish()
        return self._done

    @property
    def _file(self) -> pathlib.Path:
        return self._folder / self._pattern.format(len(self._done))

    @contextlib.contextmanager
    def _failures_told(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # what array_record raises when the disk is full
            raise DataError(
                str(self._file),
                None,
                f"cannot be written ({str(error).split(';')[0]})",
                "free the disk and run the same command again",
            ) from error

    def _finish(self) -> None:
        with self._failures_told():
            self._writer.close()
        self._done.append((_seal(self._file), self._count))
        self._writer, self._count = None, 0


class _OffsetsFile:
    """A .npy file of int64 that grows: its header is written again when its length is known."""

    def __init__(self, file: pathlib.Path):
        self._file, self._count = file, 0
        self._out = pathlib.Path(f"{file}.tmp").open("wb")  # noqa: SIM115
        self._header_bytes = self._write_header()

    def append(self, value: int) -> None:
        self._out.write(value.to_bytes(8, "little"))
        self._count += 1

    def close(self, value: int) -> FileEntry:
        """Appends the last value and returns the whole file."""
        self.append(value)
        self._out.seek(0)
        if self._write_header() != self._header_bytes:
            raise AssertionError("numpy changed the length of the .npy header with the length of the array")
        self._out.close()
        return _seal(self._file)

    def _write_header(self) -> int:
        # numpy leaves room in the header for the first dimension to grow.
        header = {"descr": "<i8", "fortran_order": False, "shape": (self._count,)}
        np.lib.format.write_array_header_1_0(self._out, header)
        return self._out.tell()


def _seal(file: pathlib.Path) -> FileEntry:
    """Brings a finished file to the disk and under its name; returns its size and checksum."""
    temporary = pathlib.Path(f"{file}.tmp")
    with temporary.open("rb+") as out:
        os.fsync(out.fileno())
    os.replace(temporary, file)
    return file_entry(file)
