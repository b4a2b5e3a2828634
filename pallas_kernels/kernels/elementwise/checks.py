"""Checks that the element-wise functions share."""

from typing import Literal

import jax
import jax.numpy as jnp

from pallas_kernels.errors import ArgumentError, UnsupportedError

Backend = Literal["auto", "pallas", "xla"]


def check_backend(function: str, backend: str) -> None:
    """Raises unless `backend` is one that the function has."""
    if backend == "pallas":
        raise UnsupportedError(function, backend, "there is no kernel, XLA fuses it with what is around it")
    if backend not in ("auto", "xla"):
        raise ArgumentError(function, "backend", f"is {backend!r}", "choose auto or xla")


def check_floating(function: str, **arrays: jax.Array) -> None:
    """Raises unless all arrays hold floating-point numbers."""
    for name, array in arrays.items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ArgumentError(function, name, f"is {array.dtype}", "give a floating dtype")
