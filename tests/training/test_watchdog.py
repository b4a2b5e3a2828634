"""The watchdog ends a process that hangs, and no other; in processes of their own, because it ends them."""

import subprocess
import sys
import threading

import pytest

from davinci_jax.training.watchdog import EXIT_CODE, Watchdog

PROGRAM = """
import time
from davinci_jax.training.watchdog import Watchdog

def hang():
    time.sleep({after})

watchdog = Watchdog({limit})
{before}
hang()
print("alive")
"""


def run(limit: float, after: float, before: str) -> subprocess.CompletedProcess:
    program = PROGRAM.format(limit=limit, after=after, before=before)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)


def test_a_step_that_hangs_ends_the_process_with_the_stacks():
    ended = run(0.2, 30, "watchdog.beat()")
    assert ended.returncode == EXIT_CODE == 75
    assert "no step for 0 s" in ended.stderr
    assert "in hang" in ended.stderr
    assert "alive" not in ended.stdout


@pytest.mark.parametrize(
    "before", ["", "watchdog.beat(); watchdog.pause()", "for _ in range(20): watchdog.beat(); time.sleep(0.05)"],
    ids=["not armed", "paused", "beating"],
)  # fmt: skip
def test_what_does_not_hang_lives(before):
    after = 0.1 if "range" in before else 0.8
    ended = run(0.4, after, before)
    assert (ended.returncode, ended.stdout) == (0, "alive\n")


def test_a_limit_of_zero_watches_nothing():
    before = threading.active_count()
    Watchdog(0).beat()
    assert threading.active_count() == before
