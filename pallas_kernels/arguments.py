"""Checks of arguments that several functions share."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.errors import ArgumentError

_LARGEST = float(jnp.finfo(jnp.float32).max)

Backend = Literal["auto", "pallas", "xla"]


def check_backend(function: str, backend: str) -> None:
    """Refuses what is no backend."""
    if backend not in ("auto", "pallas", "xla"):
        raise ArgumentError(function, "backend", f"is {backend!r}", "choose auto, pallas or xla")


def check_config(function: str, config: Any, *kinds: type, argument: str = "config") -> None:
    """Refuses a config that is neither None nor one of `kinds`, of which a function without block sizes has none."""
    if config is None or isinstance(config, kinds):
        return
    names = " or ".join(kind.__name__ for kind in kinds)
    remedy = f"give {names}, or None to have it looked up" if kinds else "give None: nothing can be configured"
    raise ArgumentError(function, argument, f"is {config!r}", remedy)


def check_arrays(function: str, **arrays: Any) -> None:
    """Refuses what is no array, by the name of its argument."""
    for argument, value in arrays.items():
        if not is_array(value):
            raise ArgumentError(function, argument, f"is {type(value).__name__}", "give an array")


def check_flag(function: str, argument: str, value: Any) -> None:
    """Refuses what is neither True nor False: any other value counts as one of them, and would not be noticed."""
    if not isinstance(value, (bool, np.bool_)):
        raise ArgumentError(function, argument, f"is {said(value)}", "give True or False")


def is_array(value: Any) -> bool:
    """Whether `value` is an array of jax or NumPy, or has the shape and dtype of one."""
    return hasattr(value, "shape") and hasattr(value, "dtype") and hasattr(value, "ndim")


def is_number(value: Any) -> bool:
    """Whether `value` is a real number of Python or NumPy."""
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def is_integer(value: Any) -> bool:
    """Whether `value` is an integer of Python or NumPy."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def as_number(function: str, argument: str, value: Any) -> float:
    """A Python number of a Python or NumPy scalar, finite in float32."""
    if not is_number(value) or not abs(value) <= _LARGEST:
        remedy = "give a finite Python or NumPy number, known when the call is traced"
        raise ArgumentError(function, argument, f"is {said(value)}", remedy)
    return float(value)


def as_floating(function: str, argument: str, dtype: Any, default: Any) -> np.dtype:
    """A floating dtype, `default` where none is given."""
    try:
        found = jnp.dtype(default if dtype is None else dtype)
    except TypeError:
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating):
        raise ArgumentError(function, argument, f"is {dtype!r}", "give a floating dtype, or None")
    return found


def as_array(function: str, argument: str, value: Any) -> jax.Array | np.ndarray:
    """`value` itself if it is an array, else the array of its numbers, as of a list."""
    if is_array(value):
        return value
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ArgumentError(function, argument, f"is {type(value).__name__}", "give an array") from error


def as_int32(function: str, argument: str, value: Any) -> jax.Array | np.ndarray:
    """`as_array`, with integers of a list or of NumPy in int32, whatever width they have by default."""
    array = as_array(function, argument, value)
    chosen = is_array(value) and not isinstance(value, np.ndarray)
    if chosen or not jnp.issubdtype(array.dtype, jnp.integer) or isinstance(array, jax.core.Tracer):
        return array
    array = np.asarray(array)
    bounds = np.iinfo(np.int32)
    if array.size and not (bounds.min <= array.min() and array.max() <= bounds.max):
        problem = f"has values from {array.min()} to {array.max()}"
        raise ArgumentError(function, argument, problem, "give values that int32 holds")
    return array.astype(np.int32)


def values(array: jax.Array | np.ndarray) -> np.ndarray | None:
    """The numbers in `array` where they are known: not while it is traced, nor where other processes have a part."""
    if isinstance(array, jax.core.Tracer) or (isinstance(array, jax.Array) and not array.is_fully_addressable):
        return None
    return np.asarray(array)


def said(value: Any) -> str:
    """How an error shows a value: a traced one has none."""
    return "traced" if isinstance(value, jax.core.Tracer) else repr(value)
