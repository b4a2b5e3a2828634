"""The fingerprint against NumPy, over meshes, and over every kind of change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from davinci_jax.experiment import MeshConfig
from davinci_jax.sharding import make_mesh
from davinci_jax.training.fingerprint import fingerprint


def reference(x: np.ndarray) -> str:
    """The two sums in Python integers."""
    mask = 2**32 - 1

    def mix(h):
        h = (h ^ (h >> 16)) * 0x85EBCA6B & mask
        h = (h ^ (h >> 13)) * 0xC2B2AE35 & mask
        return h ^ (h >> 16)

    words = x.reshape(-1).view(f"uint{8 * x.dtype.itemsize}").tolist()
    golden = 0x9E3779B9
    first = sum(mix(word ^ (n * golden & mask)) for n, word in enumerate(words)) & mask
    second = sum(mix(((word + golden) * 0x85EBCA6B + n * 0xC2B2AE35) & mask) for n, word in enumerate(words)) & mask
    return f"{first:08x}{second:08x}"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32, jnp.int8])
@pytest.mark.parametrize("shape", [(), (7,), (3, 4, 5)])
def test_equals_the_reference(dtype, shape):
    x = np.asarray(jax.random.normal(jax.random.key(0), shape) * 50).astype(dtype)
    assert fingerprint({"x": jnp.asarray(x)}) == {"['x']": reference(np.asarray(x))}


@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(replica=2, fsdp=4), MeshConfig(replica=8, fsdp=1)])
def test_does_not_depend_on_the_mesh(mesh):
    x = np.random.default_rng(0).normal(size=(16, 6)).astype(np.float32)
    sharded = jax.device_put(x, NamedSharding(make_mesh(mesh), PartitionSpec("fsdp")))
    assert fingerprint({"x": sharded}) == {"['x']": reference(x)}


@settings(max_examples=60, deadline=None)
@given(position=st.integers(0, 95), bit=st.integers(0, 31))
def test_any_flipped_bit_changes_it(position, bit):
    x = np.random.default_rng(0).normal(size=96).astype(np.float32)
    y = x.copy()
    y.view(np.uint32)[position] ^= np.uint32(1 << bit)
    before, after = fingerprint({"x": jnp.asarray(x)})["['x']"], fingerprint({"x": jnp.asarray(y)})["['x']"]
    assert before[:8] != after[:8]
    assert before[8:] != after[8:]


def test_swapped_elements_change_it():
    x = jnp.arange(96, dtype=jnp.float32)
    assert fingerprint({"x": x}) != fingerprint({"x": x[::-1]})
