"""Which implementation runs a grouped product, and how it is batched and divided over a mesh.

`xla`, `tpu` and `hopper` hold the same three functions of local arrays, `product`, `gated_product` and
`transposed_product`; the kernels' modules also `unsupported(depth, columns, dtype) -> str | None`.
"""

import functools
import importlib
from typing import Literal

import jax
import jax.numpy as jnp

from pallas_kernels import partition, target
from pallas_kernels.errors import ArgumentError, UnsupportedError

Backend = Literal["auto", "pallas", "xla"]
MODULES = {"tpu": "tpu", "gpu": "hopper"}


def choose(function: str, backend: Backend, depth: int, columns: int, dtype) -> str:
    """The name of the implementation: "xla", "tpu" or "hopper".

    Raises:
      ArgumentError: no such backend.
      UnsupportedError: `backend` is "pallas" and the kernels do not take this case.
    """
    if backend not in ("auto", "pallas", "xla"):
        raise ArgumentError(function, "backend", f"is {backend!r}", "choose auto, pallas or xla")
    if backend == "xla":
        return "xla"
    reason = unsupported(depth, columns, dtype)
    if reason is None:
        return MODULES[target.current().platform]
    if backend == "pallas":
        raise UnsupportedError(function, backend, reason)
    return "xla"


def unsupported(depth: int, columns: int, dtype) -> str | None:
    """Why the kernels of the current target do not take rows of `depth` and `columns`; None if they do."""
    device = target.current()
    if device.platform not in MODULES or device.family == "other":
        return f"there is no kernel for {device.device_kind}"
    return _module(MODULES[device.platform]).unsupported(depth, columns, jnp.dtype(dtype))


def product(backend: str, x, w, group_sizes, *, rows=None, transpose_w=False, out_dtype=None, config=None) -> jax.Array:
    """[M, K] x [G, K, N] -> [M, N]; `backend` is one that `choose` gave, K and N may be divided over a mesh."""
    options = {"transpose_w": transpose_w, "out_dtype": out_dtype or x.dtype, "config": config}
    weight = "e n k" if transpose_w else "e k n"
    return _run(backend, "product", "k n", (x, w), ("m k", weight), ("n",), group_sizes, rows, options)[0]


def gated_product(
    backend: str, x, gate, up, group_sizes, *, rows=None, transpose_w=False, keep=False, out_dtype=None, config=None
) -> tuple[jax.Array, ...]:
    """silu(x gate) * (x up) [M, N], with `keep` also x gate and x up; N may be divided over a mesh."""
    options = {"transpose_w": transpose_w, "keep": keep, "out_dtype": out_dtype or x.dtype, "config": config}
    weight = "e n k" if transpose_w else "e k n"
    outs = ("n",) * (3 if keep else 1)
    return _run(backend, "gated_product", "n", (x, gate, up), ("m k", weight, weight), outs, group_sizes, rows, options)


def transposed_product(backend: str, x, y, group_sizes, *, rows=None, out_dtype=None, config=None) -> jax.Array:
    """[M, K], [M, N] -> [G, K, N]; K and N may be divided over a mesh."""
    options = {"out_dtype": out_dtype or x.dtype, "config": config}
    dims = ("m k", "m n") if rows is None else ("m k", "r n")
    return _run(backend, "transposed_product", "k n", (x, y), dims, None, group_sizes, rows, options)[0]


def _run(backend, name, divisible, arrays, dims, out_columns, group_sizes, rows, options) -> tuple[jax.Array, ...]:
    function = getattr(_module(backend), name)
    given = () if rows is None else (rows,)

    def local(*parts):
        results = function(*parts[: len(arrays) + 1], rows=parts[-1] if given else None, **options)
        return results if isinstance(results, tuple) else (results,)

    out_rows = "r" if given else "m"
    out_dims = ("e k n",) if out_columns is None else tuple(f"{out_rows} {label}" for label in out_columns)
    return partition.divided(
        local if backend != "xla" else _sequential(local),
        (*arrays, group_sizes, *given),
        (*dims, "e", *(["r"] if given else [])),
        out_dims,
        divisible=divisible,
        batch="",
        name="grouped_matmul",
        opaque=backend != "xla",
    )


def _sequential(function):
    """`function` under `jax.vmap` as one call after another: its loops would else all run as long as the longest."""
    return jax.custom_batching.sequential_vmap(function)


@functools.cache
def _module(backend: str):
    """Imported when first used: Mosaic GPU needs absl-py, which jax alone does not bring."""
    return importlib.import_module(f"pallas_kernels.kernels.grouped_matmul.{backend}")
