"""Hopper's grouped matmul in the interpreter against float64 NumPy: one product, one gradient, what is refused."""

import jax.numpy as jnp
import numpy as np
import pytest
from grouped_reference import close, product, transposed
from hopper_interpreter import hopper

from pallas_kernels import target
from pallas_kernels.errors import UnsupportedError
from pallas_kernels.kernels.grouped_matmul import hopper as kernels
from pallas_kernels.kernels.grouped_matmul import tuning_hopper


def draw(*shape, dtype=jnp.float16, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape) / shape[-1] ** 0.25, dtype)


@pytest.mark.slow
def test_product_with_groups_at_any_row():
    # More than a tile, none, less than a tile at a row that is no multiple of 8, and rows past the groups.
    group_sizes = np.array([133, 0, 11], np.int32)
    x, w = draw(160, 128), draw(3, 128, 64, seed=1)
    config = kernels.Config(tile_n=64, stages=2)
    with hopper():
        y = kernels.product(x, w, jnp.asarray(group_sizes), out_dtype=jnp.float16, config=config)
    close(y, product(x, w, group_sizes), "float16")
    assert not np.asarray(y)[group_sizes.sum() :].any()


@pytest.mark.slow
def test_transposed_product_ignores_neighbours():
    group_sizes = np.array([70, 0, 3], np.int32)
    x, y = draw(85, 128), draw(85, 64, seed=1)
    expected = transposed(x, y, group_sizes)
    x, y = x.at[73:].set(jnp.nan), y.at[73:].set(jnp.inf)
    config = kernels.TransposedConfig(tile_n=64, stages=2)
    with hopper():
        dw = kernels.transposed_product(x, y, jnp.asarray(group_sizes), out_dtype=jnp.float32, config=config)
    close(dw, expected)
    assert not np.asarray(dw)[1].any()


def test_unsupported_says_why():
    with target.compiling_for(target.H200):
        assert kernels.unsupported(2048, 768, jnp.bfloat16) is None
        assert "float32" in kernels.unsupported(2048, 768, jnp.float32)
        assert "columns 700" in kernels.unsupported(2048, 700, jnp.bfloat16)
        assert "depth 0" in kernels.unsupported(0, 768, jnp.bfloat16)
    with target.compiling_for(target.TPU_V5P):
        assert "TPU v5" in kernels.unsupported(2048, 768, jnp.bfloat16)


def test_local_sizes_are_checked():
    x, w, group_sizes = draw(8, 128), draw(2, 128, 96), jnp.zeros(2, jnp.int32)
    with target.compiling_for(target.H200), pytest.raises(UnsupportedError, match="columns 96"):
        kernels.product(x, w, group_sizes, out_dtype=jnp.float16)


def test_default_tiles_fit():
    assert kernels.fits(kernels.Config())
    assert not kernels.fits(kernels.Config(), weights=2)
    assert kernels.fits(kernels.TransposedConfig())
    assert not kernels.fits(kernels.TransposedConfig(stages=5))


def test_candidates_fit_their_shapes():
    for shape in tuning_hopper.shapes().values():
        found = tuning_hopper.candidates("hopper", shape)
        assert 3 <= len(found) <= 15
        weights = 2 if shape.kind == "gated" else 1
        assert all(kernels.fits(config, weights) and shape.columns % config.tile_n == 0 for config in found)
