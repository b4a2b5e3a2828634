"""A bound on the processor time that one document takes of a library whose own bounds leave it days."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

_AGAIN = 0.1  # seconds of processor time after which work that goes on is stopped once more


class OverTime(BaseException):
    """The time is used up; no `Exception`, since a library catches those of damaged files and goes on."""


class Allowance:
    """Processor time that the work on one document may take, that of programs started for it included.

    It stops work on Python's own instructions, and only in the main thread of a process, where tasks run. A program
    needs a bound of its own: `left` says how much there is.

    Args:
      seconds: of processor time; how busy the machine is makes no difference.
    """

    def __init__(self, seconds: float):
        self.left = seconds

    @contextlib.contextmanager
    def spend(self) -> Iterator[None]:
        """Takes what the block uses off what is left; raises `OverTime` in it when nothing is."""
        if self.left <= 0:
            raise OverTime
        started = _taken()
        try:
            with _stopped_after(self.left):
                yield
        except OverTime:
            self.left = 0
            raise
        finally:
            self.left -= _taken() - started


@contextlib.contextmanager
def _stopped_after(seconds: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # no other thread gets signals
        return

    armed = True

    def stop(*_) -> None:
        if armed:
            raise OverTime

    before = signal.signal(signal.SIGPROF, stop)
    # 0 would be none. Again and again: Python drops what is raised in a finaliser or a callback of C.
    signal.setitimer(signal.ITIMER_PROF, max(seconds, 0.001), _AGAIN)
    try:
        try:
            yield
        finally:
            armed = False  # it must not strike below
    finally:
        armed = False  # it may have struck before the line above
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _taken() -> float:
    """Returns the seconds of this process and of those that it has started and waited for."""
    times = os.times()
    return time.process_time() + times.children_user + times.children_system
