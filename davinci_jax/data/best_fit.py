"""Best-fit packing: documents put together in rows so that few are cut (Ding et al. 2024, arXiv 2404.10830).

A document longer than L is cut every L tokens. The pieces of a window of documents are then placed, the longest
first, each into the fullest row that still has room for it ("best-fit decreasing"). The plan depends on the document
lengths and L alone; it is made once, lies beside the shards as memory-mapped arrays and tells what a row holds in
constant time.
"""

from __future__ import annotations

import bisect
import functools
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from davinci_jax.data.permutation import mix
from davinci_jax.data.rows import Ranges, Rows, expand
from davinci_jax.data.shards import ShardSet
from davinci_jax.errors import DataError

# Documents that are packed together. More fill rows better; fewer keep what a row holds close together.
WINDOW = 2**16


class Packed(NamedTuple):
    """Pieces in rows.

    Attributes:
      counts: int64 [rows], pieces of each row.
      start: int64 [pieces], positions in the stream, row by row and ascending in each.
      length: int64 [pieces].
    """

    counts: np.ndarray
    start: np.ndarray
    length: np.ndarray


class BestFitRows(Rows):
    """Rows of whole documents and of pieces of long ones; makes the plan if it is not there.

    Raises:
      DataError: the plan cannot be written, or is damaged.
    """

    def __init__(self, shards: ShardSet, length: int, source: int = 0, mask_questions: bool = False):
        super().__init__(shards, length, source, mask_questions)
        self._folder = plan_folder(shards, length)
        if not (self._folder / "plan.json").is_file():
            make_plan(shards, length)
        try:
            plan = json.loads((self._folder / "plan.json").read_bytes())
            self._num_rows, self._num_pieces = int(plan["rows"]), int(plan["pieces"])
        except (ValueError, TypeError, KeyError) as error:
            raise _damaged(self._folder / "plan.json", f"cannot be read ({error})") from error

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if not key.startswith("_array_")}

    @property
    def num_rows(self) -> int:
        return self._num_rows

    def ranges(self, rows: np.ndarray) -> Ranges:
        first, end = self._array_first[rows], self._array_first[rows + 1]
        wrong = (first < 0) | (end <= first) | (end > self._num_pieces)
        if not wrong.any():
            owner, piece = expand(first, end)
            start, length = self._array_start[piece], self._array_length[piece].astype(np.int64)
            wrong = checksums(end - first, start, length) != self._array_check[rows]
        if wrong.any():
            raise _damaged(self._folder, f"does not match its checksum at row {rows[np.argmax(wrong)]}")
        return Ranges(owner, start, start + length)

    @functools.cached_property
    def _array_first(self) -> np.ndarray:
        return self._load("first", np.int64, self._num_rows + 1)

    @functools.cached_property
    def _array_check(self) -> np.ndarray:
        return self._load("check", np.uint64, self._num_rows)

    @functools.cached_property
    def _array_start(self) -> np.ndarray:
        return self._load("start", np.int64, self._num_pieces)

    @functools.cached_property
    def _array_length(self) -> np.ndarray:
        return self._load("length", np.uint32, self._num_pieces)

    def _load(self, name: str, dtype: type, count: int) -> np.ndarray:
        file = self._folder / name
        try:
            if file.stat().st_size != count * np.dtype(dtype).itemsize:
                raise _damaged(file, f"has {file.stat().st_size} bytes where the plan counts {count} items")
            return np.memmap(file, dtype, "r", shape=(count,)) if count else np.zeros(0, dtype)
        except OSError as error:
            raise _damaged(file, f"cannot be read ({error.strerror})") from error


def checksums(counts: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Returns a checksum of the pieces of each row, uint64 [rows]."""
    mixed = mix(start.astype(np.uint64) ^ mix(length.astype(np.uint64)))
    total = np.cumsum(mixed, dtype=np.uint64)
    last = np.cumsum(counts) - 1
    return mix(np.diff(total[last], prepend=np.uint64(0)) ^ counts.astype(np.uint64))


def plan_folder(shards: ShardSet, length: int) -> pathlib.Path:
    """Returns the folder of the plan for rows of `length` tokens; another shard set has another."""
    return shards.folder / f"best-fit-{shards.split}-{length}-{shards.fingerprint[:12]}"


def make_plan(shards: ShardSet, length: int) -> pathlib.Path:
    """Packs the documents of a split and writes the plan, atomically; returns its folder.

    Several hosts may call it at once: one plan is kept, and all are equal.

    Raises:
      DataError: the folder of the shard set cannot be written, or the document offsets are damaged.
    """
    shards.verify_file(shards.entry.offsets)
    folder = plan_folder(shards, length)
    new = folder.with_name(f".{folder.name}.{os.uname().nodename}.{os.getpid()}.tmp")
    try:
        new.mkdir(parents=True, exist_ok=True)
        _write_plan(shards, length, new)
        new.rename(folder)
    except OSError as error:
        if (folder / "plan.json").is_file():
            return folder
        raise DataError(
            str(folder),
            None,
            f"cannot be written ({error.strerror})",
            "make the plan with `davinci shard` where the folder may be written",
        ) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return folder


def count_rows(shards: ShardSet, length: int) -> int:
    """Returns the rows of `length` tokens that a split is packed in; writes no plan where there is none.

    Raises:
      DataError: the plan or the document offsets are damaged.
    """
    if (plan_folder(shards, length) / "plan.json").is_file():
        return BestFitRows(shards, length).num_rows
    shards.verify_file(shards.entry.offsets)
    return sum(len(packed.counts) for packed in _windows(shards, length))


def _windows(shards: ShardSet, length: int) -> Iterator[Packed]:
    """Packs the documents of a split, window by window."""
    for begin in range(0, shards.entry.documents, WINDOW):
        yield pack(np.array(shards.document_offsets[begin : begin + WINDOW + 1]), length)


def _write_plan(shards: ShardSet, length: int, folder: pathlib.Path) -> None:
    rows = pieces = 0
    with (
        (folder / "first").open("wb") as first,
        (folder / "check").open("wb") as check,
        (folder / "start").open("wb") as start,
        (folder / "length").open("wb") as lengths,
    ):
        for packed in _windows(shards, length):
            (np.cumsum(packed.counts) - packed.counts + pieces).tofile(first)
            checksums(*packed).tofile(check)
            packed.start.tofile(start)
            packed.length.astype(np.uint32).tofile(lengths)
            rows, pieces = rows + len(packed.counts), pieces + len(packed.start)
        np.array([pieces], np.int64).tofile(first)
    (folder / "plan.json").write_text(json.dumps({"rows": rows, "pieces": pieces, "length": length}) + "\n")


def pack(offsets: np.ndarray, length: int) -> Packed:
    """Packs the documents of a window.

    Args:
      offsets: int64 [documents + 1], where each document begins in the stream, and where the last one ends.
      length: tokens of a row, L.

    Returns:
      Rows in the order of their first piece in the stream.
    """
    document, number = expand(np.zeros(len(offsets) - 1, np.int64), -(-np.diff(offsets) // length))
    start = offsets[document] + number * length
    size = np.minimum(offsets[document + 1] - start, length)
    row = best_fit_decreasing(size, length)
    order = np.lexsort((start, row))
    start, size, row = start[order], size[order], row[order]
    counts = np.bincount(row)
    begin = np.cumsum(counts) - counts
    by_start = np.argsort(start[begin], kind="stable")
    _, piece = expand(begin[by_start], (begin + counts)[by_start])
    return Packed(counts[by_start], start[piece], size[piece])


def best_fit_decreasing(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """Returns the bin of each item, int64 [n], bins numbered from 0 and none of them empty.

    Items are taken the largest first, in their order among equals; each goes into the bin with the least room that
    holds it, or into a new one. Equal items are placed together, so the cost is that of the distinct sizes and not
    of the items: a bin with room r for items of size s takes r // s of them before any other bin is the best.

    Args:
      sizes: int [n], from 1 to `capacity`.
      capacity: room of a bin.
    """
    bin_of = np.empty(len(sizes), np.int64)
    by_size = np.argsort(-sizes, kind="stable")
    firsts = np.flatnonzero(np.diff(sizes[by_size], prepend=-1))
    rooms: dict[int, list[int]] = {}
    known: list[int] = []  # the keys of `rooms`, ascending
    num_bins = 0

    def put_back(room: int, bins: list[int]) -> None:
        if room and bins:
            if room not in rooms:
                bisect.insort(known, room)
                rooms[room] = []
            rooms[room] += bins

    for first, end in zip(firsts, np.append(firsts[1:], len(sizes)), strict=True):
        items, size = by_size[first:end], int(sizes[by_size[first]])
        while len(items):
            at = bisect.bisect_left(known, size)
            if at < len(known):
                room = known.pop(at)
                open_bins = rooms.pop(room)
            else:
                room = capacity
                needed = -(-len(items) // (capacity // size))
                open_bins = list(range(num_bins, num_bins + needed))
                num_bins += needed
            each = room // size
            used = min(len(open_bins), -(-len(items) // each))
            taken = min(len(items), used * each)
            bin_of[items[:taken]] = np.repeat(open_bins[:used], each)[:taken]
            left_in_last = taken - (used - 1) * each
            put_back(room - each * size, open_bins[: used - 1])
            put_back(room - left_in_last * size, open_bins[used - 1 : used])
            put_back(room, open_bins[used:])
            items = items[taken:]
    return bin_of


def _damaged(path: pathlib.Path, problem: str) -> DataError:
    return DataError(str(path), None, problem, "remove the folder of the plan; it is made again")
