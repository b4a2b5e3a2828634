"""A run that is killed at any moment continues, and repeats nothing that was done."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from curated_corpus import content, run, write_config, write_corpus

from davinci_jax.curation import executors

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("raw"))


@pytest.fixture
def pool(monkeypatch):
    """Has runs in this process use a pool, too."""
    monkeypatch.setattr(executors, "_WORKER_BYTES", 1)


POOLED = pathlib.Path(__file__).with_name("pooled_curate.py")


def start(file, stdout=subprocess.DEVNULL, program=POOLED):
    return subprocess.Popen(
        [sys.executable, str(program), str(file)],
        stdout=stdout,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def kill(group):
    """Kills what is left of a process and its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def test_a_killed_run_continues(raw, tmp_path):
    """Killed again and again, each time a little later, with two workers and with one, alone or with its children."""
    reference = content(run(write_config(tmp_path, raw, "whole")).folder)
    groups = []
    try:
        for attempt in range(40):
            file = write_config(tmp_path, raw, "killed", f"workers={1 + (attempt + 1) % 2}")
            process = start(file)
            groups.append(process.pid)
            try:
                _, errors = process.communicate(timeout=1.2 + 0.4 * attempt)
            except subprocess.TimeoutExpired:
                # Alone: its workers live on for a while and write into the same folders as those of the next attempt.
                (os.kill if attempt % 3 == 1 else os.killpg)(process.pid, signal.SIGKILL)
                process.wait()
                continue
            assert process.returncode == 0, errors.decode()
            break
    finally:
        for group in groups:
            kill(group)
    assert len(groups) > 3
    [folder] = {path.resolve() for path in (tmp_path / "killed/curated/s").glob("current")}
    assert content(folder) == reference
    assert run(write_config(tmp_path, raw, "killed")).built is False


def test_a_relaunch_repeats_no_task_that_is_done(raw, tmp_path, pool):
    file = write_config(tmp_path, raw, "later", "workers=2")
    process = start(file)
    try:
        deadline = time.monotonic() + 50
        while len(done := set((tmp_path / "later/curated/s").glob("*/counts/*.json"))) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert len(members(process.pid)) > 3  # the command and two workers, and what starts those
    finally:
        kill(process.pid)
        process.communicate()
    before = {file: file.stat().st_mtime_ns for file in done}
    run(write_config(tmp_path, raw, "later", "workers=3"))
    assert {file: file.stat().st_mtime_ns for file in before} == before


def wait_for(pattern, folder, seconds=50):
    """Waits until files of a pattern are there; returns them."""
    deadline = time.monotonic() + seconds
    while not (found := list(folder.glob(pattern))):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def all_ended(group, seconds=10):
    """Whether every process of a group ends by itself."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def members(group):
    """The processes of a group, each with what the kernel tells of it."""
    found = {}
    for file in pathlib.Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):  # ended since
            if os.getpgid(int(file.parent.name)) == group:
                found[int(file.parent.name)] = dict(
                    line.split(":\t", 1) for line in file.read_text().splitlines() if ":\t" in line
                )
    return found


def hearing(group, number):
    """The processes of a group that a signal reaches: neither held back nor ignored."""
    masks = {process: int(told["SigBlk"], 16) | int(told["SigIgn"], 16) for process, told in members(group).items()}
    return {process for process, mask in masks.items() if not mask >> (number - 1) & 1}


# Ctrl-C of a terminal goes to all processes, SIGTERM of a scheduler to all or to the first alone.
@pytest.mark.parametrize(
    ("workers", "send", "number"),
    [
        (1, os.killpg, signal.SIGINT),
        (2, os.killpg, signal.SIGTERM),
        pytest.param(2, os.killpg, signal.SIGINT, marks=pytest.mark.exhaustive),
        pytest.param(2, os.kill, signal.SIGTERM, marks=pytest.mark.exhaustive),
    ],
)
def test_a_run_that_is_told_to_stop_leaves_nobody_behind_and_continues(raw, tmp_path, workers, send, number):
    reference = content(run(write_config(tmp_path, raw, "whole")).folder)
    file = write_config(tmp_path, raw, "stopped", f"workers={workers}")
    process = start(file, stdout=subprocess.PIPE)
    try:
        wait_for("curated/s/*/progress/*", tmp_path / "stopped")
        assert hearing(process.pid, signal.SIGINT) == {process.pid}  # workers are stopped by it
        send(process.pid, number)
        told, errors = process.communicate(timeout=20)
        assert process.returncode == 130
        assert told.decode().endswith("curate: stopped; the same command goes on from here\n")
        assert b"Traceback" not in errors
        assert all_ended(process.pid)
    finally:
        kill(process.pid)
    assert not list((tmp_path / "stopped/curated/s").glob("current"))
    assert content(run(file).folder) == reference


# An operation in which a signal is lost, as in a callback of native code.
DEAF = """
import dataclasses, pathlib, sys, time

from davinci_jax.cli import main
from davinci_jax.curation import registry


@dataclasses.dataclass(frozen=True)
class Deaf:
    name, level = "drop-short", "L2"

    def parameters(self):
        return {}

    def apply(self, documents, reject):
        for document in documents:
            pathlib.Path(sys.argv[1] + ".at").touch()
            end = time.monotonic() + 4
            while time.monotonic() < end:
                try:
                    time.sleep(0.1)
                except BaseException:
                    pass
            yield document


registry.OPERATIONS["drop-short"] = (lambda: sys.modules["__main__"], "Deaf")
sys.exit(main(["curate", sys.argv[1]]))
"""


@pytest.mark.parametrize("signals", [1, 2])
def test_a_signal_waits_for_the_end_of_a_document_and_a_second_one_does_not(raw, tmp_path, signals):
    (tmp_path / "deaf.py").write_text(DEAF)
    file = write_config(tmp_path, raw, "stopped")
    file.write_text(file.read_text().replace(", characters=200", ""))
    process = start(file, program=tmp_path / "deaf.py")
    try:
        wait_for("*.at", tmp_path)
        began = time.monotonic()
        for _ in range(signals):
            process.send_signal(signal.SIGINT)
            time.sleep(0.5)
        _, errors = process.communicate(timeout=20)
        assert process.returncode == 130
        assert errors.decode() == "\nstopping after the document at hand; once more ends it at once\n"
        assert (time.monotonic() - began < 2) == (signals == 2)
    finally:
        kill(process.pid)
