"""Ctrl-C and SIGTERM stop a curation between two documents; a second one ends it at once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import types
from collections.abc import Iterator

_SHOW_CURSOR = b"\x1b[?25h"  # a bar of progress hides it


class _Request:
    """Whether a signal has come, and whether it waits for the end of a document."""

    asked = held = False


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Has Ctrl-C and SIGTERM raise `KeyboardInterrupt`, at once or where `held_back` says; in the main thread alone."""
    if threading.current_thread() is not threading.main_thread():
        yield  # no other thread may say what signals do
        return
    _Request.asked = False
    numbers = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, _handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _Request.asked = False


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Has a signal wait for `check`, the last one at the end of the block.

    Raised at once it may fall into a callback of native code (spaCy, tokenizers, resiliparse), where it is dropped or
    becomes a panic.
    """
    _Request.held = True
    try:
        yield
    finally:
        _Request.held = False
    check()


def check() -> None:
    """Raises `KeyboardInterrupt` where a signal has come; called between documents."""
    if _Request.asked:
        raise KeyboardInterrupt


def _handle(_: int, __: types.FrameType | None) -> None:
    if _Request.asked:
        _end()
    _Request.asked = True
    if not _Request.held:
        raise KeyboardInterrupt
    # No print: the handler may have come into the middle of one.
    os.write(2, b"\nstopping after the document at hand; once more ends it at once\n")


def _end() -> None:
    pools = sys.modules.get("multiprocess")  # where nobody has imported it there are no workers
    for child in pools.active_children() if pools else ():
        child.kill()
    if sys.stdout.isatty():
        os.write(1, _SHOW_CURSOR)
    os._exit(128 + signal.SIGINT)
