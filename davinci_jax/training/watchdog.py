"""Ends a process that hangs: JAX notices dead peers, not stuck ones."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time

EXIT_CODE = 75  # EX_TEMPFAIL: try again


class Watchdog:
    """Exits with code 75 and all stacks when no beat comes for `limit` seconds; armed by the first beat."""

    def __init__(self, limit: float):
        self._limit, self._last = limit, None
        if limit > 0:
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    def beat(self) -> None:
        """Says that the run moves."""
        self._last = time.monotonic()

    def pause(self) -> None:
        """Disarms until the next beat: around work of unknown length, such as a restore."""
        self._last = None

    def _watch(self) -> None:
        while True:
            time.sleep(min(1.0, self._limit / 4))
            last = self._last
            if last is not None and time.monotonic() - last > self._limit:
                print(
                    f"no step for {self._limit:.0f} s: the stacks follow, exit {EXIT_CODE}", file=sys.stderr, flush=True
                )
                faulthandler.dump_traceback(all_threads=True)
                os._exit(EXIT_CODE)
