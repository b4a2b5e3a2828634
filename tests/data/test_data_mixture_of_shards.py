"""Plans and budgets count the shards that are there instead of the declared tokens."""

import dataclasses

import pytest
from shard_sets import write_shards

from davinci_jax.errors import ConfigError, DataError
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
from davinci_jax.training.plan import make_plan

MODEL = ModelConfig(
    vocab_size=64, hidden_size=8, num_layers=1, num_heads=2, num_kv_heads=1, head_size=4, mlp_size=8, max_positions=8
)


@pytest.fixture
def experiment(tmp_path):
    """Two sources drawn 1000 times each over 100 tokens declared; shards give one of them other numbers."""
    rate = LearningRate(peak=1e-3)
    sources = tuple(Source(name=name, domain=name, level="L2", tokens=100, max_epochs=100) for name in ("web", "code"))
    stage = Stage(name="1", tokens=16_000, batch=(Batch(size=10),), learning_rate=rate, mixture={"web": 1, "code": 1})
    write_shards(tmp_path / "web", [[1] * 40] * 20)
    return Experiment(
        run=RunConfig(name="x"),
        model=MODEL,
        data=DataConfig(root=str(tmp_path), sources=sources, sequence_length=8),
        curriculum=(stage,),
    )


def test_plan_counts_shards_that_are_there(experiment):
    web, code = make_plan(experiment)["sources"]
    # 20 documents of 40 tokens are 100 rows of 8; 100 declared tokens fill 12.
    assert (web["counted"], web["pool_tokens"], web["total_epochs"]) == ("shards", 800, 10)
    assert (code["counted"], code["pool_tokens"], code["total_epochs"]) == ("declared", 96, 1000 / 12)
    assert make_plan(experiment)["stages"][0]["domain_epochs"] == pytest.approx({"web": 10, "code": 1000 / 12})


def test_refusal_counts_shards(experiment):
    with pytest.raises(ConfigError, match=r"data\.sources\.web\.max_epochs = 9\.0: allows 9 x 800 tokens"):
        make_plan(apply_overrides(experiment, ["data.sources.web.max_epochs=9"]))
    make_plan(apply_overrides(experiment, ["data.sources.web.max_epochs=10"]))


def test_damaged_shards_are_named(experiment, tmp_path):
    (tmp_path / "web" / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="web/manifest"):
        make_plan(experiment)


def test_packing_changes_the_rows(experiment):
    packed = dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, packing="best_fit"))
    web = make_plan(packed)["sources"][0]
    assert web["pool_tokens"] >= 800
    assert web["total_epochs"] == 1000 / (web["pool_tokens"] / 8)
