"""Forward attention on TPU.

Scores are held transposed, [keys, queries]. Maxima and sums over keys then run down the sublanes, where they are
elementwise, and the probabilities enter the second product as the stationary operand, which fills the 256 wide
matrix unit of v6e and TPU7x although heads are 128 wide. Softmax is in base 2, online over blocks of keys
(Dao et al. 2022, arXiv 2205.14135).
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import partition, target
from pallas_kernels.kernels.attention import block_lists, tpu_heads
from pallas_kernels.kernels.attention.spec import AttentionSpec, Masks
from pallas_kernels.kernels.attention.tpu_configs import TpuAttentionForwardConfig as ForwardConfig
from pallas_kernels.kernels.attention.tpu_tiles import (
    HIDDEN,
    LOG2_E,
    LOWEST,
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


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    masks: Masks,
    *,
    spec: AttentionSpec,
    config: ForwardConfig,
) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, H, K] and log-sum-exp [B, H, T] float32 of arrays in bfloat16 or float32."""
    batch, queries, heads, size = q.shape
    keys = k.shape[1]
    units = tpu_heads.units(heads, k.shape[2], size, q.dtype, config.heads)
    positions = masks.compared_positions(spec)
    by_position = positions is not None
    first, last = block_lists.intervals(spec, batch, queries, keys, masks.q_segments, masks.kv_segments, by_position)
    blocks = block_lists.block_list(
        spec,
        first,
        last,
        keys,
        config.block_q,
        config.block_kv,
        positions=positions,
    )
    inputs = _inputs(q, k, v, blocks, positions, config, units)
    outputs = _outputs(q, k, v, blocks, config, units)
    out, lse = pl.pallas_call(
        functools.partial(
            _kernel,
            spec=spec,
            config=config,
            units=units,
            kinds=blocks.kinds,
            has_bounds=blocks.bounds is not None,
            has_positions=by_position,
            short=keys % config.block_kv and keys,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(units.count, blocks.count),
            in_specs=[spec for _, spec in inputs],
            out_specs=[spec for _, spec in outputs],
            scratch_shapes=_scratch(q, config, units, by_position),
        ),
        out_shape=[shape for shape, _ in outputs],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem_limit()
        ),
        name="attention_forward",
    )(*map(jnp.asarray, (blocks.rows, blocks.cols, blocks.flags)), *(x for x, _ in inputs))
    return out.reshape(q.shape), lse.reshape(batch, heads, queries)


def _inputs(q, k, v, blocks, positions, config, units) -> list[tuple[jax.Array, pl.BlockSpec]]:
    """Arrays of the kernel, and which block of them a step reads."""
    rows, bq, bk = blocks.rows_per_batch, config.block_q, config.block_kv

    def at_kv(unit, step, row, col, *_):
        return row[step] // rows, col[step], units.kv_block(unit)

    def along_q(unit, step, row, *_):
        return row[step] // rows, 0, row[step] % rows

    def along_kv(unit, step, row, col, *_):
        return row[step] // rows, 0, col[step]

    found = [
        (units.q.array(q), units.q.spec(bq, _at_q(rows))),
        (units.kv.array(k), units.kv.spec(bk, at_kv)),
        (units.kv.array(v), units.kv.spec(bk, at_kv)),
    ]
    return found + mask_inputs(blocks.bounds, positions, bq, bk, along_q, along_kv)


def _outputs(q, k, v, blocks, config, units) -> list[tuple[jax.ShapeDtypeStruct, pl.BlockSpec]]:
    """Results of the kernel, and which block of them a step writes: the output and its log-sum-exp."""
    batch, queries, rows, n = q.shape[0], q.shape[1], blocks.rows_per_batch, units.q.block

    def at_lse(unit, step, row, *_):
        return row[step] // rows, unit, 0, row[step] % rows

    lse_shape = (batch, units.count, n, queries)
    return [
        (
            partition.out_struct(units.q.shape(batch, queries), q.dtype, q, k, v),
            units.q.spec(config.block_q, _at_q(rows)),
        ),
        (partition.out_struct(lse_shape, jnp.float32, q, k, v), pl.BlockSpec((1, 1, n, config.block_q), at_lse)),
    ]


def _at_q(rows: int):
    """Index of the block of queries of a step, of which a row of the batch has so many."""
    return lambda unit, step, row, *_: (row[step] // rows, row[step] % rows, unit)


def _scratch(q, config, units, by_position: bool) -> list[pltpu.VMEM]:
    bq, bk, n, g, size = config.block_q, config.block_kv, units.q.block, units.kv_heads, q.shape[3]
    return [
        pltpu.VMEM((n, bq, size), q.dtype),
        pltpu.VMEM((g, bk, size), q.dtype),
        pltpu.VMEM((g, size, bk), q.dtype),
        pltpu.VMEM((n, 1, bq), jnp.float32),
        pltpu.VMEM((n, 1, bq), jnp.float32),
        pltpu.VMEM((n, size, bq), jnp.float32),
        *([pltpu.VMEM((bk, 128), jnp.int32)] if by_position else []),
    ]


def vmem_limit() -> int:
    """Bytes of vector memory that a kernel may take on the current target: all but what XLA keeps for itself.

    `tpu.vmem_bytes` counts blocks, scratch and spilled tiles one by one, so no more than that is held back.
    """
    return target.VMEM[target.current().family] - 8 * 2**20


def _kernel(rows, cols, flags, q, k, v, *refs, spec, config, units, kinds, has_bounds, has_positions, short):
    bounds, positions, refs = mask_refs(refs, has_bounds, has_positions)
    out, lse, q_heads, k_heads, v_heads, maxima, sums, accumulators, *columns = refs
    unit, step = pl.program_id(0), pl.program_id(1)
    flag = flags[step]
    kind = flag & (2**block_lists.KIND_BITS - 1)
    key_start = cols[step] * config.block_kv

    @pl.when(flag & block_lists.FIRST != 0)
    def start():
        for n in range(units.q.block):
            q_heads[n] = units.q.load(q, n)
        maxima[...] = jnp.full_like(maxima, LOWEST)
        sums[...] = jnp.zeros_like(sums)
        accumulators[...] = jnp.zeros_like(accumulators)

    @pl.when(kind != block_lists.EMPTY)
    def load():
        def one(n, head):
            k_heads[n] = units.kv.load(k, head)
            values = units.kv.load(v, head).T
            if short:  # what lies behind the array is anything, even NaN
                index = jax.lax.broadcasted_iota(jnp.int32, values.shape, 1)
                values = jnp.where(index < short - key_start, values, 0).astype(values.dtype)
            v_heads[n] = values

        units.each_kv(unit, one)
        if has_positions:
            columns[0][...] = column(positions[1][...])

    def seen(tile):
        return visible(tile, spec, key_start, bounds, (positions[0], columns[0]) if has_positions else None)

    state = (q_heads, k_heads, v_heads, maxima, sums, accumulators)
    for which in (block_lists.FULL, block_lists.DIAGONAL, block_lists.PARTIAL):
        when_kind(kind, which, kinds, functools.partial(_block, which, state, seen, spec, config, units, has_bounds))

    @pl.when(flag & block_lists.LAST != 0)
    def finish():
        def head(n):
            total = sums[n]
            nonzero = total > 0
            log = jnp.log2(jnp.where(nonzero, total, 1.0)) + maxima[n]
            lse[0, 0, n : n + 1, :] = jnp.where(nonzero, log / LOG2_E, -jnp.inf)
            return (accumulators[n] * jnp.where(nonzero, 1 / jnp.where(nonzero, total, 1.0), 0.0)).T.astype(out.dtype)

        units.q.store(out, head)


def _block(which, state, seen, spec, config, units, has_bounds):
    """One block of scores of every head of the unit."""
    q_heads, k_heads, v_heads, maxima, sums, accumulators = state
    order = tiles(which, config.block_q, config.block_kv, config.tile_q, config.tile_kv, has_bounds)
    factor = spec.scale * LOG2_E

    def products(tile: Tile):
        kv = tile.head // units.sharing
        return dot(k_heads[kv, tile.keys], q_heads[tile.head, tile.queries], (1, 1))

    def softmax(tile: Tile, scores):
        if spec.soft_cap:
            scores = jnp.tanh(scores * (spec.scale / spec.soft_cap)) * (spec.soft_cap * LOG2_E)
        else:
            scores = scores * factor
        if tile.masked:
            scores = jnp.where(seen(tile), scores, HIDDEN)
        before = maxima[tile.head, :, tile.queries]
        after = jnp.maximum(before, jnp.max(scores, axis=0, keepdims=True))
        weights, decay = jnp.exp2(scores - after), jnp.exp2(before - after)
        maxima[tile.head, :, tile.queries] = after
        total = jnp.sum(weights, axis=0, keepdims=True)
        sums[tile.head, :, tile.queries] = sums[tile.head, :, tile.queries] * decay + total
        return weights.astype(v_heads.dtype), decay

    def accumulate(tile: Tile, weights, decay):
        part = dot(v_heads[tile.head // units.sharing, :, tile.keys], weights, (1, 0))
        accumulators[tile.head, :, tile.queries] = accumulators[tile.head, :, tile.queries] * decay + part

    for_each_head(units.q.block, config.unroll, order, products, softmax, accumulate)
