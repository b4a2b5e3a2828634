"""What forward and backward kernels share: the order of tiles in a block of scores, masks, products."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.kernels.attention import block_lists
from pallas_kernels.kernels.attention.spec import AttentionSpec

LOG2_E = math.log2(math.e)
HIDDEN = -3e38  # a score that is masked; below LOWEST, so that it weighs nothing in rows that see nothing
LOWEST = -1e30  # where running maxima start


@dataclasses.dataclass(frozen=True)
class Tile:
    """A piece of a block of scores: the unit of work that is overlapped.

    Attributes:
      head: of the unit.
      queries, keys: the part of the block.
      masked: whether something in it may be hidden.
    """

    head: Any
    queries: slice
    keys: slice
    masked: bool


def tiles(kind: int, block_q: int, block_kv: int, tile_q: int, tile_kv: int, intervals: bool) -> list[Tile]:
    """Tiles of a block, all keys of some queries after another; on the diagonal those above it are left out.

    Args:
      intervals: masks compare with intervals of keys, which may hide any part of a block on the diagonal.
    """
    found = []
    for q in range(0, block_q, tile_q):
        for k in range(0, block_kv, tile_kv):
            if kind == block_lists.DIAGONAL and k > q + tile_q - 1:
                continue
            crosses = k + tile_kv - 1 > q
            masked = kind == block_lists.PARTIAL or (kind == block_lists.DIAGONAL and (intervals or crosses))
            found.append(Tile(None, slice(q, q + tile_q), slice(k, k + tile_kv), masked))
    return found


def overlapped(work: Iterable[Tile], products: Callable[[Tile], Any], softmax: Callable, accumulate: Callable) -> None:
    """Runs three stages over tiles, each one tile behind the one before, so that matrix and vector units overlap.

    The compiler schedules instructions near where they are written; this writes side by side what is independent.
    """
    scores = weights = None
    for tile in [*work, None, None]:
        ahead = (tile, products(tile)) if tile is not None else None
        behind = (scores[0], softmax(*scores)) if scores is not None else None
        if weights is not None:
            accumulate(weights[0], *weights[1])
        scores, weights = ahead, behind


def for_each_head(heads: int, unroll: int, tiles_of_head: Iterable[Tile], products, softmax, accumulate) -> None:
    """`overlapped` over the tiles of all heads of a unit, in one stretch for as many as `unroll` says and divides."""
    together = math.gcd(unroll, heads)

    def body(i, _):
        these = [i * together + n for n in range(together)]
        work = (dataclasses.replace(tile, head=head) for head in these for tile in tiles_of_head)
        overlapped(work, products, softmax, accumulate)

    jax.lax.fori_loop(0, heads // together, body, None)


def mask_inputs(
    bounds, positions, block_q: int, block_kv: int, along_q: Callable, along_kv: Callable
) -> list[tuple[jax.Array, pl.BlockSpec]]:
    """The arrays that hide scores, where there are any, and which block of them a step reads; see `mask_refs`.

    Args:
      bounds: [B, 2, T], first and last key that a query sees, or None.
      positions: [B, T] and [B, S], or None.
      along_q, along_kv: give the index of a step's block along the queries and along the keys.
    """
    found = []
    if bounds is not None:
        found.append((jnp.asarray(bounds), pl.BlockSpec((1, 2, block_q), along_q)))
    if positions is not None:
        found.append((positions[0][:, None], pl.BlockSpec((1, 1, block_q), along_q)))
        found.append((positions[1][:, None], pl.BlockSpec((1, 1, block_kv), along_kv)))
    return found


def mask_refs(refs: Sequence[Any], has_bounds: bool, has_positions: bool) -> tuple[Any, tuple[Any, Any] | None, list]:
    """(bounds, positions, the rest) of references that begin with those of `mask_inputs`; None where they are not."""
    refs = list(refs)
    bounds = refs.pop(0).at[0] if has_bounds else None
    positions = (refs.pop(0).at[0], refs.pop(0).at[0]) if has_positions else None
    return bounds, positions, refs


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Product over dimension contract[0] of `a` and contract[1] of `b`, accumulated in float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    numbers = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, numbers, precision=precision, preferred_element_type=jnp.float32)


def visible(tile: Tile, spec: AttentionSpec, key_start, bounds, positions) -> jax.Array:
    """Mask [keys, queries] of a tile.

    Args:
      key_start: index of the first key of the block.
      bounds: reference [2, block_q], first and last key that a query sees; None in blocks on the diagonal where only
        causality hides.
      positions: references [1, block_q] and [block_kv, lanes], or None.
    """
    shape = (tile.keys.stop - tile.keys.start, tile.queries.stop - tile.queries.start)
    key = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    if bounds is None:
        return key - jax.lax.broadcasted_iota(jnp.int32, shape, 1) <= tile.queries.start - tile.keys.start
    offset = key_start + tile.keys.start
    seen = (key >= bounds[0:1, tile.queries] - offset) & (key <= bounds[1:2, tile.queries] - offset)
    if positions is None:
        return seen
    left, right = spec.window or (-1, -1)
    query, key = positions[0][:, tile.queries], positions[1][tile.keys, :1]
    for reach in ([0] if spec.causal else []) + ([right] if right >= 0 else []):
        seen &= key <= query + reach
    if left >= 0:
        seen &= key >= query - left
    return seen


def column(row: jax.Array) -> jax.Array:
    """[1, n] as [n, 128], the same in all lanes."""
    return jnp.broadcast_to(row, (128, row.shape[1])).T


def when_kind(kind, which: int, kinds: frozenset[int], action: Callable[[], None]) -> None:
    """Runs `action` in entries of one kind, if that kind can occur at all."""
    if which in kinds:
        pl.when(kind == which)(action)
