"""Layers: initial scale, and use on their own, without a mesh."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from davinci_jax import layers, ops
from davinci_jax.experiment import ModelConfig

CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=64,
    num_layers=8,
    num_heads=8,
    num_kv_heads=2,
    head_size=16,
    mlp_size=128,
    compute_dtype="float32",
    init_std=0.05,
)


@pytest.fixture(scope="module")
def block():
    return jax.jit(lambda key: layers.Block(CONFIG, key))(jax.random.key(0))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "shape", "std"),
    [
        ("attention.q_proj", (64, 8, 16), 0.05),
        ("attention.k_proj", (64, 2, 16), 0.05),
        ("attention.v_proj", (64, 2, 16), 0.05),
        ("attention.o_proj", (8, 16, 64), 0.05 / 4),  # sqrt(2 * 8 layers) = 4
        ("mlp.gate", (64, 128), 0.05),
        ("mlp.up", (64, 128), 0.05),
        ("mlp.down", (128, 64), 0.05 / 4),
    ],
)
def test_matrices_begin_normal_with_the_stated_scale(block, path, shape, std):
    module, name = path.split(".")
    value = np.asarray(getattr(getattr(block, module), name)[...])
    assert (value.shape, value.dtype) == (shape, np.float32)
    n = value.size
    assert abs(value.mean()) < 5 * std / n**0.5
    assert abs(value.std() / std - 1) < 5 / (2 * n) ** 0.5
    assert 0.67 < (np.abs(value) < std).mean() < 0.70  # 68.3 % of a normal lie within one deviation


def test_biases_begin_at_zero_and_norms_at_one(block):
    for name, heads in (("q_bias", 8), ("k_bias", 2), ("v_bias", 2)):
        np.testing.assert_array_equal(getattr(block.attention, name)[...], np.zeros((heads, 16)))
    np.testing.assert_array_equal(block.attention_norm.scale[...], np.ones(64))
    np.testing.assert_array_equal(block.mlp_norm.scale[...], np.ones(64))


def test_no_two_matrices_begin_alike(block):
    leaves = [np.asarray(leaf).ravel()[:64] for leaf in jax.tree.leaves(block) if np.asarray(leaf).std() > 0]
    assert len(leaves) == 7
    correlations = np.corrcoef(leaves) - np.eye(7)
    assert np.abs(correlations).max() < 0.6


@pytest.mark.slow
def test_a_layer_runs_without_a_mesh(block):
    """Attention of one token is its value, mixed: a closed form without softmax."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 1, 64)), jnp.float32)
    cos, sin = ops.rope_table(jnp.zeros((3, 1), jnp.int32), ops.rope_frequencies(16, 10000.0))
    out = block.attention(x, jnp.ones((3, 1), jnp.int32), cos, sin)
    value = np.einsum("btd,dgk->btgk", x, block.attention.v_proj[...]).repeat(4, axis=2)
    np.testing.assert_allclose(out, np.einsum("bthk,hkd->btd", value, block.attention.o_proj[...]), atol=1e-5)


@pytest.mark.slow
def test_layers_import_no_trainer():
    """Another project can use the layers: they bring in jax, flax and the config dataclasses only."""
    code = "import davinci_jax.layers, sys; print(*sorted(m for m in sys.modules if m.startswith('davinci_jax.')))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    allowed = ("errors", "experiment", "layers", "ops", "sharding")
    assert {name.split(".")[1] for name in found} == set(allowed)


@pytest.mark.slow
def test_ops_import_jax_only():
    code = (
        "import davinci_jax.ops, sys; print(*sorted(m for m in sys.modules if m.startswith(('davinci_jax.', 'flax'))))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {name.split(".")[1] for name in found} == {"ops"}
