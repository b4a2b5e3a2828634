"""The plan of a run against the report's figures and against arrays that are really there."""

import dataclasses
import io
import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import pytest
from rich.console import Console

from davinci_jax import optimizers
from davinci_jax.errors import ConfigError
from davinci_jax.experiment import ModelConfig, OptimizerConfig, apply_overrides, load_config
from davinci_jax.models import decoder
from davinci_jax.sharding import make_mesh
from davinci_jax.training.plan import make_plan
from davinci_jax.training.plan_view import show_plan

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
TINY = ModelConfig(vocab_size=96, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, head_size=4, mlp_size=24)


@pytest.fixture(scope="module")
def experiment():
    return load_config(CONFIGS / "davinci_3b.py")


@pytest.fixture(scope="module")
def plan(experiment):
    return make_plan(experiment, num_devices=256)


def shown(plan: dict, width: int = 140) -> str:
    console = Console(file=io.StringIO(), width=width)
    show_plan(plan, console)
    return console.file.getvalue()


def test_stages_of_the_report(plan):
    assert [stage["steps"] for stage in plan["stages"]] == [310_919, 119_210, 59_605, 59_605]
    assert [stage["first_step"] for stage in plan["stages"]] == [0, 310_919, 430_129, 489_734]
    assert [stage["tokens"] for stage in plan["stages"]] == pytest.approx([4e12, 2e12, 1e12, 1e12], rel=2e-5)
    ramp = plan["stages"][0]["batch"]
    assert [(piece["size"], piece["steps"]) for piece in ramp[:2]] == [(1024, 70_000), (2048, 40_000)]
    assert [piece["tokens"] for piece in ramp] == pytest.approx([293.6e9, 335.5e9, 3.371e12], rel=1e-3)
    rates = [(stage["learning_rate"]["peak"], stage["learning_rate"]["last"]) for stage in plan["stages"]]
    assert rates == [(3e-4, 3e-4), (3e-4, 3e-5), (3e-5, 3e-5), (3e-5, 3e-5)]
    assert plan["stages"][1]["learning_rate"]["first"] == 3e-4
    assert plan["stages"][2]["mixture"] == pytest.approx({"General": 0.1, "Code": 0.3, "Science": 0.3, "QA": 0.3})
    assert plan["stages"][3]["mixture"]["QA"] == pytest.approx(70 / 100.3)


def test_expected_time_at_the_assumed_utilisation(experiment):
    """8e12 tokens x 20.33 GFLOP at 40 % of 256 x 459 TFLOP/s."""
    known = make_plan(apply_overrides(experiment, ["run.peak_flops=459e12"]), num_devices=256)
    assert known["time"]["seconds"] == pytest.approx(8e12 * 20.33e9 / (256 * 459e12 * 0.4), rel=1e-3)
    assert "40 d 01 h at 40% (assumed) of 459 TFLOP/s a device; 246k device hours" in shown(known)
    unknown = make_plan(experiment, num_devices=256)
    assert unknown["time"]["seconds"] is None
    assert "unknown: give run.peak_flops" in shown(unknown)


@pytest.mark.parametrize(
    ("every", "count", "words"),
    [
        ("none", 0, "none (evaluation.every_steps is unset)"),
        ("0", 4, "4, at stage ends, of"),
        ("100000", 9, "9, at stage ends and every 100,000 steps, of"),
    ],
)
def test_evaluations_may_be_few_or_none(experiment, every, count, words):
    plan = make_plan(apply_overrides(experiment, [f"evaluation.every_steps={every}"]), num_devices=256)
    assert plan["evaluations"]["count"] == count
    assert words in shown(plan)


@pytest.mark.slow
def test_a_pipe_gets_whole_lines():
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    command = [sys.executable, "-m", "davinci_jax.cli", "plan", str(CONFIGS / "davinci_3b.py")]
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    assert max(map(len, out.splitlines())) > 100
    (row,) = [line for line in out.splitlines() if "checkpoints" in line]
    assert row.endswith("uncompressed")
    assert all(line == line.rstrip() for line in out.splitlines())


def test_model_of_the_report(plan):
    model = plan["model"]
    layer = 2048 * (2 * 2048 + 2 * 256 + 3 * 11008) + 2048 + 2 * 256 + 2 * 2048
    assert model["params"] == 36 * layer + 151_936 * 2048 + 2048
    assert model["params"] / 1e9 == pytest.approx(3.086, abs=5e-4)
    assert model["flops_per_token"] / 1e9 == pytest.approx(20.33, abs=5e-3)
    assert model["total_flops"] == pytest.approx(20.33e9 * 8e12, rel=1e-3)
    assert "causal half" in model["flops_convention"]


def test_sources_of_the_report(plan):
    assert len(plan["sources"]) == 28
    assert sum(source["total_tokens"] for source in plan["sources"]) == plan["tokens"]
    for number, stage in enumerate(plan["stages"]):
        assert sum(source["tokens"][stage["name"]] for source in plan["sources"]) == stage["tokens"], number
        assert sum(stage["domain_tokens"].values()) == stage["tokens"]
    assert plan["stages"][3]["domain_epochs"]["QA"] == pytest.approx(0.698e12 / 242.4e9, rel=1e-3)
    assert "stage 2-2 repeats QA: 2.9 epochs of it in this stage" in plan["notes"]
    assert any("100.3" in note for note in plan["notes"])
    assert any("nemotron-cc-v1-synthetic-qa" in note for note in plan["notes"])
    assert {source["counted"] for source in plan["sources"]} == {"declared"}


def test_checkpoints_and_evaluations_of_the_report(plan):
    checkpoints = plan["checkpoints"]
    # Every 5000th of 549,339 steps and the last one; parameters and two moments in float32.
    assert (checkpoints["written"], checkpoints["kept"]) == (110, 110)
    assert checkpoints["bytes_each"] == pytest.approx(12 * plan["model"]["params"], rel=1e-6)
    assert checkpoints["bytes_kept"] == 110 * checkpoints["bytes_each"]
    assert plan["evaluations"]["count"] == 109 + 4


def test_kept_checkpoints(experiment):
    fewer = apply_overrides(experiment, ["checkpoint.keep_every=none", "checkpoint.keep_last=2"])
    assert make_plan(fewer)["checkpoints"]["kept"] == 2
    # 20,000, 40,000, ... 540,000 for ever; 545,000 and 549,339 as the last two.
    some = apply_overrides(experiment, ["checkpoint.keep_every=20000", "checkpoint.keep_last=2"])
    assert make_plan(some)["checkpoints"]["kept"] == 27 + 2


@pytest.mark.slow
@pytest.mark.parametrize(("name", "replica", "fsdp"), [("adamw", 2, 4), ("muon", 1, 8)])
def test_memory_is_that_of_real_arrays(experiment, name, replica, fsdp):
    small = dataclasses.replace(
        apply_overrides(experiment, [f"mesh.replica={replica}", f"mesh.fsdp={fsdp}"]),
        model=dataclasses.replace(TINY, max_positions=4096),
        optimizer=OptimizerConfig(name=name),
    )
    planned = make_plan(small, num_devices=8)
    with jax.set_mesh(make_mesh(small.mesh)):
        model = decoder.build(small.model, jax.random.key(0))
        state = jax.jit(optimizers.build(small.optimizer, lambda step: 1e-3).init)(model)
    held = [sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree)) for tree in (model, state)]
    assert [planned["devices"]["parameter_bytes"], planned["devices"]["optimizer_bytes"]] == held
    assert planned["checkpoints"]["bytes_each"] == sum(leaf.nbytes for leaf in jax.tree.leaves((model, state)))


def test_memory_of_the_report_on_256_devices(plan):
    devices = plan["devices"]
    assert devices["mesh"] == {"fsdp": 256}
    assert devices["parameter_bytes"] == pytest.approx(4 * plan["model"]["params"] / 256, rel=0.02)
    assert devices["optimizer_bytes"] == pytest.approx(2 * devices["parameter_bytes"], rel=1e-3)
    assert devices["total_bytes"] == 2 * devices["parameter_bytes"] + devices["optimizer_bytes"]
    # 1024, 2048 and 4096 sequences over 256 devices: 4 rows each at a time, at most 4 times.
    assert (devices["rows_per_micro_batch"], devices["most_micro_batches"]) == (4, 4)


def test_plan_is_json_and_says_it_in_words(plan):
    assert json.loads(json.dumps(plan)) == plan
    text = shown(plan)
    for words in ("310,919 steps", "3.086 B", "tied", "20.33 G", "fsdp 256", "4.12"):
        assert words in text
    rates = [line.split("learning rate  ")[1].rstrip() for line in text.splitlines() if "learning rate  " in line]
    assert rates == [
        "1.5e-07 -> 0.0003  (2,000 steps of warm-up to 0.0003, then constant)",
        "0.0003 -> 3e-05  (cosine)",
        "1.5e-08 -> 3e-05  (2,000 steps of warm-up to 3e-05, then constant)",
        "3e-05 -> 3e-05  (constant)",
    ]
    for source in plan["sources"]:
        assert source["name"] in text


def test_plan_keeps_its_numbers_on_a_narrow_terminal(plan):
    text = shown(plan, width=80)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    assert "0.64 0.39 0.50 0.04 1.57" in text


RECIPES = sorted(file for file in CONFIGS.glob("*.py") if not file.stem.startswith("curate_"))


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_every_shipped_config_has_a_plan(file, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # no shards here, whatever lies in the working copy
    plan = make_plan(load_config(file))
    assert plan["steps"] > 100
    assert f"{plan['steps']:,} steps" in shown(plan)
    assert not any(math.isnan(stage["learning_rate"]["last"]) for stage in plan["stages"])


@pytest.mark.parametrize(
    ("override", "devices", "message"),
    [
        (
            "data.sources.megascience-rs.max_epochs=4",
            1,
            r"megascience-rs\.max_epochs = 4\.0: .* which is 4\.117 epochs",
        ),
        ("curriculum.1-1.batch.0.size=1000", 256, r"batch\.size = 1000: is not divisible by the 256 devices"),
        ("mesh.fsdp=8", 12, r"mesh: replica 1 x fsdp 8 = 8 does not match 12 devices"),
        ("model.hidden_size=2304", 512, r"model\.hidden_size = 2304: does not divide over 512 devices"),
    ],
)
def test_a_run_that_cannot_be_is_refused(experiment, override, devices, message):
    with pytest.raises(ConfigError, match=message):
        make_plan(apply_overrides(experiment, [override]), num_devices=devices)
