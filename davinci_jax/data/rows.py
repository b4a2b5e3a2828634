"""Rows of L tokens, cut from the token stream of a shard set.

Every row is a list of ranges of the stream, laid out one after the other: one range for "concat", one for each
piece of a document for "best_fit". All else follows from the stream: a segment begins where a range or a document
begins, and a token's label is the stream's next token, unless a document begins there.
"""

from __future__ import annotations

import abc
from typing import NamedTuple

import numpy as np

from davinci_jax.data.batch import NO_TARGET, PADDING_SEGMENT, Batch
from davinci_jax.data.manifest import NAME, no_shard_set, shard_folder
from davinci_jax.data.shards import ShardSet
from davinci_jax.experiment import DataConfig


class Ranges(NamedTuple):
    """Ranges [start, stop) of a token stream, each int64 [k], in the order in which they fill rows.

    Attributes:
      row: the row, counted from 0, that a range belongs to; ascending.
      start, stop: positions in the stream; stop > start.
    """

    row: np.ndarray
    start: np.ndarray
    stop: np.ndarray


class Rows(abc.ABC):
    """Rows of one split of a source. Safe to share between threads and to pickle.

    Args:
      shards: the split.
      length: tokens of a row, L.
      source: index of the source in config order.
      mask_questions: whether tokens in masked spans are no targets.
    """

    def __init__(self, shards: ShardSet, length: int, source: int = 0, mask_questions: bool = False):
        self.shards, self.length, self.source, self.mask_questions = shards, length, source, mask_questions

    @property
    @abc.abstractmethod
    def num_rows(self) -> int:
        """Rows in all."""

    @abc.abstractmethod
    def ranges(self, rows: np.ndarray) -> Ranges:
        """Returns what the rows int64 [n] hold; `Ranges.row` counts in `rows`."""

    @property
    def fill(self) -> float:
        """Share of the rows' places that hold a token; the rest is padding."""
        return self.shards.num_tokens / max(1, self.num_rows * self.length)

    def read(self, rows: np.ndarray) -> Batch:
        """Returns rows by their number, int64 [n], in any order and with repeats; arrays int32 [n, L].

        Raises:
          DataError: a damaged shard; names the file and the record.
        """
        rows = np.asarray(rows, np.int64)
        if rows.size and not 0 <= rows.min() <= rows.max() < self.num_rows:
            raise IndexError(f"rows {rows.min()} to {rows.max()} are outside [0, {self.num_rows})")
        batch = Batch.empty(rows.shape, self.length)
        batch.sources[...] = self.source
        if rows.size:
            _fill(self.shards, self.ranges(rows), batch, self.mask_questions)
        return batch


class ConcatRows(Rows):
    """Row r is tokens [r L, (r + 1) L) of the stream; the last row may end in padding."""

    @property
    def num_rows(self) -> int:
        return -(-self.shards.num_tokens // self.length)

    def ranges(self, rows: np.ndarray) -> Ranges:
        start = rows * self.length
        return Ranges(np.arange(len(rows)), start, np.minimum(start + self.length, self.shards.num_tokens))


def open_rows(data: DataConfig, source: int, split: str = "train") -> Rows:
    """Returns the rows of a source, packed as the config says; held-out rows are always concatenated.

    Args:
      data: names the folder, the row length and the packing.
      source: index of the source in `data.sources`.
      split: "train" or "heldout".

    Raises:
      DataError: no shard set, or a damaged one.
    """
    config = data.sources[source]
    folder = shard_folder(data, config)
    if not (folder / NAME).is_file():
        raise no_shard_set(folder, config.name)
    shards = ShardSet(folder, split)
    # Held-out figures cover every token, so that runs which mask questions and runs which do not can be compared.
    arguments = (shards, data.sequence_length, source, config.loss == "answers" and split == "train")
    if data.packing == "best_fit" and split == "train":
        from davinci_jax.data.best_fit import BestFitRows  # it builds on this module

        return BestFitRows(*arguments)
    return ConcatRows(*arguments)


def counted_rows(data: DataConfig, source: int) -> int | None:
    """Returns the training rows of a source whose shard set is there, else `None`; writes nothing.

    Raises:
      DataError: a damaged shard set.
    """
    folder = shard_folder(data, data.sources[source])
    if not (folder / NAME).is_file():
        return None
    if data.packing == "best_fit":
        from davinci_jax.data.best_fit import count_rows  # it builds on this module

        return count_rows(ShardSet(folder), data.sequence_length)
    return open_rows(data, source).num_rows


def _fill(shards: ShardSet, ranges: Ranges, batch: Batch, mask_questions: bool) -> None:
    """Writes ranges of the stream into the rows of a batch."""
    rows, length = batch.tokens.shape
    lengths = ranges.stop - ranges.start
    filled = np.zeros(rows + 1, np.int64)
    np.add.at(filled, ranges.row + 1, lengths)
    # Where a range lands in the batch, counted over all its rows.
    offset = np.cumsum(lengths) - lengths
    place = offset - np.cumsum(filled)[ranges.row] + ranges.row * length

    borders, spans = _copy_tokens(shards, ranges, place, batch)
    owner, border = _in_ranges(borders, borders, ranges.start, ranges.stop)
    border_place = place[owner] + borders[border] - ranges.start[owner]
    labels = batch.labels.reshape(-1)
    labels[border_place - 1] = NO_TARGET
    if mask_questions and len(spans):
        # The label of a token is the token after it.
        labels[_masked_places(spans, ranges, place)] = NO_TARGET

    padding = np.arange(rows) * length + filled[1:]
    padding = padding[filled[1:] < length]
    inner = border_place[borders[border] < ranges.stop[owner]]
    _segments(np.concatenate([place, inner]), padding, batch)


def _copy_tokens(shards: ShardSet, ranges: Ranges, place: np.ndarray, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Copies tokens and their successors; returns the document starts [d] and masked spans [m, 2] of the blocks read.

    Both are positions in the stream, ascending; starts have no repeats.
    """
    size = shards.block_tokens
    owner, number = expand(ranges.start // size, (ranges.stop - 1) // size + 1)
    begin = np.maximum(ranges.start[owner], number * size)
    end = np.minimum(ranges.stop[owner], (number + 1) * size)
    needed, which = np.unique(number, return_inverse=True)
    found = shards.read_blocks(needed)
    tokens, labels = batch.tokens.reshape(-1), batch.labels.reshape(-1)
    parts = (which, begin - number * size, end - begin, place[owner] + begin - ranges.start[owner])
    for block, at, count, to in zip(*(part.tolist() for part in parts), strict=True):
        source = found[block].tokens
        tokens[to : to + count] = source[at : at + count]
        labels[to : to + count] = source[at + 1 : at + count + 1]
    firsts = needed * size
    borders = np.concatenate([block.starts for block in found]) + np.repeat(firsts, [len(b.starts) for b in found])
    spans = np.concatenate([block.spans for block in found])
    spans = spans + np.repeat(firsts, [len(block.spans) for block in found])[:, None]
    # A document that starts with a block is told of by the block before, too.
    return borders[np.diff(borders, prepend=-1) > 0], spans


def _in_ranges(
    first: np.ndarray, last: np.ndarray, after: np.ndarray, upto: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (range, item) for all items that have a position in (after, upto] of a range.

    Items cover positions first..last, both ascending.
    """
    low = np.searchsorted(last, after, side="right")
    high = np.searchsorted(first, upto, side="right")
    return expand(low, high)


def _masked_places(spans: np.ndarray, ranges: Ranges, place: np.ndarray) -> np.ndarray:
    """Returns the places in the batch of tokens whose successor lies in a masked span."""
    owner, span = _in_ranges(spans[:, 0], spans[:, 1] - 1, ranges.start, ranges.stop)
    begin = np.maximum(spans[span, 0], ranges.start[owner] + 1)
    end = np.minimum(spans[span, 1], ranges.stop[owner] + 1)
    shift = place[owner] - ranges.start[owner] - 1
    return expand(begin + shift, end + shift)[1]


def _segments(segments: np.ndarray, padding: np.ndarray, batch: Batch) -> None:
    """Numbers segments and positions, given the places where segments and padding begin."""
    rows, length = batch.tokens.shape
    begin = np.concatenate([segments, padding])
    order = np.argsort(begin, kind="stable")
    begin, is_padding = begin[order], order >= len(segments)
    row = begin // length
    # The first segment of each row is the one at the row's first place.
    ids = np.arange(len(begin)) - np.searchsorted(row, row) + 1
    ids[is_padding] = PADDING_SEGMENT
    counts = np.diff(begin, append=rows * length)
    batch.segment_ids.reshape(-1)[:] = np.repeat(ids.astype(np.int32), counts)
    columns = np.repeat((begin - row * length).astype(np.int32), counts).reshape(rows, length)
    np.subtract(np.arange(length, dtype=np.int32), columns, out=batch.positions)
    if is_padding.any():
        _, empty = expand(begin[is_padding], (begin + counts)[is_padding])
        batch.tokens.reshape(-1)[empty] = 0
        batch.labels.reshape(-1)[empty] = NO_TARGET
        batch.positions.reshape(-1)[empty] = 0


def expand(begin: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (i, x) for every x of every half-open interval [begin[i], end[i]), as two int64 [n]."""
    counts = np.maximum(end - begin, 0)
    owner = np.repeat(np.arange(len(counts)), counts)
    within = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    return owner, begin[owner] + within
