"""Hopper's grouped matmul in the interpreter over dtypes, layouts, epilogues and sizes of groups."""

import jax.numpy as jnp
import numpy as np
import pytest
from grouped_reference import close, gated, product, sizes, transposed
from hopper_interpreter import hopper

from pallas_kernels.kernels.grouped_matmul import hopper as kernels

pytestmark = pytest.mark.exhaustive


def draw(*shape, dtype=jnp.bfloat16, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape) / shape[-1] ** 0.25, dtype)


def test_transposed_weights_gathered_rows_and_two_blocks():
    group_sizes = sizes("some empty", 4, 190, seed=3)
    x, w = draw(64, 64), draw(4, 128, 64, seed=1)
    rows = np.random.default_rng(2).integers(0, 64, 190).astype(np.int32)
    config = kernels.Config(tile_n=64, stages=3, band=2)
    with hopper(cores=2):
        y = kernels.product(
            x, w, jnp.asarray(group_sizes), rows=rows, transpose_w=True, out_dtype=jnp.bfloat16, config=config
        )
    close(y, product(np.asarray(x, np.float64)[rows], np.swapaxes(w, 1, 2), group_sizes), "bfloat16")


def test_gated_with_fewer_rows_than_a_tile():
    group_sizes = np.array([5, 0, 37], np.int32)
    x, gate, up = draw(50, 128), draw(3, 128, 64, seed=1), draw(3, 128, 64, seed=2)
    config = kernels.Config(tile_n=64, stages=2)
    with hopper():
        outs = kernels.gated_product(
            x, gate, up, jnp.asarray(group_sizes), keep=True, out_dtype=jnp.float32, config=config
        )
    close(outs[0], gated(x, gate, up, group_sizes))
    close(outs[1], product(x, gate, group_sizes))
    close(outs[2], product(x, up, group_sizes))


@pytest.mark.parametrize("kind", ["one", "none"])
def test_one_group_with_all_rows_or_none(kind):
    group_sizes = sizes(kind, 3, 130)
    x, w, y = draw(130, 128, dtype=jnp.float16), draw(3, 128, 64, seed=1, dtype=jnp.float16), draw(130, 64, seed=2)
    with hopper():
        out = kernels.product(
            x, w, jnp.asarray(group_sizes), out_dtype=jnp.float16, config=kernels.Config(tile_n=64, stages=2)
        )
        dw = kernels.transposed_product(
            x.astype(jnp.bfloat16),
            y,
            jnp.asarray(group_sizes),
            out_dtype=jnp.bfloat16,
            config=kernels.TransposedConfig(tile_n=64, stages=3),
        )
    close(out, product(x, w, group_sizes), "float16")
    close(dw, transposed(x.astype(jnp.bfloat16), y, group_sizes), "bfloat16")


def test_wide_tiles_of_the_gradient_and_two_blocks():
    group_sizes = sizes("short", 3, 100, seed=5)
    x, y = draw(100, 256), draw(100, 128, seed=1)
    config = kernels.TransposedConfig(tile_k=256, tile_n=128, stages=2, band=1)
    with hopper(cores=2):
        dw = kernels.transposed_product(x, y, jnp.asarray(group_sizes), out_dtype=jnp.float32, config=config)
    close(dw, transposed(x, y, group_sizes))
