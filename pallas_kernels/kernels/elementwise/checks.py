"""Checks that the element-wise functions share."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import arguments
from pallas_kernels.errors import ArgumentError, UnsupportedError


def check_backend(function: str, backend: str, config: Any) -> None:
    """Raises unless `backend` is one that the function has, and `config` None."""
    arguments.check_backend(function, backend)
    arguments.check_config(function, config)
    if backend == "pallas":
        raise UnsupportedError(function, backend, "there is no kernel, XLA fuses it with what is around it")


def check_floating(function: str, **arrays: jax.Array) -> None:
    """Raises unless all are arrays of floating-point numbers."""
    arguments.check_arrays(function, **arrays)
    for name, array in arrays.items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ArgumentError(function, name, f"is {array.dtype}", "give a floating dtype")
