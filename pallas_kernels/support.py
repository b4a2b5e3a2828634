"""Asking whether a kernel takes a case, without running it."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from pallas_kernels.errors import ArgumentError, UnsupportedError
from pallas_kernels.kernels.attention import attention
from pallas_kernels.kernels.cross_entropy import linear_cross_entropy
from pallas_kernels.kernels.elementwise import rms_norm, rope, swiglu
from pallas_kernels.kernels.grouped_matmul import grouped_matmul, grouped_matmul_transposed
from pallas_kernels.kernels.moe import moe_mlp
from pallas_kernels.kernels.routing import route

FUNCTIONS = (
    attention,
    grouped_matmul,
    grouped_matmul_transposed,
    linear_cross_entropy,
    moe_mlp,
    rms_norm,
    rope,
    route,
    swiglu,
)


def supported(function: Callable, *arguments: Any, backend: str = "pallas", **options: Any) -> str | None:
    """Why `backend` does not take a case on the current target; None if it does.

    The call is traced with shapes alone: nothing is compiled or run. `pallas_kernels.target.compiling_for` asks for
    another target than jax's default device.

      supported(attention, q, k, v, segment_ids=ids, soft_cap=30.0)

    Args:
      function: a public function of this package that takes `backend`.
      arguments: its arrays, or `jax.ShapeDtypeStruct` in their place.
      backend: the backend that is asked about.
      options: the other arguments of `function`.

    Raises:
      ArgumentError: `function` is none of these, or the call is wrong on every backend.
    """
    if not any(function is known for known in FUNCTIONS):
        names = ", ".join(known.__name__ for known in FUNCTIONS)
        problem = f"is {getattr(function, '__name__', type(function).__name__)}, which takes no backend of this package"
        raise ArgumentError("supported", "function", problem, f"give one of {names}")
    arrays = {name: value for name, value in options.items() if _is_array(value)}
    static = {name: value for name, value in options.items() if name not in arrays}

    def call(arguments, arrays):
        return function(*arguments, **arrays, **static, backend=backend)

    try:
        jax.eval_shape(call, arguments, arrays)
    except UnsupportedError as error:
        return error.reason
    return None


def _is_array(value: Any) -> bool:
    leaves = jax.tree.leaves(value)
    if any(isinstance(leaf, np.generic) for leaf in leaves):  # a scalar of NumPy has a shape, and is a static number
        return False
    return bool(leaves) and all(hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves)
