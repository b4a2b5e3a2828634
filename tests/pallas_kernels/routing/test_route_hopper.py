"""The Hopper kernels in the interpreter against plain loops in float64: choice, order, blocks, races, gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from routing_cases import CASES, EXPERTS, check_undefined, compare, equal_groups, inputs, undefined
from routing_reference import route as reference

pytest.importorskip("absl", reason="Mosaic GPU needs absl-py")

from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

from pallas_kernels import supported, tables, target
from pallas_kernels.errors import UnsupportedError
from pallas_kernels.kernels.routing import hopper, route, xla
from pallas_kernels.kernels.routing.spec import RoutingSpec


def interpreting(**params):
    return target.interpreting(target.H200, interpret_pallas_call.InterpretGPUParams(**params))


@pytest.mark.slow
def test_several_blocks_without_races():
    logits, options = inputs(0, 150, CASES["groups, bias"])
    with interpreting(detect_races=True):
        compare(route(logits, backend="pallas", **options), reference(logits, **options))
    assert not interpret_pallas_call.get_races().races_found


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", CASES)
def test_equals_loops(case):
    logits, options = inputs(1, 130, CASES[case])
    with interpreting():
        compare(route(logits, backend="pallas", **options), reference(logits, **options))


@pytest.mark.exhaustive
def test_more_experts_than_one_tile_of_ranks():
    """Ranks are counted for 64 experts at a time; 72 are one tile and a part of another."""
    spec = RoutingSpec(5, "sigmoid", None, None, True, 1.0, None)
    chosen = jnp.asarray(np.random.default_rng(0).permuted(np.tile(np.arange(72), (200, 1)), axis=1)[:, :5], jnp.int32)
    with interpreting():
        got = hopper.order(chosen, experts=72, spec=spec)
    for a, b in zip(got, xla.sort(chosen, 72, spec), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.exhaustive
def test_undefined_scores_leave_an_order_and_are_seen():
    logits, options = undefined()
    with interpreting():
        check_undefined(route(logits, backend="pallas", **options))


@pytest.mark.exhaustive
def test_of_equal_groups_the_first_is_kept():
    logits, options = equal_groups()
    with interpreting():
        compare(route(logits, backend="pallas", **options), reference(logits, **options))


@pytest.mark.exhaustive
def test_gradient_and_vmap_equal_those_of_xla():
    logits, options = inputs(2, 16, CASES["groups, bias"])
    a, b = np.random.default_rng(3).standard_normal((2, 16, EXPERTS))

    def loss(backend, logits):
        routing = route(logits, backend=backend, **options)
        return jnp.sum(routing.weights * a[:, :2]) + jnp.sum(routing.scores * b)

    stacked = logits.reshape(2, 8, EXPERTS)
    with interpreting():
        got = jax.grad(functools.partial(loss, "pallas"))(logits)
        mapped = jax.vmap(functools.partial(route, backend="pallas", **options))(stacked)
    np.testing.assert_allclose(got, jax.grad(functools.partial(loss, "xla"))(logits), atol=1e-6)
    for i in range(2):
        compare([x[i] for x in mapped], reference(stacked[i], **options))


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
def test_tokens_divided_over_a_mesh_have_one_order(kind):
    logits, options = inputs(4, 16, CASES["capacity"])
    mesh = jax.make_mesh((2,), ("data",), (kind,))
    with jax.set_mesh(mesh), interpreting():
        divided = jax.device_put(logits, NamedSharding(mesh, PartitionSpec("data", None)))
        compare(jax.jit(functools.partial(route, backend="pallas", **options))(divided), reference(logits, **options))


def test_auto_takes_the_kernels_where_they_were_measured_to_be_faster(monkeypatch):
    def is_taken(**options):
        logits = jax.ShapeDtypeStruct((8, 16), jnp.bfloat16)
        return "routing_select" in str(jax.make_jaxpr(lambda x: route(x, top_k=2, **options))(logits))

    with target.compiling_for(target.H200):
        assert is_taken(backend="pallas")
        for order, faster in ((["pallas", "xla"], True), (["xla", "pallas"], False)):
            table = {"hopper": {"experts16": {"config": {"order": order}}}}
            monkeypatch.setattr(tables, "load", {"routing_backend": table}.__getitem__)
            assert is_taken() == faster
        monkeypatch.setattr(tables, "load", lambda operation: {})
        assert not is_taken()


def test_what_the_kernels_do_not_take_goes_to_xla_unless_they_are_asked_for():
    with target.compiling_for(target.H200):
        for experts, groups, reason in ((12, None, "multiple of 8"), (16, (4, 2), "groups of 4"), (512, None, "256")):
            logits = jax.ShapeDtypeStruct((8, experts), jnp.float32)
            options = {"top_k": 2, "groups": groups}
            assert reason in supported(route, logits, **options)
            with pytest.raises(UnsupportedError, match=reason):
                jax.eval_shape(lambda x, o=options: route(x, backend="pallas", **o), logits)
            assert "routing_select" not in str(jax.make_jaxpr(lambda x, o=options: route(x, **o))(logits))
        logits = jax.ShapeDtypeStruct((8, 64), jnp.float32)
        assert "17 experts of a token" in supported(route, logits, top_k=17)
        assert "no tokens" in supported(route, jax.ShapeDtypeStruct((0, 16), jnp.float32), top_k=2)
