"""Kill it anywhere, start it again: the run ends with the parameters of the run that was never touched."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import time

import jax
import numpy as np
import pytest
import tiny_run

from davinci_jax.experiment import load_config
from davinci_jax.sharding import make_mesh
from davinci_jax.training.load import load_model
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


def kill_when(config: pathlib.Path, due, number=signal.SIGKILL) -> int:
    """Starts training, slowed, and sends the signal as soon as `due()` is true; returns the exit code."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(tiny_run.faulty("slow", 0, config), env=tiny_run.ENVIRONMENT, **quiet)
    wait_until(due, [process])
    process.send_signal(number)
    return ended([process])[0]


def wait_until(due, processes) -> None:
    """Kills the processes if it never comes to that."""
    deadline = time.monotonic() + 240
    try:
        while not due():
            assert all(process.poll() is None for process in processes), "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
    except BaseException:
        for process in processes:
            process.kill()
        raise


def ended(processes) -> list[int]:
    """Exit codes; processes that do not end are killed."""
    try:
        return [process.wait(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()


def logged(directory: pathlib.Path, step: int) -> bool:
    file = directory / "metrics.jsonl"
    if not file.is_file():
        return False
    lines = [line for line in file.read_text().split("\n") if '"train"' in line and line.endswith("}")]
    return bool(lines) and json.loads(lines[-1])["step"] >= step


def saving(directory: pathlib.Path) -> bool:
    """Whether a save has begun and has no seal yet."""
    folder = directory / "checkpoints"
    names = os.listdir(folder) if folder.is_dir() else []
    return any("tmp" in name or (name.isdigit() and not is_sealed(folder / name)) for name in names)


def finish_and_compare(base, config, directory, *extra) -> None:
    root, _ = base
    tiny_run.davinci("train", config, *extra)
    assert fingerprint(directory) == fingerprint(root / "run")
    assert losses(directory) == losses(root / "run")


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(2, id="in 1-1", marks=pytest.mark.exhaustive),
        pytest.param(5, id="before a border", marks=pytest.mark.exhaustive),
        pytest.param(9, id="in 1-2", marks=pytest.mark.exhaustive),
        pytest.param(14, id="across 2-1"),
    ],
)
def test_sigkill_between_steps(base, tmp_path, step):
    config, directory = another(base, tmp_path)
    assert kill_when(config, lambda: logged(directory, step)) == -9
    assert not logged(directory, LAST)
    finish_and_compare(base, config, directory)


def test_sigkill_during_saves(base, tmp_path):
    config, directory = another(base, tmp_path)
    hits = 0
    for pause in (0, 0.004, 0.02):

        def due():
            if saving(directory):
                time.sleep(pause)  # noqa: B023
                return True
            return False

        assert kill_when(config, due) == -9
        hits += saving(directory)
    assert hits
    finish_and_compare(base, config, directory)


def test_sigkill_between_commit_and_seal(base, tmp_path):
    """The arrays are there and nobody vouches for them: they are set aside; the step before serves."""
    config, directory = another(base, tmp_path)
    assert subprocess.run(tiny_run.faulty("seal", 6, config), env=tiny_run.ENVIRONMENT).returncode == -9
    checkpoints = directory / "checkpoints"
    assert not is_sealed(checkpoints / "6")
    assert (checkpoints / "6" / "_CHECKPOINT_METADATA").is_file(), "Orbax has committed it"
    finish_and_compare(base, config, directory)
    assert (checkpoints / "6.unfinished").is_dir()
    events = [line for line in read_metrics(directory).events if line["event"] in ("resume", "unfinished_checkpoint")]
    assert [(line["event"], line["step"]) for line in events] == [("unfinished_checkpoint", 6), ("resume", 3)]


@pytest.mark.exhaustive
def test_sigkill_while_an_old_checkpoint_is_removed(base, tmp_path):
    """Half a checkpoint is none, even when the newer ones are lost; the next removal takes the rest away."""
    config, directory = another(base, tmp_path)
    assert subprocess.run(tiny_run.faulty("remove", 3, config), env=tiny_run.ENVIRONMENT).returncode == -9
    checkpoints = directory / "checkpoints"
    assert sorted(os.listdir(checkpoints)) == ["3.removed", "6", "9"]
    finish_and_compare(base, config, directory)
    assert sorted(os.listdir(checkpoints)) == ["15", "18"]


def test_sigterm_saves_and_other_loader_workers_go_on_until_they_are_killed(base, tmp_path):
    """SIGTERM inside stage 1-1, SIGKILL inside stage 1-2, the rest with another number of workers."""
    config, directory = another(base, tmp_path)
    assert kill_when(config, lambda: logged(directory, 4), signal.SIGTERM) == 0
    steps = [int(name) for name in os.listdir(directory / "checkpoints") if name.isdigit()]
    assert max(steps) >= 4
    assert not logged(directory, 8)
    assert kill_when(config, lambda: logged(directory, 8)) == -9
    assert not logged(directory, LAST)
    finish_and_compare(base, config, directory, "data.workers=2")


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


def start_two_hosts(config, command=tiny_run.command("train")) -> list[subprocess.Popen]:
    """Two processes of a device each, joined on this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    shared = {**os.environ, "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_NUM_CPU_DEVICES": "1"}
    return [
        subprocess.Popen([*command, str(config)], env={**shared, "JAX_PROCESS_ID": str(n)}, stdout=subprocess.DEVNULL)
        for n in range(2)
    ]


def test_two_hosts_stop_together_and_train_what_one_does(base, tmp_path):
    """SIGTERM to one of them ends both after the same step, with one checkpoint of both."""
    root, _ = base
    config, directory = another(base, tmp_path)
    hosts = start_two_hosts(config, tiny_run.faulty("slow", 0))
    wait_until(lambda: logged(directory, 3), hosts)
    hosts[1].send_signal(signal.SIGTERM)
    assert ended(hosts) == [0, 0]
    stopped = max(int(name) for name in os.listdir(directory / "checkpoints") if name.isdigit())
    assert 3 <= stopped < LAST
    assert sorted(path.name for path in (directory / "checkpoints" / str(stopped)).glob("seal*")) == [
        "seal-0-of-2.json",
        "seal-1-of-2.json",
    ]
    one, two = losses(root / "run"), losses(directory)
    assert max(two) == stopped
    assert all(abs(one[step] - two[step]) < 1e-5 * one[step] for step in two)


@pytest.mark.exhaustive
def test_two_hosts_go_on_together(base, tmp_path):
    root, _ = base
    config, directory = another(base, tmp_path)
    hosts = start_two_hosts(config, tiny_run.faulty("slow", 0))
    wait_until(lambda: logged(directory, 3), hosts)
    hosts[0].send_signal(signal.SIGTERM)
    assert ended(hosts) == [0, 0]
    assert not logged(directory, LAST)
    assert ended(start_two_hosts(config)) == [0, 0]
    one, two = losses(root / "run"), losses(directory)
    assert one.keys() == two.keys()
    assert all(abs(one[step] - two[step]) < 1e-5 * one[step] for step in one)


@pytest.mark.exhaustive
def test_sigkill_of_two_hosts(base, tmp_path):
    """Two hosts go on from it bit by bit as two hosts do that nobody touched, one host to the last digits."""
    root, _ = base
    (tmp_path / "untouched").mkdir()
    config, untouched = another(base, tmp_path / "untouched")
    assert ended(start_two_hosts(config)) == [0, 0]
    config, directory = another(base, tmp_path)
    hosts = start_two_hosts(config, tiny_run.faulty("slow", 0))
    wait_until(lambda: logged(directory, 8), hosts)
    for host in hosts:
        host.kill()
    assert [host.wait() for host in hosts] == [-9, -9]
    (tmp_path / "alone").mkdir()
    alone, alone_directory = another(base, tmp_path / "alone")
    shutil.copytree(directory, alone_directory)

    assert ended(start_two_hosts(config)) == [0, 0]
    assert fingerprint(directory) == fingerprint(untouched)
    assert losses(directory) == losses(untouched)

    tiny_run.davinci("train", alone)
    assert any(line["event"] == "resume" and line["step"] >= 6 for line in read_metrics(alone_directory).events)
    expected = losses(root / "run")
    assert losses(alone_directory) == pytest.approx(expected, rel=1e-5)
    for one, other in zip(parameters(alone_directory), parameters(root / "run"), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max())


def parameters(directory: pathlib.Path) -> list[np.ndarray]:
    experiment = load_config(directory)
    run = dataclasses.replace(experiment.run, directory=str(directory))
    with jax.set_mesh(make_mesh(experiment.mesh)):
        model, step = load_model(dataclasses.replace(experiment, run=run))
    assert step == LAST
    return [np.asarray(leaf) for leaf in jax.tree.leaves(model)]


@pytest.mark.parametrize("every", ["none", pytest.param("1", marks=pytest.mark.exhaustive)])
def test_evaluation_disturbs_nothing(base, tmp_path, every):
    root, _ = base
    config, directory = another(base, tmp_path, tensorboard=False)
    tiny_run.davinci("train", config, f"evaluation.every_steps={every}", "checkpoint.every_steps=7")
    assert len(read_metrics(directory).evaluations) == (0 if every == "none" else LAST)
    assert fingerprint(directory) == fingerprint(root / "run")
    assert losses(directory) == losses(root / "run")
    if every == "none":
        assert not (directory / "evaluations").exists()
        tiny_run.davinci("report", directory)
        assert "The run does not evaluate." in (directory / "report.html").read_text()
        tiny_run.davinci("evaluate", directory)
        ours, theirs = (
            json.loads((run / "evaluations" / f"{LAST}.json").read_text()) for run in (directory, root / "run")
        )
        assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}


def test_logging_disturbs_nothing(base, tmp_path):
    """With three steps a line, each loss is the mean of those of its steps, over as many targets."""
    root, _ = base
    config, directory = another(base, tmp_path, log_every_steps=3)
    tiny_run.davinci("train", config)
    assert fingerprint(directory) == fingerprint(root / "run")
    each = losses(root / "run")
    assert {3, 6, 9, 10, 12, 14, 15, 18} == losses(directory).keys()
    assert losses(directory)[10] == each[10]  # the end of a stage
    assert losses(directory)[9] == pytest.approx((each[7] + each[8] + each[9]) / 3, rel=0.05)


def test_a_finished_run_is_left_as_it_is(base):
    root, _ = base
    before, evaluations = fingerprint(root / "run"), (root / "run" / "metrics.jsonl").read_text().count('"evaluation"')
    tiny_run.davinci("train", root / "config.json")
    assert fingerprint(root / "run") == before
    assert (root / "run" / "metrics.jsonl").read_text().count('"evaluation"') == evaluations
