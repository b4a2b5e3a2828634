"""Metrics: valid JSON whatever the values, torn ends mended, undone steps left out."""

import json
import math
import resource
import struct

import jax.numpy as jnp
import numpy as np
import pytest

from davinci_jax.errors import TrainingError
from davinci_jax.training import metrics
from davinci_jax.training.metrics import FILE, MetricsWriter, read_metrics


def _refuse(constant: str):
    raise AssertionError(f"{constant} is no JSON")


def _lines(run_dir):
    return [json.loads(line, parse_constant=_refuse) for line in (run_dir / FILE).read_text().splitlines()]


def _write(run_dir, *calls):
    with MetricsWriter(run_dir, tensorboard=False) as writer:
        for kind, values in calls:
            if kind == "event":
                writer.event(values.pop("event"), **values)
            else:
                getattr(writer, kind)(values)


def test_array_scalars_and_non_finite_values_are_strict_json_and_come_back(tmp_path):
    values = {"step": np.int64(3), "loss": jnp.float32(2.5), "grad_norm": math.nan, "max": np.inf, "min": -math.inf}
    _write(tmp_path, ("train", {**values, "mfu": None, "stage": "NaN"}))
    (line,) = _lines(tmp_path)
    assert line["kind"] == "train"
    assert (line["step"], line["loss"], line["grad_norm"], line["mfu"]) == (3, 2.5, "NaN", None)
    assert line["time"] > 1e9
    (read,) = read_metrics(tmp_path).train
    assert math.isnan(read["grad_norm"])
    assert (read["max"], read["min"], read["stage"]) == (math.inf, -math.inf, "NaN")


def test_a_line_reaches_the_file_before_the_writer_is_closed(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer.train({"step": 1, "loss": 1.0})
    assert len(_lines(tmp_path)) == 1
    writer.close()
    writer.close()


def test_a_reader_passes_over_a_torn_last_line(tmp_path):
    _write(tmp_path, ("train", {"step": 1}))
    with open(tmp_path / FILE, "ab") as file:
        file.write(b'{"kind": "train", "step": 2, "lo')
    read = read_metrics(tmp_path)
    assert [line["step"] for line in read.train] == [1]
    assert read.damaged == 1


@pytest.mark.parametrize(
    ("tail", "steps"),
    [
        (b'{"kind": "train", "step": 2, "lo', [1, 3]),
        (b'{"kind": "train", "step": 2}', [1, 2, 3]),
        (b'{"kind": "train", "step": 2}\n', [1, 2, 3]),
        (b"\xff\xfe\x00", [1, 3]),
        (b"17", [1, 3]),
    ],
    ids=["torn", "no newline", "whole", "not text", "not an object"],
)
def test_opening_mends_the_end_of_the_file(tmp_path, tail, steps):
    _write(tmp_path, ("train", {"step": 1}))
    with open(tmp_path / FILE, "ab") as file:
        file.write(tail)
    _write(tmp_path, ("train", {"step": 3}))
    assert [line["step"] for line in _lines(tmp_path)] == steps
    assert read_metrics(tmp_path).damaged == 0


def test_a_torn_first_line_is_cut_too(tmp_path):
    (tmp_path / FILE).write_bytes(b'{"ki')
    _write(tmp_path, ("train", {"step": 1}))
    assert [line["step"] for line in _lines(tmp_path)] == [1]


def test_damage_in_the_middle_costs_that_line_only(tmp_path):
    (tmp_path / FILE).write_bytes(
        b'{"kind": "train", "step": 1}\nnonsense\n{"kind": "train", "step": 2}\n{"kind": "train"}\n\n[1]\n'
    )
    read = read_metrics(tmp_path)
    assert [line["step"] for line in read.train] == [1, 2]
    assert read.damaged == 3


def test_the_last_line_of_a_step_wins(tmp_path):
    _write(
        tmp_path,
        ("train", {"step": 10, "loss": 3.0}),
        ("evaluation", {"step": 10, "loss": 4.0}),
        ("train", {"step": 10, "loss": 2.0}),
    )
    read = read_metrics(tmp_path)
    assert [(line["step"], line["loss"]) for line in read.train] == [(10, 2.0)]
    assert [line["loss"] for line in read.evaluations] == [4.0]


def test_a_resume_drops_what_it_undid_and_nothing_else(tmp_path):
    _write(
        tmp_path,
        ("event", {"event": "start", "step": 0}),
        *(("train", {"step": step, "try": 1}) for step in (10, 20, 30, 35)),
        ("evaluation", {"step": 30}),
        ("event", {"event": "checkpoint", "step": 30}),
        ("event", {"event": "resume", "step": 20}),
        ("train", {"step": 30, "try": 2}),
    )
    read = read_metrics(tmp_path)
    assert [(line["step"], line["try"]) for line in read.train] == [(10, 1), (20, 1), (30, 2)]
    assert read.evaluations == []
    assert [event["event"] for event in read.events] == ["start", "checkpoint", "resume"]


def test_wall_time_leaves_out_the_time_between_processes(tmp_path):
    _write(
        tmp_path,
        ("event", {"event": "start", "step": 0, "time": 1000.0}),
        ("train", {"step": 10, "time": 1060.0}),
        ("event", {"event": "resume", "step": 0, "time": 5000.0}),
        ("train", {"step": 10, "time": 5030.0}),
    )
    assert read_metrics(tmp_path).wall_seconds == 90.0


def test_a_missing_file_has_no_lines(tmp_path):
    read = read_metrics(tmp_path / "nowhere")
    assert (read.train, read.evaluations, read.events, read.damaged) == ([], [], [], 0)


def test_a_full_disk_is_told_in_one_line(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer._file.close()
    writer._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
    with pytest.raises(TrainingError, match=r"metrics\.jsonl: cannot be written \(No space left on device\)"):
        writer.train({"step": 1})
    writer._file.close()


def test_a_run_directory_that_is_a_file_is_told_in_one_line(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(TrainingError, match="cannot be written"):
        MetricsWriter(tmp_path / "run", tensorboard=False)


def _events(run_dir):
    """Decodes event files with the record format alone: length, its checksum, protobuf, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    for file in sorted((run_dir / "tensorboard").iterdir()):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            yield Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


@pytest.mark.parametrize("first", [0, 4])
def test_tensorboard_gets_the_numbers_and_hides_undone_steps(tmp_path, first):
    with MetricsWriter(tmp_path, tensorboard=True) as writer:
        writer.event("resume" if first else "start", step=first)
        writer.train({"step": 5, "loss": jnp.float32(1.5), "loss/Code": 2.0, "stage": "1-1", "mfu": None})
        writer.evaluation({"step": 5, "bits_per_byte": 0.5})
    events = list(_events(tmp_path))
    scalars = {(v.tag, e.step): v.simple_value for e in events for v in e.summary.value}
    assert scalars == {("train/loss", 5): 1.5, ("train/loss/Code", 5): 2.0, ("evaluation/bits_per_byte", 5): 0.5}
    starts = [event.step for event in events if event.session_log.status == 1]
    assert starts == [first + 1]


class _Tracker:
    def __init__(self, run_dir, first_step):
        self.run_dir, self.first_step, self.seen, self.closed = run_dir, first_step, [], 0

    def log(self, kind, values, step):
        if step == 2:
            raise ConnectionError("no route")
        self.seen.append((kind, values, step))

    def close(self):
        self.closed += 1


def test_a_registered_tracker_is_fed_and_dropped_when_it_fails(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(metrics, "_factories", [])
    metrics.register_tracker(lambda *args: made.append(_Tracker(*args)) or made[-1])
    _write(
        tmp_path,
        ("event", {"event": "start", "step": 0}),
        *(("train", {"step": step, "loss": 1.0, "stage": "1-1"}) for step in (1, 2, 3)),
    )
    (tracker,) = made
    assert tracker.seen == [("train", {"loss": 1.0}, 1)]
    assert (tracker.run_dir, tracker.first_step) == (tmp_path, 0)
    lines = _lines(tmp_path)
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2, 3]
    assert [line["error"] for line in lines if line.get("event") == "tracker_dropped"] == ["ConnectionError: no route"]


def test_host_memory_is_in_bytes():
    peak = metrics.host_memory_bytes()
    assert 20 * 2**20 < peak < 2**40
    assert peak >= resource.getpagesize()


def test_device_memory_is_the_fullest_or_unknown(monkeypatch):
    class Device:
        def __init__(self, stats):
            self.stats = stats

        def memory_stats(self):
            return self.stats

    devices = [Device({"peak_bytes_in_use": 5}), Device({"peak_bytes_in_use": 7}), Device(None)]
    monkeypatch.setattr(metrics.jax, "local_devices", lambda: devices)
    assert metrics.device_memory_bytes() == 7
    monkeypatch.setattr(metrics.jax, "local_devices", lambda: devices[2:])
    assert metrics.device_memory_bytes() is None
