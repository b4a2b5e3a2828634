"""A mixture of experts in training: what a step does with its load, and a whole run, killed and started again."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_resume
import test_step
import tiny_run

from davinci_jax import optimizers
from davinci_jax.cli import main
from davinci_jax.experiment import Batch as RampPiece
from davinci_jax.experiment import Experiment, LearningRate, MeshConfig, ModelConfig, Moe, OptimizerConfig, Stage
from davinci_jax.models.decoder import build, is_state, training_loss
from davinci_jax.sharding import make_mesh
from davinci_jax.training.layout import BatchLayout
from davinci_jax.training.metrics import read_metrics
from davinci_jax.training.state import init_state
from davinci_jax.training.step import make_step

# Compiles many programs; left out of the fast subset.
pytestmark = pytest.mark.slow

MOE = Moe(
    experts=8, experts_per_token=2, expert_size=8, shared_size=8, first_dense=1, score="sigmoid", bias_rate=0.01,
)  # fmt: skip
MODEL = dataclasses.replace(tiny_run.MODEL, vocab_size=64, moe=MOE)


@functools.cache
def one_step(model: ModelConfig, micro_rows: int, devices: int = 1, optimizer=None):
    """(model before, model after, metrics) of one step of 8 rows in micro-batches; plain descent unless told."""
    optimizer = optimizer or optax.sgd(1.0)
    mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
    with jax.set_mesh(mesh):
        layout = BatchLayout(mesh, micro_rows, 8 // micro_rows)
        state = init_state(model, optimizer, 0)
        before = jax.tree.map(np.asarray, state.model)
        batch = layout.put(test_step.cut(test_step.make_batch(8, 0), micro_rows))
        state, metrics = make_step(model, optimizer, 3, state)(state, batch, jnp.asarray(8 // micro_rows, jnp.int32))
        return before, *jax.tree.map(np.asarray, (state.model, metrics))


def test_the_bias_moves_by_the_counts_of_the_whole_batch():
    """With accumulation on four devices as at once on one; nothing but the counts moves it."""
    before, after, metrics = one_step(MODEL, 8)
    load = metrics["expert_load"]
    assert load.shape == (1, 8)
    assert load.sum() == 8 * 12 * 2
    np.testing.assert_array_equal(before.blocks.mlp.balance[...], 0)
    np.testing.assert_allclose(after.blocks.mlp.balance[...], 0.01 * np.sign(24 - load), atol=1e-8)
    _, other, other_metrics = one_step(MODEL, 4, 4)
    np.testing.assert_array_equal(other_metrics["expert_load"], load)
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_gradient_is_that_of_the_mean_loss_and_the_weighted_router_losses():
    model = dataclasses.replace(MODEL, moe=dataclasses.replace(MOE, aux_loss=0.3, router_z_loss=0.05, bias_rate=0.0))
    before, after, metrics = one_step(model, 8)
    batch = test_step.make_batch(8, 0)

    def total(decoder):
        arrays = map(jnp.asarray, (batch.tokens, batch.labels, batch.segment_ids, batch.positions))
        loss, _, load = training_loss(decoder, *arrays)
        mean = loss / (batch.labels >= 0).sum()
        return mean + 0.3 * load.balance_loss.sum() + 0.05 * load.z_loss.sum(), load

    plain = jax.jit(lambda key: jax.value_and_grad(total, has_aux=True)(build(model, key)))
    (_, load), wanted = plain(jax.random.key(0))
    for a, b, want in zip(*map(jax.tree.leaves, (before, after, wanted)), strict=True):
        np.testing.assert_allclose(a - b, want, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(metrics["expert_balance_loss"], load.balance_loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["router_z_loss"], load.z_loss, rtol=1e-5)


@pytest.mark.parametrize("name", ["muon", pytest.param("adamw", marks=pytest.mark.exhaustive)])
def test_the_bias_has_no_moments_and_no_decay(name):
    model = dataclasses.replace(MODEL, moe=dataclasses.replace(MOE, bias_rate=0.0))
    decoder = build(model, jax.random.key(0))
    decoder.blocks.mlp.balance[...] = jnp.arange(8.0)[None]
    optimizer = optimizers.build(OptimizerConfig(name=name, weight_decay=0.5), 1e-2, decoder)
    state = optimizer.init(decoder)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    assert any("router" in path for path in paths)
    assert not any("balance" in path for path in paths)
    updates, _ = jax.jit(optimizer.update)(jax.tree.map(jnp.ones_like, decoder), state, decoder)
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        assert (np.abs(update).max() == 0) == is_state(path), jax.tree_util.keystr(path)


# A run of its own: 30 steps, so that the loss falls and the bias has time to act.
STEPS = 30


def make_experiment(experiment: Experiment, directory, moe: Moe = MOE) -> Experiment:
    stage = Stage(
        name="1-1", tokens=STEPS * 16 * tiny_run.LENGTH, batch=(RampPiece(size=16),),
        learning_rate=LearningRate(peak=1e-2, warmup_steps=3), mixture={"General": 70, "Code": 30},
    )  # fmt: skip
    sources = tuple(dataclasses.replace(s, stages=None, max_epochs=100) for s in experiment.data.sources)
    return dataclasses.replace(
        experiment,
        run=dataclasses.replace(experiment.run, directory=str(directory), tensorboard=False),
        model=dataclasses.replace(tiny_run.MODEL, qk_norm=True, moe=moe),
        data=dataclasses.replace(experiment.data, sources=sources),
        curriculum=(stage,),
        evaluation=dataclasses.replace(experiment.evaluation, every_steps=0),
        checkpoint=dataclasses.replace(experiment.checkpoint, every_steps=10),
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(the tiny experiment, the directory of its mixture's finished run)."""
    root = tmp_path_factory.mktemp("moe")
    experiment = tiny_run.prepare(root)
    config = tiny_run.write_config(make_experiment(experiment, root / "moe"), root / "moe.json")
    tiny_run.davinci("train", config)
    return experiment, root / "moe"


@pytest.mark.exhaustive
def test_the_sampler_takes_a_mixture(finished):
    assert main(["generate", str(finished[1]), "--max-new-tokens", "4"]) == 0


def test_the_loss_falls(finished):
    _, run = finished
    lines = read_metrics(run).train
    assert len(lines) == STEPS
    losses = [line["loss"] for line in lines]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 1.0
    for line in lines:
        assert line["experts/per_token"] == pytest.approx(2)
        assert line["experts/dropped"] == 0
        assert line["experts/layers"]["max_load"][0] == pytest.approx(line["experts/max_load"], rel=1e-3)


@pytest.mark.exhaustive
def test_the_bias_keeps_experts_from_being_left_out(finished, tmp_path):
    experiment, run = finished
    unbalanced = make_experiment(experiment, tmp_path / "run", dataclasses.replace(MOE, bias_rate=0.0))
    tiny_run.davinci("train", tiny_run.write_config(unbalanced, tmp_path / "config.json"))

    def busiest(directory):
        return np.mean([line["experts/max_load"] for line in read_metrics(directory).train[-10:]])

    assert busiest(run) < busiest(tmp_path / "run") - 0.5


@pytest.mark.exhaustive
def test_killed_and_started_again_it_ends_the_same(finished, tmp_path):
    experiment, untouched = finished
    config = tiny_run.write_config(make_experiment(experiment, tmp_path / "run"), tmp_path / "config.json")
    test_resume.kill_when(config, lambda: test_resume.logged(tmp_path / "run", 17))
    tiny_run.davinci("train", config)
    last = test_resume.fingerprint(tmp_path / "run", STEPS)
    assert last == test_resume.fingerprint(untouched, STEPS)
    assert any("balance" in name for name in last)
    assert test_resume.losses(tmp_path / "run") == test_resume.losses(untouched)


def test_the_report_takes_a_mixture(finished):
    _, run = finished
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "Busiest expert by layer" in page
    assert "Dropped choices" not in page
