"""Which implementation "auto" takes: the kernels on TPUs, on Hopper only those that were measured, else XLA's."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import tables, target
from pallas_kernels.kernels.grouped_matmul import grouped_matmul, hopper, products, tpu, xla
from pallas_kernels.kernels.moe import moe_mlp
from pallas_kernels.kernels.routing import route

FUNCTIONS = ("product", "gated_product", "transposed_product")


@pytest.fixture
def taken(monkeypatch):
    """(module, function) of the products that are traced, each of which gives what XLA's would."""
    seen = []
    for module in (hopper, tpu, xla):
        for name in FUNCTIONS:
            stand_in = _stand_in(seen, module.__name__.rpartition(".")[2], name, getattr(xla, name))
            monkeypatch.setattr(module, name, stand_in)
    return seen


def _stand_in(seen, module, name, function):
    def product(*arrays, **options):
        seen.append((module, name))
        return function(*arrays, **options)

    return product


def table(monkeypatch, **sources):
    """A table of Hopper's kernels with an entry for each kind of product, 256 x 128 and 128 x 256, and its source."""
    entries = {
        products.shape_class(kind, 3, *sizes): {"config": {}, "source": source}
        for kind, source in sources.items()
        for sizes in ((256, 128), (128, 256))
    }
    monkeypatch.setattr(tables, "load", {hopper.OPERATION: {"hopper": entries}}.__getitem__)


def arrays(depth=256, columns=128, dtype=jnp.bfloat16):
    shapes = ((40, depth), (3, depth, columns))
    return [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]


def trace(device, **options):
    """Traces a product and its gradients."""
    x, w = arrays()

    def loss(x, w):
        return jnp.sum(grouped_matmul(x, w, jnp.array([10, 20, 10]), **options))

    with target.compiling_for(device):
        jax.eval_shape(jax.grad(loss, (0, 1)), x, w)


@pytest.mark.parametrize("device", [target.TPU_V5E, target.TPU_V5P, target.TPU_V6E, target.TPU_7X])
def test_tpus_take_the_kernels(device, taken):
    trace(device)
    assert {module for module, _ in taken} == {"tpu"}


def test_hopper_takes_what_was_measured(taken, monkeypatch):
    table(monkeypatch, product="measured", product_t="static")
    trace(target.H200)
    assert set(taken) == {("hopper", "product"), ("xla", "product"), ("xla", "transposed_product")}


def test_hopper_takes_nothing_without_a_table(taken, monkeypatch):
    monkeypatch.setattr(tables, "load", {hopper.OPERATION: {}}.__getitem__)
    trace(target.H200)
    assert {module for module, _ in taken} == {"xla"}


def test_a_kernel_that_is_named_needs_no_table(taken, monkeypatch):
    monkeypatch.setattr(tables, "load", {hopper.OPERATION: {}}.__getitem__)
    trace(target.H200, backend="pallas")
    assert {module for module, _ in taken} == {"hopper"}


def test_the_mlp_of_a_mixture(taken, monkeypatch):
    table(monkeypatch, gated="measured", product="measured", product_t="measured", dw="measured")
    x, logits = jnp.zeros((12, 256), jnp.bfloat16), jnp.zeros((12, 3))
    w = jnp.zeros((3, 256, 128), jnp.bfloat16)

    def loss(*w):
        return jnp.sum(moe_mlp(x, route(logits, top_k=2), *w))

    with target.compiling_for(target.H200):
        jax.eval_shape(jax.grad(loss, (0, 1, 2)), w, w, jnp.swapaxes(w, 1, 2))
    assert set(taken) == {("hopper", name) for name in FUNCTIONS}


@pytest.mark.slow
def test_sizes_on_one_device_count(taken, monkeypatch):
    table(monkeypatch, product="measured", product_t="measured", dw="measured")
    mesh = jax.make_mesh((2,), ("model",), (jax.sharding.AxisType.Explicit,))
    x, w = (jnp.zeros(struct.shape, struct.dtype) for struct in arrays())
    with jax.set_mesh(mesh), target.compiling_for(target.H200):
        w = jax.device_put(w, jax.NamedSharding(mesh, jax.P(None, None, "model")))
        grouped_matmul(x, w, jnp.array([10, 20, 10]))
    assert taken == [("xla", "product")]


def test_recorded_tiles_that_do_not_divide_the_part_of_one_device(taken, monkeypatch):
    entry = {"config": {"tile_n": 128}, "source": "measured"}
    keys = [products.shape_class("product", 3, 256, columns) for columns in (128, 64)]
    monkeypatch.setattr(tables, "load", {hopper.OPERATION: {"hopper": dict.fromkeys(keys, entry)}}.__getitem__)
    mesh = jax.make_mesh((2,), ("model",), (jax.sharding.AxisType.Explicit,))
    x, w = (jnp.zeros(struct.shape, struct.dtype) for struct in arrays())
    with jax.set_mesh(mesh), target.compiling_for(target.H200):
        w = jax.device_put(w, jax.NamedSharding(mesh, jax.P(None, None, "model")))
        grouped_matmul(x, w, jnp.array([10, 20, 10]))
        assert "columns 64" in hopper.misfit(None, "product", 3, 256, 64, x.dtype)
    assert taken == [("xla", "product")]
