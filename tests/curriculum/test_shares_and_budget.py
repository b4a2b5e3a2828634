"""Shares of sources, what the stages draw from them, and the recipe's table."""

import dataclasses

import numpy as np
import pytest

from davinci_jax.curriculum.budget import make_budget, mixture_index
from davinci_jax.curriculum.recipe import POOL, STAGES, scaled
from davinci_jax.curriculum.shares import domain_shares, source_shares
from davinci_jax.curriculum.timeline import Timeline
from davinci_jax.errors import ConfigError
from davinci_jax.experiment import (
    Batch,
    DataConfig,
    Experiment,
    LearningRate,
    ModelConfig,
    RunConfig,
    Source,
    Stage,
    apply_overrides,
)

MODEL = ModelConfig(
    vocab_size=64, hidden_size=8, num_layers=1, num_heads=2, num_kv_heads=1, head_size=4, mlp_size=8, max_positions=4096
)


def source(name, domain, tokens, **fields):
    return Source(name=name, domain=domain, level="L2", tokens=tokens, **fields)


def stage(name, mixture, tokens=8000):
    rate = LearningRate(peak=1e-3)
    return Stage(name=name, tokens=tokens, batch=(Batch(size=10),), learning_rate=rate, mixture=mixture)


def experiment(sources, stages, length=8):
    data = DataConfig(root="data", sources=tuple(sources), sequence_length=length)
    return Experiment(run=RunConfig(name="x"), model=MODEL, data=data, curriculum=tuple(stages))


def budget_of(run, rows=None):
    return make_budget(run, Timeline.compile(run.curriculum, run.data.sequence_length), rows)


def test_shares_by_tokens_by_weight_and_by_stage():
    sources = (
        source("a", "General", 300),
        source("b", "General", 100),
        source("late", "General", 600, stages=("2",)),
        source("c", "Code", 5, weight=1),
        source("d", "Code", 500, weight=3),
        source("e", "QA", 7),
    )
    first, second = stage("1", {"General": 80, "Code": 20, "QA": 0}), stage("2", {"General": 50, "QA": 50.5})
    assert source_shares(first, sources) == pytest.approx((0.6, 0.2, 0, 0.05, 0.15, 0))
    half = 50 / 100.5
    assert source_shares(second, sources) == pytest.approx((0.3 * half, 0.1 * half, 0.6 * half, 0, 0, 1 - half))
    assert domain_shares(second) == pytest.approx({"General": half, "QA": 1 - half})


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_shares_of_the_report(stage):
    shares = source_shares(stage, POOL)
    assert sum(shares) == pytest.approx(1, abs=1e-12)
    for domain, percent in stage.mixture.items():
        of_domain = [share for share, source in zip(shares, POOL, strict=True) if source.domain == domain]
        assert sum(of_domain) == pytest.approx(percent / sum(stage.mixture.values()), abs=1e-12)
    for share, pool_source in zip(shares, POOL, strict=True):
        if pool_source.stages is not None and stage.name not in pool_source.stages:
            assert share == 0


def test_pool_of_the_report():
    billions = {domain: sum(s.tokens for s in POOL if s.domain == domain) / 1e9 for s in POOL for domain in [s.domain]}
    assert billions == pytest.approx({"General": 4280, "Code": 598, "Science": 1943, "QA": 734.4})
    assert len(POOL) == 28
    usable = sum(s.tokens for s in POOL if s.domain == "QA" and s.stages) / 1e9
    assert usable == pytest.approx(242.4)
    early = sum(s.tokens for s in POOL if s.domain == "Science" and (s.stages is None or "1-1" in s.stages)) / 1e9
    late = sum(s.tokens for s in POOL if s.domain == "Science" and (s.stages is None or "2-2" in s.stages)) / 1e9
    assert (early, late) == pytest.approx((1212, 1289))


def test_epochs_of_the_report():
    # QA 1.0 T of 242.4 B, Code 1.57 of its pool, General 0.96; Science 1.28 in stage 1 and 0.30 in stage 2.
    budget = budget_of(experiment(POOL, STAGES, length=4096))
    budget.check()
    epochs = dict(zip([s.name for s in POOL], budget.epochs.sum(axis=0), strict=True))
    assert epochs["darwin-science-book-qa"] == pytest.approx(4.12, abs=0.005)
    assert epochs["github-10-stars"] == pytest.approx(1.57, abs=0.005)
    assert epochs["nemotron-cc-v1"] == pytest.approx(0.96, abs=0.005)
    assert epochs["megamath-web"] == pytest.approx(1.28, abs=0.005)
    assert epochs["megamath-refined"] == pytest.approx(0.30, abs=0.005)
    assert epochs["nemotron-cc-v1-synthetic-qa"] == 0
    assert budget.tokens.sum() == pytest.approx(8e12, rel=1e-4)


def test_repeats_are_no_larger_than_the_recipe_needs():
    budget = budget_of(experiment(POOL, STAGES, length=4096))
    for pool_source, epochs in zip(POOL, budget.epochs.sum(axis=0), strict=True):
        assert pool_source.max_epochs == max(1, np.ceil(epochs))


def test_draws_add_up_per_stage():
    run = experiment(
        [source("a", "G", 9e4), source("b", "G", 3e4), source("c", "C", 9e4)], [stage("1", {"G": 3, "C": 1})]
    )
    budget = budget_of(run)
    assert budget.draws.tolist() == [[563, 187, 250]]
    assert budget.draws.sum() == 1000
    assert budget.tokens.tolist() == [[4504, 1496, 2000]]
    assert budget.epochs[0] == pytest.approx([563 / 11250, 187 / 3750, 250 / 11250])


def test_too_many_epochs_are_refused_with_the_arithmetic():
    run = experiment([source("a", "G", 1600), source("b", "G", 6400)], [stage("1", {"G": 1}), stage("2", {"G": 1})])
    with pytest.raises(
        ConfigError,
        match=r"data\.sources\.a\.max_epochs = 1.0: allows 1 x 1600 tokens, and stages 1, 2 draw 3200, "
        r"which is 2 epochs; raise it to 2, shorten the stages, or lower the share of G in their mixtures",
    ):
        budget_of(run).check()
    budget_of(apply_overrides(run, ["data.sources.G.max_epochs=2"])).check()


def test_last_row_of_a_source_is_still_within_its_epoch():
    run = experiment([source("a", "G", 8000)], [stage("1", {"G": 1})])
    budget_of(run).check()
    with pytest.raises(ConfigError, match=r"1\.001 epochs; raise it to 1\.01"):
        budget_of(run, rows=[999]).check()


def test_rows_of_shards_replace_declared_tokens():
    run = experiment([source("a", "G", 1e6)], [stage("1", {"G": 1})])
    budget_of(run).check()
    with pytest.raises(ConfigError, match=r"allows 1 x 800 tokens, and stages 1 draw 8000, which is 10 epochs"):
        budget_of(run, rows=[100]).check()
    with pytest.raises(ConfigError, match="has no sequence to give, and stages 1 draw 1000"):
        budget_of(run, rows=[0]).check()


def test_index_follows_timeline_and_pool():
    run = experiment([source("a", "G", 9e4), source("b", "C", 9e4)], [stage("1", {"G": 1}), stage("2", {"C": 1}, 400)])
    index = mixture_index(run, Timeline.compile(run.curriculum, 8), [500, 600])
    assert index.num_sequences == 1050
    assert index.lookup(np.arange(1050)).source.tolist() == [0] * 1000 + [1] * 50
    assert (index.names, index.rows) == (("a", "b"), (500, 600))


@pytest.mark.parametrize("number", range(4), ids=[stage.name for stage in STAGES])
def test_domains_of_the_recipe_are_within_one_sequence_at_every_prefix(number):
    run = experiment(POOL, STAGES, length=4096)
    timeline = Timeline.compile(STAGES, 4096)
    index = mixture_index(run, timeline, [10**6] * len(POOL))
    source = index.lookup(timeline.sequences_of(number).start + np.arange(30_000)).source
    x = np.arange(1, len(source) + 1)
    for domain, share in domain_shares(STAGES[number]).items():
        chosen = np.array([pool_source.domain == domain for pool_source in POOL])[source]
        assert np.abs(np.cumsum(chosen) - x * share).max() < 1


def test_scaled_keeps_shape_and_mixture():
    small = scaled(STAGES, tokens=1e-3, batch=1 / 64, length=1 / 4, learning_rate=2)
    full, tiny = Timeline.compile(STAGES, 4096), Timeline.compile(small, 1024)
    for large, piece in zip(full.pieces, tiny.pieces, strict=True):
        assert piece.batch_size * 64 == large.batch_size
        assert piece.num_steps == pytest.approx(large.num_steps * 1e-3 * 256, rel=0.002)
    assert tiny.num_tokens == pytest.approx(8e9, rel=1e-3)
    assert [s.mixture for s in small] == [s.mixture for s in STAGES]
    assert small[1].learning_rate == dataclasses.replace(STAGES[1].learning_rate, peak=6e-4, final=6e-5)
    assert small[0].learning_rate.warmup_steps == 512
