"""Which keys each query sees, as ranges: what lets a kernel skip tiles, and mask by two comparisons.

The keys of one document follow each other, so a query sees one range of them, [first, last). Causality, windows and
the end of the sequence only narrow it as long as positions count up. Arrays of positions need not: then ranges hold
documents alone, and positions are compared as well.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels.kernels.attention import documents
from pallas_kernels.kernels.attention.spec import AttentionSpec

_MIN, _MAX = np.int32(-(2**31)), np.int32(2**31 - 1)
Array = Any  # NumPy's when everything is known at trace time, else JAX's


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Query t sees key s if first <= s < last and, where positions are given, lowest <= position of s <= highest.

    Attributes:
      first, last: [batch or 1, queries].
      lowest, highest: [batch, queries], or None.
      key_positions: [batch, keys], or None.
    """

    first: Array
    last: Array
    lowest: Array | None = None
    highest: Array | None = None
    key_positions: Array | None = None

    def padded(self, block_q: int, block_kv: int) -> "Bounds":
        """For lengths padded to whole tiles. Rows that are made up see what the last one sees."""
        arrays = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        blocks = {name: block_kv if name == "key_positions" else block_q for name in arrays}
        return Bounds(**{k: None if x is None else padded(x, blocks[k], 1, mode="edge") for k, x in arrays.items()})

    def arrays(self) -> list[Array]:
        """Those there are, in order."""
        arrays = (getattr(self, field.name) for field in dataclasses.fields(self))
        return [x for x in arrays if x is not None]


def bounds(
    spec: AttentionSpec,
    queries: int,
    keys: int,
    q_segments: Array | None,
    kv_segments: Array | None,
    q_positions: Array | None,
    kv_positions: Array | None,
) -> Bounds:
    """The bounds of every query of a batch; see `AttentionSpec` and `Masks` for what is visible."""
    xp = _library(q_segments, kv_segments, q_positions, kv_positions)
    xp = jnp if q_segments is not None and kv_segments is None else xp
    if q_segments is None:
        first, last = np.zeros((1, queries), np.int32), np.full((1, queries), keys, np.int32)
    else:
        first, last = _documents(xp, q_segments, kv_segments)
    if q_positions is None or not (spec.causal or spec.window):
        lowest, highest = _reach(spec, np.arange(queries, dtype=np.int32)[None])
        first = first if lowest is None else xp.maximum(first, lowest)
        last = last if highest is None else xp.minimum(last, highest + 1)
        return Bounds(first, last)
    lowest, highest = _reach(spec, q_positions)
    lowest = xp.full_like(q_positions, _MIN) if lowest is None else lowest
    highest = xp.full_like(q_positions, _MAX) if highest is None else highest
    return Bounds(first, last, lowest, highest, kv_positions)


def _library(*arrays: Array | None) -> Any:
    """NumPy where all is known at trace time: ranges are constants then."""
    return np if all(x is None or isinstance(x, np.ndarray) for x in arrays) else jnp


def _documents(xp: Any, q_segments: Array, kv_segments: Array | None) -> tuple[Array, Array]:
    """Where the run of keys of each query's own document begins and ends. No sort."""
    if kv_segments is None:
        first, last = documents.runs(q_segments)
        return first, jnp.where(q_segments < 0, first, last + 1)
    same = (q_segments[:, :, None] == kv_segments[:, None, :]) & (q_segments >= 0)[:, :, None]
    index = np.arange(kv_segments.shape[1], dtype=np.int32)
    first = xp.min(xp.where(same, index, _MAX), axis=-1)
    last = xp.max(xp.where(same, index + 1, 0), axis=-1)
    return xp.minimum(first, last), last


def _reach(spec: AttentionSpec, positions: Array) -> tuple[Array | None, Array | None]:
    """The lowest and the highest position that a query sees, None without a limit."""
    left, right = (-1, -1) if spec.window is None else spec.window
    lowest = positions - left if left >= 0 else None
    highest = positions + right if right >= 0 else None
    if spec.causal:
        highest = positions
    return lowest, highest


def padded(x: Array, multiple: int, axis: int, **how) -> Array:
    """`x` with zeros (or as `how` says for `pad`) up to the next multiple along `axis`; the same `x` if it is one."""
    missing = -x.shape[axis] % multiple
    if not missing:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, missing)
    return (np if isinstance(x, np.ndarray) else jnp).pad(x, widths, **how)


def tile_ranges(limits: Bounds, block_q: int, block_kv: int, keys: int, *, of: str) -> Array:
    """Which tiles to visit, for each tile of queries (`of="q"`) or of keys (`of="kv"`).

    Returns:
      int32 [batch or 1, tiles, 4]: start, full_start, full_end, end. Tiles in [start, end) have visible pairs, those
      in [full_start, full_end) nothing but visible pairs, so that they need no mask.
    """
    xp = _library(*limits.arrays())

    def reduced(x, block, reduction):
        x = padded(x, block, 1, mode="edge")
        return reduction(x.reshape(x.shape[0], -1, block), axis=-1)

    empty = limits.first >= limits.last  # leave such rows out where the reach of a tile is measured
    low = reduced(xp.where(empty, _MAX, limits.first), block_q, xp.min)[:, :, None]
    high = reduced(xp.where(empty, 0, limits.last), block_q, xp.max)[:, :, None]
    all_low = reduced(xp.where(empty, _MAX, limits.first), block_q, xp.max)[:, :, None]
    all_high = reduced(xp.where(empty, 0, limits.last), block_q, xp.min)[:, :, None]
    begin = (np.arange(-(-keys // block_kv), dtype=np.int32) * block_kv)[None, None]
    active = (low < begin + block_kv) & (high > begin)
    whole = (all_low <= begin) & (all_high >= begin + block_kv)
    if limits.lowest is not None:
        nearest = reduced(limits.key_positions, block_kv, xp.min)[:, None]
        farthest = reduced(limits.key_positions, block_kv, xp.max)[:, None]
        active = active & (reduced(limits.lowest, block_q, xp.min)[:, :, None] <= farthest)
        active = active & (reduced(limits.highest, block_q, xp.max)[:, :, None] >= nearest)
        whole = whole & (reduced(limits.lowest, block_q, xp.max)[:, :, None] <= nearest)
        whole = whole & (reduced(limits.highest, block_q, xp.min)[:, :, None] >= farthest)
    if of == "kv":
        active, whole = xp.swapaxes(active, 1, 2), xp.swapaxes(whole, 1, 2)
    return _runs(xp, active, whole & active)


def _runs(xp, active: Array, whole: Array) -> Array:
    """Along the last axis: from the first to the last active one, and the first run of whole ones in there."""
    count = active.shape[-1]
    index = np.arange(count, dtype=np.int32)
    start = xp.min(xp.where(active, index, count), axis=-1)
    end = xp.max(xp.where(active, index + 1, 0), axis=-1)
    start = xp.minimum(start, end)
    full_start = xp.minimum(xp.min(xp.where(whole, index, count), axis=-1), end)
    broken = ~whole & (index >= full_start[..., None])
    full_end = xp.minimum(xp.min(xp.where(broken, index, count), axis=-1), end)
    return xp.stack([start, full_start, full_end, end], axis=-1).astype(np.int32)
