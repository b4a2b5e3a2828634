"""Files that are whole or not there."""

from __future__ import annotations

import os
import pathlib


def version(file: pathlib.Path) -> tuple[str, int, int]:
    """Returns what tells whether a file is still the same: absolute path, time of last change (ns), size; 0 if absent.

    What is kept of a file's content in memory is kept by this: the same relative path may come to mean another file.
    """
    try:
        status = file.stat()
    except OSError:
        return str(file.absolute()), 0, 0
    return str(file.absolute()), status.st_mtime_ns, status.st_size


def write_atomically(file: pathlib.Path, text: str) -> None:
    """Writes text as UTF-8 under a temporary name, forces it to disk, then renames it over `file`."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, file)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename, error.filename2 = str(file), None  # the name that a person knows
        raise
