"""The gradient of the weights on Hopper: for each group its rows of x, transposed, times its rows of dy."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

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
from pallas_kernels.kernels.grouped_matmul.config import HopperGroupedMatmulTransposedConfig as Config
from pallas_kernels.kernels.grouped_matmul.hopper_pipeline import Pipeline

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
            "x_smem": hopper_device.tiled((*stage_rows, config.tile_k), x.dtype),
            "dy_smem": hopper_device.tiled((*stage_rows, config.tile_n), dy.dtype),
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
    block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
    walk = _Walk(
        order=order,
        block=block,
        blocks=blocks,
        total=total,
        row_tiles=x.shape[1] // config.tile_k,
        column_tiles=dy.shape[1] // config.tile_n,
        rows=x.shape[0],
        config=config,
    )
    count = walk.count()
    shared = {
        "config": config,
        "walk": walk,
        "pipeline": Pipeline(full, empty, config.stages),
        "x_smem": x_smem,
        "dy_smem": dy_smem,
    }
    producer = _Producer(**shared, x=x, dy=dy)
    consumer = _Consumer(**shared, warpgroup=warpgroup, masked=masked, out_smem=out_smem, out=out)
    lax.cond(warpgroup == CONSUMERS, lambda: producer.run(count), lambda: consumer.run(count))


class _Place(NamedTuple):
    """A tile of the output, and the rows that it sums over.

    Attributes:
      group: whose weights.
      k, n: its place among the tiles of the group.
      start, end: first row of the group, and the row after its last.
      aligned: the row that copies begin with, the last multiple of `ATOM` up to `start`.
      steps: stages of rows; none for an empty group, which gives zeros.
    """

    group: jax.Array
    k: jax.Array
    n: jax.Array
    start: jax.Array
    end: jax.Array
    aligned: jax.Array
    steps: jax.Array


@dataclasses.dataclass(frozen=True)
class _Walk:
    """The tiles of the output that one block makes: those of the longest groups first.

    Attributes:
      order: reference to `schedule.longest_first`.
      block, blocks: number of this block, and of all.
      total: tiles of all groups.
      row_tiles, column_tiles: tiles of one group.
      rows: of all groups, and behind them.
    """

    order: Any
    block: jax.Array
    blocks: int
    total: int
    row_tiles: int
    column_tiles: int
    rows: int
    config: Config

    def count(self) -> jax.Array:
        """Tiles of this block."""
        whole, rest = divmod(self.total, self.blocks)
        return whole + (self._position(jnp.int32(whole)) < rest).astype(jnp.int32)

    def _position(self, turn: jax.Array) -> jax.Array:
        """Blocks take turns forwards and backwards, so that none always has the longer of two groups."""
        return jnp.where(lax.rem(turn, jnp.int32(2)) == 0, self.block, self.blocks - 1 - self.block)

    def place(self, turn: jax.Array) -> _Place:
        """Where this block's tile number `turn` is."""
        index, tiles_of_group = turn * self.blocks + self._position(turn), self.row_tiles * self.column_tiles
        rank = lax.div(index, jnp.int32(tiles_of_group))
        band = min(self.config.band, self.row_tiles)
        k, n = schedule.banded(index - rank * tiles_of_group, self.row_tiles, self.column_tiles, band)
        group, start, end = self.order[rank, 0], self.order[rank, 1], self.order[rank, 2]
        aligned = lax.div(start, jnp.int32(ATOM)) * ATOM
        tile_m = self.config.tile_m
        steps = jnp.where(end > start, lax.div(end - aligned + (tile_m - 1), jnp.int32(tile_m)), 0)
        return _Place(group, k, n, start, end, aligned, steps)

    def first_row(self, aligned: jax.Array, step: jax.Array) -> jax.Array:
        """Where the rows of a step begin: its last ones may lie behind the array, and it moves back."""
        return jnp.minimum(aligned + step * self.config.tile_m, self.rows - self.config.tile_m)


@dataclasses.dataclass(frozen=True)
class _Producer:
    """The warpgroup that loads `x` and `dy` into the stages of `x_smem` and `dy_smem`."""

    config: Config
    walk: _Walk
    pipeline: Pipeline
    x_smem: Any
    dy_smem: Any
    x: Any
    dy: Any

    def run(self, count: jax.Array) -> None:
        plgpu.set_max_registers(40, action="decrease")
        loaded = lax.fori_loop(0, count, self._tile, jnp.int32(0))
        self.pipeline.drain(loaded)

    def _tile(self, turn: jax.Array, loaded: jax.Array) -> jax.Array:
        """Loads what one tile of the output needs; the number of stages loaded by then."""
        place = self.walk.place(turn)

        def step(i, loaded):
            slot = self.pipeline.acquire(loaded)
            rows = pl.ds(pl.multiple_of(self.walk.first_row(place.aligned, i), ATOM), self.config.tile_m)
            for source, smem, part in ((self.x, self.x_smem, place.k), (self.dy, self.dy_smem, place.n)):
                width = smem.shape[-1]
                columns = pl.ds(part * width, width)
                plgpu.copy_gmem_to_smem(source.at[rows, columns], smem.at[slot], self.pipeline.full.at[slot])
            return loaded + 1

        return lax.fori_loop(0, place.steps, step, loaded)


@dataclasses.dataclass(frozen=True)
class _Consumer:
    """A warpgroup that multiplies: its share of the rows of each tile of the output, that is of the columns of x.

    `masked` is the barrier at which the warpgroups meet once rows of other groups are zeros.
    """

    config: Config
    walk: _Walk
    pipeline: Pipeline
    x_smem: Any
    dy_smem: Any
    warpgroup: jax.Array
    masked: Any
    out_smem: Any
    out: Any

    @property
    def height(self) -> int:
        """Rows of a tile of the output that are this warpgroup's."""
        return self.config.tile_k // CONSUMERS

    def run(self, count: jax.Array) -> None:
        plgpu.set_max_registers(232, action="increase")
        width = self.config.tile_n // CONSUMERS
        x_part = pl.ds(self.warpgroup * self.height, self.height)
        dy_part = pl.ds(self.warpgroup * width, width)

        def tile(turn, done):
            place = self.walk.place(turn)
            value = self._product(place, done, x_part, dy_part)
            done = done + place.steps
            pl.when(place.steps > 0)(lambda: self.pipeline.release(done - 1))
            rows = pl.ds(place.k * self.config.tile_k + self.warpgroup * self.height, self.height)
            value = value.astype(self.out.dtype)
            out, smem = self.out.at[place.group, rows], self.out_smem.at[self.warpgroup]
            _store(value, out, place.n * self.config.tile_n, smem)
            return done

        lax.fori_loop(0, count, tile, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    def _product(self, place: _Place, done: jax.Array, x_part: pl.Slice, dy_part: pl.Slice) -> jax.Array:
        """x^T dy, float32, from the stages of `place`, which come after `done`; the last is not released.

        Args:
          x_part: columns of x that this warpgroup multiplies, and that it masks.
          dy_part: columns of dy that it masks; it multiplies all of them.
        """

        def run(acc):
            def step(i, done):
                slot = self.pipeline.slot(done)
                row = self.walk.first_row(place.aligned, i)
                low, high = jnp.maximum(place.start, place.aligned + i * self.config.tile_m) - row, place.end - row
                self.pipeline.wait(slot)
                parts = self.x_smem.at[slot, :, x_part], self.dy_smem.at[slot, :, dy_part]
                pl.when((low > 0) | (high < self.config.tile_m))(lambda: self._mask(parts, low, high))
                plgpu.wgmma(acc, self.x_smem.at[slot, :, x_part].T, self.dy_smem.at[slot])
                plgpu.wgmma_wait(1)
                # All but the product just begun is done: hand back what the one before read.
                pl.when(i > 0)(lambda: self.pipeline.release(done - 1))
                return done + 1

            lax.fori_loop(0, place.steps, step, done)
            return acc[...]  # waits for the last product

        return pl.run_scoped(run, plgpu.ACC((self.height, self.config.tile_n), jnp.float32))

    def _mask(self, parts: Sequence[Any], low: jax.Array, high: jax.Array) -> None:
        """Rows of the neighbours become zeros in both operands, for theirs may not be finite."""
        for part in parts:
            _keep_rows(part, low, high)
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.masked)
        plgpu.barrier_wait(self.masked)


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
