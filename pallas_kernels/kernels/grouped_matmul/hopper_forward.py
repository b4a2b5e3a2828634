"""Grouped matmul on Hopper: x [M, K] by the weights of each row's group."""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import partition, target
from pallas_kernels.kernels.grouped_matmul import hopper_memory as memory
from pallas_kernels.kernels.grouped_matmul import hopper_schedule as schedule
from pallas_kernels.kernels.grouped_matmul.config import OUT_SLOTS
from pallas_kernels.kernels.grouped_matmul.config import HopperGroupedMatmulConfig as Config

CONSUMERS = 2  # warpgroups that multiply; one more loads


def forward(
    x: jax.Array,
    weights: tuple[jax.Array, ...],
    group_sizes: jax.Array,
    *,
    transpose_w: bool,
    keep: bool = False,
    out_dtype: jax.typing.DTypeLike,
    config: Config,
) -> list[jax.Array]:
    """x [M, K] times [G, K, N] ([G, N, K] if `transpose_w`), with M >= tile_m.

    Two weights, gate and up, give silu(x gate) * (x up), and with `keep` also x gate and x up.
    """
    rows = x.shape[0]
    out_columns = weights[0].shape[1 if transpose_w else 2]
    tiles, counts = schedule.row_tiles(group_sizes, rows, config.tile_m)
    column_tiles = out_columns // config.tile_n
    blocks = min(target.current().cores, tiles.shape[0] * column_tiles)
    tile_k = memory.columns(x.dtype)
    x_tiles = (config.stages, config.tile_m, tile_k)
    w_tiles = (config.stages, *((config.tile_n, tile_k) if transpose_w else (tile_k, config.tile_n)))
    out_slots = (CONSUMERS, OUT_SLOTS, config.tile_m // CONSUMERS, memory.columns(out_dtype))
    out = partition.out_struct((rows, out_columns), out_dtype, x, *weights, group_sizes)

    def grouped_matmul(*refs, **scratch):
        _kernel(*refs, **scratch, config=config, blocks=blocks, column_tiles=column_tiles, transpose_w=transpose_w)

    kernel = plgpu.kernel(
        grouped_matmul,
        out_type=[out] * (1 + keep * len(weights)),
        scratch_types={
            "x_smem": memory.views(memory.tiled(x_tiles, x.dtype), memory.swizzled(x_tiles, x.dtype)),
            "w_smem": [memory.tiled(w_tiles, x.dtype) for _ in weights],
            "out_smem": memory.views(memory.swizzled(out_slots, out_dtype), memory.linear(out_slots, out_dtype)),
            "full": plgpu.Barrier(num_arrivals=1 + len(weights), num_barriers=config.stages),
            "empty": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=config.stages),
        },
        grid=(blocks,),
        grid_names=("block",),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
    )
    return kernel(tiles, counts, x, *weights)


def _kernel(tiles, counts, x, *refs, x_smem, w_smem, out_smem, full, empty, config, blocks, column_tiles, transpose_w):
    weights, outs = refs[: len(w_smem)], refs[len(w_smem) :]
    x_tiled, x_copied = memory.unpack(x_smem, 2)
    out_whole, out_rows = memory.unpack(out_smem, 2)
    tile_k = x_tiled.shape[-1]
    block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
    product_tiles, all_tiles = counts[0], counts[1]
    count = lax.div(all_tiles * column_tiles - block + (blocks - 1), jnp.int32(blocks))

    def place(turn):
        """Row tile, column tile and depth steps of this block's tile number `turn`."""
        m, n = schedule.banded(block + turn * blocks, all_tiles, column_tiles, config.band)
        steps = jnp.where(m < product_tiles, x.shape[1] // tile_k, 0)
        return m, n, steps  # no steps after the last group: zeros

    def produce():
        plgpu.set_max_registers(40, action="decrease")

        def tile(turn, done):
            m, n, steps = place(turn)
            group, row = tiles[m, schedule.GROUP], tiles[m, schedule.ROW]
            column = n * config.tile_n

            def step(k, done):
                slot = lax.rem(done, jnp.int32(config.stages))

                @pl.when(done >= config.stages)
                def _():
                    plgpu.barrier_wait(empty.at[slot])

                k_slice, n_slice = pl.ds(k * tile_k, tile_k), pl.ds(column, config.tile_n)
                plgpu.copy_gmem_to_smem(x.at[pl.ds(row, config.tile_m), k_slice], x_copied.at[slot], full.at[slot])
                for w, smem in zip(weights, w_smem, strict=True):
                    part = w.at[group, n_slice, k_slice] if transpose_w else w.at[group, k_slice, n_slice]
                    plgpu.copy_gmem_to_smem(part, smem.at[slot], full.at[slot])
                return done + 1

            return lax.fori_loop(0, steps, step, done)

        done = lax.fori_loop(0, count, tile, jnp.int32(0))
        for slot in range(config.stages):  # every arrival is awaited, so that the barriers end in a known phase

            @pl.when(slot < done)
            def _(slot=slot):
                plgpu.barrier_wait(empty.at[slot])

    def consume():
        plgpu.set_max_registers(232, action="increase")
        height = config.tile_m // CONSUMERS
        mine = pl.ds(warpgroup * height, height)

        def tile(turn, done):
            m, n, steps = place(turn)

            def products(*accs):
                def step(k, done):
                    slot = lax.rem(done, jnp.int32(config.stages))
                    plgpu.barrier_wait(full.at[slot])
                    for acc, smem in zip(accs, w_smem, strict=True):
                        w = smem.at[slot]
                        plgpu.wgmma(acc, x_tiled.at[slot, mine], w.T if transpose_w else w)
                    plgpu.wgmma_wait(len(accs))

                    @pl.when(k > 0)  # all but the products just begun are done: hand back what those before read
                    def _():
                        plgpu.barrier_arrive(empty.at[lax.rem(done - 1, jnp.int32(config.stages))])

                    return done + 1

                lax.fori_loop(0, steps, step, done)
                return [acc[...] for acc in accs]  # waits for the last products

            shape = (height, config.tile_n)
            values = pl.run_scoped(products, *[plgpu.ACC(shape, jnp.float32) for _ in weights])
            done = done + steps

            @pl.when(steps > 0)
            def _():
                plgpu.barrier_arrive(empty.at[lax.rem(done - 1, jnp.int32(config.stages))])

            if len(values) == 2:
                gated, plain = values
                values = [gated * plain / (1.0 + jnp.exp2(-math.log2(math.e) * gated)), gated, plain]
            values = [value.astype(out.dtype) for value, out in zip(values, outs, strict=False)]  # the first, or all
            row, low, high = (tiles[m, i] for i in (schedule.ROW, schedule.LOW, schedule.HIGH))
            first = warpgroup * height
            low, high = (jnp.clip(edge - first, 0, height) for edge in (low, high))
            column = pl.ds(n * config.tile_n, config.tile_n)
            for out, value in zip(outs, values, strict=True):
                part = out.at[:, column]
                _store(value, part, row + first, low, high, out_whole.at[warpgroup], out_rows.at[warpgroup])
            return done

        lax.fori_loop(0, count, tile, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    lax.cond(warpgroup == CONSUMERS, produce, consume)


def _store(value, out, row, low, high, whole, rows):
    """Rows `low` to `high` of `value` to `out` from `row` on, by parts of 128 bytes of each row."""
    height, width = value.shape
    size = whole.shape[-1]
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the copies of what was stored before

    @pl.when(high - low == height)
    def _():
        for i in range(width // size):
            slot = i % OUT_SLOTS
            if i >= OUT_SLOTS:
                plgpu.wait_smem_to_gmem(OUT_SLOTS - 1, wait_read_only=True)
            whole[slot] = value[:, i * size : (i + 1) * size]
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(whole.at[slot], out.at[pl.ds(row, height), pl.ds(i * size, size)])

    @pl.when((high > low) & (high - low < height))
    def _():
        for i in range(width // size):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            memory.store_linear(rows.at[0], value[:, i * size : (i + 1) * size])
            plgpu.commit_smem()
            _copy_rows(rows.at[0], out.at[:, pl.ds(i * size, size)], row, low, high, height)


def _copy_rows(rows, out, row, low, high, height):
    """Rows `low` to `high`: a copy has a fixed number of rows, so that up to four of a power of four cover them."""
    count = high - low
    size = 1
    while size < height:

        @pl.when((count >= size) & (count < 4 * size))
        def _(size=size):
            def copy(i, _):
                first = jnp.minimum(low + i * size, high - size)  # the last may overlap the one before
                plgpu.copy_smem_to_gmem(rows.at[pl.ds(first, size)], out.at[pl.ds(row + first, size)])

            lax.fori_loop(0, lax.div(count + (size - 1), jnp.int32(size)), copy, None)

        size *= 4
