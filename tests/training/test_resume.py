"""Kill it anywhere, start it again: the run ends with the parameters of the run that was never touched."""

import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import time

import pytest
import tiny_run

from davinci_jax.training.metrics import read_metrics
from davinci_jax.training.seal import is_sealed, read_meta

LAST = sum(tiny_run.STEPS)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The data and the finished, untouched run."""
    root = tmp_path_factory.mktemp("base")
    experiment = tiny_run.prepare(root)
    tiny_run.davinci("train", tiny_run.write_config(experiment, root / "config.json"))
    return root, experiment


def another(base, tmp_path, **run) -> tuple[pathlib.Path, pathlib.Path]:
    """A config of the same experiment in another run directory."""
    _, experiment = base
    directory = tmp_path / "run"
    run = dataclasses.replace(experiment.run, directory=str(directory), **run)
    return tiny_run.write_config(dataclasses.replace(experiment, run=run), tmp_path / "config.json"), directory


def fingerprint(directory: pathlib.Path, step: int = LAST) -> dict:
    folder = directory / "checkpoints" / str(step)
    assert is_sealed(folder)
    return read_meta(folder)["fingerprint"]


def losses(directory: pathlib.Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_metrics(directory).train}


def kill_when(config: pathlib.Path, due, number=signal.SIGKILL, extra=()) -> int:
    """Starts training and sends the signal as soon as `due()` is true; returns the exit code."""
    process = subprocess.Popen(
        tiny_run.command("train", config, *extra), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while process.poll() is None and not due():
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(number)
    return process.wait(timeout=120)


def logged(directory: pathlib.Path, step: int) -> bool:
    file = directory / "metrics.jsonl"
    if not file.is_file():
        return False
    lines = [line for line in file.read_text().split("\n") if '"train"' in line and line.endswith("}")]
    return bool(lines) and json.loads(lines[-1])["step"] >= step


def saving(directory: pathlib.Path) -> bool:
    folder = directory / "checkpoints"
    return folder.is_dir() and any("tmp" in name for name in os.listdir(folder))


def finish_and_compare(base, config, directory, *extra) -> None:
    root, _ = base
    tiny_run.davinci("train", config, *extra)
    assert fingerprint(directory) == fingerprint(root / "run")
    assert losses(directory) == losses(root / "run")


@pytest.mark.parametrize("step", [2, 5, 9, 14], ids=["in 1-1", "before a border", "in 1-2", "across 2-1"])
def test_sigkill_between_steps(base, tmp_path, step):
    config, directory = another(base, tmp_path)
    assert kill_when(config, lambda: logged(directory, step)) in (-9, 0)
    finish_and_compare(base, config, directory)


def test_sigkill_during_saves(base, tmp_path):
    config, directory = another(base, tmp_path)
    rng = random.Random(0)
    for _ in range(3):

        def due():
            if saving(directory):
                time.sleep(rng.random() * 0.03)
                return True
            return False

        kill_when(config, due)
    finish_and_compare(base, config, directory)


def test_another_number_of_loader_workers(base, tmp_path):
    config, directory = another(base, tmp_path)
    kill_when(config, lambda: logged(directory, 7))
    finish_and_compare(base, config, directory, "data.workers=2")


def test_sigterm_saves_and_exits_cleanly(base, tmp_path):
    config, directory = another(base, tmp_path)
    code = kill_when(config, lambda: logged(directory, 4), signal.SIGTERM)
    assert code == 0
    steps = [int(name) for name in os.listdir(directory / "checkpoints") if name.isdigit()]
    assert max(steps) >= 4
    finish_and_compare(base, config, directory)


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(base, tmp_path):
    root, _ = base
    config, directory = another(base, tmp_path)
    shutil.copytree(root / "run", directory)
    newest = directory / "checkpoints" / str(LAST)
    victim = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    result = tiny_run.davinci("train", config)
    assert f"checkpoint of step {LAST} is damaged and set aside" in result.stdout
    assert victim.name in result.stdout.replace("\n", "")
    assert fingerprint(directory) == fingerprint(root / "run")


def start_two_hosts(config) -> list[subprocess.Popen]:
    """Two processes of four devices each, joined on this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    shared = {**os.environ, "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_NUM_CPU_DEVICES": "4"}
    return [
        subprocess.Popen(
            tiny_run.command("train", config), env={**shared, "JAX_PROCESS_ID": str(n)}, stdout=subprocess.DEVNULL
        )
        for n in range(2)
    ]


def test_two_hosts_stop_together_and_train_what_one_does(base, tmp_path):
    """SIGTERM to one of them ends both after the same step with a checkpoint; started again, they finish."""
    root, _ = base
    config, directory = another(base, tmp_path)
    hosts = start_two_hosts(config)
    deadline = time.monotonic() + 240
    while not logged(directory, 3):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    hosts[1].send_signal(signal.SIGTERM)
    assert [host.wait(timeout=240) for host in hosts] == [0, 0]
    stopped = max(int(name) for name in os.listdir(directory / "checkpoints") if name.isdigit())
    assert 3 <= stopped < LAST
    assert [host.wait(timeout=240) for host in start_two_hosts(config)] == [0, 0]
    one, two = losses(root / "run"), losses(directory)
    assert one.keys() == two.keys()
    assert all(abs(one[step] - two[step]) < 1e-4 * one[step] for step in one)
    assert sorted(path.name for path in (directory / "checkpoints" / str(LAST)).glob("seal*")) == [
        "seal-0-of-2.json",
        "seal-1-of-2.json",
    ]


def test_evaluation_and_logging_disturb_nothing(base, tmp_path):
    root, _ = base
    config, directory = another(base, tmp_path, tensorboard=False)
    tiny_run.davinci("train", config, "evaluation.every_steps=1", "checkpoint.every_steps=7")
    assert fingerprint(directory) == fingerprint(root / "run")
    assert losses(directory) == losses(root / "run")


def test_a_finished_run_is_left_as_it_is(base):
    root, _ = base
    before = fingerprint(root / "run")
    tiny_run.davinci("train", root / "config.json")
    assert fingerprint(root / "run") == before
