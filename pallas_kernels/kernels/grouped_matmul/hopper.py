"""Grouped products on Hopper (H100, H200): functions of local arrays, called by the public ones."""

import jax
import jax.numpy as jnp

from pallas_kernels import tables
from pallas_kernels.errors import UnsupportedError
from pallas_kernels.kernels.grouped_matmul import hopper_forward, hopper_memory, hopper_transposed
from pallas_kernels.kernels.grouped_matmul.hopper_forward import Config as Config
from pallas_kernels.kernels.grouped_matmul.hopper_transposed import Config as TransposedConfig
from pallas_kernels.target import current

OPERATION = "grouped_matmul_hopper"
MULTIPLE = 128  # of features in and out: what the tiles of the product and of both its gradients divide
TILES = (256, 128, 64)
ACCUMULATORS = 128 * 256  # float32 sums that the registers of two warpgroups hold


def unsupported(depth: int, columns: int, dtype: jax.typing.DTypeLike) -> str | None:
    """Why these kernels do not take x [M, depth] times weights [G, depth, columns] and its gradients; None if they do.

    M, G and the sizes of the groups may be anything.
    """
    if current().family != "hopper":
        return f"there is no kernel for {current().device_kind}"
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
    x = _take(x, rows)
    groups, k, n = group_sizes.shape[0], x.shape[1], y.shape[1]
    if config is None:
        recorded = tables.lookup(OPERATION, current().family, shape_class("dw", groups, k, n))
        config = TransposedConfig(**recorded) if recorded else TransposedConfig(tile_n=_widest(n, TILES))
    _check("the gradient of the weights", x, {"depth": (k, config.tile_k), "columns": (n, config.tile_n)})
    atom = hopper_transposed.ATOM
    count = max(-(x.shape[0] // -atom) * atom, config.tile_m)
    x, y = (_pad_rows(part, count) for part in (x, y))
    return hopper_transposed.transposed(x, y, group_sizes, out_dtype=out_dtype, config=config)


def shape_class(kind: str, groups: int, k: int, n: int) -> str:
    """Key of the table of block sizes; `kind` is "product", "product_t" (with `transpose_w`), "gated" or "dw"."""
    return f"{kind}/groups{groups}/{k}x{n}"


def fits(config: Config | TransposedConfig, weights: int = 1) -> bool:
    """Whether the block sizes fit into shared memory and registers; `weights` is 2 for `gated_product`."""
    if isinstance(config, TransposedConfig):
        used, sums = config.shared_memory(), config.tile_k * config.tile_n
    else:
        used, sums = config.shared_memory(weights), config.tile_m * config.tile_n * weights
    return used <= hopper_memory.LIMIT and sums <= ACCUMULATORS


def _products(x, weights, group_sizes, rows, transpose_w, keep, out_dtype, config) -> tuple[jax.Array, ...]:
    x = _take(x, rows)
    k, n = x.shape[1], weights[0].shape[1 if transpose_w else 2]
    if config is None:
        kind = "gated" if len(weights) > 1 else "product_t" if transpose_w else "product"
        recorded = tables.lookup(OPERATION, current().family, shape_class(kind, group_sizes.shape[0], k, n))
        tiles = [tile for tile in TILES if tile * len(weights) <= TILES[0]]
        config = Config(**recorded) if recorded else Config(tile_n=_widest(n, tiles))
    _check("grouped_matmul", x, {"depth": (k, hopper_memory.columns(x.dtype)), "columns": (n, config.tile_n)})
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


def _widest(size: int, tiles) -> int:
    """The widest tile that divides `size`; if none does, the check that follows says so."""
    return next((tile for tile in tiles if size % tile == 0), tiles[-1])


def _check(function: str, x: jax.Array, sizes: dict[str, tuple[int, int]]) -> None:
    """Local sizes, which a mesh may have divided after `unsupported` saw them."""
    for name, (size, tile) in sizes.items():
        if size == 0 or size % tile:
            raise UnsupportedError(function, "pallas", f"{name} {size} on one device is no multiple of {tile}")
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        raise UnsupportedError(function, "pallas", f"x is {x.dtype}")


def _take(x: jax.Array, rows: jax.Array | None) -> jax.Array:
    return x if rows is None else jnp.take(x, rows, axis=0, mode="clip")


def _pad_rows(x: jax.Array, rows: int) -> jax.Array:
    return x if x.shape[0] == rows else jnp.pad(x, ((0, rows - x.shape[0]), (0, 0)))
