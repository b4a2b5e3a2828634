"""Ahead-of-time compilation for TPUs and the H200: skipped where the compilers (extra `aot`) are not installed."""

import importlib.util
import os
import pathlib

import jax
import pytest

_HERE = pathlib.Path(__file__).parent
_MISSING = [name for name in ("libtpu", "jax_cuda13_plugin", "absl") if importlib.util.find_spec(name) is None]

# What compilers said of a program is kept between runs, by program and compiler versions.
os.environ.setdefault("PALLAS_KERNELS_AOT_CACHE", str(_HERE.parents[2] / ".cache" / "aot"))


if not _MISSING:
    # Registers and spills are those of programs compiled as a user's are, unlike those of the other tests.
    jax.config.update("jax_disable_most_optimizations", False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests of this folder where a compiler is missing."""
    if _MISSING:
        reason = f"needs {', '.join(_MISSING)}: bash launch/test.sh aot installs the compilers in an environment apart"
        for item in items:
            if _HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=reason))
