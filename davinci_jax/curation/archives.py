"""Members of zip and tar archives, read one after the other and never unpacked to disk.

An archive is somebody else's program for writing files: its names may lead out of the folder, and a few kilobytes may
stand for terabytes. Names are checked, every member and the whole are bounded, and links and devices are refused.
What is unpacked counts whether it is kept, refused, skipped or a header: all of it takes time, and headers memory.
"""

from __future__ import annotations

import re
import tarfile
import zipfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from davinci_jax.curation import unpacking
from davinci_jax.curation.places import ARCHIVES, decompressed

_HEADERS = 2**18  # bytes of a tar's headers before a member, which `tarfile` reads whole into memory
_NAME = 4096  # bytes of a name; the longest path that Linux opens
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # of the others `zipfile` unpacks whole chunks, without a bound


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
      Bomb: more came out than an archive of its size may hold; members before have been yielded.
      zipfile.BadZipFile, tarfile.TarError, OSError, EOFError: a damaged archive; members before the damage have been
        yielded.
    """
    limit = unpacking.budget(size)
    excess = f"an archive of {size} bytes holds more than {unpacking.RATIO} times as much"
    if name.lower().endswith(".zip"):
        yield from _zip(stream, max_bytes, limit, excess)
    else:
        yield from _tar(stream, name, max_bytes, limit, excess)


def unsafe(name: str) -> str:
    """Returns why the name of a member cannot be a path below a folder, "" if it can."""
    if "\0" in name or not name:
        return "a name that is no path"
    if len(name.encode("utf-8", "surrogatepass")) > _NAME:
        return f"a name of more than {_NAME} bytes"
    if name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", name):
        return "an absolute path"
    return "a path that leads out of the archive" if ".." in re.split(r"[/\\]", name) else ""


class _Metered:
    """A stream of unpacked bytes that raises `Bomb` once more than `limit` have been read.

    Args:
      stream: what is read.
      limit: bytes from its beginning; whoever reads may move it on.
      excess: what the exception says.
    """

    def __init__(self, stream: BinaryIO, limit: int, excess: str):
        self._stream, self._taken = stream, 0
        self.limit, self.excess = limit, excess

    def read(self, count: int) -> bytes:
        raw = self._stream.read(count)
        self._taken += len(raw)
        if self._taken > self.limit:
            raise unpacking.Bomb(self.excess)
        return raw


def _zip(stream: BinaryIO, max_bytes: int, limit: int, excess: str) -> Iterator[Member]:
    with zipfile.ZipFile(stream) as archive:
        for info in archive.infolist():
            name = _printable(info.filename)
            if info.is_dir():
                continue
            refused = unsafe(name) or ("encrypted" if info.flag_bits & 1 else "") or _nested(name)
            refused = refused or ("" if info.compress_type in _METHODS else "compressed by a method that is not read")
            if refused:
                yield Member(_shown(name), b"", refused)
                continue
            with archive.open(info) as member:
                found, taken = _bounded(name, member, max_bytes)
            limit -= taken
            if limit < 0:
                raise unpacking.Bomb(excess)
            yield found


def _tar(stream: BinaryIO, name: str, max_bytes: int, limit: int, excess: str) -> Iterator[Member]:
    plain, _ = decompressed(stream, "tar.gz" if name.lower().endswith(".tgz") else name)
    headers = f"its headers have more than {_HEADERS} bytes"
    metered = _Metered(plain, _HEADERS, headers)
    with tarfile.open(fileobj=metered, mode="r|", bufsize=tarfile.RECORDSIZE) as archive:
        while (info := archive.next()) is not None:
            metered.limit, metered.excess = limit, excess
            found = _tar_member(archive, info, max_bytes)
            if found is not None:
                yield found
            # Both would grow with each member; nothing looks into them any more.
            archive.members.clear()
            archive.pax_headers.clear()
            before_headers = archive.offset + tarfile.RECORDSIZE
            if before_headers + _HEADERS < limit:
                metered.limit, metered.excess = before_headers + _HEADERS, headers


def _tar_member(archive: tarfile.TarFile, info: tarfile.TarInfo, max_bytes: int) -> Member | None:
    """Returns the file that a header stands for, `None` for a folder."""
    name = _printable(info.name)
    if info.isdir():
        return None
    refused = unsafe(name) or ("" if info.isreg() else "no regular file") or _nested(name)
    if refused:
        return Member(_shown(name), b"", refused)
    return _bounded(name, archive.extractfile(info), max_bytes)[0]


def _bounded(name: str, member: BinaryIO, max_bytes: int) -> tuple[Member, int]:
    """Returns a member, refused where it is too long, and how many bytes it took to know."""
    raw = member.read(max_bytes + 1)
    if len(raw) > max_bytes:
        return Member(name, b"", f"more than {max_bytes} bytes"), len(raw)
    return Member(name, raw), len(raw)


def _nested(name: str) -> str:
    return "an archive within an archive" if is_archive(name) else ""


def _printable(name: str) -> str:
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _shown(name: str) -> str:
    return name if len(name) <= _NAME else f"{name[:100]}...{name[-100:]}"
