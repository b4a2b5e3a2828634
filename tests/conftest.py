"""Runs every test on eight virtual CPU devices, with programs compiled in a hurry and kept between runs.

Most of a test's time is the compiler's. Without LLVM's optimisations and XLA's newer emitters the programs compute the
same and compile in a third of the time; with JAX_DISABLE_MOST_OPTIMIZATIONS=0, as `launch/test.sh exhaustive` sets it,
they are compiled as a user's are.
"""

import importlib.metadata
import os
import pathlib

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1" and importlib.metadata.version("jaxlib").startswith("0.10."):
    # An unknown flag ends the process: later versions of jaxlib do not have this one.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")


def pytest_collection_modifyitems(items) -> None:
    """Files of whole runs go first: the worker that got them last would end minutes after the others."""
    items.sort(key=lambda item: item.path.parent.name != "training")
