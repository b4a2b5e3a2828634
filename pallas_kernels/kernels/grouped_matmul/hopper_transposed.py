"""The gradient of the weights on Hopper: for each group its rows of x, transposed, times its rows of dy."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import partition, target
from pallas_kernels.kernels.grouped_matmul import hopper_memory as memory
from pallas_kernels.kernels.grouped_matmul import hopper_schedule as schedule
from pallas_kernels.kernels.grouped_matmul.config import OUT_SLOTS
from pallas_kernels.kernels.grouped_matmul.config import HopperGroupedMatmulTransposedConfig as Config

CONSUMERS = 2  # warpgroups that multiply; one more loads
ATOM = 8  # rows: a copy of tiles starts at a multiple of them


def transposed(
    x: jax.Array, dy: jax.Array, group_sizes: jax.Array, *, out_dtype: jax.typing.DTypeLike, config: Config
) -> jax.Array:
    """x [M, K], dy [M, N] -> [G, K, N]. M is a multiple of 8 and at least tile_m."""
    (rows, features), out_columns, groups = x.shape, dy.shape[1], group_sizes.shape[0]
    order = schedule.longest_first(group_sizes, rows)
    total = groups * (features // config.tile_k) * (out_columns // config.tile_n)
    blocks = min(target.current().cores, total)
    stage_rows = (config.stages, config.tile_m)

    def grouped_matmul_transposed(*refs, **scratch):
        _kernel(*refs, **scratch, config=config, blocks=blocks, total=total)

    kernel = plgpu.kernel(
        grouped_matmul_transposed,
        out_type=partition.out_struct((groups, features, out_columns), out_dtype, x, dy, group_sizes),
        scratch_types={
            "x_smem": memory.tiled((*stage_rows, config.tile_k), x.dtype),
            "dy_smem": memory.tiled((*stage_rows, config.tile_n), dy.dtype),
            "out_smem": memory.swizzled(
                (CONSUMERS, OUT_SLOTS, config.tile_k // CONSUMERS, memory.columns(out_dtype)), out_dtype
            ),
            "full": plgpu.Barrier(num_arrivals=2, num_barriers=config.stages),
            "empty": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=config.stages),
            "masked": plgpu.Barrier(num_arrivals=CONSUMERS),
        },
        grid=(blocks,),
        grid_names=("block",),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )
    return kernel(order, x, dy)


def _kernel(order, x, dy, out, *, x_smem, dy_smem, out_smem, full, empty, masked, config, blocks, total):
    rows = x.shape[0]
    row_tiles, column_tiles = x.shape[1] // config.tile_k, dy.shape[1] // config.tile_n
    block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
    stages = jnp.int32(config.stages)

    def position(turn):
        """Blocks take turns forwards and backwards, so that none always has the longer of two groups."""
        return jnp.where(lax.rem(turn, jnp.int32(2)) == 0, block, blocks - 1 - block)

    count = total // blocks + (position(jnp.int32(total // blocks)) < total % blocks).astype(jnp.int32)

    def place(turn):
        """Group, output tile, first and last row, and steps of this block's tile number `turn`."""
        index = turn * blocks + position(turn)
        rank = lax.div(index, jnp.int32(row_tiles * column_tiles))
        k, n = schedule.banded(
            index - rank * (row_tiles * column_tiles), row_tiles, column_tiles, min(config.band, row_tiles)
        )
        group, start, end = order[rank, 0], order[rank, 1], order[rank, 2]
        aligned = lax.div(start, jnp.int32(ATOM)) * ATOM
        steps = jnp.where(end > start, lax.div(end - aligned + (config.tile_m - 1), jnp.int32(config.tile_m)), 0)
        return group, k, n, start, end, aligned, steps  # no steps for an empty group: zeros

    def first_row(aligned, i):
        return jnp.minimum(aligned + i * config.tile_m, rows - config.tile_m)

    def produce():
        plgpu.set_max_registers(40, action="decrease")

        def tile(turn, done):
            _, k, n, _, _, aligned, steps = place(turn)

            def step(i, done):
                slot = lax.rem(done, stages)

                @pl.when(done >= stages)
                def _():
                    plgpu.barrier_wait(empty.at[slot])

                mine = pl.ds(pl.multiple_of(first_row(aligned, i), ATOM), config.tile_m)
                for source, smem, part in ((x, x_smem, k), (dy, dy_smem, n)):
                    width = smem.shape[-1]
                    plgpu.copy_gmem_to_smem(source.at[mine, pl.ds(part * width, width)], smem.at[slot], full.at[slot])
                return done + 1

            return lax.fori_loop(0, steps, step, done)

        done = lax.fori_loop(0, count, tile, jnp.int32(0))
        for slot in range(config.stages):  # every arrival is awaited, so that the barriers end in a known phase

            @pl.when(slot < done)
            def _(slot=slot):
                plgpu.barrier_wait(empty.at[slot])

    def consume():
        plgpu.set_max_registers(232, action="increase")
        height, width = config.tile_k // CONSUMERS, config.tile_n // CONSUMERS
        x_part, dy_part = pl.ds(warpgroup * height, height), pl.ds(warpgroup * width, width)

        def tile(turn, done):
            group, k, n, start, end, aligned, steps = place(turn)

            def products(acc):
                def step(i, done):
                    slot = lax.rem(done, stages)
                    row = first_row(aligned, i)
                    low, high = jnp.maximum(start, aligned + i * config.tile_m) - row, end - row
                    plgpu.barrier_wait(full.at[slot])

                    @pl.when((low > 0) | (high < config.tile_m))
                    def _():  # rows of the neighbours: zeros in both operands, for theirs may not be finite
                        _keep_rows(x_smem.at[slot, :, x_part], low, high)
                        _keep_rows(dy_smem.at[slot, :, dy_part], low, high)
                        plgpu.commit_smem()
                        plgpu.barrier_arrive(masked)
                        plgpu.barrier_wait(masked)

                    plgpu.wgmma(acc, x_smem.at[slot, :, x_part].T, dy_smem.at[slot])
                    plgpu.wgmma_wait(1)

                    @pl.when(i > 0)  # all but the product just begun is done: hand back what the one before read
                    def _():
                        plgpu.barrier_arrive(empty.at[lax.rem(done - 1, stages)])

                    return done + 1

                lax.fori_loop(0, steps, step, done)
                return acc[...]  # waits for the last product

            value = pl.run_scoped(products, plgpu.ACC((height, config.tile_n), jnp.float32))
            done = done + steps

            @pl.when(steps > 0)
            def _():
                plgpu.barrier_arrive(empty.at[lax.rem(done - 1, stages)])

            target_rows = pl.ds(k * config.tile_k + warpgroup * height, height)
            _store(value.astype(out.dtype), out.at[group, target_rows], n * config.tile_n, out_smem.at[warpgroup])
            return done

        lax.fori_loop(0, count, tile, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    lax.cond(warpgroup == CONSUMERS, produce, consume)


def _keep_rows(smem, low, high):
    """Zeros in all rows but `low` to `high`."""
    row = memory.row_index(smem.shape)
    value = smem[...]
    smem[...] = jnp.where((row >= low) & (row < high), value, jnp.zeros_like(value))


def _store(value, out, column, smem):
    """`value` to `out` from `column` on, by parts of 128 bytes of each row."""
    part = smem.shape[-1]
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the copies of the tile before
    for i in range(value.shape[1] // part):
        slot = i % OUT_SLOTS
        if i >= OUT_SLOTS:
            plgpu.wait_smem_to_gmem(OUT_SLOTS - 1, wait_read_only=True)
        smem[slot] = value[:, i * part : (i + 1) * part]
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem.at[slot], out.at[:, pl.ds(column + i * part, part)])
