"""Decoding token by token equals the forward pass over the whole sequence."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from davinci_jax import sharding
from davinci_jax.experiment import MeshConfig, ModelConfig
from davinci_jax.models import cache as caches
from davinci_jax.models import decoder as decoders

# Compiles many programs; left out of the fast subset.
pytestmark = pytest.mark.slow

CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_size=8,
    mlp_size=48,
    init_std=0.3,
    compute_dtype="float32",
)


@pytest.mark.parametrize(
    ("num_devices", "pieces", "num_kv_heads"),
    [
        (1, (1,) * 10, 4),
        (4, (6, 1, 1, 1, 1), 2),
        *(
            pytest.param(*case, marks=pytest.mark.exhaustive)
            for case in ((1, (6, 1, 1, 1, 1), 2), (1, (4, 3, 3), 1), (4, (4, 3, 3), 1))
        ),
    ],
)
def test_decoding_equals_the_forward_pass(num_devices, pieces, num_kv_heads):
    """Rows of ragged length, padded on the left, prompt in one piece or in several; every kind of head sharing."""
    config = dataclasses.replace(CONFIG, num_kv_heads=num_kv_heads)
    tokens = np.random.default_rng(0).integers(0, 64, (4, 10))
    padding = np.array([0, 3, 0, 1])
    with jax.set_mesh(sharding.make_mesh(MeshConfig(), jax.devices()[:num_devices])):
        model = decoders.build(config, jax.random.key(0))

        def place(x):
            return jax.device_put(jnp.asarray(x, jnp.int32), sharding.spec("batch", None))

        positions = np.maximum(np.arange(10) - padding[:, None], 0)
        segments = np.arange(10) >= padding[:, None]
        want = np.asarray(jax.jit(model.logits)(place(tokens), place(segments), place(positions)))
        cache, step = caches.init_cache(config, 4, 13, padding), jax.jit(caches.decode, donate_argnums=1)
        stop = 0
        for piece in pieces:
            start, stop = stop, stop + piece
            logits, cache = step(model, cache, place(tokens[:, start:stop]))
            real = padding < stop
            np.testing.assert_allclose(np.asarray(logits)[real], want[real, stop - 1], atol=1e-5, rtol=1e-5)
        assert int(cache.length) == 10


def test_a_row_does_not_depend_on_its_padding():
    tokens = np.random.default_rng(1).integers(0, 64, (1, 5))
    with jax.set_mesh(sharding.make_mesh(MeshConfig(), jax.devices()[:1])):
        model = decoders.build(CONFIG, jax.random.key(0))
        alone, _ = caches.decode(model, caches.init_cache(CONFIG, 1, 5), jnp.asarray(tokens))
        padded = jnp.asarray(np.concatenate([np.full((1, 3), 63), tokens], 1))
        shifted, _ = caches.decode(model, caches.init_cache(CONFIG, 1, 9, np.array([3])), padded)
    np.testing.assert_allclose(alone, shifted, atol=1e-5, rtol=1e-5)


def test_cache_is_in_the_compute_dtype():
    with jax.set_mesh(sharding.make_mesh(MeshConfig(), jax.devices()[:1])):
        cache = caches.init_cache(CONFIG, 2, 7)
    assert (cache.keys.shape, cache.keys.dtype) == ((3, 2, 7, 2, 8), jnp.float32)
