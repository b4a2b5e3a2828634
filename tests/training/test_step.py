"""The step: the same numbers on every mesh and cut, one compile for a batch ramp, gradients of the mean loss."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from davinci_jax.data.batch import Batch
from davinci_jax.errors import ConfigError
from davinci_jax.experiment import Batch as RampPiece
from davinci_jax.experiment import (
    DataConfig,
    Experiment,
    LearningRate,
    MeshConfig,
    ModelConfig,
    RunConfig,
    Source,
    Stage,
)
from davinci_jax.models.decoder import build, token_losses
from davinci_jax.sharding import make_mesh
from davinci_jax.training.layout import BatchLayout, batch_layout
from davinci_jax.training.state import abstract_state, init_state
from davinci_jax.training.step import make_step

# Compiles many programs; left out of the fast subset.
pytestmark = pytest.mark.slow

MODEL = ModelConfig(
    vocab_size=64, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, head_size=4, mlp_size=32,
    compute_dtype="float32", z_loss=1e-3,
)  # fmt: skip
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))


def make_batch(rows: int, seed: int) -> Batch:
    """Rows of 12 tokens, some without a target, of three sources."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 64, (rows, 12)).astype(np.int32)
    labels = np.where(rng.random(tokens.shape) < 0.2, -1, rng.integers(0, 64, tokens.shape)).astype(np.int32)
    positions = np.broadcast_to(np.arange(12, dtype=np.int32), tokens.shape)
    return Batch(tokens, labels, np.ones_like(tokens), positions, rng.integers(0, 3, rows).astype(np.int32))


def cut(batch: Batch, micro_rows: int) -> Batch:
    return jax.tree.map(lambda x: x.reshape(-1, micro_rows, *x.shape[1:]), batch)


def assert_same_shardings(a, b) -> None:
    assert all(
        x.sharding.is_equivalent_to(y.sharding, x.ndim)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def run(mesh: MeshConfig, micro_rows: int, devices=None, sizes=(8, 16, 16)) -> tuple[list, np.ndarray]:
    """Losses, norms and counts of three steps of a ramp, and the last parameters; one executable for all steps."""
    mesh = make_mesh(mesh, devices)
    with jax.set_mesh(mesh):
        layout = BatchLayout(mesh, micro_rows, max(sizes) // micro_rows)
        state = init_state(MODEL, OPTIMIZER, 0)
        assert_same_shardings(state, abstract_state(MODEL, OPTIMIZER, 0))
        compiled, rows = None, []
        for n, size in enumerate(sizes):
            batch = cut(make_batch(size, n), micro_rows)
            arguments = (layout.put(batch), jnp.asarray(size // micro_rows, jnp.int32))
            compiled = compiled or make_step(MODEL, OPTIMIZER, 3, state).lower(state, *arguments).compile()
            before = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
            state, metrics = compiled(state, *arguments)
            assert_same_shardings(state, before)
            rows.append(jax.tree.map(np.asarray, metrics))
        flat = np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(state.model)])
    return rows, flat


@functools.cache
def run_on_one() -> tuple[list, np.ndarray]:
    return run(MeshConfig(), 8, jax.devices()[:1])


@pytest.mark.parametrize(
    ("replica", "fsdp"), [(2, 4), *(pytest.param(*mesh, marks=pytest.mark.exhaustive) for mesh in ((1, 8), (8, 1)))]
)  # fmt: skip
def test_every_mesh_gives_the_same_numbers(replica, fsdp):
    one, parameters = run_on_one()
    other, other_parameters = run(MeshConfig(replica=replica, fsdp=fsdp), 8)
    for a, b in zip(one, other, strict=True):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), a, b)
    np.testing.assert_allclose(parameters, other_parameters, rtol=1e-5, atol=1e-5)


def test_every_cut_gives_the_same_numbers():
    one, parameters = run_on_one()
    finer, finer_parameters = run(MeshConfig(), 2, jax.devices()[:1])
    np.testing.assert_allclose([m["loss"] for m in one], [m["loss"] for m in finer], rtol=1e-5)
    np.testing.assert_allclose(parameters, finer_parameters, rtol=1e-5, atol=1e-5)


def test_gradient_is_that_of_the_mean_over_all_targets():
    """Against plain automatic differentiation of the whole batch at once, with an update that shows the gradient."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    batch = make_batch(8, 0)

    def mean_loss(model):
        arrays = (batch.tokens, batch.labels, batch.segment_ids, batch.positions)
        nll, lse_squared = token_losses(model, *map(jnp.asarray, arrays))
        return (nll.sum() + MODEL.z_loss * lse_squared.sum()) / (batch.labels >= 0).sum()

    wanted = jax.tree.map(np.asarray, jax.jit(lambda key: jax.grad(mean_loss)(build(MODEL, key)))(jax.random.key(0)))
    with jax.set_mesh(mesh):
        state = init_state(MODEL, optax.sgd(1.0), 0)
        before = jax.tree.map(np.asarray, state.model)
        layout = BatchLayout(mesh, 2, 4)
        step = make_step(MODEL, optax.sgd(1.0), 3, state)
        state, metrics = step(state, layout.put(cut(batch, 2)), jnp.asarray(4, jnp.int32))
        moved = jax.tree.map(lambda a, b: a - np.asarray(b), before, state.model)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), wanted, moved)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(wanted), rtol=1e-5)
    for source in range(3):
        mine = batch.sources == source
        assert metrics["rows"][source] == mine.sum()
        assert metrics["targets"][source] == (batch.labels[mine] >= 0).sum()


def make_experiment(*sizes: int, micro_batch: int = 8) -> Experiment:
    ramp = (*(RampPiece(size=size, steps=2) for size in sizes[:-1]), RampPiece(size=sizes[-1]))
    stage = Stage(name="1-1", tokens=1e5, batch=ramp, learning_rate=LearningRate(peak=1e-3), mixture={"General": 1})
    source = Source(name="a", domain="General", level="L2", tokens=1e6)
    return Experiment(
        run=RunConfig(name="x", micro_batch=micro_batch), model=MODEL, curriculum=(stage,),
        data=DataConfig(root="r", sources=(source,), sequence_length=12),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("sizes", "micro_batch", "rows", "micro"),
    [((8, 16, 32), 2, 8, 4), ((16, 32), 8, 16, 2), ((24, 48), 2, 8, 6), ((24, 48), 3, 24, 2), ((32, 48), 2, 16, 3)],
)
def test_layout_takes_the_largest_micro_batch_that_divides(sizes, micro_batch, rows, micro):
    layout = batch_layout(make_experiment(*sizes, micro_batch=micro_batch), make_mesh(MeshConfig(fsdp=8)))
    assert (layout.micro_rows, layout.max_micro) == (rows, micro)
    assert all(size % layout.micro_rows == 0 for size in sizes)
    assert layout.local_rows.tolist() == list(range(layout.micro_rows))


def test_batch_not_divisible_by_the_devices_is_refused():
    with pytest.raises(ConfigError, match=r"batch.size = 20: is not divisible by the 8 devices .* choose 16"):
        batch_layout(make_experiment(8, 20), make_mesh(MeshConfig(fsdp=8)))


def test_num_micro_bounds_what_is_read():
    """The padding beyond `num_micro` never counts, whatever it holds."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        layout = BatchLayout(mesh, 4, 3)
        state = init_state(MODEL, OPTIMIZER, 0)
        step = make_step(MODEL, OPTIMIZER, 3, state)
        batch = layout.put(cut(make_batch(12, 3), 4))
        short = jax.tree.map(lambda x: x.at[2:].set(7), batch)
        results = [
            step(dataclasses.replace(jax.tree.map(jnp.copy, state)), b, jnp.asarray(2, jnp.int32))
            for b in (batch, short)
        ]
    assert results[0][1]["loss"] == results[1][1]["loss"]
