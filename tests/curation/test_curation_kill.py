"""A run that is killed at any moment continues, and repeats nothing that was done."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest
from curated_corpus import content, run, write_config, write_corpus

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("raw"))


def start(file):
    return subprocess.Popen(
        [sys.executable, "-m", "davinci_jax.cli", "curate", str(file)],
        stdout=subprocess.DEVNULL,
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


def test_a_relaunch_repeats_no_task_that_is_done(raw, tmp_path):
    file = write_config(tmp_path, raw, "later")
    process = start(file)
    try:
        deadline = time.monotonic() + 50
        while len(done := set((tmp_path / "later/curated/s").glob("*/counts/*.json"))) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        kill(process.pid)
        process.communicate()
    before = {file: file.stat().st_mtime_ns for file in done}
    run(write_config(tmp_path, raw, "later", "workers=2"))
    assert {file: file.stat().st_mtime_ns for file in before} == before
