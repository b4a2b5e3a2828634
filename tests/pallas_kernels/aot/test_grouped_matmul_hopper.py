"""Hopper's grouped matmul compiled for the H200: it fits, spills nothing, and the tensor cores are not serialised."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.compiler import aot
from pallas_kernels.kernels.grouped_matmul import hopper as kernels

TOKENS, GROUPS, DEPTH, COLUMNS = 131072, 128, 2048, 768
exhaustive = pytest.mark.exhaustive


def struct(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


SIZES = struct(GROUPS, dtype=jnp.int32)
X, Y, W = struct(TOKENS, DEPTH), struct(TOKENS, COLUMNS), struct(GROUPS, DEPTH, COLUMNS)

X16, W16 = (struct(*array.shape, dtype=jnp.float16) for array in (X, W))


def product(x, w, sizes, **options):
    return kernels.product(x, w, sizes, **{"out_dtype": x.dtype, **options})


def transposed_w(y, w, sizes):
    return product(y, w, sizes, transpose_w=True)


def float32_out(x, w, sizes):
    return product(x, w, sizes, out_dtype=jnp.float32)


def narrow(x, w, sizes):
    return product(x[:1000], w[:, :, :192], sizes)


def gated(x, gate, up, sizes, keep=False):
    return kernels.gated_product(x, gate, up, sizes, keep=keep, out_dtype=x.dtype)


def gated_kept(x, gate, up, sizes):
    return gated(x, gate, up, sizes, keep=True)


def tall(x, w, sizes):
    return product(x, w, sizes, config=kernels.Config(tile_m=256, tile_n=128, stages=3))


def transposed(x, y, sizes):
    return kernels.transposed_product(x, y, sizes, out_dtype=x.dtype)


def transposed_float32(x, y, sizes):
    return kernels.transposed_product(x[:1003], y[:1003], sizes, out_dtype=jnp.float32)


@pytest.mark.parametrize(
    ("function", "arguments", "wgmma"),
    [
        (product, (X, W, SIZES), 4),
        (transposed, (X, Y, SIZES), 4),
        pytest.param(transposed_w, (Y, W, SIZES), 4, marks=exhaustive),
        pytest.param(float32_out, (X, W, SIZES), 4, marks=exhaustive),
        pytest.param(narrow, (X, W, SIZES), 4, marks=exhaustive),
        pytest.param(gated, (X, W, W, SIZES), 8, marks=exhaustive),
        pytest.param(gated_kept, (X, W, W, SIZES), 8, marks=exhaustive),
        pytest.param(tall, (X, W, SIZES), 8, marks=exhaustive),
        pytest.param(transposed_float32, (X, Y, SIZES), 4, marks=exhaustive),
        pytest.param(product, (X16, W16, SIZES), 4, marks=exhaustive, id="float16"),
    ],
)
def test_compiles_without_spills(function, arguments, wgmma):
    (kernel,) = aot.compile_for("h200", function, *arguments).kernels
    assert (kernel.spill_stores, kernel.spill_loads, kernel.stack) == (0, 0, 0)
    # C7519 only says that a fence was put before the first product; C7510 would say that products wait for each other.
    assert not [line for line in kernel.warnings if "C7519" not in line]
    assert kernel.registers == 168  # three warpgroups share 65536
    assert kernel.wgmma % wgmma == 0
    assert kernel.wgmma >= wgmma
