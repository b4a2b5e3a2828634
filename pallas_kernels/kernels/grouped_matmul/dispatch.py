"""Which implementation runs a grouped product, and how it is batched and divided over a mesh.

`xla`, `tpu` and `hopper` hold the same three functions of local arrays, `product`, `gated_product` and
`transposed_product`; the kernels' modules also `unsupported(depth, columns, dtype) -> str | None`.
"""

import enum
import types

import jax
import jax.numpy as jnp

from pallas_kernels import layout, partition, tables, target
from pallas_kernels.arguments import Backend, check_backend, check_config
from pallas_kernels.errors import UnsupportedError
from pallas_kernels.kernels.grouped_matmul import products, xla
from pallas_kernels.kernels.grouped_matmul.config import (
    GroupedMatmulConfig,
    HopperGroupedMatmulConfig,
    HopperGroupedMatmulTransposedConfig,
    TpuGroupedMatmulConfig,
    TpuGroupedMatmulTransposedConfig,
)


class Choice(enum.Enum):
    """What runs the products of a call; `HOPPER_IF_MEASURED` is for each product its kernel or XLA."""

    XLA = enum.auto()
    TPU = enum.auto()
    HOPPER = enum.auto()
    HOPPER_IF_MEASURED = enum.auto()


_HOPPER = ((HopperGroupedMatmulConfig,), (HopperGroupedMatmulTransposedConfig,))
_TPU = ((TpuGroupedMatmulConfig,), (TpuGroupedMatmulTransposedConfig,))
CONFIGS = {  # of a product, of the gradient of the weights; XLA ignores those that another device's kernels would take
    Choice.TPU: _TPU,
    Choice.HOPPER: _HOPPER,
    Choice.HOPPER_IF_MEASURED: _HOPPER,
    Choice.XLA: tuple(tpu + hopper for tpu, hopper in zip(_TPU, _HOPPER, strict=True)),
}


def choose(function: str, backend: Backend, depth: int, columns: int, dtype) -> Choice:
    """What runs the products of a call.

    "auto" takes the kernels on TPUs. On Hopper, where nothing but a run tells how fast a kernel is, it takes one only
    for shapes that the table of block sizes has with a time measured on a device, and else `xla`: blocks of rows in
    one batched dense product, which trains at the speed of dense products less padding, unlike `lax.ragged_dot`.

    Raises:
      ArgumentError: no such backend.
      UnsupportedError: `backend` is "pallas" and the kernels do not take this case.
    """
    check_backend(function, backend)
    reason = None if backend == "xla" else unsupported(depth, columns, dtype)
    if backend == "pallas" and reason is not None:
        raise UnsupportedError(function, backend, reason)
    if backend == "xla" or reason is not None:
        return Choice.XLA
    if target.current().platform == "tpu":
        return Choice.TPU
    return Choice.HOPPER if backend == "pallas" else Choice.HOPPER_IF_MEASURED


def configured(
    function: str, config: GroupedMatmulConfig | None, choice: Choice, argument: str = "config"
) -> GroupedMatmulConfig:
    """`config`, or one that leaves all to the tables.

    Raises:
      ArgumentError: it is no config, or not one of the kernels that run.
    """
    check_config(function, config, GroupedMatmulConfig, argument=argument)
    config = config or GroupedMatmulConfig()
    product, transposed = CONFIGS[choice]
    check_config(function, config.forward, *product, argument=f"{argument}.forward")
    check_config(function, config.grad_x, *product, argument=f"{argument}.grad_x")
    check_config(function, config.grad_w, *transposed, argument=f"{argument}.grad_w")
    return config


def unsupported(depth: int, columns: int, dtype) -> str | None:
    """Why the kernels of the current target do not take rows of `depth` and `columns`; None if they do."""
    device = target.current()
    missing = device.lacks_kernels("tpu", "gpu")
    if missing is not None:
        return missing
    module = _module(Choice.TPU if device.platform == "tpu" else Choice.HOPPER)
    return module.unsupported(depth, columns, jnp.dtype(dtype))


def product(
    choice: Choice, x, w, group_sizes, *, rows=None, transpose_w=False, out_dtype=None, config=None
) -> jax.Array:
    """[M, K] x [G, K, N] -> [M, N]; K and N may be divided over a mesh."""
    options = {"transpose_w": transpose_w, "out_dtype": out_dtype or x.dtype, "config": config}
    weight = "e n k" if transpose_w else "e k n"
    return _run(choice, "product", "k n", (x, w), ("m k", weight), ("n",), group_sizes, rows, options)[0]


def gated_product(
    choice: Choice, x, gate, up, group_sizes, *, rows=None, transpose_w=False, keep=False, out_dtype=None, config=None
) -> tuple[jax.Array, ...]:
    """silu(x gate) * (x up) [M, N], with `keep` also x gate and x up; N may be divided over a mesh."""
    options = {"transpose_w": transpose_w, "keep": keep, "out_dtype": out_dtype or x.dtype, "config": config}
    weight = "e n k" if transpose_w else "e k n"
    outs = ("n",) * (3 if keep else 1)
    return _run(choice, "gated_product", "n", (x, gate, up), ("m k", weight, weight), outs, group_sizes, rows, options)


def transposed_product(choice: Choice, x, y, group_sizes, *, rows=None, out_dtype=None, config=None) -> jax.Array:
    """[M, K], [M, N] -> [G, K, N]; K and N may be divided over a mesh."""
    options = {"out_dtype": out_dtype or x.dtype, "config": config}
    dims = ("m k", "m n") if rows is None else ("m k", "r n")
    return _run(choice, "transposed_product", "k n", (x, y), dims, None, group_sizes, rows, options)[0]


def _run(choice, name, divisible, arrays, dims, out_columns, group_sizes, rows, options) -> tuple[jax.Array, ...]:
    given = () if rows is None else (rows,)
    opaque = _implementation(choice, name, (*arrays, group_sizes), options) is not xla

    def local(*parts):
        own = parts[: len(parts) - len(given)]
        implementation = _implementation(choice, name, own, options) if opaque else xla
        results = getattr(implementation, name)(*own, rows=parts[-1] if given else None, **options)
        return results if isinstance(results, tuple) else (results,)

    out_rows = "r" if given else "m"
    out_dims = ("e k n",) if out_columns is None else tuple(f"{out_rows} {label}" for label in out_columns)

    def call(*arrays):
        return partition.divided(
            local if opaque else _sequential(local),
            arrays,
            (*dims, "e", *(["r"] if given else [])),
            out_dims,
            divisible=divisible,
            batch="",
            name="grouped_matmul",
            opaque=opaque,
        )

    arrays = (*arrays, group_sizes, *given)
    divided = any(entry is not None for array in arrays for entry in layout.entries(array))
    return (layout.on_every_device(call) if opaque and not divided else call)(*arrays)


def _sequential(function):
    """`function` under `jax.vmap` as one call after another: its loops would else all run as long as the longest."""
    return jax.custom_batching.sequential_vmap(function)


def _implementation(choice: Choice, name: str, arrays, options) -> types.ModuleType:
    """The module for one product: of whole arrays, or of one device's part of them, whose sizes are others."""
    if choice != Choice.HOPPER_IF_MEASURED:
        return _module(choice)
    x, *others, group_sizes = arrays
    transpose_w = options.get("transpose_w", False)
    if name == "transposed_product":
        kind, columns = "dw", others[0].shape[1]
    else:
        kind, columns = products.kind(len(others), transpose_w), others[0].shape[1 if transpose_w else 2]
    hopper = _module(Choice.HOPPER)
    sizes = (kind, group_sizes.shape[0], x.shape[1], columns)
    entry = tables.load(hopper.OPERATION).get(target.current().family, {}).get(products.shape_class(*sizes))
    measured = entry is not None and entry["source"] == "measured"
    return hopper if measured and hopper.misfit(options["config"], *sizes, x.dtype) is None else xla


def _module(choice: Choice) -> types.ModuleType:
    """Kernels are imported when first used: Pallas takes a while, and Mosaic GPU needs absl-py, which jax does not."""
    if choice == Choice.TPU:
        from pallas_kernels.kernels.grouped_matmul import tpu

        return tpu
    if choice == Choice.HOPPER:
        from pallas_kernels.kernels.grouped_matmul import hopper

        return hopper
    return xla
