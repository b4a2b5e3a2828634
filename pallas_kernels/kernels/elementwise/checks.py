"""Checks that the element-wise functions share."""

import jax
import jax.numpy as jnp

from pallas_kernels import arguments
from pallas_kernels.errors import ArgumentError, UnsupportedError


def check_backend(function: str, backend: str) -> None:
    """Raises unless `backend` is one that the function has."""
    arguments.check_backend(function, backend)
    if backend == "pallas":
        raise UnsupportedError(function, backend, "there is no kernel, XLA fuses it with what is around it")


def check_floating(function: str, **arrays: jax.Array) -> None:
    """Raises unless all arrays hold floating-point numbers."""
    for name, array in arrays.items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ArgumentError(function, name, f"is {array.dtype}", "give a floating dtype")
