"""The gradient of grouped weights on TPUs: for each group the product of its rows, summed block by block."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import partition
from pallas_kernels.kernels.grouped_matmul import tpu_schedule
from pallas_kernels.kernels.grouped_matmul.config import TpuGroupedMatmulTransposedConfig as Config


def transposed(
    x: jax.Array,
    y: jax.Array,
    group_sizes: jax.Array,
    *,
    out_dtype: jax.typing.DTypeLike,
    config: Config,
    vmem_limit: int,
) -> jax.Array:
    """[M, K] and [M, N] -> [G, K, N]; M > 0. The depth is divided between the cores of a device."""
    (count, depth), columns, groups = x.shape, y.shape[1], group_sizes.shape[0]
    height, width = min(config.depth, depth), min(config.columns, columns)
    places = tpu_schedule.steps(group_sizes, count, config.rows, visit_empty=True)
    call = pl.pallas_call(
        functools.partial(_kernel, part=config.part),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(pl.cdiv(depth, height), pl.cdiv(columns, width), places[0].shape[0]),
            in_specs=[
                pl.BlockSpec((config.rows, height), lambda k, n, t, group, row_block, *_: (row_block[t], k)),
                pl.BlockSpec((config.rows, width), lambda k, n, t, group, row_block, *_: (row_block[t], n)),
            ],
            out_specs=pl.BlockSpec((None, height, width), lambda k, n, t, group, *_: (group[t], k, n)),
            scratch_shapes=[pltpu.VMEM((height, width), jnp.float32)],
        ),
        out_shape=partition.out_struct((groups, depth, columns), out_dtype, x, y, group_sizes),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=vmem_limit
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * count * depth * columns,
            transcendentals=0,
            bytes_accessed=x.nbytes + y.nbytes + groups * depth * columns * x.dtype.itemsize,
        ),
        name="grouped_matmul_transposed",
    )
    return call(*places, x, y)


def _kernel(group, row_block, starts, ends, x, y, out, total, *, part: int):
    del row_block
    step, last = pl.program_id(2), pl.num_programs(2) - 1
    rows = x.shape[0]
    start, end = starts[step], ends[step]

    @pl.when((step == 0) | (group[step] != group[jnp.maximum(step - 1, 0)]))
    def _():
        total[...] = jnp.zeros_like(total)

    def add(x, y):
        total[...] += lax.dot_general(x, y, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)

    whole = (start <= 0) & (end >= rows)

    @pl.when(whole)
    def _():
        add(x[...], y[...])

    @pl.when(~whole)
    def _():
        def one(i, _):
            place = pl.ds(pl.multiple_of(i * part, part), part)
            row = i * part + lax.broadcasted_iota(jnp.int32, (part, 1), 0)
            mine = (row >= start) & (row < end)  # of both: rows past the groups may hold anything
            add(jnp.where(mine, x[place], 0), jnp.where(mine, y[place], 0))

        lax.fori_loop(jnp.maximum(start, 0) // part, pl.cdiv(jnp.minimum(end, rows), part), one, None)

    @pl.when((step == last) | (group[step] != group[jnp.minimum(step + 1, last)]))
    def _():
        out[...] = total[...].astype(out.dtype)
