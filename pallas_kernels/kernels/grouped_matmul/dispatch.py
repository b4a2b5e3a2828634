"""Which implementation runs a grouped product, and how it is batched and divided over a mesh.

`xla`, `tpu` and `hopper` hold the same three functions of local arrays, `product`, `gated_product` and
`transposed_product`; the kernels' modules also `unsupported(depth, columns, dtype) -> str | None`.
"""

import types
from typing import Literal

import jax
import jax.numpy as jnp

from pallas_kernels import partition, tables, target
from pallas_kernels.errors import ArgumentError, UnsupportedError
from pallas_kernels.kernels.grouped_matmul import xla

Backend = Literal["auto", "pallas", "xla"]
KERNELS = {"tpu": "tpu", "gpu": "hopper"}
MEASURED = "hopper where measured"


def choose(function: str, backend: Backend, depth: int, columns: int, dtype) -> str:
    """The implementation of a call: "xla", "tpu", "hopper", or "hopper where measured", which each product decides.

    "auto" takes the kernels on TPUs. On Hopper, where nothing but a run tells how fast a kernel is, it takes one only
    for shapes that the table of block sizes has with a time measured on a device, and else `xla`: blocks of rows in
    one batched dense product, which trains at the speed of dense products less padding, unlike `lax.ragged_dot`.

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
        kernels = KERNELS[target.current().platform]
        return MEASURED if kernels == "hopper" and backend == "auto" else kernels
    if backend == "pallas":
        raise UnsupportedError(function, backend, reason)
    return "xla"


def unsupported(depth: int, columns: int, dtype) -> str | None:
    """Why the kernels of the current target do not take rows of `depth` and `columns`; None if they do."""
    device = target.current()
    if device.platform not in KERNELS or device.family == "other":
        return f"there is no kernel for {device.device_kind}"
    try:
        module = _module(KERNELS[device.platform])
    except ModuleNotFoundError as error:
        if error.name != "absl":
            raise
        return "absl-py is not installed, which Mosaic GPU needs"
    return module.unsupported(depth, columns, jnp.dtype(dtype))


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
    given = () if rows is None else (rows,)
    opaque = _implementation(backend, name, (*arrays, group_sizes), options) is not xla

    def local(*parts):
        own = parts[: len(arrays) + 1]
        implementation = _implementation(backend, name, own, options) if opaque else xla
        results = getattr(implementation, name)(*own, rows=parts[-1] if given else None, **options)
        return results if isinstance(results, tuple) else (results,)

    out_rows = "r" if given else "m"
    out_dims = ("e k n",) if out_columns is None else tuple(f"{out_rows} {label}" for label in out_columns)
    return partition.divided(
        local if opaque else _sequential(local),
        (*arrays, group_sizes, *given),
        (*dims, "e", *(["r"] if given else [])),
        out_dims,
        divisible=divisible,
        batch="",
        name="grouped_matmul",
        opaque=opaque,
    )


def _sequential(function):
    """`function` under `jax.vmap` as one call after another: its loops would else all run as long as the longest."""
    return jax.custom_batching.sequential_vmap(function)


def _implementation(backend: str, name: str, arrays, options) -> types.ModuleType:
    """The module for one product: of whole arrays, or of one device's part of them, whose sizes are others."""
    if backend != MEASURED:
        return _module(backend)
    x, second, *_, group_sizes = arrays
    transpose_w = options.get("transpose_w", False)
    if name == "transposed_product":
        kind, columns = "dw", second.shape[1]
    else:
        kind = "gated" if name == "gated_product" else "product_t" if transpose_w else "product"
        columns = second.shape[1 if transpose_w else 2]
    hopper = _module("hopper")
    key = hopper.shape_class(kind, group_sizes.shape[0], x.shape[1], columns)
    entry = tables.load(hopper.OPERATION).get(target.current().family, {}).get(key)
    return hopper if entry and entry["source"] == "measured" else xla


def _module(backend: str) -> types.ModuleType:
    """Kernels are imported when first used: Pallas takes a while, and Mosaic GPU needs absl-py, which jax does not."""
    if backend == "tpu":
        from pallas_kernels.kernels.grouped_matmul import tpu

        return tpu
    if backend == "hopper":
        from pallas_kernels.kernels.grouped_matmul import hopper

        return hopper
    return xla
