"""L0: the files of git repositories at one revision, read by git itself from its objects.

A repository is somebody else's: nothing is checked out, no hook, filter or setting of the user's or the system's takes
part, and objects that are missing are not fetched.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
import subprocess
from collections.abc import Iterator
from typing import Any, NamedTuple

from davinci_jax.curation.inputs import MAX_BYTES, Acquired, no_files
from davinci_jax.curation.licences import stated_licence
from davinci_jax.curation.places import Item, Place
from davinci_jax.errors import DataError

_ALONE = {
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_OPTIONAL_LOCKS": "0",
    "GIT_NO_LAZY_FETCH": "1",
    "GIT_NO_REPLACE_OBJECTS": "1",
    "PATH": os.environ.get("PATH", os.defpath),
}
_SETTINGS = ("safe.directory=*", "core.fsmonitor=false", "core.hooksPath=/dev/null", "protocol.allow=never")
_SECONDS = 600
_LICENCE_FILE, _LICENCE_BYTES = re.compile(r"(?:licen[cs]e|copying|unlicense)(?:[-.]\w+)*", re.IGNORECASE), 2**20


class _Blob(NamedTuple):
    path: str
    digest: str
    size: int


@dataclasses.dataclass(frozen=True)
class GitReader:
    """Every file of every repository in a folder, as bytes; a repository is a working copy or a bare one.

    Where files like LICENSE or COPYING at its top state licences that are known, all of them joined by AND are the
    `metadata["repository_licence"]` of each file; a file may still state another.

    Attributes:
      revision: commit, branch or tag.
      suffixes: endings of the files that are read; none means all.
      max_bytes: bound on a file; a longer one is rejected.
    """

    revision: str = "HEAD"
    suffixes: tuple[str, ...] = ()
    max_bytes: int = MAX_BYTES
    name = "read-git"

    def parameters(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def items(self, place: Place) -> list[Item]:
        found = []
        for folder in _repositories(place):
            commit = self._commit(folder)
            relative = folder.relative_to(place.folder).as_posix()
            size = sum(blob.size for blob in self._chosen(_blobs(folder, commit))) if commit else 0
            refused = "" if commit else f"has no revision {self.revision!r}"
            found.append(Item(relative, size, commit, refused=refused))
        return found

    def read(self, place: Place, item: Item) -> Iterator[Acquired]:
        folder, prefix = place.folder / item.path, "" if item.path == "." else f"{item.path}/"
        time = _git(folder, "show", "-s", "--format=%cI", item.stamp).decode().strip()
        with _Contents(folder) as contents:
            blobs = _blobs(folder, item.stamp)
            licence = _licence(blobs, contents)
            for blob in self._chosen(blobs):
                refused = f"more than {self.max_bytes} bytes" if blob.size > self.max_bytes else ""
                yield Acquired(
                    prefix + blob.path,
                    raw=b"" if refused else contents.read(blob),
                    metadata={"path": blob.path, "repository": folder.resolve().name, "time": time, **licence},
                    provenance={"commit": item.stamp},
                    refused=refused,
                )

    def _commit(self, folder: pathlib.Path) -> str:
        try:
            found = _git(folder, "rev-parse", "--verify", "--end-of-options", f"{self.revision}^{{commit}}")
            return found.decode().strip()
        except OSError:
            return ""

    def _chosen(self, blobs: list[_Blob]) -> list[_Blob]:
        return [blob for blob in blobs if not self.suffixes or blob.path.lower().endswith(self.suffixes)]


def _blobs(folder: pathlib.Path, commit: str) -> list[_Blob]:
    """Returns the regular files of a commit; links and submodules are none."""
    found = []
    for line in _git(folder, "ls-tree", "-r", "-l", "-z", commit).split(b"\0"):
        head, _, raw_path = line.partition(b"\t")
        mode, kind, digest, size = head.decode().split() if head else ("", "", "", "")
        if kind == "blob" and mode != "120000":
            found.append(_Blob(raw_path.decode("utf-8", "backslashreplace"), digest, int(size)))
    return found


class _Contents:
    """Reads the bytes of files, one `git cat-file` for all of a repository."""

    def __init__(self, folder: pathlib.Path):
        self._folder = folder

    def __enter__(self) -> _Contents:
        self._process = subprocess.Popen(
            _command(self._folder, "cat-file", "--batch"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=_ALONE,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.kill()
        self._process.stdout.close()
        self._process.wait()

    def read(self, blob: _Blob) -> bytes:
        self._process.stdin.write(f"{blob.digest}\n".encode())
        self._process.stdin.flush()
        head = self._process.stdout.readline().split()
        if len(head) != 3 or head[1] != b"blob":
            raise OSError(f"{blob.path} cannot be read from the repository")
        raw = self._process.stdout.read(int(head[2]))
        self._process.stdout.read(1)
        return raw


def _licence(blobs: list[_Blob], contents: _Contents) -> dict[str, str]:
    """Returns the licences that the files at the top of a repository state, as metadata; nothing where none does."""
    files = [blob for blob in blobs if _LICENCE_FILE.fullmatch(blob.path) and blob.size < _LICENCE_BYTES]
    texts = [contents.read(blob).decode("utf-8", "replace") for blob in files]
    stated = sorted({licence for text in texts if (licence := stated_licence(text))})
    # Where one of several is compound, AND must not bind into it.
    joined = stated[0] if len(stated) == 1 else " AND ".join(f"({licence})" for licence in stated)
    return {"repository_licence": joined} if stated else {}


def _repositories(place: Place) -> list[pathlib.Path]:
    root = place.folder
    if not root.is_dir():
        raise DataError(place.field, place.path, "does not exist", "name a repository, or a folder of some")
    found: list[pathlib.Path] = []
    waiting = [root]
    while waiting:
        folder = waiting.pop()
        if (folder / ".git").exists() or ((folder / "HEAD").is_file() and (folder / "objects").is_dir()):
            found.append(folder)
        else:
            waiting += [child for child in folder.iterdir() if child.is_dir() and not child.is_symlink()]
    if not found:
        raise no_files(place, "git repository")
    return sorted(found)


def _command(folder: pathlib.Path, *arguments: str) -> list[str]:
    settings = [part for setting in _SETTINGS for part in ("-c", setting)]
    # Named, or git looks for one further up where this one is broken.
    own = (folder / ".git" if (folder / ".git").exists() else folder).absolute()
    return ["git", "-C", str(folder), f"--git-dir={own}", *settings, *arguments]


def _git(folder: pathlib.Path, *arguments: str) -> bytes:
    try:
        result = subprocess.run(_command(folder, *arguments), capture_output=True, env=_ALONE, timeout=_SECONDS)
    except FileNotFoundError as error:
        raise DataError("git", None, "is not installed", "install git") from error
    if result.returncode:
        problem = result.stderr.decode("utf-8", "replace").strip()[:300]
        raise OSError(f"git: {problem}")
    return result.stdout
