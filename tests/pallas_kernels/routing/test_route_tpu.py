"""The TPU kernels in the interpreter against plain loops in float64: choice, order, blocks, races, gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from routing_cases import CASES, EXPERTS, check_undefined, compare, equal_groups, inputs, undefined
from routing_reference import route as reference

from pallas_kernels import supported, target
from pallas_kernels.errors import UnsupportedError
from pallas_kernels.kernels.routing import route, tpu, xla


def interpreting(races=False):
    params = pltpu.InterpretParams(detect_races=races, num_cores_or_threads=2, out_of_bounds_reads="uninitialized")
    return target.interpreting(target.TPU_V5P, params)


@pytest.mark.slow
def test_several_blocks_on_two_cores_without_races(monkeypatch):
    monkeypatch.setattr(tpu, "_TOKENS", 128)
    logits, options = inputs(0, 150, CASES["groups, bias"])
    with interpreting(races=True):
        compare(route(logits, backend="pallas", **options), reference(logits, **options))
    assert not interpret_pallas_call.races.races_found


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", CASES)
def test_equals_loops(case):
    logits, options = inputs(1, 20, CASES[case])
    with interpreting():
        compare(route(logits, backend="pallas", **options), reference(logits, **options))


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
def test_gradient_vmap_and_shard_map_equal_those_of_xla():
    logits, options = inputs(2, 16, CASES["groups, bias"])
    a, b = np.random.default_rng(3).standard_normal((2, 16, EXPERTS))

    def loss(backend, logits):
        routing = route(logits, backend=backend, **options)
        return jnp.sum(routing.weights * a[: len(logits), :2]) + jnp.sum(routing.scores * b[: len(logits)])

    stacked, mesh = logits.reshape(2, 8, EXPERTS), jax.make_mesh((2,), ("data",), (AxisType.Auto,))
    rows = PartitionSpec("data")
    with interpreting():
        got = jax.grad(functools.partial(loss, "pallas"))(logits)
        mapped = jax.vmap(functools.partial(route, backend="pallas", **options))(stacked)
        local = jax.shard_map(
            lambda x: route(x, backend="pallas", **options)[:5],
            mesh=mesh,
            in_specs=rows,
            out_specs=(rows,) * 5,
            check_vma=False,
        )(logits)
    np.testing.assert_allclose(got, jax.grad(functools.partial(loss, "xla"))(logits), atol=1e-6)
    for i in range(2):
        expected = reference(stacked[i], **options)
        compare([x[i] for x in mapped], expected)
        parts = [x[i * len(x) // 2 : (i + 1) * len(x) // 2] for x in local]
        compare((*parts, expected[-1]), expected)


@pytest.mark.exhaustive
def test_explicit_axes_have_one_order():
    logits, options = inputs(4, 16, CASES["capacity"])
    mesh = jax.make_mesh((2,), ("data",), (AxisType.Explicit,))
    with jax.set_mesh(mesh), interpreting():
        divided = jax.device_put(logits, NamedSharding(mesh, PartitionSpec("data", None)))
        compare(jax.jit(functools.partial(route, backend="pallas", **options))(divided), reference(logits, **options))


def test_what_the_kernels_do_not_take_goes_to_xla_unless_they_are_asked_for():
    with target.compiling_for(target.TPU_V6E):
        for experts, groups, reason in ((12, None, "multiple of 8"), (16, (4, 2), "groups of 4"), (2048, None, "1024")):
            logits = jax.ShapeDtypeStruct((8, experts), jnp.float32)
            options = {"top_k": 2, "groups": groups}
            assert reason in supported(route, logits, **options)
            with pytest.raises(UnsupportedError, match=reason):
                jax.eval_shape(lambda x, o=options: route(x, backend="pallas", **o), logits)
            program = jax.make_jaxpr(lambda x, o=options: route(x, **o))(logits)
            assert "routing_select" not in str(program)
        logits = jax.ShapeDtypeStruct((8, 16), jnp.float32)
        assert "routing_select" in str(jax.make_jaxpr(lambda x: route(x, top_k=2))(logits))


def test_generations_without_a_kernel_take_xla():
    logits = jax.ShapeDtypeStruct((8, 16), jnp.float32)
    with target.compiling_for(target.Target("tpu", "TPU v4", 2)):
        assert supported(route, logits, top_k=2) == "there is no kernel for TPU v4"
        assert "routing_select" not in str(jax.make_jaxpr(lambda x: route(x, top_k=2))(logits))


@pytest.mark.parametrize(("experts", "tokens"), [(12, 20), (2**20, 2**8)])
def test_the_permutation_of_tpus_undoes_the_inverse(experts, tokens):
    """Sorted where expert and number fit into 31 bits, scattered otherwise."""
    chosen = jnp.asarray(np.random.default_rng(0).integers(0, experts + 1, (tokens, 8)), jnp.int32)
    by_hand = np.argsort(np.asarray(chosen).reshape(-1), kind="stable")
    inverse = jnp.asarray(np.argsort(by_hand), jnp.int32)
    with target.compiling_for(target.TPU_V6E):
        permutation = jax.jit(functools.partial(xla.permutation, experts=experts))(chosen, inverse)
        program = str(jax.make_jaxpr(functools.partial(xla.permutation, experts=experts))(chosen, inverse))
    np.testing.assert_array_equal(permutation, by_hand)
    assert ("sort[" in program) == (experts == 12)
