"""A function of local arrays gives the same on whole and on divided arrays, under every kind of mesh axis."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pallas_kernels import partition
from pallas_kernels.errors import ArgumentError

HEADS, KEYS = "b t (g r) k", "b s g k"


def local(q, k, w):
    """Heads read their key's sum; the second result sums over everything that may be divided."""
    repeats = q.shape[2] // k.shape[2]
    return q * jnp.repeat(k.sum(1, keepdims=True), repeats, axis=2), q.sum((0, 1, 2)) * w


def divided(q, k, w):
    options = {"divisible": "b g", "batch": "b", "name": "f", "opaque": True}
    return partition.divided(local, (q, k, w), (HEADS, KEYS, "k"), (HEADS, "k"), **options)


def first(q, k, w):
    options = {"divisible": "b g", "batch": "b", "name": "f", "opaque": True}
    return partition.divided(lambda *x: local(*x)[:1], (q, k, w), (HEADS, KEYS, "k"), (HEADS,), **options)[0]


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((4, 6, 8, 3), (4, 5, 2, 3), (3,))]


def placed(mesh, arrays, axes=("data", None, "tensor")):
    specs = (PartitionSpec(*axes), PartitionSpec(*axes), PartitionSpec())
    return [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True)]


def mesh_of(kind):
    return jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(kind,) * 2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
def test_divided_arrays_stay_divided_and_sums_are_whole(kind, arrays):
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        compiled = jax.jit(divided).lower(*placed(mesh, arrays)).compile()
        got = compiled(*placed(mesh, arrays))
    assert "all-gather" not in compiled.as_text()
    assert got[0].sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec("data", None, "tensor")), 4)
    for a, b in zip(got, local(*arrays), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
def test_what_all_devices_have_whole_is_summed_over_those_that_divide_the_rest(kind, arrays):
    """As queries of divided heads that share one key head, and the gradient of that."""

    def local(q, k):
        return q * k.sum(1, keepdims=True), q.sum(2, keepdims=True)[:, : k.shape[1]] * k

    def run(q, k):
        options = {"divisible": "b h", "batch": "b", "name": "f", "opaque": True}
        return partition.divided(local, (q, k), ("b t h k", KEYS), ("b t h k", KEYS), **options)

    q, k = arrays[0], arrays[1][:, :, :1]
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        specs = PartitionSpec("data", None, "tensor"), PartitionSpec("data")
        parts = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip((q, k), specs, strict=True)]
        assert [partition.explicit_parts(x, 2) for x in parts] == ([2, 1] if kind is AxisType.Explicit else [1, 1])
        compiled = jax.jit(run).lower(*parts).compile()
        got = compiled(*parts)
    assert "all-gather" not in compiled.as_text()
    for a, b in zip(got, local(q, k), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_constants_made_while_tracing_go_along(arrays):
    """Block lists of unpacked rows, for example, are NumPy arrays by the time a kernel is traced."""
    table = np.arange(3, dtype=np.float32)
    options = {"divisible": "b g", "batch": "b", "name": "f", "opaque": True}

    def run(q):
        return partition.divided(lambda q: (q * table,), (q,), ("b t g k",), ("b t g k",), **options)[0]

    np.testing.assert_allclose(jax.jit(run)(arrays[0]), arrays[0] * table)


def test_the_partitioner_finds_the_mesh_without_a_context(arrays):
    got = jax.jit(divided)(*placed(mesh_of(AxisType.Auto), arrays))
    for a, b in zip(got, local(*arrays), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_arrays_of_a_surrounding_shard_map_are_local_already(arrays):
    mesh = mesh_of(AxisType.Auto)
    spec = PartitionSpec("data", None, "tensor")

    def body(*parts):
        product, total = divided(*parts)
        return product, jax.lax.psum(total, ("data", "tensor"))

    specs = {"in_specs": (spec, spec, PartitionSpec()), "out_specs": (spec, PartitionSpec())}
    got = jax.jit(jax.shard_map(body, mesh=mesh, **specs))(*arrays)
    for a, b in zip(got, local(*arrays), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("function", [divided, first])
@pytest.mark.parametrize("kind", [None, AxisType.Explicit, AxisType.Auto])
def test_vmap(function, kind, arrays):
    q, k, w = arrays
    mapped = jax.jit(jax.vmap(function, in_axes=(0, None, None)))
    if kind is None:
        got = mapped(jnp.stack([q, 2 * q]), k, w)
    else:
        mesh = mesh_of(kind)
        with jax.set_mesh(mesh):
            part, *others = placed(mesh, arrays)
            got = mapped(jax.jit(lambda q: jnp.stack([q, 2 * q]))(part), *others)
    want = [function(q, k, w), function(2 * q, k, w)]
    for i in range(2):
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want[i]), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-5)


def test_divisions_that_cannot_be_are_refused(arrays):
    mesh = mesh_of(AxisType.Explicit)
    q, k, w = arrays
    with jax.set_mesh(mesh):
        with pytest.raises(ArgumentError, match=r"divided along `t` over the mesh axis 'tensor'.*only b, g"):
            divided(jax.device_put(q, NamedSharding(mesh, PartitionSpec(None, "tensor"))), k, w)
        with pytest.raises(ArgumentError, match="differs along `b`"):
            divided(*placed(mesh, arrays)[:1], k, w)


@pytest.mark.slow
def test_outputs_vary_where_an_input_does():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def body(x, w):
        assert partition.out_struct((3,), jnp.float32, w).manual_axis_type is None
        assert partition.out_struct((3,), jnp.float32, w, x).manual_axis_type.varying == {"data"}
        x, w, nothing = partition.vary_alike(x, w, None)
        assert nothing is None
        assert jax.typeof(w).manual_axis_type.varying == {"data"}
        return x * w

    def loss(w):
        data = PartitionSpec("data")
        run = jax.shard_map(body, mesh=mesh, in_specs=(data, PartitionSpec()), out_specs=data)
        return run(jnp.arange(8.0), w).sum()

    assert jax.grad(loss)(2.0) == 28
