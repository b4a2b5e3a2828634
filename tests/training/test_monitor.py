"""The monitor: one line an interval, with means over it, from per-source sums worked out by hand."""

import json
import types

import numpy as np
import pytest
import tiny_run

from davinci_jax.curriculum.timeline import Timeline
from davinci_jax.models.flops import flops_per_token
from davinci_jax.training import monitor as module
from davinci_jax.training.metrics import read_metrics
from davinci_jax.training.monitor import Monitor

# Of three sources, one a domain: sums of nats, targets and rows at each step.
STEPS = [
    {"nll": np.array([8.0, 6.0, 0.0]), "targets": np.array([4.0, 2.0, 0.0]), "rows": np.array([12, 4, 0])},
    {"nll": np.array([4.0, 0.0, 0.0]), "targets": np.array([4.0, 0.0, 0.0]), "rows": np.array([16, 0, 0])},
    {"nll": np.array([1.0, 1.0, 9.0]), "targets": np.array([1.0, 1.0, 3.0]), "rows": np.array([8, 4, 4])},
]


class Clock:
    """Seconds that only a test lets pass."""

    def __init__(self):
        self.now = 50.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "time", types.SimpleNamespace(perf_counter=clock.perf_counter))
    return clock


@pytest.fixture
def experiment(tmp_path):
    return tiny_run.make_experiment(tmp_path)


@pytest.fixture
def monitor(experiment, tmp_path, clock):
    timeline = Timeline.compile(experiment.curriculum, experiment.data.sequence_length)
    with Monitor(experiment, timeline, tmp_path) as monitor:
        yield monitor


def feed(monitor, step: int, number: int) -> None:
    monitor.step(step, {**STEPS[number], "grad_norm": np.float32(0.5 + number), "param_norm": np.float32(10 + number)})


def test_a_line_holds_means_over_its_interval(monitor, experiment, clock, tmp_path):
    monitor.compiled(0, 3.0)
    feed(monitor, 2, 0)  # steps 2 and 3 have batches of 16
    feed(monitor, 3, 1)
    monitor.data_wait(0.25)
    clock.now += 2.0
    monitor.flush()
    clock.now += 1.0
    feed(monitor, 4, 2)
    monitor.flush()
    monitor.flush()  # nothing new, no line
    first, second = read_metrics(tmp_path).train
    tokens = 2 * 16 * tiny_run.LENGTH
    assert (first["step"], first["stage"], first["batch_size"], first["learning_rate"]) == (4, "1-1", 16, 1e-2)
    assert first["tokens"] == (2 * 8 + 2 * 16) * tiny_run.LENGTH
    assert first["loss"] == pytest.approx(18 / 10)
    assert (first["loss/General"], first["loss/Code"]) == (12 / 8, 6 / 2)
    assert "loss/QA" not in first
    assert [first[f"share/{name}"] for name in ("General", "Code", "QA")] == [28 / 32, 4 / 32, 0]
    assert (first["grad_norm"], first["param_norm"]) == (1.5, 11)
    assert (first["step_seconds"], first["data_wait_seconds"]) == (1.0, 0.125)
    assert first["tokens_per_second"] == tokens / 2
    assert (second["loss"], second["loss/QA"], second["step_seconds"], second["data_wait_seconds"]) == (11 / 5, 3, 1, 0)


def test_mfu_is_of_all_devices(experiment, tmp_path, clock):
    import dataclasses

    import jax

    experiment = dataclasses.replace(experiment, run=dataclasses.replace(experiment.run, peak_flops=1e9))
    timeline = Timeline.compile(experiment.curriculum, experiment.data.sequence_length)
    with Monitor(experiment, timeline, tmp_path) as monitor:
        feed(monitor, 2, 0)
        clock.now += 4.0
        monitor.flush()
    (line,) = read_metrics(tmp_path).train
    per_token = flops_per_token(experiment.model, tiny_run.LENGTH)
    assert line["mfu"] == pytest.approx(16 * tiny_run.LENGTH / 4 * per_token / (1e9 * jax.device_count()))


def test_pauses_do_not_slow_the_interval(monitor, clock, tmp_path):
    feed(monitor, 2, 0)
    clock.now += 1.0
    with monitor.paused():
        clock.now += 100.0
    monitor.flush()
    assert read_metrics(tmp_path).train[0]["step_seconds"] == 1.0


def test_evaluations_go_to_the_log_and_to_a_file_of_their_own(monitor, tmp_path):
    monitor.evaluation(6, {"loss": 2.5, "bits_per_byte": 1.25})
    (line,) = read_metrics(tmp_path).evaluations
    assert (line["step"], line["stage"], line["loss"]) == (6, "1-1", 2.5)
    assert json.loads((tmp_path / "evaluations" / "6.json").read_text()) == {
        "step": 6, "loss": 2.5, "bits_per_byte": 1.25,
    }  # fmt: skip


@pytest.mark.parametrize(("stopped_by", "event"), [("SIGTERM", "sigterm"), ("SIGINT", "sigint"), (None, "finish")])
def test_the_end_is_told_by_its_cause(monitor, tmp_path, stopped_by, event):
    monitor.unfinished_checkpoint(3)
    monitor.finish(6, stopped_by)
    told = [(line["event"], line["step"]) for line in read_metrics(tmp_path).events]
    assert told == [("unfinished_checkpoint", 3), (event, 6)]


def test_other_hosts_are_silent(experiment, tmp_path, clock, monkeypatch, capsys):
    monkeypatch.setattr(module.jax, "process_index", lambda: 1)
    timeline = Timeline.compile(experiment.curriculum, experiment.data.sequence_length)
    with Monitor(experiment, timeline, tmp_path) as monitor:
        feed(monitor, 2, 0)
        monitor.flush()
        monitor.evaluation(6, {"loss": 2.5})
        monitor.checkpoint(6)
        monitor.finish(6, None)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""
