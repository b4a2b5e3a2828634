"""Reading a shard set: blocks of the token stream and records of the documents, by position."""

from __future__ import annotations

import functools
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from davinci_jax.data import blocks
from davinci_jax.data.blocks import Block
from davinci_jax.data.manifest import FileEntry, Manifest, sha256_of
from davinci_jax.data.records import READERS, FileKey, damaged
from davinci_jax.errors import DataError
from davinci_jax.experiment import Source


class ShardSet:
    """One split of a shard set. Opens no shard before it is read; safe to share between threads and to pickle.

    Args:
      folder: folder of the shard set.
      split: "train" or "heldout".

    Raises:
      DataError: no shard set, a damaged manifest, or a file that is missing or has another size than the manifest's.
    """

    def __init__(self, folder: str | os.PathLike[str], split: str = "train"):
        self.folder = pathlib.Path(folder)
        self.split = split
        self.manifest = Manifest.load(self.folder)
        self.entry = self.manifest.splits[split]
        self.fingerprint = self.manifest.fingerprint
        found = _stat_all(self.folder)
        self._shards = [_checked(self.folder, entry, found) for entry in self.entry.shards]
        self._documents = [_checked(self.folder, entry, found) for entry in self.entry.documents_files]
        _checked(self.folder, self.entry.offsets, found)
        self._first_blocks = np.cumsum([0, *(shard.blocks for shard in self.entry.shards)])

    def __reduce__(self):
        return type(self), (self.folder, self.split)

    @property
    def num_tokens(self) -> int:
        """Tokens of the split."""
        return self.entry.tokens

    @property
    def block_tokens(self) -> int:
        """Tokens of every block but the last."""
        return self.manifest.block_tokens

    def file_of(self, token: int) -> pathlib.Path:
        """Returns the shard that holds a token, by its position in the stream."""
        block = token // self.block_tokens
        return pathlib.Path(self._shards[int(np.searchsorted(self._first_blocks, block, side="right")) - 1].path)

    def read_blocks(self, indices: np.ndarray) -> list[Block]:
        """Returns blocks by position in the stream, int64 [n], ascending and without repeats.

        Raises:
          DataError: a damaged shard; names the file and the record.
        """
        shards = np.searchsorted(self._first_blocks, indices, side="right") - 1
        cuts = np.flatnonzero(np.diff(shards, prepend=-1, append=len(self._shards)))
        found = []
        for begin, end in itertools.pairwise(cuts):
            shard = int(shards[begin])
            positions = (indices[begin:end] - self._first_blocks[shard]).tolist()
            records = READERS.read(self._shards[shard], self.entry.shards[shard].blocks, positions)
            found += [
                self._decode(shard, position, record) for position, record in zip(positions, records, strict=True)
            ]
        return found

    def _decode(self, shard: int, position: int, record: bytes) -> Block:
        path = self._shards[shard].path
        try:
            block = blocks.decode(record)
        except ValueError as error:
            raise damaged(path, position, str(error)) from error
        expected = int(self._first_blocks[shard]) + position
        if block.index != expected:
            raise damaged(path, position, f"holds block {block.index} where block {expected} belongs")
        tokens = min(self.block_tokens, self.num_tokens - expected * self.block_tokens)
        if block.num_tokens != tokens:
            raise damaged(path, position, f"holds {block.num_tokens} tokens where {tokens} belong")
        return block

    @functools.cached_property
    def document_offsets(self) -> np.ndarray:
        """Position of each document's first token, then the number of tokens: int64 [documents + 1], on disk."""
        file = self.folder / self.entry.offsets.file
        try:
            offsets = np.load(file, mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            raise damaged(str(file), None, f"is damaged ({error})") from error
        if offsets.shape != (self.entry.documents + 1,) or offsets.dtype != np.int64:
            raise damaged(str(file), None, f"holds {offsets.dtype} {offsets.shape}, not int64 of every document")
        return offsets

    def document_records(self, ordinals: Sequence[int]) -> list[dict[str, Any]]:
        """Returns id, first_token, num_tokens, level, lineage and any licence of documents by position in the split.

        Raises:
          DataError: a damaged document table.
        """
        firsts = np.cumsum([0, *(entry.documents for entry in self.entry.documents_files)])
        found = []
        for ordinal in ordinals:
            number = int(np.searchsorted(firsts, ordinal, side="right")) - 1
            position = int(ordinal - firsts[number])
            key = self._documents[number]
            record = json.loads(READERS.read(key, self.entry.documents_files[number].documents, [position])[0])
            first, end = (int(x) for x in self.document_offsets[ordinal : ordinal + 2])
            if (record["first_token"], record["num_tokens"]) != (first, end - first):
                raise damaged(
                    str(self.folder / self.entry.offsets.file), None, f"does not match record {position} of {key.path}"
                )
            found.append(record)
        return found

    def require(self, tokenizer_fingerprint: str, vocab_size: int) -> None:
        """Raises `DataError` unless the tokens are of this tokenizer and fit a model with this vocabulary."""
        tokenizer = self.manifest.tokenizer
        if tokenizer.fingerprint != tokenizer_fingerprint:
            raise DataError(
                str(self.folder),
                None,
                f"was made with another tokenizer ({tokenizer.fingerprint}, {tokenizer.vocab_size} ids; the run has "
                f"{tokenizer_fingerprint})",
                "name that tokenizer in data.tokenizer, or remove the folder and run `davinci shard`",
            )
        if tokenizer.vocab_size > vocab_size:
            raise DataError(
                "model.vocab_size",
                vocab_size,
                f"is below the {tokenizer.vocab_size} ids of the tokens in {self.folder}",
                f"use {tokenizer.vocab_size} or more",
            )

    def require_labels(self, source: Source) -> None:
        """Raises `DataError` unless the set was made for the source's domain and level."""
        for name in ("domain", "level"):
            made, wanted = getattr(self.manifest, name), getattr(source, name)
            if made != wanted:
                raise DataError(
                    f"data.sources[{source.name}].{name}",
                    wanted,
                    f"is not what the shards in {self.folder} were made for, {made!r}",
                    "give the source that value, or remove the folder and run `davinci shard`",
                )

    def verify(self, progress: Callable[[int], None] | None = None) -> None:
        """Recomputes the checksum of every file of the split; raises `DataError` that names the first bad one.

        Args:
          progress: is given the bytes of each file that was checked.
        """
        for entry in self.entry.files:
            self.verify_file(entry)
            if progress is not None:
                progress(entry.bytes)

    def verify_file(self, entry: FileEntry) -> None:
        """Recomputes the checksum of one file; raises `DataError` if it differs from the manifest's."""
        found = sha256_of(self.folder / entry.file)
        if found != entry.sha256:
            raise damaged(
                str(self.folder / entry.file),
                None,
                f"was altered: its SHA-256 is {found[:12]}..., the manifest's {entry.sha256[:12]}...",
            )


def _stat_all(folder: pathlib.Path) -> dict[str, os.stat_result]:
    with os.scandir(folder) as files:
        return {file.name: file.stat() for file in files if file.is_file()}  # a link to nothing is a missing file


def _checked(folder: pathlib.Path, entry: FileEntry, found: dict[str, os.stat_result]) -> FileKey:
    """Returns the key of a file; raises `DataError` unless it is there with the size of the manifest."""
    path = str(folder / entry.file)
    if entry.file not in found:
        raise damaged(path, None, "is missing")
    stat = found[entry.file]
    if stat.st_size != entry.bytes:
        kind = "truncated" if stat.st_size < entry.bytes else "altered"
        raise damaged(path, None, f"is {kind}: {stat.st_size} bytes of {entry.bytes}")
    return FileKey(path, stat.st_size, stat.st_mtime_ns)
