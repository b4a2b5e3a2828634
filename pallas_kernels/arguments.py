"""Checks of arguments that several functions share."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.errors import ArgumentError

Backend = Literal["auto", "pallas", "xla"]


def check_backend(function: str, backend: str) -> None:
    """Refuses what is no backend."""
    if backend not in ("auto", "pallas", "xla"):
        raise ArgumentError(function, "backend", f"is {backend!r}", "choose auto, pallas or xla")


def check_config(function: str, config: Any, *kinds: type, argument: str = "config") -> None:
    """Refuses a config that is neither None nor one of `kinds`."""
    if config is not None and not isinstance(config, kinds):
        names = " or ".join(kind.__name__ for kind in kinds)
        raise ArgumentError(function, argument, f"is {config!r}", f"give {names}, or None to have it looked up")


def is_number(value: Any) -> bool:
    """Whether `value` is a real number of Python or NumPy."""
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def is_integer(value: Any) -> bool:
    """Whether `value` is an integer of Python or NumPy."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def as_array(function: str, argument: str, value: Any) -> jax.Array | np.ndarray:
    """`value` itself if it is an array, else the array of its numbers, as of a list."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return value
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise ArgumentError(function, argument, f"is {type(value).__name__}", "give an array") from error


def values(array: jax.Array | np.ndarray) -> np.ndarray | None:
    """The numbers in `array` where they are known: not while it is traced, nor where other processes have a part."""
    if isinstance(array, jax.core.Tracer) or (isinstance(array, jax.Array) and not array.is_fully_addressable):
        return None
    return np.asarray(array)
