"""Backward attention on TPU: one kernel, five products for each block of scores.

Blocks come in the order of the forward kernel, queries outside. The gradient of a block of queries is summed in
vector memory while its keys pass, and so are those of all keys of a row of the batch, which grouped queries keep
small; a sequence too long for that is taken in spans of keys. As in the forward kernel scores are transposed, and
all three gradients are made transposed, [head size, positions], with the scores as the stationary operand.
Formulas: Dao et al. 2022, arXiv 2205.14135, appendix B.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import partition
from pallas_kernels.kernels.attention import block_lists, tpu_heads
from pallas_kernels.kernels.attention.spec import AttentionSpec, Masks
from pallas_kernels.kernels.attention.tpu_configs import TpuAttentionBackwardConfig as BackwardConfig
from pallas_kernels.kernels.attention.tpu_forward import vmem_limit
from pallas_kernels.kernels.attention.tpu_tiles import (
    HIDDEN,
    LOG2_E,
    Tile,
    column,
    dot,
    for_each_head,
    mask_inputs,
    mask_refs,
    tiles,
    visible,
    when_kind,
)


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    dout: jax.Array,
    masks: Masks,
    *,
    spec: AttentionSpec,
    config: BackwardConfig,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v, in their shapes, of arrays in bfloat16 or float32."""
    batch, queries, heads, size = q.shape
    keys = k.shape[1]
    units = tpu_heads.units(heads, k.shape[2], size, q.dtype, config.heads)
    positions = masks.compared_positions(spec)
    first, last = block_lists.intervals(
        spec, batch, queries, keys, masks.q_segments, masks.kv_segments, positions is not None
    )
    span = keys_at_once(units, config)
    sums, parts = 0.0, []
    for start in range(0, keys, span):
        part = slice(start, min(start + span, keys))
        of_part = None if positions is None else (positions[0], positions[1][:, part])
        blocks = block_lists.block_list(
            spec,
            first,
            last,
            part.stop - part.start,
            config.block_q,
            config.block_kv,
            positions=of_part,
            key_offset=start,
            flush=True,
        )
        if keys <= span:
            return _call(q, k, v, lse, delta, dout, spec, blocks, of_part, config, units, q.dtype)
        keys_of, values_of = k[:, part], v[:, part]
        dq, *dkv = _call(q, keys_of, values_of, lse, delta, dout, spec, blocks, of_part, config, units, jnp.float32)
        sums, parts = sums + dq, [*parts, dkv]
    return sums.astype(q.dtype), *(jnp.concatenate(x, axis=1) for x in zip(*parts, strict=True))


def keys_at_once(units: tpu_heads.Units, config: BackwardConfig) -> int:
    """Keys whose gradients fit in half of the vector memory, in whole blocks."""
    per_key = 2 * 4 * units.kv_heads * max(units.kv.size, 8)
    return max(vmem_limit() // 2 // per_key // config.block_kv, 1) * config.block_kv


def _call(q, k, v, lse, delta, dout, spec, blocks, positions, config, units, dq_dtype):
    """The gradients of q, in `dq_dtype`, and of k and v, which fit in vector memory."""
    batch, queries, keys = q.shape[0], q.shape[1], k.shape[1]
    inputs = _inputs(q, k, v, lse, delta, dout, blocks, positions, config, units)
    # Units that read the same key head each give a part of its gradient.
    sharers = max(1, units.ratio // units.q.block)
    whole = None
    if sharers == 1:
        whole = tpu_heads.HeadBlocks.of(units.kv.heads, q.shape[3], units.kv_heads, k.dtype, exact=True)
    shape, dtype, kv_spec = _gradient_of_keys(k, blocks, config, units, whole, sharers)
    dq_shape = partition.out_struct(units.q.shape(batch, queries), dq_dtype, q, k, v, dout)
    kv_shape = partition.out_struct(shape, dtype, q, k, v, dout)
    plan = _Plan(
        spec=spec,
        config=config,
        units=units,
        whole=whole,
        kinds=blocks.kinds,
        height=blocks.rows_per_batch,
        has_bounds=blocks.bounds is not None,
        has_positions=positions is not None,
        short_q=queries % config.block_q and queries,
        short_kv=keys % config.block_kv and keys,
    )
    dq, dk, dv = pl.pallas_call(
        functools.partial(_kernel, plan=plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(units.count, blocks.count),
            in_specs=[block for _, block in inputs],
            out_specs=[units.q.spec(config.block_q, _at_q(blocks.rows_per_batch)), kv_spec, kv_spec],
            scratch_shapes=_scratch(q, k, config, units, positions is not None),
        ),
        out_shape=[dq_shape, kv_shape, kv_shape],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem_limit()
        ),
        name="attention_backward",
    )(*map(jnp.asarray, (blocks.rows, blocks.cols, blocks.flags)), *(x for x, _ in inputs))
    if not whole:
        dk, dv = (_joined(x, sharers, units.kv_heads, k) for x in (dk, dv))
    return dq.reshape(q.shape), dk.reshape(k.shape), dv.reshape(v.shape)


def _inputs(q, k, v, lse, delta, dout, blocks, positions, config, units) -> list[tuple[jax.Array, pl.BlockSpec]]:
    """Arrays of the kernel, and which block of them a step reads."""
    batch, queries, height, n = q.shape[0], q.shape[1], blocks.rows_per_batch, units.q.block
    bq, bk, at_q = config.block_q, config.block_kv, _at_q(height)

    def at_kv(unit, step, row, col, *_):
        return row[step] // height, col[step], units.kv_block(unit)

    def at_statistic(unit, step, row, *_):
        return row[step] // height, unit, 0, _query_block(row, step, height)

    def along_q(unit, step, row, *_):
        return row[step] // height, 0, _query_block(row, step, height)

    def along_kv(unit, step, row, col, *_):
        return row[step] // height, 0, col[step]

    def statistic(x):
        return x.reshape(batch, units.count, n, queries), pl.BlockSpec((1, 1, n, bq), at_statistic)

    found = [
        (units.q.array(q), units.q.spec(bq, at_q)),
        (units.q.array(dout), units.q.spec(bq, at_q)),
        (units.kv.array(k), units.kv.spec(bk, at_kv)),
        (units.kv.array(v), units.kv.spec(bk, at_kv)),
        statistic(lse),
        statistic(delta),
    ]
    return found + mask_inputs(blocks.bounds, positions, bq, bk, along_q, along_kv)


def _query_block(row, step, height: int):
    """The block of queries of a step within its row of the batch; in FLUSH entries that of the last one."""
    return jnp.minimum(row[step] % height, height - 2)


def _at_q(height: int):
    return lambda unit, step, row, *_: (row[step] // height, _query_block(row, step, height), unit)


def _gradient_of_keys(k, blocks, config, units, whole, sharers: int):
    """Shape and dtype of the gradient of keys or values as the kernel writes it, and which block a step writes."""
    batch, keys, _, size = k.shape
    height, bk, g = blocks.rows_per_batch, config.block_kv, units.kv_heads

    def at_flush(step, row, col):
        return row[step] // height, jnp.where(row[step] % height == height - 1, col[step], 0)

    if whole:
        spec = whole.spec(bk, lambda u, t, row, col, *_: (*at_flush(t, row, col), u))
        return whole.shape(batch, keys), k.dtype, spec
    spec = pl.BlockSpec((1, 1, bk, g * size), lambda u, t, row, col, *_: (u, *at_flush(t, row, col), 0))
    return (units.count, batch, keys, g * size), jnp.float32 if sharers > 1 else k.dtype, spec


def _scratch(q, k, config, units, by_position: bool) -> list[pltpu.VMEM]:
    """The memory of `_Scratch`."""
    bq, bk, n, g, size = config.block_q, config.block_kv, units.q.block, units.kv_heads, q.shape[3]
    cols = math.ceil(k.shape[1] / bk)
    of_queries, of_keys = pltpu.VMEM((n, size, bq), q.dtype), pltpu.VMEM((g, bk, size), q.dtype)
    row, sum_of_keys = pltpu.VMEM((n, 1, bq), jnp.float32), pltpu.VMEM((cols, g, size, bk), jnp.float32)
    found = _Scratch(
        q=of_queries,
        dout=of_queries,
        k=of_keys,
        k_turned=pltpu.VMEM((g, size, bk), q.dtype),
        v=of_keys,
        lse=row,
        delta=row,
        dq=pltpu.VMEM((n, size, bq), jnp.float32),
        dk=sum_of_keys,
        dv=sum_of_keys,
        key_positions=pltpu.VMEM((bk, 128), jnp.int32) if by_position else None,
    )
    return [memory for memory in found if memory is not None]


def _joined(parts, sharers: int, together: int, like):
    """[units, B, S, heads x size] summed over the units that share key heads, as [B, S, G, K]."""
    batch, keys, _, size = like.shape
    parts = parts.reshape(-1, sharers, batch, keys, together, size).sum(axis=1)
    return parts.transpose(1, 2, 0, 3, 4).astype(like.dtype)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What one kernel is specialised for.

    Attributes:
      spec, config, units: as everywhere.
      whole: blocks of all key heads of a unit, in which it writes gradients; None where units share key heads.
      kinds: of blocks of scores that can occur.
      height: rows of blocks that a row of the batch has, with the one of FLUSH entries.
      has_bounds, has_positions: which masks there are.
      short_q, short_kv: the length where the last block reaches beyond the array, else 0.
    """

    spec: AttentionSpec
    config: BackwardConfig
    units: tpu_heads.Units
    whole: tpu_heads.HeadBlocks | None
    kinds: frozenset[int]
    height: int
    has_bounds: bool
    has_positions: bool
    short_q: int
    short_kv: int


class _Scratch(NamedTuple):
    """What stays in vector memory from step to step; n query heads, g key heads, positions of a block last.

    Attributes:
      q, dout: [n, size, queries], of the block of queries at hand.
      k, v: [g, keys, size], of the block of keys at hand; k_turned: [g, size, keys].
      lse, delta: [n, 1, queries]; lse in powers of two.
      dq: [n, size, queries], the sum over the keys so far.
      dk, dv: [blocks, g, size, keys], the sums over the queries so far, of all blocks of keys.
      key_positions: [keys, lanes], where positions decide.
    """

    q: Any
    dout: Any
    k: Any
    k_turned: Any
    v: Any
    lse: Any
    delta: Any
    dq: Any
    dk: Any
    dv: Any
    key_positions: Any = None


def _kernel(rows, cols, flags, q, dout, k, v, lse, delta, *refs, plan: _Plan):
    bounds, positions, refs = mask_refs(refs, plan.has_bounds, plan.has_positions)
    dq, dk, dv, *scratch = refs
    scratch = _Scratch(*scratch)
    unit, step = pl.program_id(0), pl.program_id(1)
    flag, col = flags[step], cols[step]
    kind = flag & (2**block_lists.KIND_BITS - 1)
    key_start = col * plan.config.block_kv

    @pl.when(flag & block_lists.FIRST_OF_ROW != 0)
    def clear():
        scratch.dk[...] = jnp.zeros_like(scratch.dk)
        scratch.dv[...] = jnp.zeros_like(scratch.dv)

    @pl.when(flag & block_lists.FIRST != 0)
    def start():
        length = plan.short_q and plan.short_q - rows[step] % plan.height * plan.config.block_q
        _load_queries(plan, scratch, q, dout, lse, delta, length)

    @pl.when((kind != block_lists.EMPTY) & (kind != block_lists.FLUSH))
    def load():
        _load_keys(plan, scratch, unit, k, v, plan.short_kv and plan.short_kv - key_start)
        if positions:
            scratch.key_positions[...] = column(positions[1][...])

    def seen(tile):
        by_position = (positions[0], scratch.key_positions) if positions else None
        return visible(tile, plan.spec, key_start, bounds, by_position)

    for which in (block_lists.FULL, block_lists.DIAGONAL, block_lists.PARTIAL):
        when_kind(kind, which, plan.kinds, functools.partial(_block, which, plan, scratch, col, seen))

    @pl.when(flag & block_lists.LAST != 0)
    def finish():
        plan.units.q.store(dq, lambda n: (scratch.dq[n] * plan.spec.scale).T.astype(dq.dtype))

    @pl.when(kind == block_lists.FLUSH)
    def flush():
        _store_keys(plan, dk, scratch.dk, col, plan.spec.scale)
        _store_keys(plan, dv, scratch.dv, col, 1.0)


def _load_queries(plan: _Plan, scratch: _Scratch, q, dout, lse, delta, length) -> None:
    """Head after head of a new block of queries, of which `length` exist, and nothing summed for it yet."""
    for n in range(plan.units.q.block):
        scratch.q[n] = _cut(plan.units.q.load(q, n).T, 1, length)
        scratch.dout[n] = _cut(plan.units.q.load(dout, n).T, 1, length)
        scratch.lse[n] = _cut(lse[0, 0, n : n + 1, :] * LOG2_E, 1, length)
        scratch.delta[n] = _cut(delta[0, 0, n : n + 1, :], 1, length)
    scratch.dq[...] = jnp.zeros_like(scratch.dq)


def _load_keys(plan: _Plan, scratch: _Scratch, unit, k, v, length) -> None:
    """Head after head of the keys and values of a step, of which `length` exist."""

    def one(n, head):
        keys = _cut(plan.units.kv.load(k, head), 0, length)
        scratch.k[n] = keys
        scratch.k_turned[n] = keys.T
        scratch.v[n] = _cut(plan.units.kv.load(v, head), 0, length)

    plan.units.each_kv(unit, one)


def _store_keys(plan: _Plan, ref, total, col, factor: float) -> None:
    """Writes the gradients of block `col` of keys or values, times `factor`."""
    heads = [(total[col, n] * factor).T.astype(ref.dtype) for n in range(plan.units.kv_heads)]
    if plan.whole:
        plan.whole.store(ref, heads.__getitem__)
        return
    size = plan.units.kv.size
    for n, head in enumerate(heads):
        ref[0, 0, :, n * size : (n + 1) * size] = head


def _cut(x: jax.Array, axis: int, length) -> jax.Array:
    """Zeros behind `length`, where a block reaches beyond its array: what lies there is anything, even NaN."""
    if isinstance(length, int) and not length:
        return x
    index = jax.lax.broadcasted_iota(jnp.int32, x.shape, axis)
    return jnp.where(index < length, x, 0).astype(x.dtype)


def _block(which: int, plan: _Plan, scratch: _Scratch, col, seen: Callable[[Tile], jax.Array]) -> None:
    """One block of scores, of kind `which`, of every head of the unit; `seen` masks those of a tile."""
    spec, config, sharing = plan.spec, plan.config, plan.units.sharing
    dk_sum, dv_sum = scratch.dk.at[col], scratch.dv.at[col]
    order = tiles(which, config.block_q, config.block_kv, config.tile_q, config.tile_kv, plan.has_bounds)

    def products(tile: Tile):
        kv = tile.head // sharing
        scores = dot(scratch.k[kv, tile.keys], scratch.q[tile.head, :, tile.queries], (1, 0))
        return scores, dot(scratch.v[kv, tile.keys], scratch.dout[tile.head, :, tile.queries], (1, 0))

    def softmax(tile: Tile, both):
        scores, dweights = both
        if spec.soft_cap:
            bent = jnp.tanh(scores * (spec.scale / spec.soft_cap))
            scores = bent * (spec.soft_cap * LOG2_E)
        else:
            scores = scores * (spec.scale * LOG2_E)
        if tile.masked:
            scores = jnp.where(seen(tile), scores, HIDDEN)
        weights = jnp.exp2(scores - scratch.lse[tile.head, :, tile.queries])
        dscores = weights * (dweights - scratch.delta[tile.head, :, tile.queries])
        if spec.soft_cap:
            dscores = dscores * (1 - bent * bent)
        return weights.astype(scratch.q.dtype), dscores.astype(scratch.q.dtype)

    def accumulate(tile: Tile, weights, dscores):
        kv = tile.head // sharing
        dv_sum[kv, :, tile.keys] += dot(scratch.dout[tile.head, :, tile.queries], weights, (1, 1))
        dk_sum[kv, :, tile.keys] += dot(scratch.q[tile.head, :, tile.queries], dscores, (1, 1))
        scratch.dq[tile.head, :, tile.queries] += dot(scratch.k_turned[kv, :, tile.keys], dscores, (1, 0))

    for_each_head(plan.units.q.block, config.unroll, order, products, softmax, accumulate)
