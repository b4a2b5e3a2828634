"""Muon against torch, optax and NumPy in float64, and divided over eight devices."""

import doctest
import importlib
import pathlib
import re
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file

from davinci_jax import sharding
from davinci_jax.experiment import MeshConfig
from davinci_jax.optimizers import COEFFICIENTS, Matrix, muon, newton_schulz, orthogonalize, scale_by_muon

# Compiles many programs; left out of the fast subset.
pytestmark = pytest.mark.slow

REFERENCES = pathlib.Path(__file__).parents[1] / "references"
STACKED = {"q": Matrix(1, 1), "o": Matrix(1, 2), "up": Matrix(1, 1), "experts": Matrix(2, 1), "lone": Matrix(0, 1)}
SHAPES = {"q": (3, 16, 2, 4), "o": (8, 2, 4, 16), "up": (3, 16, 24), "experts": (3, 2, 16, 8), "lone": (16, 8)}
SPECS = {
    "q": P(None, "fsdp", "tensor", None),
    "o": P(None, "tensor", None, "fsdp"),
    "up": P(None, "fsdp", "tensor"),
    "experts": P(None, "tensor", "fsdp"),
    "lone": P("fsdp", "tensor"),
}


def stacked_rule(path, leaf):
    return STACKED[path[-1].key]


def normal(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def newton_schulz_numpy(x, steps=5):
    """The published iteration in float64, one matrix at a time and never turned."""
    a, b, c = COEFFICIENTS
    x = x.astype(np.float64) / np.linalg.norm(x.astype(np.float64))
    for _ in range(steps):
        x = a * x + b * x @ x.T @ x + c * x @ x.T @ x @ x.T @ x
    return x


def follow(record, optimizer):
    """Yields (step, name, ours, theirs) along a recorded trajectory."""
    names = [key.removeprefix("start/") for key in record if key.startswith("start/")]
    params = {name: jnp.asarray(record[f"start/{name}"]) for name in names}
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for step in range(sum(key.startswith("gradient/") for key in record) // len(names)):
        grads = {name: jnp.asarray(record[f"gradient/{step}/{name}"]) for name in names}
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for name in names:
            yield step, name, np.asarray(params[name]), record[f"result/{step}/{name}"]


@pytest.mark.parametrize("shape", [(8, 8), (6, 20), (20, 6)])
def test_newton_schulz_equals_float64(shape):
    x = normal(shape)
    ours = jax.jit(lambda x: newton_schulz(x, dtype=jnp.float32))(x)
    np.testing.assert_allclose(ours, newton_schulz_numpy(x), atol=2e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(4, 24, 64), (4, 64, 24)])
def test_singular_values_come_near_one(shape, dtype):
    x = normal(shape) * 1e-3
    values = np.asarray(jax.jit(lambda x: newton_schulz(x, dtype=dtype))(x), np.float32)
    values = np.linalg.svd(values, compute_uv=False)
    assert values.min() > 0.65, values.min()
    assert values.max() < 1.25, values.max()


def test_zero_gradient_gives_zero_update():
    assert not np.any(orthogonalize(jnp.zeros((2, 4, 6)), Matrix(1, 1)))


def test_heads_are_flattened_into_one_matrix():
    q, o = normal((2, 6, 3, 4)), normal((2, 3, 4, 6))
    ours_q = jax.jit(lambda q: orthogonalize(q, Matrix(1, 1), dtype=jnp.float32))(q)
    ours_o = jax.jit(lambda o: orthogonalize(o, Matrix(1, 2), dtype=jnp.float32))(o)
    for layer in range(2):
        expected = newton_schulz_numpy(q[layer].reshape(6, 12)).reshape(6, 3, 4)
        np.testing.assert_allclose(ours_q[layer], expected, atol=2e-5)
        expected = newton_schulz_numpy(o[layer].reshape(12, 6)).reshape(3, 4, 6)
        np.testing.assert_allclose(ours_o[layer], expected, atol=2e-5)


def test_update_has_the_asked_root_mean_square():
    params = {"wide": jnp.asarray(normal((16, 64))), "tall": jnp.asarray(normal((64, 16)))}
    optimizer = scale_by_muon(rms=0.2)
    updates, _ = jax.jit(optimizer.update)(params, optimizer.init(params))
    for update in updates.values():
        assert float(jnp.sqrt(jnp.mean(update**2))) == pytest.approx(0.2, rel=0.15)


def test_a_leaf_that_is_no_matrix_is_refused():
    optimizer = scale_by_muon()
    params = {"bias": jnp.ones(3)}
    with pytest.raises(ValueError, match="bias"):
        optimizer.update(params, optimizer.init(params))
    with pytest.raises(ValueError, match="cannot be read"):
        Matrix(stack=1, rows=2).shape((3, 4, 5))


# Rounding to bfloat16 moves each implementation by up to 2e-4 from the float64 trajectory, independently.
@pytest.mark.parametrize(("file", "dtype", "atol"), [("float64", jnp.float32, 1e-6), ("bfloat16", jnp.bfloat16, 5e-4)])
def test_trajectory_equals_torch_muon(file, dtype, atol):
    record = load_file(REFERENCES / "optimizers" / f"muon_{file}.safetensors")
    optimizer = muon(1e-2, momentum=0.95, weight_decay=0.1, rms=0.2, dtype=dtype)
    for step, name, ours, theirs in follow(record, optimizer):
        np.testing.assert_allclose(ours, theirs, atol=atol, err_msg=f"{name} after step {step}")


@pytest.mark.parity
@pytest.mark.parametrize("float64", [True, False])
def test_recorded_muon_is_what_torch_computes(float64):
    live = runpy.run_path(str(REFERENCES / "make_optimizer_references.py"))["muon"](float64)
    record = load_file(REFERENCES / "optimizers" / f"muon_{'float64' if float64 else 'bfloat16'}.safetensors")
    assert live.keys() == record.keys()
    for name, value in live.items():
        np.testing.assert_allclose(record[name], value, atol=1e-6 if float64 else 1e-3, err_msg=name)


def test_equals_optax_without_nesterov():
    """optax corrects the average's bias, which orthogonalisation ignores, and weighs Nesterov's two terms otherwise."""
    params = {"wide": jnp.asarray(normal((6, 20))), "tall": jnp.asarray(normal((20, 6)))}
    ours = muon(1e-2, nesterov=False, weight_decay=0.1, rms=0.2, dtype=jnp.float32)
    theirs = optax.contrib.muon(1e-2, nesterov=False, weight_decay=0.1, consistent_rms=0.2)
    ours_params = theirs_params = params
    ours_state, theirs_state = ours.init(params), theirs.init(params)
    our_update, their_update = jax.jit(ours.update), jax.jit(theirs.update)
    for step in range(3):
        grads = jax.tree.map(lambda x, step=step: jnp.asarray(normal(x.shape, seed=step + 1)), params)
        updates, ours_state = our_update(grads, ours_state, ours_params)
        ours_params = optax.apply_updates(ours_params, updates)
        updates, theirs_state = their_update(grads, theirs_state, theirs_params)
        theirs_params = optax.apply_updates(theirs_params, updates)
    for name in params:
        np.testing.assert_allclose(ours_params[name], theirs_params[name], atol=1e-6)


def sharded_update(mesh):
    """Returns the compiled update on the mesh with its sharded gradients and state."""
    optimizer = scale_by_muon(matrix=stacked_rule, dtype=jnp.float32)
    grads = {
        name: jax.device_put(normal(shape), jax.NamedSharding(mesh, SPECS[name])) for name, shape in SHAPES.items()
    }
    state = jax.jit(optimizer.init)(grads)
    return jax.jit(optimizer.update), grads, state


@pytest.mark.parametrize("shape", [(8, 1), (4, 2)])
def test_eight_devices_equal_one(shape):
    optimizer = scale_by_muon(matrix=stacked_rule, dtype=jnp.float32)
    grads = {name: jnp.asarray(normal(shape)) for name, shape in SHAPES.items()}
    expected, _ = jax.jit(optimizer.update)(grads, optimizer.init(grads))
    mesh = jax.make_mesh(shape, ("fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        update, grads, state = sharded_update(mesh)
        updates, state = update(grads, state)
        for name in SHAPES:
            np.testing.assert_allclose(updates[name], expected[name], atol=1e-5, err_msg=name)
            assert updates[name].sharding.is_equivalent_to(grads[name].sharding, grads[name].ndim)
            assert state.momentum[name].sharding.is_equivalent_to(grads[name].sharding, grads[name].ndim)
        update(grads, state)
        assert update._cache_size() == 1


def test_stacked_matrices_are_exchanged_not_gathered():
    """Each device orthogonalises its own layers: eight of `o` on eight devices make batches of one, not of eight."""
    mesh = jax.make_mesh((8, 1), ("fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        grads = {"o": jax.device_put(normal(SHAPES["o"]), jax.NamedSharding(mesh, SPECS["o"]))}
        optimizer = scale_by_muon(matrix=stacked_rule, dtype=jnp.float32)
        program = jax.jit(optimizer.update).lower(grads, optimizer.init(grads)).compile().as_text()
    assert "all-to-all" in program
    assert "all-gather" not in program
    assert not re.search(r"f32\[8,8,(8|16)\]\S* dot", program)


@pytest.mark.parametrize("fsdp", [4, 64, 256])
def test_any_number_of_devices_keeps_the_layout(fsdp):
    """More devices than layers, and numbers that do not divide them: shapes and shardings only, on an abstract mesh."""
    mesh = AbstractMesh((fsdp, 2), ("fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    shapes = {"q": (36, 512, 16, 128), "o": (36, 16, 128, 512), "up": (36, 512, 1024)}
    grads = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=jax.NamedSharding(mesh, SPECS[name]))
        for name, shape in shapes.items()
    }
    optimizer = scale_by_muon(matrix=stacked_rule)
    with jax.sharding.use_abstract_mesh(mesh):
        updates, state = jax.eval_shape(lambda grads: optimizer.update(grads, optimizer.init(grads)), grads)
    for name, grad in grads.items():
        for leaf in (updates[name], state.momentum[name]):
            assert (leaf.shape, leaf.dtype, leaf.sharding.spec) == (grad.shape, grad.dtype, grad.sharding.spec)


def test_docstring_examples():
    assert doctest.testmod(importlib.import_module("davinci_jax.optimizers.muon")).attempted > 0
    assert doctest.testmod(importlib.import_module("davinci_jax.optimizers.muon")).failed == 0


def test_stacked_experts_are_orthogonalised_one_by_one():
    """[layers, experts, D, F] against a loop over single matrices, on eight devices, each with an expert of its own."""
    x = np.random.default_rng(5).normal(size=(3, 8, 16, 24)).astype(np.float32)
    single = jax.jit(lambda m: orthogonalize(m, Matrix(), dtype=jnp.float32))
    want = np.stack([np.stack([np.asarray(single(matrix)) for matrix in layer]) for layer in x])
    with jax.set_mesh(sharding.make_mesh(MeshConfig())):
        divided = jax.device_put(jnp.asarray(x), sharding.spec("layers", "expert", "embed", "mlp"))
        run = jax.jit(lambda y: orthogonalize(y, Matrix(stack=2), dtype=jnp.float32))
        got = run(divided)
        assert got.sharding.spec == divided.sharding.spec
        shapes = re.findall(r"f32\[(\d+),(\d+),16,24\]", run.lower(divided).compile().as_text())
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert ("3", "1") in shapes  # a device's whole matrices: one expert of every layer, and no filling
