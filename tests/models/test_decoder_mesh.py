"""The same numbers on every mesh, and the layout of a pod checked without one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding

from davinci_jax import sharding
from davinci_jax.experiment import MeshConfig, ModelConfig
from davinci_jax.models import decoder as decoders
from davinci_jax.models import presets

# Compiles many programs; left out of the fast subset.
pytestmark = pytest.mark.slow

MESHES = {"one": MeshConfig(), "fsdp8": MeshConfig(), "replica2_fsdp4": MeshConfig(replica=2)}


def config(**changes):
    return ModelConfig(
        vocab_size=96,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_size=8,
        mlp_size=64,
        init_std=0.2,
        compute_dtype="float32",
        loss_chunk=24,
        z_loss=1e-2,
        **changes,
    )


def loss(model, tokens, labels, segments, positions):
    total, nll, _ = decoders.training_loss(model, tokens, labels, segments, positions)
    return total / (labels >= 0).sum(), nll


@functools.cache
def run(mesh_name, tied):
    """(parameters, loss, gradients, losses per token) as NumPy, and the layout of each gradient and parameter."""
    devices = jax.devices()[:1] if mesh_name == "one" else jax.devices()
    rng = np.random.default_rng(0)
    tokens, labels = rng.integers(0, 96, (2, 8, 20))
    labels[:, 5] = -1
    segments, positions = np.repeat([[1, 2]], 8, 0).repeat(10, 1), np.tile(np.arange(10), (8, 2))
    with jax.set_mesh(sharding.make_mesh(MESHES[mesh_name], devices)):
        model = decoders.build(config(tied_embeddings=tied), jax.random.key(3))

        def place(x):
            return jax.device_put(jnp.asarray(x, jnp.int32), sharding.spec("batch", "sequence"))

        batch = [place(x) for x in (tokens, labels, segments, positions)]
        (value, nll), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(model, *batch)
    layouts = [(g.sharding.spec, p.sharding.spec) for g, p in zip(*map(jax.tree.leaves, (grads, model)), strict=True)]
    arrays = jax.tree.map(np.asarray, [jax.tree.leaves(x) for x in (model, value, grads, nll)])
    return (*arrays, layouts)


@pytest.mark.parametrize(
    ("mesh_name", "tied"),
    [
        pytest.param("fsdp8", True, id="tied-fsdp8", marks=pytest.mark.exhaustive),
        pytest.param("replica2_fsdp4", False, id="untied-replica2_fsdp4"),
        pytest.param("fsdp8", False, id="untied-fsdp8", marks=pytest.mark.exhaustive),
        pytest.param("replica2_fsdp4", True, id="tied-replica2_fsdp4", marks=pytest.mark.exhaustive),
    ],
)
def test_loss_and_gradients_equal_one_device(mesh_name, tied):
    parameters, *got, layouts = run(mesh_name, tied)
    want_parameters, *want, _ = run("one", tied)
    for a, b in zip(parameters, want_parameters, strict=True):
        # Initialisation: the same numbers on every mesh; jax 0.12 rounds the last bits of a normal by its layout.
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * max(1, np.abs(b).max()))
    assert all(gradient == parameter for gradient, parameter in layouts)


def test_parameters_are_divided():
    *_, layouts = run("replica2_fsdp4", False)
    divided = [spec for _, spec in layouts if "fsdp" in spec]
    assert len(divided) == 9  # all matrices; biases and norm scales are whole


def abstract_mesh(**axes):
    sizes = sharding.mesh_sizes(MeshConfig(**axes), 256)
    return AbstractMesh(sizes, sharding.MESH_AXES, axis_types=(AxisType.Explicit,) * len(sizes))


@pytest.mark.parametrize("axes", [{"replica": 1}, {"replica": 4}])
@pytest.mark.parametrize(
    "preset",
    ["davinci_3b", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("davinci_1b", "davinci_7b"))],
)
def test_layout_on_256_devices(preset, axes):
    mesh = abstract_mesh(**axes)
    with jax.sharding.use_abstract_mesh(mesh):
        model = jax.eval_shape(lambda: decoders.build(getattr(presets, preset)(), jax.random.key(0)))
        where = NamedSharding(mesh, sharding.spec("batch", "sequence"))
        batch = [jax.ShapeDtypeStruct((512, 4096), jnp.int32, sharding=where) for _ in range(4)]
        (value, nll), grads = jax.eval_shape(jax.value_and_grad(loss, has_aux=True), model, *batch)
    assert nll.sharding == where
    assert value.sharding.is_fully_replicated
    pairs = list(zip(jax.tree.leaves(model), jax.tree.leaves(grads), strict=True))
    assert all(parameter.sharding == gradient.sharding for parameter, gradient in pairs)
    held = sum(np.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf, _ in pairs)
    whole = sum(leaf.size for leaf, _ in pairs)
    assert held < 1.05 * whole / (256 // axes["replica"])
