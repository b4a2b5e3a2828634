"""Held-out figures against NumPy in float64, on one device and on eight."""

import math
import types

import jax
import numpy as np
import pytest
from scipy.special import log_softmax

from davinci_jax.data.batch import Batch
from davinci_jax.evaluation.heldout import Heldout, choose_rows
from davinci_jax.experiment import Batch as Ramp
from davinci_jax.experiment import (
    DataConfig,
    EvaluationConfig,
    Experiment,
    LearningRate,
    MeshConfig,
    ModelConfig,
    RunConfig,
    Source,
    Stage,
)
from davinci_jax.models.decoder import build
from davinci_jax.sharding import make_mesh

# Compiles many programs; left out of the fast subset.
pytestmark = pytest.mark.slow

LENGTH, VOCAB = 16, 32
MODEL = ModelConfig(
    vocab_size=VOCAB, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, head_size=4, mlp_size=24,
    compute_dtype="float32", init_std=0.3,
)  # fmt: skip
# Id 0 is special, and the rest have one to three bytes, so a byte counted for the wrong token shows.
TOKENIZER = types.SimpleNamespace(token_bytes=lambda: np.array([0] + [1 + n % 3 for n in range(VOCAB - 1)], np.int32))
SIZES = {"web": 40, "books": 10, "code": 7, "maths": 0}


class FakeRows:
    """Rows drawn from the source's number; a third of the targets are masked and each row holds two documents."""

    def __init__(self, source: int, num_rows: int):
        draw = np.random.default_rng(source)
        shape = (num_rows, LENGTH)
        tokens = draw.integers(0, VOCAB, shape).astype(np.int32)
        labels = np.where(draw.random(shape) < 1 / 3, -1, draw.integers(0, VOCAB, shape)).astype(np.int32)
        second = np.arange(LENGTH) >= draw.integers(1, LENGTH, (num_rows, 1))
        positions = np.where(second, np.arange(LENGTH) - (LENGTH - second.sum(1, keepdims=True)), np.arange(LENGTH))
        sources = np.full(num_rows, source, np.int32)
        self.batch = Batch(tokens, labels, 1 + second.astype(np.int32), positions.astype(np.int32), sources)
        self.num_rows = num_rows
        self.served = []

    def read(self, rows):
        assert rows.dtype == np.int64
        self.served += rows.tolist()
        return Batch(*(field[rows] for field in self.batch))


def experiment(tokens=2_000_000, micro_batch=4) -> Experiment:
    domains = {"web": "General", "books": "General", "code": "Code", "maths": "Science"}
    sources = tuple(Source(name=name, domain=domain, level="L3", tokens=1e3) for name, domain in domains.items())
    stage = Stage(
        name="1", tokens=1e4, batch=(Ramp(size=8),), learning_rate=LearningRate(peak=1e-3), mixture={"General": 1}
    )
    return Experiment(
        run=RunConfig(name="t", micro_batch=micro_batch),
        model=MODEL,
        data=DataConfig(root="x", sources=sources, sequence_length=LENGTH),
        curriculum=(stage,),
        evaluation=EvaluationConfig(tokens=tokens),
    )


def fake_rows():
    return [FakeRows(n, size) for n, size in enumerate(SIZES.values())]


def evaluate(rows, num_devices=1, **settings):
    mesh = make_mesh(MeshConfig(), jax.devices()[:num_devices])
    with jax.set_mesh(mesh):
        heldout = Heldout(experiment(**settings), rows, TOKENIZER, mesh)
        return heldout.evaluate(build(MODEL, jax.random.key(0))), heldout


def reference(rows, chosen):
    """(nats, targets, bytes) of the chosen rows of a source, from whole logits in float64."""
    batch = rows.read(np.asarray(chosen, np.int64))
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        logits = jax.jit(build(MODEL, jax.random.key(0)).logits)(batch.tokens, batch.segment_ids, batch.positions)
    log_probabilities = log_softmax(np.asarray(logits, np.float64), axis=-1)
    counted = batch.labels >= 0
    picked = np.take_along_axis(log_probabilities, np.maximum(batch.labels, 0)[..., None], -1)[..., 0]
    return -picked[counted].sum(), counted.sum(), TOKENIZER.token_bytes()[batch.labels[counted]].sum()


def test_figures_equal_numpy():
    """All rows: 57 in batches of 4, so the last batch is filled up and must not count."""
    result, _ = evaluate(fake_rows())
    parts = [reference(rows, range(rows.num_rows)) for rows in fake_rows()[:3]]
    domains = {"/General": np.add(parts[0], parts[1]), "/Code": np.array(parts[2]), "": np.sum(parts, axis=0)}
    for suffix, (nats, targets, num_bytes) in domains.items():
        assert result[f"loss{suffix}"] == pytest.approx(nats / targets, rel=1e-5)
        assert result[f"bits_per_byte{suffix}"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)
    assert result["heldout_tokens"] == domains[""][1]
    assert result["heldout_bytes"] == domains[""][2]
    assert result["seconds"] > 0


def test_uniform_model_has_the_loss_of_its_vocabulary():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        uniform = jax.tree.map(lambda x: 0 * x, build(MODEL, jax.random.key(0)))
        result = Heldout(experiment(), fake_rows(), TOKENIZER, mesh).evaluate(uniform)
    assert result["loss"] == pytest.approx(math.log(VOCAB), rel=1e-6)


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_eight_devices_equal_one(micro_batch):
    one, _ = evaluate(fake_rows())
    eight, _ = evaluate(fake_rows(), num_devices=8, micro_batch=micro_batch)
    assert one.keys() == eight.keys()
    for name in one.keys() - {"seconds"}:
        assert eight[name] == pytest.approx(one[name], rel=1e-6), name


def test_budget_is_spread_over_sources_and_the_same_every_time():
    """10 rows of General: 8 of the 40 of web and 2 of the 10 of books; Code has fewer than asked and gives all."""
    rows = fake_rows()
    _, heldout = evaluate(rows, tokens=10 * LENGTH - 3)
    assert rows[0].served == [0, 5, 10, 15, 20, 25, 30, 35]
    assert rows[1].served == [0, 5]
    assert rows[2].served == list(range(7))
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        heldout.evaluate(build(MODEL, jax.random.key(1)))
    assert rows[0].served[8:] == rows[0].served[:8]


def test_domain_without_heldout_rows_is_noted(caplog):
    result, heldout = evaluate(fake_rows())
    assert "loss/Science" not in result
    assert len(heldout.notes) == 1
    assert "'Science' has no held-out rows" in caplog.text


def test_source_that_no_stage_draws_from_is_left_out():
    rows = fake_rows()
    result, heldout = evaluate([*rows[:2], None, None])
    assert {"loss/Code", "loss/Science"}.isdisjoint(result)
    assert heldout.notes == []


def test_nothing_held_out_gives_no_result():
    result, heldout = evaluate([FakeRows(n, 0) for n in range(4)])
    assert result is None
    assert len(heldout.notes) == 3


def test_rows_without_targets_count_nothing():
    rows = fake_rows()
    rows[2].batch.labels[:] = -1
    result, _ = evaluate(rows)
    assert "loss/Code" not in result
    assert np.isfinite(result["loss"])


def test_decoder_stays_whole_and_one_program_serves():
    mesh = make_mesh(MeshConfig(), jax.devices()[:8])
    with jax.set_mesh(mesh):
        decoder = build(MODEL, jax.random.key(0))
        heldout = Heldout(experiment(), fake_rows(), TOKENIZER, mesh)
        first = heldout.evaluate(decoder)
        programs = heldout._losses._cache_size()
        second = heldout.evaluate(decoder)
        assert heldout._losses._cache_size() == programs
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(decoder))
    assert {**first, "seconds": 0} == {**second, "seconds": 0}


@pytest.mark.parametrize("sizes", [[3, 5, 0], [1, 1, 1], [100, 1], [0], []])
@pytest.mark.parametrize("wanted", [1, 2, 4, 1000])
def test_choose_rows_takes_what_is_asked(sizes, wanted):
    chosen = choose_rows(sizes, wanted)
    assert sum(len(rows) for rows in chosen) == min(wanted, sum(sizes))
    for rows, size in zip(chosen, sizes, strict=True):
        assert len(set(rows.tolist())) == len(rows)
        assert all(0 <= row < size for row in rows)
