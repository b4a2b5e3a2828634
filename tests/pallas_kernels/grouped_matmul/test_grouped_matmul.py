"""`grouped_matmul` in XLA's operations against float64 NumPy: products, gradients, batches, meshes, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grouped_reference import KINDS, TOLERANCE, close, gated, gated_gradients, product, sizes, transposed
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pallas_kernels import target
from pallas_kernels.errors import ArgumentError, UnsupportedError
from pallas_kernels.kernels.grouped_matmul import (
    GroupedMatmulConfig,
    TpuGroupedMatmulConfig,
    grouped_matmul,
    grouped_matmul_transposed,
)

GPU = target.Target("gpu", "some GPU")  # no kernel: XLA's batched form, which the CPU can run as well


def arrays(rows=150, depth=24, columns=20, groups=5, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((rows, depth), (groups, depth, columns), (groups, depth, columns), (rows, columns))
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def value_and_pull(f, dy, *arrays):
    """(f(*arrays), its gradients under the cotangent dy), in one program: operation by operation it is dozens."""

    def run(dy, *arrays):
        y, pull = jax.vjp(f, *arrays)
        return y, pull(dy)

    return jax.jit(run)(dy, *arrays)


@pytest.fixture(params=["loop", pytest.param("batched", marks=pytest.mark.slow)])
def form(request):
    """Both forms of the reference: that for CPU and TPU, and that for GPUs."""
    if request.param == "loop":
        yield
    else:
        with target.compiling_for(GPU):
            yield


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("kind", KINDS)
def test_product_and_gradients(kind):
    x, w, _, dy = arrays()
    group_sizes = sizes(kind, 5, 150)
    y, (dx, dw) = value_and_pull(lambda x, w: grouped_matmul(x, w, jnp.asarray(group_sizes)), dy, x, w)
    close(y, product(x, w, group_sizes))
    close(dx, product(dy, np.swapaxes(w, 1, 2), group_sizes))
    close(dw, transposed(x, dy, group_sizes))


@pytest.mark.slow
@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("kind", ["some empty", "short"])
def test_gated_and_gradients(kind):
    x, gate, up, dy = arrays()
    group_sizes = sizes(kind, 5, 150)
    f = functools.partial(grouped_matmul, activation="swiglu")
    y, pulled = value_and_pull(lambda x, gate, up: f(x, (gate, up), jnp.asarray(group_sizes)), dy, x, gate, up)
    close(y, gated(x, gate, up, group_sizes))
    for got, expected in zip(pulled, gated_gradients(x, gate, up, group_sizes, np.asarray(dy)), strict=True):
        close(got, expected)


@pytest.mark.slow
@pytest.mark.usefixtures("form")
def test_gathered_rows_and_transposed_weights():
    x, w, _, dy = arrays()
    group_sizes = sizes("short", 5, 150)
    rows = np.random.default_rng(1).integers(0, 40, 150).astype(np.int32)
    f = functools.partial(grouped_matmul, rows=jnp.asarray(rows), transpose_w=True)
    flipped = jnp.swapaxes(w, 1, 2)
    y, (dx, dw) = value_and_pull(lambda x, w: f(x, w, jnp.asarray(group_sizes)), dy, x[:40], flipped)
    close(y, product(x[rows], w, group_sizes))
    expected = np.zeros((40, 24))
    np.add.at(expected, rows, product(dy, flipped, group_sizes))
    close(dx, expected)
    close(dw, transposed(dy, x[rows], group_sizes))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtypes(dtype):
    x, gate, up, dy = arrays(dtype=dtype)
    group_sizes = sizes("random", 5, 150)
    y, pulled = value_and_pull(lambda x, w: grouped_matmul(x, w, jnp.asarray(group_sizes)), dy, x, gate)
    assert y.dtype == jnp.dtype(dtype)
    close(y, product(x, gate, group_sizes), dtype)
    for got, expected in zip(
        pulled, (product(dy, np.swapaxes(gate, 1, 2), group_sizes), transposed(x, dy, group_sizes)), strict=True
    ):
        assert got.dtype == jnp.dtype(dtype)
        close(got, expected, dtype)
    f = functools.partial(grouped_matmul, activation="swiglu", out_dtype=jnp.float32)
    wide = jax.jit(f)(x, (gate, up), jnp.asarray(group_sizes))
    close(wide, gated(x, gate, up, group_sizes), "float32")
    assert TOLERANCE[dtype] > TOLERANCE["float32"]


@pytest.mark.slow
def test_rows_past_the_sum_may_hold_anything():
    x, w, _, dy = arrays()
    group_sizes = sizes("short", 5, 150)
    x, dy = (z.at[group_sizes.sum() :].set(jnp.nan) for z in (x, dy))
    y = jax.jit(grouped_matmul)(x, w, jnp.asarray(group_sizes))
    np.testing.assert_array_equal(y[group_sizes.sum() :], 0)
    assert np.isfinite(jax.jit(grouped_matmul_transposed)(x, dy, jnp.asarray(group_sizes))).all()


@pytest.mark.slow
def test_vmap():
    x, w, _, dy = (jnp.stack(pair) for pair in zip(arrays(seed=1), arrays(seed=2), strict=True))
    group_sizes = np.stack([sizes("some empty", 5, 150), sizes("one", 5, 150)])

    def loss(x, w, group_sizes, dy):
        return jnp.sum(jax.vmap(grouped_matmul)(x, w, group_sizes) * dy)

    dx, dw = jax.jit(jax.grad(loss, (0, 1)))(x, w, jnp.asarray(group_sizes), dy)
    shared = jax.jit(jax.vmap(grouped_matmul, (0, None, 0)))(x, w[0], jnp.asarray(group_sizes))
    for i in range(2):
        close(dx[i], product(dy[i], np.swapaxes(w[i], 1, 2), group_sizes[i]))
        close(dw[i], transposed(x[i], dy[i], group_sizes[i]))
        close(shared[i], product(x[i], w[0], group_sizes[i]))


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("activation", [None, "swiglu"])
def test_columns_divided_over_a_mesh(axis_type, activation):
    x, gate, up, dy = arrays()
    group_sizes = jnp.asarray(sizes("random", 5, 150))
    mesh = jax.make_mesh((4,), ("model",), (axis_type,))

    def loss(x, gate, up):
        w = gate if activation is None else (gate, up)
        return jnp.sum(grouped_matmul(x, w, group_sizes, activation=activation) * dy)

    expected = jax.jit(jax.grad(loss, (0, 1, 2)))(x, gate, up)
    with jax.set_mesh(mesh):
        divided = [jax.device_put(w, NamedSharding(mesh, PartitionSpec(None, None, "model"))) for w in (gate, up)]
        dy = jax.device_put(dy, NamedSharding(mesh, PartitionSpec(None, "model")))
        got = jax.jit(jax.grad(loss, (0, 1, 2)))(x, *divided)
    for a, b in zip(got, expected, strict=True):
        close(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("check_vma", [True, False])
def test_in_shard_map_each_device_has_its_own_groups(check_vma):
    x, w, _, dy = arrays(rows=160)
    group_sizes = np.concatenate([sizes("some empty", 5, 80, seed) for seed in range(2)])
    mesh = jax.make_mesh((2,), ("data",), (AxisType.Auto,))
    rows = PartitionSpec("data")

    def loss(x, w, group_sizes, dy):
        y = jnp.sum(grouped_matmul(x, w, group_sizes) * dy)
        return y[None]

    mapped = jax.shard_map(
        loss, mesh=mesh, in_specs=(rows, PartitionSpec(), rows, rows), out_specs=rows, check_vma=check_vma
    )
    dx, dw = jax.jit(jax.grad(lambda x, w: jnp.sum(mapped(x, w, group_sizes, dy)), (0, 1)))(x, w)
    parts = [(slice(80 * i, 80 * i + 80), group_sizes[5 * i : 5 * i + 5]) for i in range(2)]
    close(dx, np.concatenate([product(dy[part], np.swapaxes(w, 1, 2), own) for part, own in parts]))
    close(dw, sum(transposed(x[part], dy[part], own) for part, own in parts))


@pytest.mark.slow
@pytest.mark.parametrize("activation", [None, "swiglu"])
@pytest.mark.parametrize("gathered", [False, True])
def test_rows_divided_over_explicit_axes(activation, gathered):
    x, gate, up, dy = arrays(rows=160)
    group_sizes = jnp.asarray(sizes("random", 5, 160))
    rows = jnp.asarray(np.random.default_rng(1).integers(0, 160, 160), jnp.int32) if gathered else None

    def multiply(x, gate, up):
        w = gate if activation is None else (gate, up)
        return grouped_matmul(x, w, group_sizes, rows=rows, activation=activation)

    def loss(x, gate, up):
        return jnp.sum(multiply(x, gate, up) * dy)

    expected = [jax.jit(multiply)(x, gate, up), *jax.jit(jax.grad(loss, (0, 1, 2)))(x, gate, up)]
    mesh = jax.make_mesh((4, 2), ("data", "model"), (AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        specs = ("data", "model"), (None, "data", "model"), (None, "data", None), ("data", None), ("data",)
        given = zip((x, gate, up, dy, rows)[: 5 if gathered else 4], specs, strict=False)
        put = [jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec))) for array, spec in given]
        x, gate, up, dy, *_ = put
        rows = put[4] if gathered else None
        got = [jax.jit(multiply)(x, gate, up), *jax.jit(jax.grad(loss, (0, 1, 2)))(x, gate, up)]
    assert got[0].sharding.spec == PartitionSpec("data", "model")
    assert [g.sharding.spec for g in got[1:]] == [a.sharding.spec for a in (x, gate, up)]
    for a, b in zip(got, expected, strict=True):
        close(a, b)


def test_gradients_of_the_transposed_product():
    x, w, _, y = arrays()
    group_sizes = jnp.asarray(sizes("short", 5, 150))
    rows = np.random.default_rng(1).integers(0, 40, 150).astype(np.int32)
    f = functools.partial(grouped_matmul_transposed, group_sizes=group_sizes, rows=jnp.asarray(rows))
    out, (dx, dy) = value_and_pull(lambda x, y: f(x, y), w, x[:40], y)
    close(out, transposed(x[rows], y, group_sizes))
    expected = np.zeros((40, 24))
    np.add.at(expected, rows, product(y, np.swapaxes(w, 1, 2), group_sizes))
    close(dx, expected)
    close(dy, product(x[rows], w, group_sizes))


@pytest.mark.slow
def test_the_transposed_product_of_rows_on_explicit_axes():
    x, w, _, y = arrays(rows=160)
    group_sizes = jnp.asarray(sizes("random", 5, 160))

    def loss(x, y):
        return jnp.sum(grouped_matmul_transposed(x, y, group_sizes) * w)

    expected = jax.jit(jax.grad(loss, (0, 1)))(x, y)
    mesh = jax.make_mesh((4, 2), ("data", "model"), (AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        x, y = (jax.device_put(a, NamedSharding(mesh, PartitionSpec("data", "model"))) for a in (x, y))
        got = jax.jit(jax.grad(loss, (0, 1)))(x, y)
    for a, b, like in zip(got, expected, (x, y), strict=True):
        assert a.sharding.spec == like.sharding.spec
        close(a, b)


@pytest.mark.slow
def test_residuals_can_be_kept_by_name(capsys):
    x, gate, up, _ = arrays()
    group_sizes = jnp.asarray(sizes("random", 5, 150))
    names = ("grouped_matmul_gate", "grouped_matmul_up", "grouped_matmul_out")

    def two(x, gate, up):
        return jnp.sin(grouped_matmul(x, (gate, up), group_sizes, activation="swiglu"))

    policy = jax.checkpoint_policies.save_only_these_names(*names)
    jax.ad_checkpoint.print_saved_residuals(jax.checkpoint(two, policy=policy), x, gate, up)
    kept = capsys.readouterr().out
    assert all(f"named '{name}'" in kept for name in names)


def test_lists_of_sizes():
    x, w, _, _ = arrays()
    close(grouped_matmul(x, w, [50, 0, 60, 40, 0]), product(x, w, np.array([50, 0, 60, 40, 0])))


@pytest.mark.parametrize("dtype", [np.int64, np.uint64, np.uint8, np.int16])
def test_integers_of_numpy_of_any_width(dtype):
    x, w, _, _ = arrays()
    group_sizes, rows = np.array([50, 0, 60, 40, 0]), np.arange(150)[::-1]
    got = grouped_matmul(x, w, group_sizes.astype(dtype), rows=rows.astype(dtype))
    close(got, product(np.asarray(x)[rows], w, group_sizes))
    turned = grouped_matmul_transposed(x, got, group_sizes.astype(dtype))
    np.testing.assert_array_equal(turned, grouped_matmul_transposed(x, got, group_sizes.astype(np.int32)))


def test_lists_where_integers_have_64_bits():
    x, w, _, _ = arrays()
    with jax.enable_x64(True):
        close(grouped_matmul(x, w, [50, 0, 60, 40, 0]), product(x, w, np.array([50, 0, 60, 40, 0])))


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("x", {"x": jnp.zeros((2, 150, 24))}),
        ("x", {"x": jnp.zeros((150, 24), jnp.int32)}),
        ("w", {"w": jnp.zeros((5, 20, 24))}),
        ("w", {"w": jnp.zeros((4, 24, 20))}),
        ("w", {"w": jnp.zeros((5, 24, 20), jnp.bfloat16)}),
        ("w", {"activation": "swiglu"}),
        ("w", {"w": (jnp.zeros((5, 24, 20)), jnp.zeros((5, 24, 20)))}),
        ("activation", {"activation": "gelu"}),
        ("group_sizes", {"group_sizes": np.zeros((5, 1), np.int32)}),
        ("group_sizes", {"group_sizes": np.array([2**40, 0, 0, 0, 0])}),
        ("group_sizes", {"group_sizes": [2**40, 0, 0, 0, 0]}),
        ("x", {"x": [[1.0]]}),
        ("w", {"w": None}),
        ("w", {"w": [[[1.0]]]}),
        ("w", {"w": (jnp.zeros((5, 24, 20)), None), "activation": "swiglu"}),
        ("transpose_w", {"transpose_w": "no"}),
        ("out_dtype", {"out_dtype": "foo"}),
        ("out_dtype", {"out_dtype": jnp.int32}),
        ("group_sizes", {"group_sizes": np.array([100, 0, 0, 51, 0], np.int32)}),
        ("group_sizes", {"group_sizes": jnp.array([100, 0, 0, -1, 0], jnp.int32)}),
        ("group_sizes", {"group_sizes": [50.0, 0, 60, 40, 0]}),
        ("group_sizes", {"group_sizes": "all"}),
        ("rows", {"rows": np.zeros(150)}),
        ("rows", {"rows": np.full(150, 150, np.int32)}),
        ("rows", {"rows": np.full(150, -1, np.int32)}),
        ("rows", {"x": jnp.zeros((0, 24)), "rows": np.zeros(150, np.int32)}),
        ("config", {"config": 3}),
        ("config.grad_w", {"config": GroupedMatmulConfig(grad_w=TpuGroupedMatmulConfig())}),
        ("backend", {"backend": "triton"}),
    ],
)
def test_errors_name_the_argument(argument, change):
    x, w, _, _ = arrays()
    given = {"x": x, "w": w, "group_sizes": jnp.asarray(sizes("random", 5, 150)), **change}
    with pytest.raises(ArgumentError) as caught:
        grouped_matmul(**given)
    assert caught.value.argument == argument


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("x", {"x": [[1.0]]}),
        ("y", {"y": None}),
        ("out_dtype", {"out_dtype": "foo"}),
        ("out_dtype", {"out_dtype": np.int32}),
    ],
)
def test_errors_of_the_transposed_product_name_the_argument(argument, change):
    given = {"x": jnp.zeros((150, 24)), "y": jnp.zeros((150, 20)), "group_sizes": [150], **change}
    with pytest.raises(ArgumentError) as caught:
        grouped_matmul_transposed(**given)
    assert caught.value.argument == argument


def test_a_named_kernel_needs_its_device():
    x, w, _, _ = arrays()
    with pytest.raises(UnsupportedError, match="no kernel for cpu"):
        grouped_matmul(x, w, jnp.asarray(sizes("random", 5, 150)), backend="pallas")


def test_no_rows():
    y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, jnp.zeros(5, jnp.int32)), jnp.zeros((0, 24)), arrays()[1])
    assert y.shape == (0, 20)
    np.testing.assert_array_equal(pull(y)[1], np.zeros((5, 24, 20)))


@pytest.mark.slow
@pytest.mark.usefixtures("form")
def test_no_rows_to_take_from():
    """What `rows` names is in no group, and not there."""
    w, none = arrays()[1], jnp.zeros(5, jnp.int32)
    for rows in (jnp.zeros(0, jnp.int32), jnp.zeros(3, jnp.int32)):
        nothing, dy = jnp.zeros((0, 24)), jnp.ones((len(rows), 20))
        y, (dx,) = value_and_pull(lambda x, rows=rows: grouped_matmul(x, w, none, rows=rows), dy, nothing)
        np.testing.assert_array_equal(y, np.zeros((len(rows), 20)))
        assert dx.shape == (0, 24)
        dw = jax.jit(lambda x, y, rows=rows: grouped_matmul_transposed(x, y, none, rows=rows))(nothing, dy)
        np.testing.assert_array_equal(dw, np.zeros((5, 24, 20)))
