"""Programs from documents and models, run where they can do no harm: no network, no files, little of everything."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence

from davinci_jax.errors import ConfigError, DataError
from davinci_jax.experiment import checks

ISOLATIONS = ("namespaces", "limits")
CHILD = pathlib.Path(__file__).with_name("sandbox_child.py")
# Sockets of services, shared memory, and the user's own files: unreadable in there.
_HIDDEN = ("/run", "/dev/shm")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What a program may use.

    Attributes:
      wall_seconds: after this long it and all its children are killed.
      cpu_seconds: processor time of each of its processes.
      memory_bytes: address space of each of its processes.
      file_bytes: size of each file it writes, its output included.
      disk_bytes: all files in its folder together; they lie in memory and vanish with it.
      processes: processes and threads.
    """

    wall_seconds: float = 20.0
    cpu_seconds: int = 10
    memory_bytes: int = 2 << 30
    file_bytes: int = 1 << 20
    disk_bytes: int = 16 << 20
    processes: int = 64

    def __post_init__(self):
        checks.positive("limits", **dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
      status: "ok" (exit status 0), "failed", or "timeout".
      code: its exit status; 128 + signal for one that a signal ended; `None` after a timeout.
      output: its standard output, at most `Limits.file_bytes`.
      errors: its standard error, likewise.
    """

    status: str
    code: int | None
    output: str
    errors: str


def run(
    files: Mapping[str, str],
    arguments: Sequence[str],
    limits: Limits = Limits(),
    isolation: str = "namespaces",
) -> Outcome:
    """Runs the Python interpreter on files in a folder of their own.

    Under "namespaces" (Linux) the program has no network, sees every file system read-only and none of the user's own
    folder, no process but its own, and writes only to its folder, which lies in memory. "limits" bounds time, memory,
    files and processes alone: it stops accidents, not malice.

    Args:
      files: name -> text; plain names, no folders.
      arguments: what follows `python -I -B`, such as ("program.py",).
      limits: what it may use.
      isolation: one of `ISOLATIONS`.

    Raises:
      ConfigError: an unknown isolation, or a file name that is no plain name.
      DataError: this machine cannot isolate a program in that way.
    """
    checks.one_of("sandbox", ISOLATIONS, isolation=isolation)
    for name in files:
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            raise ConfigError("sandbox.files", name, "is no plain file name", "give a name without folders")
    with tempfile.TemporaryDirectory(prefix="davinci-sandbox-") as folder:
        return _run(folder, files, arguments, limits, isolation)


@functools.cache
def can_isolate() -> str | None:
    """Returns `None` where "namespaces" works on this machine, otherwise what stands against it."""
    try:
        outcome = run({"program.py": "print('inside')"}, ("program.py",))
    except DataError as error:
        return error.problem
    return None if outcome.output == "inside\n" else f"a program that prints a word ended with {outcome}"


def _run(folder: str, files: Mapping[str, str], arguments: Sequence[str], limits: Limits, isolation: str) -> Outcome:
    request = json.dumps(
        {
            "folder": folder,
            "files": dict(files),
            "arguments": [sys.executable, "-I", "-B", *arguments],
            "limits": {key: value for key, value in dataclasses.asdict(limits).items() if key != "wall_seconds"},
            "environment": {"HOME": folder, "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            "isolation": isolation,
            "hidden": _hidden(),
        }
    )
    reader, writer = os.pipe()
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors, open(reader, "rb") as report:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(CHILD), str(writer)],
            stdin=subprocess.PIPE, stdout=output, stderr=errors, pass_fds=(writer,), start_new_session=True,
            env={"LANG": "C.UTF-8"},
        )  # fmt: skip
        os.close(writer)
        code = _wait(process, request.encode(), limits.wall_seconds)
        told = report.read().decode()
        if told != "ready" and code is not None:
            raise DataError(
                "sandbox",
                isolation,
                f"this machine cannot isolate programs ({told or _text(errors, limits)})",
                "allow unprivileged user namespaces, or accept isolation='limits'",
            )
        status = "timeout" if code is None else ("ok" if code == 0 else "failed")
        return Outcome(status, code, _text(output, limits), _text(errors, limits))


def _wait(process: subprocess.Popen, request: bytes, seconds: float) -> int | None:
    """Sends the request and waits; returns the exit status, or `None` after killing what took too long."""
    try:
        process.communicate(request, timeout=seconds)
        return process.returncode
    except subprocess.TimeoutExpired:
        return None
    finally:
        # Under "limits" a program may leave children behind; they are in its session.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _text(file, limits: Limits) -> str:
    file.seek(0)
    return file.read(limits.file_bytes).decode("utf-8", "replace")


def _hidden() -> list[str]:
    """Folders that a program finds empty: never one that holds the interpreter or its libraries."""
    needed = [os.path.realpath(path) for path in (sys.prefix, sys.base_prefix, *sys.path) if path]
    home = os.path.realpath(os.path.expanduser("~"))
    inside = any(path == home or path.startswith(home + os.sep) for path in needed)
    return [*_HIDDEN, *([] if inside or home == os.sep else [home])]
