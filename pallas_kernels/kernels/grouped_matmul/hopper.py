"""Grouped matmul on Hopper (H100, H200): functions of local arrays, called by the public ones."""

from typing import Literal

import jax
import jax.numpy as jnp

from pallas_kernels import tables
from pallas_kernels.errors import UnsupportedError
from pallas_kernels.kernels.grouped_matmul import hopper_forward, hopper_memory, hopper_transposed
from pallas_kernels.kernels.grouped_matmul.hopper_forward import Config as Config
from pallas_kernels.kernels.grouped_matmul.hopper_transposed import Config as TransposedConfig
from pallas_kernels.target import Target, current

OPERATION = "grouped_matmul_hopper"
MULTIPLE = 128  # of features in and out: the tiles of the product and of both gradients
TILES = (256, 128, 64)

Weights = jax.Array | tuple[jax.Array, jax.Array]


def supported(
    x_shape: tuple[int, ...],
    w_shape: tuple[int, ...],
    dtype: jax.typing.DTypeLike,
    *,
    w_dtype: jax.typing.DTypeLike | None = None,
    out_dtype: jax.typing.DTypeLike | None = None,
    target: Target,
) -> str | None:
    """Why these kernels, products and gradients, do not take a case; None if they do.

    Args:
      x_shape: (M, K), any M.
      w_shape: (G, K, N), or (G, N, K).
      dtype: of x.
      w_dtype: of the weights, by default that of x.
      out_dtype: of the result, by default that of x.
      target: the device.
    """
    dtype, out = jnp.dtype(dtype), jnp.dtype(out_dtype or dtype)
    if target.family != "hopper":
        return f"{target.device_kind} is no Hopper GPU"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"operands are {dtype}, and the tensor cores read bfloat16 and float16 here"
    if w_dtype is not None and jnp.dtype(w_dtype) != dtype:
        return f"weights are {jnp.dtype(w_dtype)} and x is {dtype}"
    if out not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"results are {out}"
    if x_shape[0] == 0 or w_shape[0] == 0:
        return "there are no rows or no groups"
    if any(size == 0 or size % MULTIPLE for size in w_shape[1:]):
        return f"features {w_shape[1]} and {w_shape[2]} are not multiples of {MULTIPLE}"
    return None


def shape_class(kind: Literal["plain", "transposed_w", "swiglu", "dw"], groups: int, k: int, n: int) -> str:
    """Key of the table of block sizes; x [M, k] is multiplied to [M, n], or "dw" is [groups, k, n]."""
    return f"{kind}/g{groups}/k{k}/n{n}"


def grouped_matmul(
    x: jax.Array,
    w: Weights,
    group_sizes: jax.Array,
    *,
    rows: jax.Array | None = None,
    transpose_w: bool = False,
    activation: Literal["swiglu"] | None = None,
    out_dtype: jax.typing.DTypeLike | None = None,
    config: Config | None = None,
) -> jax.Array:
    """Rows of x by the weights of their group, with float32 accumulation.

    Args:
      x: [M, K] bfloat16 or float16, sorted by group.
      w: [G, K, N], or [G, N, K] if `transpose_w`; for "swiglu" a pair (gate, up) of them.
      group_sizes: [G] int32; their sum is at most M.
      rows: [M] int32, to take x[rows] for x. XLA gathers them ahead of the kernel: the copy engine of Hopper
        cannot, and threads that could would be short of the tensor cores' pace.
      transpose_w: the weights' last dimension is the contracted one.
      activation: "swiglu" gives silu(x gate) * (x up).
      out_dtype: of the result, by default that of x.
      config: block sizes.

    Returns:
      [M, N]; rows past the groups are zero.

    Raises:
      UnsupportedError: see `supported`.
    """
    weights = tuple(w) if activation == "swiglu" else (w,)
    out_dtype = jnp.dtype(out_dtype or x.dtype)
    groups, out_features = weights[0].shape[0], weights[0].shape[1 if transpose_w else 2]
    _check("grouped_matmul", x, weights, out_dtype)
    if rows is not None:
        x = jnp.take(x, rows, axis=0, mode="clip")
    if config is None:
        kind = activation or ("transposed_w" if transpose_w else "plain")
        entry = tables.lookup(OPERATION, current().family, shape_class(kind, groups, x.shape[1], out_features))
        config = Config(**entry) if entry else default_config(out_features, len(weights))
    padded = _pad_rows(x, max(x.shape[0], config.tile_m))
    out = hopper_forward.forward(
        padded, weights, group_sizes, transpose_w=transpose_w, out_dtype=out_dtype, config=config
    )
    return out[: x.shape[0]]


def grouped_matmul_transposed(
    x: jax.Array,
    dy: jax.Array,
    group_sizes: jax.Array,
    *,
    out_dtype: jax.typing.DTypeLike | None = None,
    config: TransposedConfig | None = None,
) -> jax.Array:
    """For each group its rows of x, transposed, times its rows of dy: the gradient of the weights.

    Args:
      x: [M, K] bfloat16 or float16, sorted by group. Rows past the groups may hold anything.
      dy: [M, N] of the same type.
      group_sizes: [G] int32; their sum is at most M.
      out_dtype: of the result, by default that of x.
      config: block sizes.

    Returns:
      [G, K, N]; zeros for empty groups.

    Raises:
      UnsupportedError: see `supported`.
    """
    out_dtype = jnp.dtype(out_dtype or x.dtype)
    groups, k, n = group_sizes.shape[0], x.shape[1], dy.shape[1]
    _check("grouped_matmul", x, (jax.ShapeDtypeStruct((groups, k, n), dy.dtype),), out_dtype)
    if config is None:
        entry = tables.lookup(OPERATION, current().family, shape_class("dw", groups, k, n))
        config = TransposedConfig(**entry) if entry else default_transposed_config(n)
    rows = max(-(x.shape[0] // -hopper_transposed.ATOM) * hopper_transposed.ATOM, config.tile_m)
    return hopper_transposed.transposed(
        _pad_rows(x, rows), _pad_rows(dy, rows), group_sizes, out_dtype=out_dtype, config=config
    )


def default_config(out_features: int, weights: int) -> Config:
    """Block sizes where none are recorded: the widest tiles that the accumulators of two warpgroups hold."""
    return Config(tile_n=next(tile for tile in TILES if tile * weights <= 256 and out_features % tile == 0))


def default_transposed_config(out_features: int) -> TransposedConfig:
    """As `default_config`, for the gradient of the weights."""
    return TransposedConfig(tile_n=next(tile for tile in TILES if out_features % tile == 0))


def fits(config: Config | TransposedConfig, dtype: jax.typing.DTypeLike, weights: int = 1) -> bool:
    """Whether the block sizes fit into shared memory and registers."""
    if isinstance(config, TransposedConfig):
        used, accumulators = config.shared_memory(dtype), config.tile_k * config.tile_n
    else:
        used, accumulators = config.shared_memory(dtype, weights), config.tile_m * config.tile_n * weights
    return used <= hopper_memory.LIMIT and accumulators <= 128 * 256


def _check(function: str, x: jax.Array, weights: tuple, out_dtype: jnp.dtype) -> None:
    for w in weights:
        reason = supported(x.shape, w.shape, x.dtype, w_dtype=w.dtype, out_dtype=out_dtype, target=current())
        if reason:
            raise UnsupportedError(function, "pallas", reason)


def _pad_rows(x: jax.Array, rows: int) -> jax.Array:
    return x if x.shape[0] == rows else jnp.pad(x, ((0, rows - x.shape[0]), (0, 0)))
