"""Grouped products on Hopper (H100, H200): functions of local arrays, called by the public ones."""

import jax
import jax.numpy as jnp

from pallas_kernels.errors import UnsupportedError
from pallas_kernels.kernels.grouped_matmul import hopper_forward, hopper_memory, hopper_transposed, products
from pallas_kernels.kernels.grouped_matmul.config import HopperGroupedMatmulConfig as Config
from pallas_kernels.kernels.grouped_matmul.config import HopperGroupedMatmulTransposedConfig as TransposedConfig
from pallas_kernels.target import current

OPERATION = "grouped_matmul_hopper"
MULTIPLE = 128  # of features in and out: what the tiles of the product and of both its gradients divide
TILES = (256, 128, 64)
ACCUMULATORS = 128 * 256  # float32 sums that the registers of two warpgroups hold


def unsupported(depth: int, columns: int, dtype: jax.typing.DTypeLike) -> str | None:
    """Why these kernels do not take x [M, depth] times weights [G, depth, columns] and its gradients; None if they do.

    M, G and the sizes of the groups may be anything.
    """
    missing = current().lacks_kernels("gpu")
    if missing is not None:
        return missing
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"{jnp.dtype(dtype)}: the tensor cores of Hopper multiply bfloat16 and float16 here"
    for name, size in (("depth", depth), ("columns", columns)):
        if size == 0 or size % MULTIPLE:
            return f"{name} {size} is no multiple of {MULTIPLE}"
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

    Rows past the groups give zeros. XLA gathers x[rows] ahead of the kernel: Hopper's copy engine cannot.
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
    config = _configured(config, "dw", group_sizes.shape[0], x.shape[1], y.shape[1])
    _check("the gradient of the weights", misfit(config, "dw", group_sizes.shape[0], x.shape[1], y.shape[1], x.dtype))
    atom = hopper_transposed.ATOM
    count = max(-(x.shape[0] // -atom) * atom, config.tile_m)
    x, y = (_pad_rows(part, count) for part in (x, y))
    return hopper_transposed.transposed(x, y, group_sizes, out_dtype=out_dtype, config=config)


def misfit(config: Config | TransposedConfig | None, kind: str, groups: int, k: int, n: int, dtype) -> str | None:
    """Why the kernel of a product of this kind does not take the sizes that one device has; None if it does.

    They may be smaller than those that `unsupported` saw: a mesh divides K and N.
    """
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"x is {dtype}"
    config = _configured(config, kind, groups, k, n)
    depth = config.tile_k if kind == "dw" else hopper_memory.columns(dtype)
    for name, size, tile in (("depth", k, depth), ("columns", n, config.tile_n)):
        if size == 0 or size % tile:
            return f"{name} {size} on one device is no multiple of {tile}"
    return None


def fits(config: Config | TransposedConfig, weights: int = 1) -> bool:
    """Whether the block sizes fit into shared memory and registers; `weights` is 2 for `gated_product`."""
    if isinstance(config, TransposedConfig):
        used, sums = config.shared_memory(), config.tile_k * config.tile_n
    else:
        used, sums = config.shared_memory(weights), config.tile_m * config.tile_n * weights
    return used <= hopper_memory.LIMIT and sums <= ACCUMULATORS


def _products(x, weights, group_sizes, rows, transpose_w, keep, out_dtype, config) -> tuple[jax.Array, ...]:
    x = products.take(x, rows)
    groups, k, n = group_sizes.shape[0], x.shape[1], weights[0].shape[1 if transpose_w else 2]
    kind = products.kind(len(weights), transpose_w)
    config = _configured(config, kind, groups, k, n)
    _check("grouped_matmul", misfit(config, kind, groups, k, n, x.dtype))
    outs = hopper_forward.forward(
        _pad_rows(x, max(x.shape[0], config.tile_m)),
        weights,
        group_sizes,
        transpose_w=transpose_w,
        keep=keep,
        out_dtype=jnp.dtype(out_dtype),
        config=config,
    )
    return tuple(out[: x.shape[0]] for out in outs)


def _configured(config, kind: str, groups: int, k: int, n: int) -> Config | TransposedConfig:
    """`config`, or the recorded one, or one with the widest tile that divides the columns, if any does."""
    kind_of_config = TransposedConfig if kind == "dw" else Config
    config = config or products.recorded(OPERATION, kind_of_config, kind, groups, k, n)
    tiles = TILES[1:] if kind == "gated" else TILES
    return config or kind_of_config(tile_n=next((tile for tile in tiles if n % tile == 0), tiles[-1]))


def _check(function: str, reason: str | None) -> None:
    if reason is not None:
        raise UnsupportedError(function, "pallas", reason)


def _pad_rows(x: jax.Array, rows: int) -> jax.Array:
    return x if x.shape[0] == rows else jnp.pad(x, ((0, rows - x.shape[0]), (0, 0)))
