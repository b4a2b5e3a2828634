"""Files of an input, on this machine or behind any address that fsspec opens: listed in a fixed order, then opened."""

from __future__ import annotations

import bz2
import dataclasses
import datetime
import gzip
import io
import lzma
import os
import pathlib
import stat
from collections.abc import Iterator
from typing import Any, BinaryIO

from davinci_jax.errors import DataError

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


@dataclasses.dataclass(frozen=True)
class Item:
    """A file of an input, as it was listed before anything was read.

    Attributes:
      path: below the input's path, "/" between its parts.
      size: bytes as they lie there.
      stamp: what tells that the file has changed: time of its last change, entity tag, version or commit.
      time: time of its last change, ISO 8601, where that says something about the document.
      refused: why it is not opened.
    """

    path: str
    size: int
    stamp: str = ""
    time: str | None = None
    refused: str = ""


class Place:
    """Where an input lies.

    Args:
      path: a file or folder of this machine, or an address such as "s3://bucket/folder".
      field: what errors call it.
    """

    def __init__(self, path: str, field: str):
        self.path, self.field = path, field
        self._local = "://" not in path and "::" not in path
        if not self._local:
            import fsspec

            try:
                self._system, self._root = fsspec.core.url_to_fs(path)
            except (ValueError, ImportError) as error:
                raise DataError(field, path, f"cannot be opened ({error})", "install what fsspec asks for") from error

    @property
    def folder(self) -> pathlib.Path:
        """The folder on this machine; raises `DataError` for an address."""
        if not self._local:
            raise DataError(self.field, self.path, "is no folder of this machine", "copy it here first")
        return pathlib.Path(self.path)

    def items(self) -> list[Item]:
        """Returns the files in alphabetical order.

        Raises:
          DataError: there is nothing there.
        """
        found = self._local_items() if self._local else self._remote_items()
        if not found:
            raise DataError(self.field, self.path, "holds no file", "name a file, or a folder that has some")
        return sorted(found, key=lambda item: item.path)

    def open(self, item: Item) -> BinaryIO:
        """Returns a file as a stream of the bytes that lie there."""
        if self._local:
            root = pathlib.Path(self.path)
            return (root / item.path if root.is_dir() else root).open("rb")
        single = self._root.rsplit("/", 1)[-1] == item.path and self._system.isfile(self._root)
        return self._system.open(self._root if single else f"{self._root.rstrip('/')}/{item.path}", "rb")

    def _local_items(self) -> list[Item]:
        root = pathlib.Path(self.path)
        if root.is_file():
            return [_local_item(root.parent.resolve(), root.resolve(), root.name)]
        if not root.is_dir():
            raise DataError(self.field, self.path, "does not exist", "name a file or folder that does")
        top, found = root.resolve(), []
        unread: list[OSError] = []
        for name, folders, files in os.walk(root, onerror=unread.append):
            folders.sort()
            folder = pathlib.Path(name)
            found += [_local_item(top, folder / file, (folder / file).relative_to(root).as_posix()) for file in files]
            linked = ((folder / inner).relative_to(root) for inner in folders if (folder / inner).is_symlink())
            found += [Item(f"{_shown(link.as_posix())}/", 0, refused="is a link to a folder") for link in linked]
        return found + [self._unread(root, error) for error in unread]

    def _unread(self, root: pathlib.Path, error: OSError) -> Item:
        """Returns a folder that cannot be listed as a refused item; raises `DataError` for the place itself."""
        problem = f"cannot be read ({error.strerror})"
        folder = pathlib.Path(error.filename)
        if folder == root:
            raise DataError(self.field, self.path, problem, "let this user read it") from error
        return Item(f"{_shown(folder.relative_to(root).as_posix())}/", 0, refused=problem)

    def _remote_items(self) -> list[Item]:
        try:
            files = self._system.find(self._root, detail=True)
        except FileNotFoundError:
            files = {}
        if not files:
            raise DataError(self.field, self.path, "does not exist or is empty", "check the address and its access")
        found = []
        for path, info in files.items():
            relative = path.removeprefix(self._root).lstrip("/") or path.rsplit("/", 1)[-1]
            changed = info.get("mtime") or info.get("LastModified") or info.get("updated") or info.get("created")
            stamp = info.get("ETag") or info.get("etag") or info.get("md5Hash") or changed
            found.append(Item(relative, info.get("size") or 0, str(stamp or ""), _iso(changed)))
        return found


def decompressed(stream: BinaryIO, name: str) -> tuple[BinaryIO, str]:
    """Returns a stream of what a compressed file holds, and the name without the ending that told so."""
    stem, ending = os.path.splitext(name)
    ending = ending.lower()
    if ending == ".gz":
        return gzip.GzipFile(fileobj=stream), stem
    if ending == ".bz2":
        return bz2.BZ2File(stream), stem
    if ending == ".xz":
        return lzma.LZMAFile(stream), stem
    if ending == ".zst":
        import zstandard

        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(stream, read_across_frames=True)), stem
    return stream, name


def chunks(stream: BinaryIO, size: int = 2**20) -> Iterator[bytes]:
    """Yields a stream in pieces."""
    while piece := stream.read(size):
        yield piece


def _local_item(top: pathlib.Path, file: pathlib.Path, relative: str) -> Item:
    """Returns a file of this machine; one that could not be read to its end, or lies elsewhere, is refused."""
    shown = _shown(relative)
    try:
        if not file.resolve().is_relative_to(top):
            return Item(shown, 0, refused="is a link that leads out of the folder")
        info = file.stat()
    except OSError as error:
        return Item(shown, 0, refused=f"cannot be read ({error.strerror})")
    if not stat.S_ISREG(info.st_mode):
        return Item(shown, 0, refused="is no regular file")
    if shown != relative:
        return Item(shown, info.st_size, refused="has a name that is not UTF-8")
    return Item(relative, info.st_size, str(info.st_mtime_ns), _iso(info.st_mtime))


def _shown(path: str) -> str:
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _iso(time: Any) -> str | None:
    if isinstance(time, (int, float)):
        time = datetime.datetime.fromtimestamp(time, datetime.UTC)
    if isinstance(time, datetime.datetime):
        return time.astimezone(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return str(time) if time else None
