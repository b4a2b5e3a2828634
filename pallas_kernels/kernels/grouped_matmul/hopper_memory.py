"""Shared memory of the Hopper kernels: other views of the tiles that tensor cores read, and what may be copied how."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import target
from pallas_kernels.kernels.grouped_matmul.config import SWIZZLE

LIMIT = 227 * 1024  # bytes of shared memory that one block may have


def columns(dtype: jax.typing.DTypeLike) -> int:
    """Elements in a row of a swizzled tile."""
    return SWIZZLE // jnp.dtype(dtype).itemsize


def swizzled(shape: tuple[int, ...], dtype: jax.typing.DTypeLike):
    """The bytes of `hopper_device.tiled` where rows have 128 bytes, but copied from or to any row of global memory.

    A copy of tiles sees global memory as blocks of 8 rows and would cut each one at a block's end.
    """
    assert shape[-1] == columns(dtype), shape
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.SwizzleTransform(SWIZZLE),))


def linear(shape: tuple[int, ...], dtype: jax.typing.DTypeLike):
    """Plain rows: slower to write from registers, but a copy may start at any of them."""
    return plgpu.SMEM(shape, dtype)


def views(*refs):
    """One region of shared memory as seen by each of `refs`, which have the same size; unpacked by `unpack`.

    The interpreter of jax 0.10 knows no unions; layouts mean nothing to it, and one view is as good as all.
    """
    return refs[0] if target.current().interpret else plgpu.RefUnion(*refs)


def unpack(ref, count: int) -> tuple:
    return (ref,) * count if target.current().interpret else tuple(ref)


def store_linear(ref, value: jax.Array) -> None:
    """Writes `value` to a `linear` ref, bank conflicts and all, which from jax 0.12 on must be allowed."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def row_index(shape: tuple[int, int]) -> jax.Array:
    """The row of each element, laid out over the registers as matrices read from shared memory are."""
    layout = None if target.current().interpret else plgpu.Layout.WGMMA  # which the interpreter does not know
    return plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout)
