"""Where the standard library and installed packages have their Python files, with version and licence."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import importlib.util
import pathlib
import platform
import sysconfig
from collections.abc import Iterator
from typing import Any

from davinci_jax.errors import DataError

STANDARD_LIBRARY = "python"

# Other people's packages, and what the build of this one machine wrote (its paths are in it).
_FOREIGN_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "lib-dynload"})
_MACHINE_PREFIXES = ("_sysconfigdata", "config-")


@dataclasses.dataclass(frozen=True)
class Package:
    """A tree of Python files.

    Attributes:
      name: "python" for the standard library, else the import name.
      version: as installed.
      root: folder of the files.
      licence: SPDX expression, where the package states one.
    """

    name: str
    version: str
    root: pathlib.Path
    licence: str | None = None

    def files(self) -> Iterator[tuple[str, pathlib.Path]]:
        """Yields (path below the root with "/" between its parts, file) in alphabetical order."""
        found = []
        for file in self.root.rglob("*.py"):
            parts = file.relative_to(self.root).parts
            if not _FOREIGN_FOLDERS.intersection(parts) and not parts[0].startswith(_MACHINE_PREFIXES):
                found.append(("/".join(parts), file))
        yield from sorted(found)


@functools.cache
def find_package(name: str) -> Package:
    """Returns an installed package by its import name, without importing it; "python" is the standard library.

    Raises:
      DataError: it is not installed.
    """
    if name == STANDARD_LIBRARY:
        return Package(name, platform.python_version(), pathlib.Path(sysconfig.get_path("stdlib")), "PSF-2.0")
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise DataError("package", name, "is not installed", f"install it: pip install {name}")
    metadata = importlib.metadata.metadata(name)
    return Package(name, metadata["Version"], pathlib.Path(spec.origin).parent, _licence(metadata))


def _licence(metadata: Any) -> str | None:
    if metadata.get("License-Expression"):
        return metadata["License-Expression"]
    classifiers = metadata.get_all("Classifier") or ()
    known = {
        "License :: OSI Approved :: BSD License": "BSD-3-Clause",
        "License :: OSI Approved :: MIT License": "MIT",
        "License :: OSI Approved :: Apache Software License": "Apache-2.0",
    }
    return next((known[classifier] for classifier in classifiers if classifier in known), None)
