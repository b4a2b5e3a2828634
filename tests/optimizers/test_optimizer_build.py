"""The decoder's optimizer: who decays, who is orthogonalised, and the published AdamW."""

import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from davinci_jax import sharding
from davinci_jax.experiment import MeshConfig, ModelConfig, OptimizerConfig
from davinci_jax.models import decoder as decoders
from davinci_jax.optimizers import Matrix, build
from davinci_jax.optimizers.decoder import block_matrix, decays

# Compiles many programs; left out of the fast subset.
pytestmark = pytest.mark.slow

REFERENCES = pathlib.Path(__file__).parents[1] / "references"
CONFIG = ModelConfig(
    vocab_size=32,
    hidden_size=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_size=4,
    mlp_size=24,
    tied_embeddings=False,
    compute_dtype="float32",
)
DECAYED = {"embed", "head", "q_proj", "k_proj", "v_proj", "o_proj", "gate", "up", "down"}
ORTHOGONALISED = {"q_proj": 1, "k_proj": 1, "v_proj": 1, "o_proj": 2, "gate": 1, "up": 1, "down": 1}


def name(path):
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value").split("/")[-1]


@pytest.fixture(scope="module")
def decoder():
    return jax.jit(lambda key: decoders.build(CONFIG, key))(jax.random.key(0))


def first_update(optimizer, grads, params):
    return jax.jit(lambda grads, params: optimizer.update(grads, optimizer.init(params), params)[0])(grads, params)


def leaves(tree):
    """Returns {dotted path: array}, for the two norms of a block have parameters of one name."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def test_rules_name_every_parameter(decoder):
    flat = jax.tree_util.tree_flatten_with_path(decoder)[0]
    assert {name(path) for path, leaf in flat if decays(path, leaf)} == DECAYED
    matrices = {name(path): block_matrix(path, leaf) for path, leaf in flat if block_matrix(path, leaf)}
    assert matrices == {key: Matrix(stack=1, rows=rows) for key, rows in ORTHOGONALISED.items()}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_unknown_parameter_is_refused(kind):
    params = {"blocks": {"adapter": jnp.ones((2, 3))}}
    with pytest.raises(ValueError, match=r"blocks\.adapter"):
        build(OptimizerConfig(name=kind), 1e-3).init(params)
    with pytest.raises(ValueError, match=r"blocks\.adapter"):
        build(OptimizerConfig(name=kind), 1e-3, params)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_only_matrices_shrink_without_gradient(decoder, kind):
    """With no gradient an update is the decay alone: -learning_rate * weight_decay * parameter, or nothing."""
    optimizer = build(OptimizerConfig(name=kind, weight_decay=0.1), 1e-2)
    params = jax.tree.map(lambda x: np.asarray(x) + 1, decoder)
    updates = first_update(optimizer, jax.tree.map(np.zeros_like, params), params)
    flat = jax.tree_util.tree_flatten_with_path(updates)[0]
    for (path, update), param in zip(flat, jax.tree.leaves(params), strict=True):
        expected = -1e-3 * np.asarray(param) if name(path) in DECAYED else np.zeros(param.shape)
        np.testing.assert_allclose(update, expected, rtol=1e-6, err_msg=name(path))


def test_gradient_is_clipped_at_the_global_norm(decoder):
    """Adam forgets the gradient's scale unless eps is large: then the update is the clipped gradient / eps."""
    grads = jax.tree.map(lambda x: np.full(x.shape, 3, x.dtype), decoder)
    norm = float(optax.tree.norm(grads))
    for clip, expected in ((None, 3.0), (1.0, 3.0 / norm), (2 * norm, 3.0)):
        optimizer = build(OptimizerConfig(clip_norm=clip, weight_decay=0.0, eps=1e6), 1.0)
        updates = first_update(optimizer, grads, decoder)
        for update in jax.tree.leaves(updates):
            np.testing.assert_allclose(-1e6 * update, np.full(update.shape, expected), rtol=1e-4)


def test_muon_updates_are_of_adamw_size(decoder):
    """One learning rate serves both: the first AdamW step has root mean square 1, Muon's the 0.2 that it is set to."""
    rng = np.random.default_rng(1)
    grads = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), decoder)
    optimizer = build(OptimizerConfig(name="muon", weight_decay=0.0), 1.0)
    updates = first_update(optimizer, grads, decoder)
    for path, update in jax.tree_util.tree_flatten_with_path(updates)[0]:
        expected = 0.2 if name(path) in ORTHOGONALISED else 1.0
        assert float(jnp.sqrt(jnp.mean(update**2))) == pytest.approx(expected, rel=0.25), name(path)


def adamw_on_record(record):
    """Yields (step, name, ours, theirs); the recorded matrix takes the decoder's name of a matrix."""
    params = {"embed": jnp.asarray(record["start/kernel"]), "scale": jnp.asarray(record["start/norm"])}
    theirs = {"embed": "kernel", "scale": "norm"}
    optimizer = build(OptimizerConfig(beta1=0.9, beta2=0.95, clip_norm=None, weight_decay=0.1), 1e-2)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for step in range(4):
        grads = {ours: jnp.asarray(record[f"gradient/{step}/{name}"]) for ours, name in theirs.items()}
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for ours, name in theirs.items():
            yield step, ours, params[ours], record[f"result/{step}/{name}"]


def test_trajectory_equals_torch_adamw():
    for step, which, ours, theirs in adamw_on_record(load_file(REFERENCES / "optimizers" / "adamw.safetensors")):
        np.testing.assert_allclose(ours, theirs, atol=1e-6, err_msg=f"{which} after step {step}")


@pytest.mark.parity
def test_recorded_adamw_is_what_torch_computes():
    live = runpy.run_path(str(REFERENCES / "make_optimizer_references.py"))["adamw"]()
    record = load_file(REFERENCES / "optimizers" / "adamw.safetensors")
    assert live.keys() == record.keys()
    for key, value in live.items():
        np.testing.assert_allclose(record[key], value, atol=1e-6, err_msg=key)


@pytest.mark.parametrize("kind", ["muon", pytest.param("adamw", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize(
    "mesh", [MeshConfig(replica=2, fsdp=4), pytest.param(MeshConfig(replica=1, fsdp=8), marks=pytest.mark.exhaustive)]
)
def test_mesh_of_eight_equals_one_device(decoder, kind, mesh):
    """Parameters after three steps, the sharding of all state, and one compilation."""

    def run():
        model = decoders.build(CONFIG, jax.random.key(0))
        optimizer = build(OptimizerConfig(name=kind), lambda step: 1e-3 * (step + 1))

        @jax.jit
        def step(model, state):
            updates, state = optimizer.update(jax.tree.map(lambda x: jnp.sin(7 * x), model), state, model)
            return optax.apply_updates(model, updates), state

        state = jax.jit(optimizer.init)(model)
        for _ in range(3):
            model, state = step(model, state)
        assert step._cache_size() == 1
        return model, state

    expected, _ = run()
    with jax.set_mesh(sharding.make_mesh(mesh)):
        model, state = run()
    for (path, ours), theirs in zip(leaves(model).items(), jax.tree.leaves(expected), strict=True):
        # The embedding's sine is near zero for some entries, where Adam divides noise by noise.
        np.testing.assert_allclose(ours, theirs, atol=1e-5, err_msg=path)
    shardings = {path.replace(".", ""): leaf.sharding for path, leaf in leaves(model).items()}
    followed = 0
    for path, leaf in leaves(state).items():
        for parameter, expected_sharding in shardings.items():
            if path.replace(".", "").endswith(parameter):
                assert leaf.sharding.is_equivalent_to(expected_sharding, leaf.ndim), path
                followed += 1
    assert followed >= len(shardings)
