"""A seal over the files of a checkpoint: size and CRC-32 of every file, written after the commit.

Orbax neither checksums array data nor survives one host's read error (the others wait in its barrier), so files are
checked before anything is loaded. Each host seals and checks its own part. A step without all its seals was never
finished. The seals lie in the step's folder and go with it.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import zlib
from typing import Any

import jax

from davinci_jax.files import write_atomically
from davinci_jax.training.trees import steps_on_disk

_NAME = re.compile(r"seal-(\d+)-of-(\d+)\.json")
_OWNER = re.compile(r"ocdbt\.process_(\d+)/")


def write_seal(folder: pathlib.Path, meta: dict[str, Any]) -> None:
    """Seals this host's files of the step in `folder`, with `meta` (JSON) beside them."""
    rank, count = jax.process_index(), jax.process_count()
    files = {name: _describe(folder / name) for name in _files(folder) if _owner(name) == rank}
    body = {"files": files, "meta": meta}
    write_atomically(folder / f"seal-{rank}-of-{count}.json", json.dumps({"crc32": _crc_of(body), **body}))


def is_sealed(folder: pathlib.Path) -> bool:
    """Whether every host has sealed the step."""
    try:
        matches = [match for match in map(_NAME.fullmatch, os.listdir(folder)) if match]
    except FileNotFoundError:  # a run that goes on has just removed the step
        return False
    return bool(matches) and len(matches) == int(matches[0][2])


def sealed_steps(directory: pathlib.Path) -> list[int]:
    """Returns the steps of a folder of checkpoints that all hosts have sealed, oldest first; none without it."""
    steps = steps_on_disk(directory) if directory.is_dir() else []
    return [step for step in steps if is_sealed(directory / str(step))]


def read_meta(folder: pathlib.Path) -> dict[str, Any]:
    """Returns what was sealed beside the files; the folder's seals have been checked."""
    name = next(name for name in sorted(os.listdir(folder)) if _NAME.fullmatch(name))
    return json.loads((folder / name).read_text())["meta"]


def find_damage(folder: pathlib.Path) -> str | None:
    """Returns what is wrong with this host's share of a sealed step, or `None` when it is whole."""
    wanted: dict[str, list[int]] = {}
    for name in sorted(filter(_NAME.fullmatch, os.listdir(folder))):
        try:
            seal = json.loads((folder / name).read_text())
            if seal.pop("crc32") != _crc_of(seal):
                return f"{name} is damaged"
        except (ValueError, KeyError, AttributeError):
            return f"{name} is damaged"
        wanted |= seal["files"]
    for n, (name, (size, crc)) in enumerate(sorted(wanted.items())):
        if n % jax.process_count() != jax.process_index():
            continue
        if not (folder / name).is_file():
            return f"{name} is missing"
        found_size, found_crc = _describe(folder / name)
        if found_size != size:
            return f"{name} has {found_size} bytes instead of {size}"
        if found_crc != crc:
            return f"{name} was altered (CRC-32 {found_crc:08x} instead of {crc:08x})"
    return None


def _files(folder: pathlib.Path) -> list[str]:
    """Names of the files but for seals, whole ones and those that another host is writing at this moment."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if not name.startswith(("seal-", ".seal-")))


def _owner(name: str) -> int:
    match = _OWNER.search(name)
    return int(match[1]) if match else 0


def _describe(file: pathlib.Path) -> list[int]:
    crc, size = 0, 0
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 22):
            crc, size = zlib.crc32(chunk, crc), size + len(chunk)
    return [size, crc]


def _crc_of(body: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())
