"""SIGTERM and Ctrl-C end a run after the step in progress, with a checkpoint."""

from __future__ import annotations

import os
import signal
import types

import jax


class StopRequest:
    """Whether the run has been asked to stop; a context manager that owns the signal handlers.

    A second Ctrl-C interrupts at once. With several hosts, JAX owns SIGTERM and all hosts agree on the step.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self._old: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        # With several hosts JAX listens for SIGTERM, so that all hosts stop at the same step; it must stay in place.
        numbers = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else (signal.SIGINT,)
        for number in numbers:
            self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: types.FrameType | None) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def now(self, step: int) -> bool:
        """Whether to stop after `step`; every host gets the same answer."""
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            if multihost_utils.reached_preemption_sync_point(step):
                self.signal = self.signal or "SIGTERM"
                return True
            return False
        return self.signal is not None
