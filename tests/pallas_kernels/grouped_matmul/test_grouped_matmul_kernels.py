"""The TPU kernels in the interpreter against float64 NumPy, with a watch for races."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grouped_reference import KINDS, close, gated, gated_gradients, product, sizes, transposed
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pallas_kernels import tables, target
from pallas_kernels.errors import UnsupportedError
from pallas_kernels.kernels.grouped_matmul import GroupedMatmulConfig, grouped_matmul, tpu, tpu_schedule, tuning

SMALL = tpu.Config(rows=32, part=16, columns=128)
SMALL_TRANSPOSED = tpu.TransposedConfig(rows=32, part=16, depth=128, columns=128)
CONFIG = GroupedMatmulConfig(forward=SMALL, grad_x=SMALL, grad_w=SMALL_TRANSPOSED)
ROWS, DEPTH, COLUMNS, GROUPS = 72, 136, 140, 4  # none a multiple of its block


@contextlib.contextmanager
def no_races():
    """Runs kernels for v5p on two cores, and fails if one writes what another reads at the same time."""
    params = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    with target.interpreting(target.TPU_V5P, params):
        yield
    assert not interpret_pallas_call.races.races_found


def arrays(dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((ROWS, DEPTH), (GROUPS, DEPTH, COLUMNS), (GROUPS, DEPTH, COLUMNS), (ROWS, COLUMNS))
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def run(function, *args):
    """One compiled call in the interpreter."""
    with no_races():
        return jax.jit(function)(*args)


@pytest.mark.slow
def test_product():
    x, w, _, _ = arrays()
    group_sizes = sizes("short", GROUPS, ROWS)
    x = x.at[group_sizes.sum() :].set(jnp.nan)
    y = run(functools.partial(tpu.product, out_dtype=x.dtype, config=SMALL), x, w, jnp.asarray(group_sizes))
    close(y, product(x, w, group_sizes))


@pytest.mark.slow
def test_transposed_product():
    x, _, _, dy = arrays()
    group_sizes = sizes("short", GROUPS, ROWS)
    x, dy = (z.at[group_sizes.sum() :].set(jnp.nan) for z in (x, dy))
    function = functools.partial(tpu.transposed_product, out_dtype=x.dtype, config=SMALL_TRANSPOSED)
    close(run(function, x, dy, jnp.asarray(group_sizes)), transposed(x, dy, group_sizes))


@pytest.mark.exhaustive
def test_gated_product_keeps_its_factors():
    x, gate, up, _ = arrays(jnp.bfloat16)
    group_sizes = sizes("random", GROUPS, ROWS)
    function = functools.partial(tpu.gated_product, keep=True, out_dtype=x.dtype, config=SMALL)
    got = run(function, x, gate, up, jnp.asarray(group_sizes))
    expected = gated(x, gate, up, group_sizes), product(x, gate, group_sizes), product(x, up, group_sizes)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == jnp.bfloat16
        close(a, b, "bfloat16")


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_public_function_and_gradients(kind, dtype):
    x, w, _, dy = arrays(dtype)
    group_sizes = sizes(kind, GROUPS, ROWS)

    def both(x, w, group_sizes, dy):
        y, pull = jax.vjp(
            lambda x, w: grouped_matmul(x, w, group_sizes, backend="pallas", transpose_w=True, config=CONFIG), x, w
        )
        return y, *pull(dy)

    flipped = jnp.swapaxes(w, 1, 2)
    y, dx, dw = run(both, x, flipped, jnp.asarray(group_sizes), dy)
    close(y, product(x, w, group_sizes), dtype)
    close(dx, product(dy, flipped, group_sizes), dtype)
    close(dw, transposed(dy, x, group_sizes), dtype)


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(6))
def test_gated_at_random(seed):
    x, gate, up, dy = arrays(seed=seed)
    group_sizes = sizes(KINDS[seed % len(KINDS)], GROUPS, ROWS, seed)

    def both(x, gate, up, group_sizes, dy):
        options = {"activation": "swiglu", "backend": "pallas", "config": CONFIG}
        y, pull = jax.vjp(lambda x, *w: grouped_matmul(x, w, group_sizes, **options), x, gate, up)
        return y, *pull(dy)

    got = run(both, x, gate, up, jnp.asarray(group_sizes), dy)
    dy = np.asarray(dy)
    expected = gated(x, gate, up, group_sizes), *gated_gradients(x, gate, up, group_sizes, dy)
    for a, b in zip(got, expected, strict=True):
        close(a, b)


@pytest.mark.exhaustive
def test_vmap():
    x, w, _, _ = (jnp.stack(pair) for pair in zip(arrays(seed=1), arrays(seed=2), strict=True))
    group_sizes = np.stack([sizes("some empty", GROUPS, ROWS), sizes("one", GROUPS, ROWS)])
    y = run(jax.vmap(functools.partial(grouped_matmul, backend="pallas", config=CONFIG)), x, w, group_sizes)
    for i in range(2):
        close(y[i], product(x[i], w[i], group_sizes[i]))


@pytest.mark.exhaustive
def test_columns_divided_over_an_explicit_axis():
    x, w, _, _ = arrays()
    group_sizes = sizes("some empty", GROUPS, ROWS)
    mesh = jax.make_mesh((2,), ("model",), (AxisType.Explicit,))
    with target.interpreting(target.TPU_V5P), jax.set_mesh(mesh):
        divided = jax.device_put(w, NamedSharding(mesh, PartitionSpec(None, None, "model")))
        f = functools.partial(grouped_matmul, backend="pallas", config=CONFIG)
        y = jax.jit(f)(x, divided, jnp.asarray(group_sizes))
    assert y.sharding.spec == PartitionSpec(None, "model")
    close(y, product(x, w, group_sizes))


@pytest.mark.exhaustive
def test_in_shard_map_each_device_has_its_own_groups():
    x, w, _, _ = arrays()
    group_sizes = np.concatenate([sizes("some empty", GROUPS, ROWS // 2, seed) for seed in range(2)])
    mesh = jax.make_mesh((2,), ("data",), (AxisType.Auto,))
    rows = PartitionSpec("data")
    f = functools.partial(grouped_matmul, backend="pallas", config=CONFIG)
    specs = {"in_specs": (rows, PartitionSpec(), rows), "out_specs": rows, "check_vma": False}
    with target.interpreting(target.TPU_V5P):  # whose interpreter does not know of varying axes
        y = jax.jit(jax.shard_map(f, mesh=mesh, **specs))(x, w, group_sizes)
    for i, part in enumerate((slice(0, ROWS // 2), slice(ROWS // 2, ROWS))):
        close(y[part], product(x[part], w, group_sizes[GROUPS * i : GROUPS * (i + 1)]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("visit_empty", [False, True])
def test_steps_cover_every_row_once(kind, visit_empty):
    group_sizes = sizes(kind, 7, 100)
    steps = tpu_schedule.steps(jnp.asarray(group_sizes), 100, 16, visit_empty=visit_empty)
    owner = np.repeat(np.arange(8), [*group_sizes, 100 - group_sizes.sum()])
    seen = np.full(112, -1)
    for group, block, start, end in np.stack(steps, axis=1):
        rows = np.arange(block * 16 + max(start, 0), block * 16 + min(end, 16))
        assert (seen[rows] == -1).all()
        seen[rows] = group
    expected = np.where(owner == 7, -1, owner) if visit_empty else owner
    np.testing.assert_array_equal(seen[:100], expected)
    assert (np.diff(steps[0]) >= 0).all()
    assert (np.diff(steps[1]) >= 0).all()
    if visit_empty:
        assert set(np.asarray(steps[0])) == set(range(7))


@pytest.mark.slow
def test_what_the_kernels_do_not_take():
    x, w, _, _ = arrays(jnp.float16)
    with target.compiling_for(target.TPU_V6E), pytest.raises(UnsupportedError, match="float16"):
        grouped_matmul(x, w, jnp.zeros(GROUPS, jnp.int32), backend="pallas")
    with target.compiling_for(target.TPU_V6E):
        assert not grouped_matmul(x, w, jnp.zeros(GROUPS, jnp.int32)).any()  # XLA's
    with target.compiling_for(target.TPU_V5P):
        assert "VMEM" in tpu.unsupported(400_000, 128, jnp.bfloat16)
        assert tpu.unsupported(7168, 2048, jnp.bfloat16) is None


def test_recorded_blocks_fit():
    """Those that do not would be passed over."""
    for family, by_key in tables.load(tpu.OPERATION).items():
        for shape in tuning.shapes().values():
            entry = by_key.get(tuning.shape_class(shape))
            if entry and shape.kind == "dw":
                size = tpu.TransposedConfig(**entry["config"]).vmem(shape.depth, shape.columns, jnp.bfloat16)
            elif entry:
                arrays = (2, 3) if shape.kind == "gated" else (1, 1)
                size = tpu.Config(**entry["config"]).vmem(shape.depth, shape.columns, jnp.bfloat16, *arrays)
            assert not entry or size <= tpu.VMEM[family]
