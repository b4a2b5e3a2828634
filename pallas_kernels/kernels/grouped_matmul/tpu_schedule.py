"""The list of steps of a grouped product: which block of rows meets which group."""

import jax
import jax.numpy as jnp
from jax import lax


def steps(group_sizes: jax.Array, count: int, block: int, *, visit_empty: bool) -> tuple[jax.Array, ...]:
    """Steps in the order of rows: one for every group with rows in a block, so at most blocks + groups of them.

    The list has one length for all sizes of groups; what is left over at its end repeats the last step's block and
    group, with no rows, so that nothing is copied or computed.

    Args:
      group_sizes: [G] int32.
      count: of rows.
      block: rows of a block.
      visit_empty: also one step without rows for every empty group, whose weights' gradient is to be written; else
        also steps for the blocks of rows past all groups, whose group has the number G.

    Returns:
      group, row block, first row within the block, end within the block: four times [steps] int32. The first may be
      negative and the end lie beyond the block where the group goes on there.
    """
    blocks, groups = -(-count // block), group_sizes.shape[0]
    ends = jnp.cumsum(group_sizes)
    starts = ends - group_sizes
    if not visit_empty:
        starts, ends = jnp.append(starts, ends[-1]), jnp.append(ends, count)
    first = starts // block
    visits = jnp.where(ends > starts, (ends - 1) // block - first + 1, 1 if visit_empty else 0)
    first = jnp.minimum(first, blocks - 1)
    last_step = jnp.cumsum(visits)
    step = lax.iota(jnp.int32, blocks + groups)
    busy = step < last_step[-1]
    at = jnp.minimum(step, last_step[-1] - 1)
    group = jnp.sum(at[:, None] >= last_step, axis=1, dtype=jnp.int32)
    row_block = first[group] + at - (last_step - visits)[group]
    start = jnp.where(busy, starts[group] - row_block * block, 0)
    end = jnp.where(busy, ends[group] - row_block * block, 0)
    return tuple(values.astype(jnp.int32) for values in (group, row_block, start, end))
