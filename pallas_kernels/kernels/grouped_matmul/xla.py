"""Grouped matmul in XLA's operations: blocks of rows of one group at a time, at most M + groups x block rows of work.

`lax.ragged_dot` is left alone: on CPUs and Hopper GPUs XLA turns it into a dense product for every group.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import target
from pallas_kernels.partition import vary_alike

CPU_BLOCK, TPU_BLOCK = 64, 512


def product(x, w, group_sizes, *, rows=None, transpose_w=False, out_dtype, config=None):
    """[M, K] x [G, K, N] -> [M, N], or with `transpose_w` x [G, N, K]; `rows` takes x[rows] for x."""
    del config  # of kernels
    return _map_blocks(functools.partial(_products, transpose_w, (out_dtype,)), x, (w,), group_sizes, rows)[0]


def gated_product(x, gate, up, group_sizes, *, rows=None, transpose_w=False, keep=False, out_dtype, config=None):
    """silu(x gate) * (x up), [M, N]; with `keep` also x gate and x up."""
    del config

    def block(x, gate, up):
        gated, plain = _products(transpose_w, (jnp.float32,) * 2, x, gate, up)
        hidden = jax.nn.silu(gated) * plain
        return tuple(y.astype(out_dtype) for y in ((hidden, gated, plain) if keep else (hidden,)))

    return _map_blocks(block, x, (gate, up), group_sizes, rows)


def transposed_product(x, y, group_sizes, *, rows=None, out_dtype, config=None):
    """For each group the product of its rows, [M, K] and [M, N] -> [G, K, N]; zeros for an empty group."""
    del config
    count = y.shape[0]
    if not count:
        return jnp.zeros((group_sizes.shape[0], x.shape[1], y.shape[1]), out_dtype)
    if target.current().platform == "gpu":
        groups, places, valid = _blocks(group_sizes, count, _gpu_block(count, group_sizes.shape[0]))
        x = _take(x, rows, places, valid)
        sums = jnp.einsum("tbk,tbn->tkn", x, _take(y, None, places, valid), preferred_element_type=jnp.float32)
        sums = jax.ops.segment_sum(sums, groups, group_sizes.shape[0], indices_are_sorted=True)
        return sums.astype(out_dtype)

    block = min(_block(), count)
    ends = jnp.cumsum(group_sizes)

    def one_group(_, bounds):
        start, end = bounds

        def body(i, total):
            first = jnp.minimum(start + i * block, count - block)  # the last block may reach back over the one before
            places = first + lax.iota(jnp.int32, block)
            valid = ((places >= start + i * block) & (places < end))[:, None]
            left, right = (
                _operand(jnp.where(valid, part, 0))
                for part in (_slice(x, rows, first, block), _slice(y, None, first, block))
            )
            return total + lax.dot_general(left, right, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)

        zeros = vary_alike(jnp.zeros((x.shape[1], y.shape[1]), jnp.float32), x, y, start)[0]
        return None, lax.fori_loop(0, -(-(end - start) // block), body, zeros).astype(out_dtype)

    return lax.scan(one_group, None, (ends - group_sizes, ends))[1]


def _products(transpose_w: bool, out_dtypes, x, *weights):
    """The products of one block of rows, or of a batch of blocks, with weights of their groups."""
    letters = "...bk,...nk->...bn" if transpose_w else "...bk,...kn->...bn"
    outs = (jnp.einsum(letters, x, w, preferred_element_type=jnp.float32) for w in weights)
    return tuple(out.astype(dtype) for out, dtype in zip(outs, out_dtypes, strict=True))


def _map_blocks(function: Callable, x, weights, group_sizes, rows):
    """Applies `function(rows of x, *weights of their group)` to every row that lies in a group; zeros elsewhere."""
    count = x.shape[0] if rows is None else rows.shape[0]
    if count and target.current().platform == "gpu":
        return _map_batched(function, x, weights, group_sizes, rows, count)
    block = min(_block(), count)
    shapes = jax.eval_shape(function, x[:1], *(w[0] for w in weights))
    outs = tuple(jnp.zeros((count, *shape.shape[1:]), shape.dtype) for shape in shapes)
    if not count:
        return outs
    ends = jnp.cumsum(group_sizes)

    def one_group(outs, group):
        start, end, *mine = group
        mine = [_operand(w) for w in mine]

        def body(i, outs):
            first = jnp.minimum(start + i * block, count - block)  # the last block may reach back over the one before
            places = first + lax.iota(jnp.int32, block)
            valid = ((places >= start + i * block) & (places < end))[:, None]
            results = function(_operand(_slice(x, rows, first, block)), *mine)
            return tuple(
                lax.dynamic_update_slice_in_dim(
                    out, jnp.where(valid, result, lax.dynamic_slice_in_dim(out, first, block)), first, 0
                )
                for out, result in zip(outs, results, strict=True)
            )

        return lax.fori_loop(0, -(-(end - start) // block), body, outs), None

    outs = vary_alike(*outs, x, group_sizes, *weights)[: len(outs)]
    return lax.scan(one_group, outs, (ends - group_sizes, ends, *weights))[0]


def _block() -> int:
    return TPU_BLOCK if target.current().platform == "tpu" else CPU_BLOCK


def _operand(x: jax.Array) -> jax.Array:
    """A CPU multiplies in float32 anyway: converted once here, rather than inside each product."""
    return x.astype(jnp.float32) if target.current().platform == "cpu" else x


def _slice(x, rows, first, block: int):
    """`block` rows from `first` on, of x or of x[rows]."""
    if rows is None:
        return lax.dynamic_slice_in_dim(x, first, block)
    return x.at[lax.dynamic_slice_in_dim(rows, first, block)].get(mode="clip")


def _map_batched(function: Callable, x, weights, group_sizes, rows, count: int):
    """`_map_blocks` as one batched product: a loop on a GPU waits for the host at every turn."""
    groups, places, valid = _blocks(group_sizes, count, _gpu_block(count, group_sizes.shape[0]))
    results = function(_take(x, rows, places, valid), *(w[groups] for w in weights))
    places = jnp.where(valid, places, count)
    return tuple(jnp.zeros((count, y.shape[-1]), y.dtype).at[places].set(y, mode="drop") for y in results)


def _gpu_block(count: int, groups: int) -> int:
    """Rows of a block: about half a mean group, so that neither padding nor copies of weights prevail."""
    half = max(count // (2 * groups), 1)
    return min(max(1 << (half.bit_length() - 1), 64), 1024)


def _blocks(group_sizes, count: int, block: int):
    """Of every block its group [T], the places of its rows [T, block], and which of them are its group's."""
    ends = jnp.cumsum(group_sizes)
    last = jnp.cumsum(-(-group_sizes // block))
    index = lax.iota(jnp.int32, count // block + group_sizes.shape[0])
    groups = jnp.minimum(jnp.searchsorted(last, index, side="right", method="compare_all"), group_sizes.shape[0] - 1)
    before = index - jnp.concatenate([jnp.zeros(1, last.dtype), last])[groups]
    places = ((ends - group_sizes)[groups] + before * block)[:, None] + lax.iota(jnp.int32, block)
    return groups, places, places < ends[groups][:, None]


def _take(x, rows, places, valid):
    """Rows [T, block] of x or x[rows]; zeros where not valid."""
    if rows is not None:
        places = rows.at[places].get(mode="clip")
    return jnp.where(valid[..., None], x.at[places].get(mode="clip"), 0)
