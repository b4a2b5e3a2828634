"""Which rows a Hopper kernel works on in which step, from the group sizes: small arrays that XLA computes."""

import jax
import jax.numpy as jnp
from jax import lax

GROUP, ROW, LOW, HIGH = range(4)  # columns of a schedule


def bounds(group_sizes: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """First row of each group and the row after its last, [G] int32; sizes that exceed `rows` are cut there."""
    ends = jnp.minimum(jnp.cumsum(group_sizes.astype(jnp.int32)), rows)
    return jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]]), ends


def row_tiles(group_sizes: jax.Array, rows: int, tile: int) -> tuple[jax.Array, jax.Array]:
    """Tiles of `tile` rows that cover each group, and then the rows after the last group.

    A group of at least `tile` rows is covered by whole tiles, the last of which is moved back to end with the group:
    the rows that two tiles share get the same value twice, and no tile touches a row of another group. Only smaller
    groups have tiles of which rows LOW to HIGH alone are theirs.

    Args:
      group_sizes: [G] int32.
      rows: all rows, at least `tile`.
      tile: rows of a tile.

    Returns:
      [T, 4] int32, for each tile its group (G after the last one), first row, LOW and HIGH; and [2] int32, the number
      of tiles of groups, and of all tiles. Rows of the schedule past them mean nothing.
    """
    groups = group_sizes.shape[0]
    starts, ends = bounds(group_sizes, rows)
    starts = jnp.concatenate([starts, ends[-1:]])
    ends = jnp.concatenate([ends, jnp.full(1, rows, jnp.int32)])
    tiles = -((starts - ends) // tile)
    last = jnp.cumsum(tiles)
    index = jnp.arange(rows // tile + groups + 1, dtype=jnp.int32)
    group = jnp.minimum(jnp.sum(index[:, None] >= last, axis=1, dtype=jnp.int32), groups)
    start, end = starts[group], ends[group]
    row = start + (index - (last - tiles)[group]) * tile
    row = jnp.clip(jnp.minimum(row, jnp.maximum(start, end - tile)), 0, rows - tile)
    low, high = jnp.maximum(start - row, 0), jnp.minimum(end - row, tile)
    return jnp.stack([group, row, low, high], axis=1).astype(jnp.int32), last[groups - 1 :].astype(jnp.int32)


def longest_first(group_sizes: jax.Array, rows: int) -> jax.Array:
    """[G, 3] int32: groups by falling size, so that what is left for the end is short: group, first row, end row."""
    starts, ends = bounds(group_sizes, rows)
    group = jnp.argsort(starts - ends, stable=True).astype(jnp.int32)
    return jnp.stack([group, starts[group], ends[group]], axis=1)


def banded(index: jax.Array, rows: jax.Array | int, columns: int, band: int) -> tuple[jax.Array, jax.Array]:
    """Row and column of tile number `index` where bands of `band` rows are walked column by column, in the kernel."""
    first = lax.div(index, jnp.int32(band * columns)) * band
    height = jnp.minimum(jnp.int32(band), rows - first)
    within = index - first * columns
    return first + lax.rem(within, height), lax.div(within, height)
