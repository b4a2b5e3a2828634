"""Grouped matmul compiled for TPUs: it fits, spills no more than recorded, and v5p runs it on both cores."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pallas_kernels import tables
from pallas_kernels.compiler import aot
from pallas_kernels.kernels.grouped_matmul import grouped_matmul, tpu, tuning

GROUPS, DEPTH, COLUMNS, ROWS = 16, 1024, 512, 4096
SMALL, SMALL_TRANSPOSED = tpu.Config(256, 128, 256), tpu.TransposedConfig(256, 128, 512, 512)


def struct(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


X, Y, W = struct(ROWS, DEPTH), struct(ROWS, COLUMNS), struct(GROUPS, DEPTH, COLUMNS)
SIZES = struct(GROUPS, dtype=jnp.int32)


def product(x, w, sizes):
    return tpu.product(x, w, sizes, out_dtype=x.dtype, config=SMALL)


def gated(x, w, sizes):
    return tpu.gated_product(x, w, w, sizes, keep=True, out_dtype=x.dtype, config=SMALL)


def transposed(x, y, sizes):
    return tpu.transposed_product(x, y, sizes, out_dtype=x.dtype, config=SMALL_TRANSPOSED)


def check(device, compiled, spills):
    (kernel,) = (kernel for kernel in compiled.kernels if kernel.pallas)
    assert kernel.spills <= spills
    assert kernel.cores == (2 if device == "v5p" else 1)
    # Nothing but the list of steps beside what goes in and out.
    assert compiled.memory.temporary < 2**20


@pytest.mark.parametrize(
    ("device", "function", "arguments", "spills"),
    [
        ("v5p", product, (X, W, SIZES), 166),
        ("v6e", transposed, (X, Y, SIZES), 0),
        pytest.param("v5p", gated, (X, W, SIZES), 396, marks=pytest.mark.exhaustive),
        pytest.param("v5p", transposed, (X, Y, SIZES), 21, marks=pytest.mark.exhaustive),
    ],
)
def test_small_blocks(device, function, arguments, spills):
    check(device, aot.compile_for(device, function, *arguments), spills)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("device", "kind", "spills"),
    [("v5p", "gated", 3460), ("v5p", "dw", 3556), ("v6e", "gated", 3085), ("v6e", "dw", 1246)],
)
def test_recorded_blocks(device, kind, spills):
    """The table's blocks fit, and take the cycles that it says."""
    shape = tuning.Shape(kind, 128, 2048, 768)
    entry = tables.load(tuning.OPERATION)[device][tuning.shape_class(shape)]
    config = (tpu.TransposedConfig if kind == "dw" else tpu.Config)(**entry["config"])
    function, arguments = tuning.build(device, shape, config)
    compiled = aot.compile_for(device, function, *arguments)
    check(device, compiled, spills)
    if entry["source"] == "static":
        assert tuning.cycles(compiled, shape, config) == pytest.approx(entry["cost"], rel=0.05)


@pytest.mark.exhaustive
def test_public_function_and_gradients_without_a_table():
    """Odd sizes, and blocks that nobody recorded: one kernel forward, two for each of the matrices backward."""
    x, w = struct(1000, 712, dtype=jnp.float32), struct(5, 712, 456, dtype=jnp.float32)

    def gradients(x, gate, up, sizes):
        f = functools.partial(grouped_matmul, activation="swiglu", backend="pallas")
        y, pull = jax.vjp(lambda x, gate, up: f(x, (gate, up), sizes), x, gate, up)
        return pull(y)

    compiled = aot.compile_for("v5p", gradients, x, w, w, struct(5, dtype=jnp.int32))
    assert compiled.text.count('custom_call_target="tpu_custom_call"') == 5
    assert all(kernel.cores == 2 for kernel in compiled.kernels if kernel.pallas)


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_divided_columns_stay_where_they_are(kind):
    """Only the gradient of the rows, a sum over all columns, is exchanged; automatic axes are those of a shard_map."""
    mesh = Mesh(np.array(aot.devices("v5p")), ("model",), axis_types=(kind,))
    columns = PartitionSpec(None, None, "model")
    x, sizes = (
        jax.ShapeDtypeStruct(each.shape, each.dtype, sharding=NamedSharding(mesh, PartitionSpec()))
        for each in (X, SIZES)
    )
    w = jax.ShapeDtypeStruct(W.shape, W.dtype, sharding=NamedSharding(mesh, columns))

    def product(x, w, sizes):
        if kind == AxisType.Explicit:
            return grouped_matmul(x, w, sizes)
        specs = {"in_specs": (PartitionSpec(), columns, PartitionSpec()), "out_specs": PartitionSpec(None, "model")}
        return jax.shard_map(grouped_matmul, mesh=mesh, **specs)(x, w, sizes)

    def gradients(x, w, sizes):
        return jax.grad(lambda x, w: jnp.square(product(x, w, sizes)).sum(dtype=jnp.float32), (0, 1))(x, w)

    compiled = aot.compile_for("v5p", gradients, x, w, sizes)
    assert compiled.kernel("grouped_matmul_transposed")
    assert [name for name in ("all-gather", "all-to-all", "permute") if f" {name}" in compiled.text] == []
    assert " all-reduce" in compiled.text


@pytest.mark.exhaustive
def test_rows_divided_over_explicit_axes():
    """They are put together, and every chip runs the kernels on all of them."""
    mesh = Mesh(np.array(aot.devices("v5p")), ("data",), axis_types=(AxisType.Explicit,))
    specs = PartitionSpec("data"), PartitionSpec(), PartitionSpec()
    arguments = (
        jax.ShapeDtypeStruct(each.shape, each.dtype, sharding=NamedSharding(mesh, spec))
        for each, spec in zip((X, W, SIZES), specs, strict=True)
    )

    def gradients(x, w, sizes):
        return jax.grad(lambda x, w: jnp.square(grouped_matmul(x, w, sizes)).sum(dtype=jnp.float32), (0, 1))(x, w)

    compiled = aot.compile_for("v5p", gradients, *arguments)
    assert compiled.kernel("grouped_matmul_transposed")
    assert " all-gather" in compiled.text
