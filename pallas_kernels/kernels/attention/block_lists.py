"""Which blocks of scores a masked attention computes: a compact list, made at run time where documents decide.

Segment ids do not decrease along a row and positions mostly count up, so the keys that one query sees by segment,
causality and window lie in an interval of indices. Intervals make masks cheap (two comparisons, whatever the masks)
and say by their minima and maxima over a block of queries which blocks of keys are invisible, which need no mask,
and which need one. Positions that the caller gives need not count up; they are compared beside the interval.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.kernels.attention import documents
from pallas_kernels.kernels.attention.spec import AttentionSpec

# Kinds of a block. DIAGONAL holds the causal diagonal from corner to corner: the tiles above it are left out.
EMPTY, FULL, DIAGONAL, PARTIAL, FLUSH = range(5)
KIND_BITS = 3
FIRST, LAST, FIRST_OF_ROW = 8, 16, 32  # flags: of a block of queries (FIRST, LAST), of a row of the batch
_FLAG_BITS = 6

Array = jax.Array | np.ndarray


@dataclasses.dataclass(frozen=True)
class BlockList:
    """The blocks to compute, in order of batch row, block of queries, block of keys.

    Attributes:
      rows: [N] int32, batch row x rows a batch row has + block of queries.
      cols: [N] int32, block of keys.
      flags: [N] int32, the kind and FIRST, LAST, FIRST_OF_ROW.
      count: how many of N are in use: an int, or int32 that is known at run time.
      rows_per_batch: blocks of queries of a batch row, one more if there are FLUSH entries.
      bounds: [B, 2, T] int32, first and last index of the keys that a query may see; None if no block needs it.
      kinds: the kinds that can occur.
    """

    rows: Array
    cols: Array
    flags: Array
    count: int | jax.Array
    rows_per_batch: int
    bounds: Array | None
    kinds: frozenset[int]


def intervals(
    spec: AttentionSpec,
    batch: int,
    queries: int,
    keys: int,
    q_segments: jax.Array | None,
    kv_segments: jax.Array | None,
    by_position: bool,
) -> tuple[Array, Array]:
    """First and last index of the keys that each query may see, [B, T] int32; first > last where there is none.

    Args:
      kv_segments: None where they are those of the queries, which needs no comparison of all queries with all keys.
      by_position: causality and window are about given positions, so the interval is that of the segment alone.
    """
    index = np.broadcast_to(np.arange(queries, dtype=np.int32), (batch, queries))
    first, last = np.zeros_like(index), np.full_like(index, keys - 1)
    if not by_position:
        left, right = spec.window or (-1, -1)
        if left >= 0:
            first = np.maximum(first, index - left)
        if right >= 0:
            last = np.minimum(last, index + right)
        if spec.causal:
            last = np.minimum(last, index)
    if q_segments is None:
        return first, last
    segment_first, segment_last = _segment_intervals(q_segments, kv_segments)
    first, last = jnp.maximum(first, segment_first), jnp.minimum(last, segment_last)
    return jnp.where(q_segments < 0, keys, first), jnp.where(q_segments < 0, -1, last)


def _segment_intervals(q_segments: jax.Array, kv_segments: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    if kv_segments is None:
        return documents.runs(q_segments)
    # Padding between documents takes a place between their ids, so that the ids still do not decrease.
    below = jax.lax.cummax(kv_segments, axis=1)
    ordered = jnp.where(kv_segments < 0, 2 * below + 1, 2 * kv_segments)
    sought = 2 * q_segments
    first = jnp.sum(ordered[:, None, :] < sought[:, :, None], axis=2, dtype=jnp.int32)
    last = jnp.sum(ordered[:, None, :] <= sought[:, :, None], axis=2, dtype=jnp.int32) - 1
    return first, last


def block_list(
    spec: AttentionSpec,
    first: Array,
    last: Array,
    keys: int,
    block_q: int,
    block_kv: int,
    *,
    positions: tuple[jax.Array, jax.Array] | None = None,
    key_offset: int = 0,
    flush: bool = False,
) -> BlockList:
    """The blocks of [block_q, block_kv] scores that have something visible.

    Blocks of queries that see nothing keep one EMPTY entry, so that their output is written.

    Args:
      spec: what is visible.
      first, last: [B, T], from `intervals`; NumPy arrays make a list that is known at trace time.
      keys: number of keys in this list, S.
      block_q, block_kv: size of a block.
      positions: of queries and of keys, [B, T], [B, S]; causality and window go by them if given.
      key_offset: index of the first key of this list, where it covers a part of the keys.
      flush: for each batch row, end with one FLUSH entry for each block of keys.
    """
    static = isinstance(first, np.ndarray) and positions is None
    xp = np if static else jnp
    batch, queries = first.shape
    first, last = first - np.int32(key_offset), last - np.int32(key_offset)
    rows, cols = math.ceil(queries / block_q), math.ceil(keys / block_kv)
    visible, full = _visible_blocks(xp, spec, first, last, cols, block_q, block_kv, positions)
    order = np.arange(cols, dtype=np.int32)
    kind = xp.where(full, FULL, xp.where(visible, PARTIAL, EMPTY)).astype(np.int32)
    if spec.causal and positions is None and block_q == block_kv:
        on_diagonal = np.arange(rows)[:, None] * block_q == key_offset + order * block_kv
        kind = xp.where((kind == PARTIAL) & on_diagonal, DIAGONAL, kind)
    kinds = frozenset(np.unique(kind).tolist()) if static else frozenset({EMPTY, FULL, DIAGONAL, PARTIAL})

    # A block of queries with nothing visible computes its first block of keys as EMPTY.
    keep = visible | (~visible.any(axis=2, keepdims=True) & (order == 0))
    lowest = xp.min(xp.where(keep, order, cols), axis=2, keepdims=True)
    highest = xp.max(xp.where(keep, order, -1), axis=2, keepdims=True)
    flags = kind + xp.where(order == lowest, FIRST, 0) + xp.where(order == highest, LAST, 0)
    row_starts = (np.arange(rows) == 0)[:, None] & (order == lowest)
    flags = flags + xp.where(row_starts, FIRST_OF_ROW, 0)
    if flush:
        ending = np.full((batch, 1, cols), FLUSH, np.int32)
        flags = xp.concatenate([flags, ending], axis=1)
        keep = xp.concatenate([keep, np.ones_like(ending, bool)], axis=1)
        kinds |= {FLUSH}
    height = rows + flush
    most = _most(spec, batch, rows, cols, block_q, block_kv, key_offset, positions is not None)
    limit = most + batch * cols * flush
    return _compact(xp, flags, keep, height, limit, kinds, _bounds(xp, first, last, kinds, static, spec))


def _visible_blocks(
    xp, spec: AttentionSpec, first, last, cols: int, block_q: int, block_kv: int, positions
) -> tuple[Array, Array]:
    """Blocks with something visible, and those with nothing hidden, [B, blocks of queries, blocks of keys] bool."""
    starts = np.arange(cols, dtype=np.int32) * block_kv
    ends = starts + np.int32(block_kv - 1)  # beyond the keys in a short last block, which thereby is never full

    def extremes(x, size):
        return (_reduce(xp, x, size, "min")[..., None], _reduce(xp, x, size, "max")[..., None])

    (first_min, first_max), (last_min, last_max) = extremes(first, block_q), extremes(last, block_q)
    visible = (first_min <= ends) & (last_max >= starts) & (first_min <= last_max)
    full = (first_max <= starts) & (last_min >= ends)
    if positions is not None:
        q_low, q_high = extremes(positions[0], block_q)
        k_low, k_high = (x.swapaxes(1, 2) for x in extremes(positions[1], block_kv))
        left, right = spec.window or (-1, -1)
        ahead = ([0] if spec.causal else []) + ([right] if right >= 0 else [])
        for reach in ahead:
            visible &= k_low <= q_high + reach
            full &= k_high <= q_low + reach
        if left >= 0:
            visible &= k_high >= q_low - left
            full &= k_low >= q_high - left
    return visible, full & visible


def _reduce(xp, x, size: int, how: str):
    """Minimum or maximum over blocks of `size` along the second dimension; the last block may be short."""
    length = x.shape[1]
    padded = xp.pad(x, ((0, 0), (0, -length % size)), mode="edge")
    return getattr(padded.reshape(x.shape[0], -1, size), how)(axis=2)


def _bounds(xp, first, last, kinds, static: bool, spec: AttentionSpec):
    """What masks compare with; without documents and windows the diagonal is all there is to mask."""
    if static and PARTIAL not in kinds and spec.window is None:
        return None
    return xp.stack([first, last], axis=1).astype(np.int32)


def _most(
    spec, batch: int, rows: int, cols: int, block_q: int, block_kv: int, key_offset: int, by_position: bool
) -> int:
    """How many entries there can be, whatever the documents."""
    low, high = np.zeros(rows, np.int64), np.full(rows, cols - 1)
    start = np.arange(rows) * block_q
    if not by_position:
        left, right = spec.window or (-1, -1)
        reach = 0 if spec.causal else right
        if reach >= 0:
            high = np.minimum(high, (start + block_q - 1 + reach - key_offset) // block_kv)
        if left >= 0:
            low = np.maximum(low, (start - left - key_offset) // block_kv)
    return batch * int(np.maximum(high - low + 1, 1).sum())


def _compact(xp, flags, keep, height: int, limit: int, kinds, bounds) -> BlockList:
    """Sorts the entries that are kept to the front, with their flags in the low bits of the key."""
    cols = flags.shape[2]
    place = np.arange(flags.size, dtype=np.int32).reshape(flags.shape)
    key = xp.where(keep, place * (1 << _FLAG_BITS) + flags, np.iinfo(np.int32).max)
    key = xp.sort(key.reshape(-1))[:limit]
    count = keep.sum(dtype=np.int32)
    if xp is np:
        key, count = key[: int(count)], int(count)
    place, flags = key >> _FLAG_BITS, key & ((1 << _FLAG_BITS) - 1)
    rows = (place // cols).astype(np.int32)
    return BlockList(rows, (place % cols).astype(np.int32), flags.astype(np.int32), count, height, bounds, kinds)
