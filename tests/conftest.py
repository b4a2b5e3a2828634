"""Runs every test on eight virtual CPU devices, with programs compiled in a hurry and kept between runs.

Most of a test's time is the compiler's. Without LLVM's optimisations and XLA's newer emitters the programs compute the
same and compile in a third of the time; with JAX_DISABLE_MOST_OPTIMIZATIONS=0, as `launch/test.sh exhaustive` sets it,
they are compiled as a user's are. Files of whole runs go first, and what a file has compiled is forgotten at its end.
"""

import importlib.metadata
import os
import pathlib
import sys

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1" and importlib.metadata.version("jaxlib").startswith("0.10."):
    # An unknown flag ends the process: later versions of jaxlib do not have this one.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Compiled programs of one file are of no use to the next: a worker would hold gigabytes of them at the end."""
    yield
    jax = sys.modules.get("jax")  # many files never import it
    if jax is not None:
        jax.clear_caches()


def pytest_collection_modifyitems(items) -> None:
    """Files of whole runs go first: the worker that got them last would end minutes after the others."""
    items.sort(key=lambda item: item.path.parent.name != "training")
