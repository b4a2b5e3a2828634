"""A decoder with experts: the same numbers on every mesh, under every remat policy, and token by token."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding

from davinci_jax import sharding
from davinci_jax.errors import ConfigError
from davinci_jax.experiment import MeshConfig, ModelConfig, Moe
from davinci_jax.models import cache as caches
from davinci_jax.models import decoder as decoders
from davinci_jax.models import flops, presets

# Compiles many programs; left out of the fast subset.
pytestmark = pytest.mark.slow

MOE = Moe(
    experts=8, experts_per_token=2, expert_size=16, shared_size=16, first_dense=1, score="sigmoid", groups=4,
    groups_kept=2, bias_rate=0.01, aux_loss=0.1, router_z_loss=0.01,
)  # fmt: skip
CONFIG = ModelConfig(
    vocab_size=96, hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=2, head_size=8, mlp_size=64, init_std=0.2,
    compute_dtype="float32", loss_chunk=24, qkv_bias=False, qk_norm=True, moe=MOE,
)  # fmt: skip
MESHES = {"fsdp8": MeshConfig(), "replica2_fsdp4": MeshConfig(replica=2)}


def batch():
    rng = np.random.default_rng(0)
    tokens, labels = rng.integers(0, 96, (2, 8, 20))
    segments, positions = np.repeat([[1, 2]], 8, 0).repeat(10, 1), np.tile(np.arange(10), (8, 2))
    return [
        jax.device_put(jnp.asarray(x, jnp.int32), sharding.spec("batch", "sequence"))
        for x in (tokens, labels, segments, positions)
    ]


def loss(model, *arrays):
    total, nll, load = decoders.training_loss(model, *arrays)
    moe = model.config.moe
    return total / nll.size + moe.aux_loss * load.balance_loss.sum() + moe.router_z_loss * load.z_loss.sum(), load


@functools.cache
def run(mesh, remat="full", devices=8):
    """(parameters, loss, load, gradients) as NumPy, and the layout of each parameter and its gradient."""
    with jax.set_mesh(sharding.make_mesh(MESHES.get(mesh, MeshConfig()), jax.devices()[:devices])):
        model = decoders.build(dataclasses.replace(CONFIG, remat=remat), jax.random.key(3))
        (value, load), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(model, *batch())
    layouts = [(g.sharding.spec, p.sharding.spec) for g, p in zip(*map(jax.tree.leaves, (grads, model)), strict=True)]
    return *jax.tree.map(np.asarray, (jax.tree.leaves(model), value, load, jax.tree.leaves(grads))), layouts


@pytest.mark.parametrize("mesh", ["fsdp8", pytest.param("replica2_fsdp4", marks=pytest.mark.exhaustive)])
def test_loss_load_and_gradients_equal_one_device(mesh):
    parameters, value, load, grads, layouts = run(mesh)
    one_parameters, one_value, one_load, one_grads, _ = run("one", devices=1)
    np.testing.assert_array_equal(load.counts, one_load.counts)
    for got, want in zip((*parameters, value, *grads), (*one_parameters, one_value, *one_grads), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * max(1, np.abs(want).max()))
    np.testing.assert_allclose(load.balance_loss, one_load.balance_loss, rtol=1e-5)
    assert all(gradient == parameter for gradient, parameter in layouts)
    # Matrices of attention and MLP in both stacks, router, three of experts, three of the shared one; the embedding.
    assert sum("fsdp" in spec for _, spec in layouts) == 2 * 4 + 3 + 1 + 3 + 3 + 1
    assert load.counts.shape == (2, 8)
    assert load.counts.sum() == 2 * 8 * 20 * 2


@pytest.mark.parametrize(
    "remat", ["save_mlp", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("none", "save_attention"))]
)
def test_remat_changes_no_gradient(remat):
    _, value, load, grads, _ = run("one", remat, 1)
    _, want_value, want_load, want_grads, _ = run("one", devices=1)
    np.testing.assert_array_equal(load.counts, want_load.counts)
    for got, want in zip((value, *grads), (want_value, *want_grads), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6, rtol=1e-5)


def test_save_mlp_keeps_the_products_of_the_experts():
    def kept(remat):
        with jax.set_mesh(sharding.make_mesh(MeshConfig(), jax.devices()[:1])):
            model = jax.eval_shape(lambda: decoders.build(dataclasses.replace(CONFIG, remat=remat), jax.random.key(0)))
            arrays = batch()
            saved = jax.eval_shape(lambda model: jax.vjp(lambda m: loss(m, *arrays)[0], model)[1], model)
        return [x.shape for x in jax.tree.leaves(saved)]

    products, logits = (2, 320, 16), (2, 160, 8)  # layers with experts, choices or tokens, width
    assert kept("save_mlp").count(products) == 2  # gate and up
    assert kept("full").count(products) == 0
    assert logits in kept("full")


def test_aux_losses_move_the_router_and_the_bias_gets_no_gradient():
    with jax.set_mesh(sharding.make_mesh(MeshConfig(), jax.devices()[:1])):
        model, arrays = decoders.build(CONFIG, jax.random.key(0)), batch()

        @jax.jit
        def gradients(model):
            return [
                jax.grad(lambda m: getattr(loss(m, *arrays)[1], name).sum())(model)  # noqa: B023
                for name in ("balance_loss", "z_loss")
            ]

        for grads in gradients(model):
            assert np.abs(grads.blocks.mlp.router[...]).max() > 1e-4
            np.testing.assert_array_equal(grads.blocks.mlp.balance[...], 0)


def test_rebalance_moves_towards_an_even_load():
    with jax.set_mesh(sharding.make_mesh(MeshConfig(), jax.devices()[:1])):
        model = decoders.build(CONFIG, jax.random.key(0))
        counts = jnp.asarray([[9, 1, 5, 5, 5, 5, 5, 5], [0, 0, 0, 0, 0, 0, 0, 8]], jnp.int32)
        moved = decoders.rebalance(decoders.rebalance(model, counts), counts)
        np.testing.assert_allclose(moved.blocks.mlp.balance[...][0], [-0.02, 0.02, *[0.0] * 6], atol=1e-7)
        np.testing.assert_allclose(moved.blocks.mlp.balance[...][1], [*[0.02] * 7, -0.02], atol=1e-7)
        np.testing.assert_array_equal(moved.blocks.mlp.router[...], model.blocks.mlp.router[...])
        still = dataclasses.replace(CONFIG, moe=dataclasses.replace(MOE, bias_rate=0.0))
        fixed = decoders.build(still, jax.random.key(0))
        assert decoders.rebalance(fixed, counts) is fixed


@pytest.mark.parametrize("num_devices", [pytest.param(1, marks=pytest.mark.exhaustive), 4])
def test_decoding_equals_the_forward_pass(num_devices):
    tokens, padding = np.random.default_rng(0).integers(0, 96, (4, 8)), np.array([0, 3, 0, 1])
    config = dataclasses.replace(CONFIG, moe=dataclasses.replace(MOE, capacity=0.5))  # which decoding does not heed
    with jax.set_mesh(sharding.make_mesh(MeshConfig(), jax.devices()[:num_devices])):
        model = decoders.build(config, jax.random.key(0))

        def place(x):
            return jax.device_put(jnp.asarray(x, jnp.int32), sharding.spec("batch", None))

        positions, segments = np.maximum(np.arange(8) - padding[:, None], 0), np.arange(8) >= padding[:, None]
        want = np.asarray(jax.jit(model.logits)(place(tokens), place(segments), place(positions)))
        cache, step = caches.init_cache(config, 4, 9, padding), jax.jit(caches.decode, donate_argnums=1)
        stop = 0
        for piece in (5, 1, 1, 1):
            start, stop = stop, stop + piece
            logits, cache = step(model, cache, place(tokens[:, start:stop]))
            np.testing.assert_allclose(np.asarray(logits), want[:, stop - 1], atol=1e-5, rtol=1e-5)


def test_layout_of_the_shipped_mixture_on_256_devices():
    sizes = sharding.mesh_sizes(MeshConfig(), 256)
    mesh = AbstractMesh(sizes, sharding.MESH_AXES, axis_types=(AxisType.Explicit,) * len(sizes))
    with jax.sharding.use_abstract_mesh(mesh):
        model = jax.eval_shape(lambda: decoders.build(presets.davinci_moe_3b(), jax.random.key(0)))
        where = NamedSharding(mesh, sharding.spec("batch", "sequence"))
        arrays = [jax.ShapeDtypeStruct((512, 4096), jnp.int32, sharding=where) for _ in range(4)]
        (value, load), grads = jax.eval_shape(jax.value_and_grad(loss, has_aux=True), model, *arrays)
    assert load.counts.shape == (27, 64)
    assert value.sharding.is_fully_replicated
    pairs = list(zip(jax.tree.leaves(model), jax.tree.leaves(grads), strict=True))
    assert all(parameter.sharding == gradient.sharding for parameter, gradient in pairs)
    held = sum(np.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf, _ in pairs)
    assert held < 1.05 * flops.num_params(presets.davinci_moe_3b()) / 256


def test_axes_of_a_mesh_that_does_not_divide_are_named():
    config = dataclasses.replace(CONFIG, hidden_size=36)
    with jax.set_mesh(sharding.make_mesh(MeshConfig())), pytest.raises(ConfigError, match=r"model.hidden_size = 36"):
        decoders.build(config, jax.random.key(0))
