"""Grouped matmul on Hopper: x [M, K] by the weights of each row's group."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import partition, target
from pallas_kernels.kernels import hopper_device
from pallas_kernels.kernels.grouped_matmul import hopper_memory as memory
from pallas_kernels.kernels.grouped_matmul import hopper_schedule as schedule
from pallas_kernels.kernels.grouped_matmul.config import OUT_SLOTS
from pallas_kernels.kernels.grouped_matmul.config import HopperGroupedMatmulConfig as Config
from pallas_kernels.kernels.grouped_matmul.hopper_pipeline import Pipeline

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
            "x_smem": memory.views(hopper_device.tiled(x_tiles, x.dtype), memory.swizzled(x_tiles, x.dtype)),
            "w_smem": [hopper_device.tiled(w_tiles, x.dtype) for _ in weights],
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
    block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
    depth_steps = x.shape[1] // x_tiled.shape[-1]
    walk = _Walk(
        tiles=tiles,
        product_tiles=counts[0],
        all_tiles=counts[1],
        block=block,
        blocks=blocks,
        column_tiles=column_tiles,
        depth_steps=depth_steps,
        band=config.band,
    )
    count = walk.count()
    shared = {
        "config": config,
        "walk": walk,
        "pipeline": Pipeline(full, empty, config.stages),
        "w_smem": w_smem,
        "transpose_w": transpose_w,
    }
    producer = _Producer(**shared, x=x, weights=weights, x_smem=x_copied)
    consumer = _Consumer(
        **shared, warpgroup=warpgroup, x_smem=x_tiled, outs=outs, out_whole=out_whole, out_rows=out_rows
    )
    lax.cond(warpgroup == CONSUMERS, lambda: producer.run(count), lambda: consumer.run(count))


@dataclasses.dataclass(frozen=True)
class _Walk:
    """The tiles of the output that one block makes: every `blocks`-th in the order of `schedule.banded`.

    Attributes:
      tiles: reference to the row tiles of `schedule.row_tiles`.
      product_tiles, all_tiles: how many of them belong to groups, and how many there are.
      block, blocks: number of this block, and of all.
      column_tiles: tiles in a row of the output.
      depth_steps: steps in which a tile goes over the depth.
      band: see `schedule.banded`.
    """

    tiles: Any
    product_tiles: jax.Array
    all_tiles: jax.Array
    block: jax.Array
    blocks: int
    column_tiles: int
    depth_steps: int
    band: int

    def count(self) -> jax.Array:
        """Tiles of this block."""
        return lax.div(self.all_tiles * self.column_tiles - self.block + (self.blocks - 1), jnp.int32(self.blocks))

    def place(self, turn: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Row tile, column tile and depth steps of this block's tile number `turn`."""
        m, n = schedule.banded(self.block + turn * self.blocks, self.all_tiles, self.column_tiles, self.band)
        steps = jnp.where(m < self.product_tiles, self.depth_steps, 0)
        return m, n, steps  # no steps after the last group: zeros


@dataclasses.dataclass(frozen=True)
class _Producer:
    """The warpgroup that loads `x` and `weights` into the stages of `x_smem` and `w_smem`."""

    config: Config
    walk: _Walk
    pipeline: Pipeline
    w_smem: Sequence[Any]
    transpose_w: bool
    x: Any
    weights: Sequence[Any]
    x_smem: Any

    def run(self, count: jax.Array) -> None:
        plgpu.set_max_registers(40, action="decrease")
        loaded = lax.fori_loop(0, count, self._tile, jnp.int32(0))
        self.pipeline.drain(loaded)

    def _tile(self, turn: jax.Array, loaded: jax.Array) -> jax.Array:
        """Loads what one tile of the output needs; the number of stages loaded by then."""
        m, n, steps = self.walk.place(turn)
        group, row = self.walk.tiles[m, schedule.GROUP], self.walk.tiles[m, schedule.ROW]
        rows, columns = pl.ds(row, self.config.tile_m), pl.ds(n * self.config.tile_n, self.config.tile_n)
        tile_k = self.x_smem.shape[-1]

        def step(k, loaded):
            slot = self.pipeline.acquire(loaded)
            full, depth = self.pipeline.full.at[slot], pl.ds(k * tile_k, tile_k)
            plgpu.copy_gmem_to_smem(self.x.at[rows, depth], self.x_smem.at[slot], full)
            for w, smem in zip(self.weights, self.w_smem, strict=True):
                part = w.at[group, columns, depth] if self.transpose_w else w.at[group, depth, columns]
                plgpu.copy_gmem_to_smem(part, smem.at[slot], full)
            return loaded + 1

        return lax.fori_loop(0, steps, step, loaded)


@dataclasses.dataclass(frozen=True)
class _Consumer:
    """A warpgroup that multiplies: its share of the rows of each tile.

    `out_whole` and `out_rows` are the two views of the shared memory through which results leave; see `_store`.
    """

    config: Config
    walk: _Walk
    pipeline: Pipeline
    w_smem: Sequence[Any]
    transpose_w: bool
    warpgroup: jax.Array
    x_smem: Any
    outs: Sequence[Any]
    out_whole: Any
    out_rows: Any

    @property
    def height(self) -> int:
        """Rows of a tile that are this warpgroup's."""
        return self.config.tile_m // CONSUMERS

    def run(self, count: jax.Array) -> None:
        plgpu.set_max_registers(232, action="increase")
        mine = pl.ds(self.warpgroup * self.height, self.height)

        def tile(turn, done):
            m, n, steps = self.walk.place(turn)
            values = self._products(mine, steps, done)
            done = done + steps
            pl.when(steps > 0)(lambda: self.pipeline.release(done - 1))
            self._finish(values, m, n)
            return done

        lax.fori_loop(0, count, tile, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    def _products(self, mine: pl.Slice, steps: jax.Array, done: jax.Array) -> list[jax.Array]:
        """x times each of the weights, float32, from the `steps` stages after `done`; the last is not released."""

        def run(*accs):
            def step(k, done):
                slot = self.pipeline.slot(done)
                self.pipeline.wait(slot)
                for acc, smem in zip(accs, self.w_smem, strict=True):
                    w = smem.at[slot]
                    plgpu.wgmma(acc, self.x_smem.at[slot, mine], w.T if self.transpose_w else w)
                plgpu.wgmma_wait(len(accs))
                # All but the products just begun are done: hand back what those before read.
                pl.when(k > 0)(lambda: self.pipeline.release(done - 1))
                return done + 1

            lax.fori_loop(0, steps, step, done)
            return [acc[...] for acc in accs]  # waits for the last products

        shape = (self.height, self.config.tile_n)
        return pl.run_scoped(run, *[plgpu.ACC(shape, jnp.float32) for _ in self.w_smem])

    def _finish(self, values: Sequence[jax.Array], m: jax.Array, n: jax.Array) -> None:
        """Stores the products of row tile `m` and column tile `n`, gate and up after SwiGLU."""
        if len(values) == 2:
            gated, plain = values
            values = [gated * plain / (1.0 + jnp.exp2(-math.log2(math.e) * gated)), gated, plain]
        values = [value.astype(out.dtype) for value, out in zip(values, self.outs, strict=False)]  # the first, or all
        row, low, high = (self.walk.tiles[m, i] for i in (schedule.ROW, schedule.LOW, schedule.HIGH))
        first = self.warpgroup * self.height
        low, high = (jnp.clip(edge - first, 0, self.height) for edge in (low, high))
        columns = pl.ds(n * self.config.tile_n, self.config.tile_n)
        whole, rows = self.out_whole.at[self.warpgroup], self.out_rows.at[self.warpgroup]
        for out, value in zip(self.outs, values, strict=True):
            _store(value, out.at[:, columns], row + first, low, high, whole, rows)


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
