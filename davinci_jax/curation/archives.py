"""Members of zip and tar archives, read one after the other and never unpacked to disk.

An archive is somebody else's program for writing files: its names may lead out of the folder, and a few kilobytes may
stand for terabytes. Names are checked, every member and the whole are bounded, and links and devices are refused.
"""

from __future__ import annotations

import re
import tarfile
import zipfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from davinci_jax.curation.places import ARCHIVES, decompressed

RATIO = 200  # bytes that one byte of an archive may stand for; text compresses 3 to 30 times
_ALLOWANCE = 64 * 2**20  # a small archive may hold this much whatever its ratio


class Member(NamedTuple):
    """A file of an archive: its name, and its bytes or why they are not read."""

    name: str
    raw: bytes
    refused: str = ""


def is_archive(name: str) -> bool:
    """Whether a file is an archive by its name."""
    return name.lower().endswith(ARCHIVES)


def members(stream: BinaryIO, name: str, size: int, max_bytes: int) -> Iterator[Member]:
    """Yields the files of an archive.

    Args:
      stream: the archive; a zip must be seekable.
      name: tells its kind.
      size: bytes of the archive.
      max_bytes: bound on a member.

    Raises:
      zipfile.BadZipFile, tarfile.TarError, OSError, EOFError: a damaged archive; members before the damage have been
        yielded.
    """
    budget = max(_ALLOWANCE, RATIO * size)
    found = _zip(stream, max_bytes) if name.lower().endswith(".zip") else _tar(stream, name, max_bytes)
    for member in found:
        budget -= len(member.raw)
        if budget < 0:
            yield Member(member.name, b"", f"an archive of {size} bytes holds more than {RATIO} times as much")
            return
        yield member


def unsafe(name: str) -> str:
    """Returns why the name of a member cannot be a path below a folder, "" if it can."""
    if "\0" in name or not name:
        return "a name that is no path"
    if name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", name):
        return "an absolute path"
    return "a path that leads out of the archive" if ".." in re.split(r"[/\\]", name) else ""


def _zip(stream: BinaryIO, max_bytes: int) -> Iterator[Member]:
    with zipfile.ZipFile(stream) as archive:
        for info in archive.infolist():
            name = _printable(info.filename)
            if info.is_dir():
                continue
            refused = unsafe(name) or ("encrypted" if info.flag_bits & 1 else "") or _nested(name)
            if refused:
                yield Member(name, b"", refused)
                continue
            with archive.open(info) as member:
                yield _bounded(name, member, max_bytes)


def _tar(stream: BinaryIO, name: str, max_bytes: int) -> Iterator[Member]:
    plain, _ = decompressed(stream, name.removesuffix(".tgz") + ".gz" if name.endswith(".tgz") else name)
    with tarfile.open(fileobj=plain, mode="r|") as archive:
        for info in archive:
            name = _printable(info.name)
            if info.isdir():
                continue
            refused = unsafe(name) or ("" if info.isreg() else "no regular file") or _nested(name)
            if refused:
                yield Member(name, b"", refused)
                continue
            yield _bounded(name, archive.extractfile(info), max_bytes)


def _bounded(name: str, member: BinaryIO, max_bytes: int) -> Member:
    raw = member.read(max_bytes + 1)
    if len(raw) > max_bytes:
        return Member(name, b"", f"more than {max_bytes} bytes")
    return Member(name, raw)


def _nested(name: str) -> str:
    return "an archive within an archive" if is_archive(name) else ""


def _printable(name: str) -> str:
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
