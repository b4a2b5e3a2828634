"""Grouped matmul on TPUs: x [M, K] by the weights of each row's group, the whole depth at once."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import partition
from pallas_kernels.kernels.grouped_matmul import tpu_schedule
from pallas_kernels.kernels.grouped_matmul.config import TpuGroupedMatmulConfig as Config


def forward(
    x: jax.Array,
    weights: tuple[jax.Array, ...],
    group_sizes: jax.Array,
    *,
    transpose_w: bool,
    keep: bool,
    out_dtype: jax.typing.DTypeLike,
    config: Config,
    vmem_limit: int,
) -> tuple[jax.Array, ...]:
    """x [M, K] times [G, K, N] ([G, N, K] if `transpose_w`); two weights give silu(x gate) * (x up) and, with `keep`,
    x gate and x up as well. M > 0. Columns are divided between the cores of a device.
    """
    (count, depth), groups = x.shape, group_sizes.shape[0]
    columns = weights[0].shape[1 if transpose_w else 2]
    width = min(config.columns, columns)
    outs = 3 if keep else 1
    group, *places = tpu_schedule.steps(group_sizes, count, config.rows, visit_empty=False)
    loaded = jnp.minimum(group, jnp.max(jnp.where(group < groups, group, 0)))  # none for rows past the groups

    def w_place(n, t, group, loaded, *_):
        return (loaded[t], n, 0) if transpose_w else (loaded[t], 0, n)

    call = pl.pallas_call(
        functools.partial(_kernel, groups=groups, weights=len(weights), transpose_w=transpose_w, part=config.part),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(pl.cdiv(columns, width), group.shape[0]),
            in_specs=[
                pl.BlockSpec((config.rows, depth), lambda n, t, group, loaded, row_block, *_: (row_block[t], 0)),
                *[pl.BlockSpec((None, width, depth) if transpose_w else (None, depth, width), w_place)] * len(weights),
            ],
            out_specs=[pl.BlockSpec((config.rows, width), lambda n, t, group, loaded, row_block, *_: (row_block[t], n))]
            * outs,
        ),
        out_shape=[partition.out_struct((count, columns), out_dtype, x, *weights, group_sizes)] * outs,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem_limit
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * len(weights) * count * depth * columns,
            transcendentals=(len(weights) - 1) * count * columns,
            bytes_accessed=x.nbytes + sum(w.nbytes for w in weights) + outs * count * columns * x.dtype.itemsize,
        ),
        name="grouped_matmul_gated" if len(weights) > 1 else "grouped_matmul",
    )
    return tuple(call(group, loaded, *places, x, *weights))


def _kernel(group, loaded, row_block, starts, ends, x, *refs, groups: int, weights: int, transpose_w: bool, part: int):
    del loaded, row_block
    w, outs = refs[:weights], refs[weights:]
    step, rows = pl.program_id(1), x.shape[0]
    start, end = starts[step], ends[step]
    real = group[step] < groups
    contracted = (((1,), (1 if transpose_w else 0,)), ((), ()))

    def results(x):
        products = [lax.dot_general(x, each[...], contracted, preferred_element_type=jnp.float32) for each in w]
        if weights == 1:
            return products
        return [jax.nn.silu(products[0]) * products[1], *products][: len(outs)]

    def store(place, values):
        """Writes the rows of this step's group, and leaves those of its neighbours."""
        row = place.start + lax.broadcasted_iota(jnp.int32, (place.size, 1), 0)
        mine = (row >= start) & (row < end)
        for out, value in zip(outs, values, strict=True):
            out[place] = jnp.where(mine, value.astype(out.dtype), out[place])

    whole = (start <= 0) & (end >= rows)

    @pl.when(real & whole)
    def _():
        for out, value in zip(outs, results(x[...]), strict=True):
            out[...] = value.astype(out.dtype)

    @pl.when(real & ~whole)
    def _():
        def one(i, _):
            place = pl.ds(pl.multiple_of(i * part, part), part)
            store(place, results(x[place]))

        lax.fori_loop(jnp.maximum(start, 0) // part, pl.cdiv(jnp.minimum(end, rows), part), one, None)

    @pl.when(~real & (start < end))
    def _():
        store(pl.ds(0, rows), [jnp.zeros((), jnp.float32)] * len(outs))
