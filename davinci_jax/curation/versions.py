"""Versions of the libraries whose result an operation passes on: after an upgrade it is another result."""

from __future__ import annotations

import importlib.metadata

from davinci_jax.errors import ConfigError

# What brings the libraries of curation: the project is installed from its clone, not from an index.
INSTALL = "in the clone: pip install -e '.[curation]'"


def installed(operation: str, *packages: str) -> str:
    """Returns packages with their versions, such as "resiliparse 0.15.2, trafilatura 2.0.0".

    Raises:
      ConfigError: one of them is not installed.
    """
    return ", ".join(f"{package} {_version(operation, package)}" for package in packages)


def _version(operation: str, package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise ConfigError(operation, None, f"needs the package {package}", INSTALL) from error
