"""Grouped products on TPUs: functions of local arrays, called by the public ones."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels import target
from pallas_kernels.kernels.grouped_matmul import products, tpu_forward, tpu_transposed
from pallas_kernels.kernels.grouped_matmul.config import TpuGroupedMatmulConfig as Config
from pallas_kernels.kernels.grouped_matmul.config import TpuGroupedMatmulTransposedConfig as TransposedConfig
from pallas_kernels.target import current

OPERATION = "grouped_matmul_tpu"
VMEM = {family: size * 3 // 4 for family, size in target.VMEM.items()}  # for a kernel; XLA keeps some for itself


def unsupported(depth: int, columns: int, dtype: jax.typing.DTypeLike) -> str | None:
    """Why these kernels do not take x [M, depth] times weights [G, depth, columns] and its gradients; None if they do.

    M, G and the sizes of the groups may be anything.
    """
    missing, dtype = current().lacks_kernels("tpu"), jnp.dtype(dtype)
    if missing is not None:
        return missing
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f"{dtype}: the matrix units of a TPU multiply bfloat16 and float32"
    if 0 in (depth, columns):
        return "there is nothing to multiply"
    if _forward_config(max(depth, columns), columns, dtype, 2, 3) is None:
        return f"rows of {max(depth, columns)} do not fit into VMEM whole"
    return None


def product(
    x: jax.Array,
    w: jax.Array,
    group_sizes: jax.Array,
    *,
    rows: jax.Array | None = None,
    transpose_w: bool = False,
    out_dtype: jax.typing.DTypeLike,
    config: Config | None = None,
) -> jax.Array:
    """[M, K] x [G, K, N] -> [M, N], or with `transpose_w` x [G, N, K]; `rows` takes x[rows] for x.

    XLA gathers x[rows] ahead of the kernel. There a copy of one row takes 16 to 18 cycles to issue (static count), once
    for every block of columns, while nothing is multiplied: more than reading and writing the gathered rows.
    """
    return _products(x, (w,), group_sizes, rows, transpose_w, False, out_dtype, config)[0]


def gated_product(
    x: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    group_sizes: jax.Array,
    *,
    rows: jax.Array | None = None,
    transpose_w: bool = False,
    keep: bool = False,
    out_dtype: jax.typing.DTypeLike,
    config: Config | None = None,
) -> tuple[jax.Array, ...]:
    """silu(x gate) * (x up), [M, N]; with `keep` also x gate and x up. Arguments as for `product`."""
    return _products(x, (gate, up), group_sizes, rows, transpose_w, keep, out_dtype, config)


def transposed_product(
    x: jax.Array,
    y: jax.Array,
    group_sizes: jax.Array,
    *,
    rows: jax.Array | None = None,
    out_dtype: jax.typing.DTypeLike,
    config: TransposedConfig | None = None,
) -> jax.Array:
    """For each group the product of its rows, [M, K] and [M, N] -> [G, K, N]; zeros for an empty group.

    Rows past the groups may hold anything, NaN too.
    """
    x = products.take(x, rows)
    groups, depth, columns = group_sizes.shape[0], x.shape[1], y.shape[1]
    if not x.shape[0]:
        return jnp.zeros((groups, depth, columns), out_dtype)
    if config is None:
        config = products.recorded(OPERATION, TransposedConfig, "dw", groups, depth, columns)
        if config is None or config.vmem(depth, columns, x.dtype) > limit():
            config = _transposed_config(x, y)
        config = _no_more_rows(config, x.shape[0])
    return tpu_transposed.transposed(x, y, group_sizes, out_dtype=out_dtype, config=config, vmem_limit=limit())


def limit() -> int:
    """Bytes of VMEM that a kernel may take."""
    return VMEM[current().family]


def _products(x, weights, group_sizes, rows, transpose_w, keep, out_dtype, config) -> tuple[jax.Array, ...]:
    x = products.take(x, rows)
    depth, columns = x.shape[1], weights[0].shape[1 if transpose_w else 2]
    if not x.shape[0]:
        return (jnp.zeros((0, columns), out_dtype),) * (3 if keep else 1)
    if config is None:
        kind = products.kind(len(weights), transpose_w)
        config = products.recorded(OPERATION, Config, kind, group_sizes.shape[0], depth, columns)
        sizes = (depth, columns, x.dtype, len(weights), 3 if keep else 1)
        if config is None or config.vmem(*sizes) > limit():
            config = _forward_config(*sizes)
        config = _no_more_rows(config, x.shape[0])
    return tpu_forward.forward(
        x,
        weights,
        group_sizes,
        transpose_w=transpose_w,
        keep=keep,
        out_dtype=out_dtype,
        config=config,
        vmem_limit=limit(),
    )


def _forward_config(depth: int, columns: int, dtype, weights: int, outs: int) -> Config | None:
    """The largest blocks that fit, with columns for every core; None if none fit."""
    for width in (2048, 1024, 512, 256, 128):
        for rows in (512, 256, 128):
            config = Config(rows, 128, _share_of_core(width, columns))
            if config.vmem(depth, columns, dtype, weights, outs) <= limit():
                return config
    return None


def _transposed_config(x: jax.Array, y: jax.Array) -> TransposedConfig:
    """The largest blocks that fit, with a part of the depth for every core."""
    depth, columns = x.shape[1], y.shape[1]
    for size in (2048, 1024, 512, 256):
        config = TransposedConfig(512, 256, _share_of_core(size, depth), size)
        if config.vmem(depth, columns, x.dtype) <= limit():
            break
    return config


def _no_more_rows(config, count: int):
    """The config with blocks that end where few rows do."""
    return dataclasses.replace(config, rows=min(config.rows, -(-count // config.part) * config.part))


def _share_of_core(size: int, whole: int) -> int:
    """At most `size`, a multiple of 128, and so much less than `whole` that every core gets a block."""
    share = -(-whole // (current().cores * 128)) * 128
    return min(size, share)
