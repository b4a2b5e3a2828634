"""`route` against plain loops in float64: choice, weights, order by expert, gradients, errors."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from routing_cases import check_undefined, undefined
from routing_reference import route as reference

from pallas_kernels.errors import ArgumentError, UnsupportedError
from pallas_kernels.kernels.routing import Routing, load_balancing_loss, route, router_z_loss

CASES = {
    "softmax": {"top_k": 3},
    "raw weights": {"top_k": 2, "normalize": False, "scale": 2.5},
    "sigmoid, bias": {"top_k": 3, "score": "sigmoid", "bias": True, "scale": 1.5},
    "groups": {"top_k": 3, "score": "sigmoid", "bias": True, "groups": (4, 2)},
    "groups of one": {"top_k": 3, "groups": (12, 4)},
    "threshold": {"top_k": 4, "score": "sigmoid", "threshold": 0.6},
    "threshold that none reach": {"top_k": 4, "threshold": 2.0},
    "capacity": {"top_k": 2, "capacity": 5},
    "capacity, threshold, groups": {"top_k": 3, "score": "sigmoid", "threshold": 0.4, "groups": (3, 2), "capacity": 3},
    "all experts": {"top_k": 12},
}


def inputs(seed, tokens, experts, options):
    """Logits, some of them equal, and the options with a bias in place of True."""
    rng = np.random.default_rng(seed)
    logits = np.round(rng.standard_normal((tokens, experts)) * 2, 1).astype(np.float32)
    options = dict(options)
    if options.get("bias"):
        options["bias"] = (rng.standard_normal(experts) * 0.2).astype(np.float32)
    return logits, options


def compare(routing: Routing, expected) -> None:
    for name, expects in zip(Routing._fields, expected, strict=True):
        got = np.asarray(getattr(routing, name))
        if name in ("weights", "scores"):
            assert got.dtype == np.float32
            np.testing.assert_allclose(got, expects, atol=3e-6, err_msg=name)
        else:
            assert got.dtype == np.int32
            np.testing.assert_array_equal(got, expects, err_msg=name)


def jitted(logits, **options) -> Routing:
    """`route` in one program: operation by operation it is compiled in fifty."""
    return jax.jit(functools.partial(route, **options))(logits)


@pytest.mark.parametrize("case", CASES)
def test_equals_loops(case):
    logits, options = inputs(0, 20, 12, CASES[case])
    compare(jitted(logits, **options), reference(logits, **options))


@pytest.mark.slow
def test_ties_go_to_the_lower_index():
    routing = jitted(jnp.zeros((3, 8)), top_k=2, groups=(4, 2))
    np.testing.assert_array_equal(routing.experts, [[0, 1]] * 3)


@pytest.mark.slow
@hypothesis.settings(max_examples=8, deadline=None, derandomize=True)
@hypothesis.given(st.integers(0, 1000), st.sampled_from([1, 7, 16]), st.sampled_from(["softmax", "sigmoid"]), st.data())
def test_equals_loops_at_random(seed, tokens, score, data):
    options = {
        "score": score,
        "top_k": data.draw(st.sampled_from([1, 3])),
        "bias": data.draw(st.booleans()) or None,
        "groups": data.draw(st.sampled_from([None, (2, 1), (4, 2)])),
        "threshold": data.draw(st.sampled_from([None, 0.3])),
        "capacity": data.draw(st.sampled_from([None, 2])),
    }
    logits, options = inputs(seed, tokens, 16, options)
    compare(jitted(logits, **options), reference(logits, **options))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["softmax", "raw weights", "groups", "capacity, threshold, groups"])
def test_gradient_equals_finite_differences(case):
    _, options = inputs(1, 6, 12, CASES[case])
    rng = np.random.default_rng(2)
    logits = rng.standard_normal((6, 12)).astype(np.float32)  # no two of them equal: steps change no choice
    a, b = rng.standard_normal((6, options["top_k"])), rng.standard_normal((6, 12))

    def loss(logits):
        routing = route(logits, **options)
        return jnp.sum(routing.weights * a) + jnp.sum(routing.scores * b)

    def expected_loss(logits):
        _, weights, *_, scores = reference(logits, **options)
        return np.sum(weights * a) + np.sum(scores * b)

    got = jax.jit(jax.grad(loss))(jnp.asarray(logits))
    logits = logits.astype(np.float64)
    expected = np.zeros_like(logits)
    for index in np.ndindex(logits.shape):
        step = np.zeros_like(logits)
        step[index] = 1e-5
        expected[index] = (expected_loss(logits + step) - expected_loss(logits - step)) / 2e-5
    np.testing.assert_allclose(got, expected, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_divided_tokens_have_one_order_under_jit(axis_type):
    logits, options = inputs(4, 16, 12, CASES["groups"])
    mesh = jax.make_mesh((4,), ("data",), (axis_type,))
    with jax.set_mesh(mesh):
        divided = jax.device_put(logits, NamedSharding(mesh, PartitionSpec("data", None)))
        routing = jax.jit(functools.partial(route, **options))(divided)
        gradient = jax.jit(jax.grad(lambda x: jnp.sum(route(x, **options).weights ** 2)))(divided)
    compare(routing, reference(logits, **options))
    assert gradient.shape == logits.shape


@pytest.mark.slow
def test_in_shard_map_each_device_has_its_own_order():
    logits, options = inputs(5, 16, 12, CASES["capacity"])
    mesh = jax.make_mesh((2,), ("data",), (AxisType.Auto,))
    rows = PartitionSpec("data")
    parts = jax.jit(
        jax.shard_map(functools.partial(route, **options), mesh=mesh, in_specs=(rows,), out_specs=Routing(*[rows] * 6))
    )(logits)
    for i in range(2):
        mine = Routing(*(x[i * len(x) // 2 : (i + 1) * len(x) // 2] for x in parts))
        compare(mine, reference(logits[8 * i : 8 * i + 8], **options))


@pytest.mark.slow
def test_bfloat16_logits():
    logits, options = inputs(6, 8, 12, {"top_k": 3})
    logits = jnp.asarray(logits, jnp.bfloat16)
    compare(jitted(logits, **options), reference(np.asarray(logits, np.float32), **options))


@pytest.mark.slow
def test_undefined_scores_leave_an_order_and_are_seen():
    logits, options = undefined()
    check_undefined(route(logits, **options))


def test_groups_that_are_all_kept_are_none():
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((6, 8)), jnp.float32)
    whole, grouped = (jax.make_jaxpr(lambda x, g=g: route(x, top_k=2, groups=g))(logits) for g in (None, (4, 4)))
    assert str(whole) == str(grouped)


def test_a_capacity_that_int32_does_not_hold_drops_nothing():
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((6, 8)), jnp.float32)
    compare(route(logits, top_k=2, capacity=2**40), reference(logits, top_k=2))


def test_losses():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((10, 4))
    _, _, sizes, _, _, scores = reference(logits, top_k=2, score="sigmoid")
    shares = scores / scores.sum(axis=1, keepdims=True)
    expected = 4 * np.sum(sizes / 20 * shares.mean(axis=0))
    np.testing.assert_allclose(load_balancing_loss(jnp.asarray(scores), jnp.asarray(sizes)), expected, rtol=1e-5)
    balanced = load_balancing_loss(jnp.full((8, 4), 0.25), jnp.full(4, 2, jnp.int32))
    np.testing.assert_allclose(balanced, 1.0, rtol=1e-6)
    expected = np.mean(np.log(np.exp(logits).sum(axis=1)) ** 2)
    np.testing.assert_allclose(router_z_loss(jnp.asarray(logits)), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("argument", "options"),
    [
        ("top_k", {"top_k": 13}),
        ("top_k", {"top_k": 0}),
        ("score", {"top_k": 2, "score": "relu"}),
        ("bias", {"top_k": 2, "bias": np.zeros(3, np.float32)}),
        ("groups", {"top_k": 2, "groups": (5, 2)}),
        ("groups", {"top_k": 2, "groups": (4, 5)}),
        ("groups", {"top_k": 4, "groups": (4, 1)}),
        ("threshold", {"top_k": 2, "threshold": "0.5"}),
        ("capacity", {"top_k": 2, "capacity": 0}),
        ("top_k", {"top_k": 2.0}),
        ("top_k", {"top_k": True}),
        ("bias", {"top_k": 2, "bias": np.zeros(12, np.int32)}),
        ("groups", {"top_k": 2, "groups": 3}),
        ("groups", {"top_k": 2, "groups": (4.0, 2)}),
        ("scale", {"top_k": 2, "scale": "2"}),
        ("scale", {"top_k": 2, "scale": np.inf}),
        ("threshold", {"top_k": 2, "threshold": np.nan}),
        ("threshold", {"top_k": 2, "threshold": 10**400}),
        ("scale", {"top_k": 2, "scale": 1e300}),
        ("normalize", {"top_k": 2, "normalize": "no"}),
        ("capacity", {"top_k": 2, "capacity": 1.5}),
        ("backend", {"top_k": 2, "backend": "cuda"}),
        ("config", {"top_k": 2, "config": 3}),
    ],
)
def test_errors_name_the_argument(argument, options):
    with pytest.raises(ArgumentError, match=f"`{argument}`") as caught:
        route(jnp.zeros((4, 12)), **options)
    assert caught.value.argument == argument


def test_whether_weights_are_normalised_cannot_be_traced():
    with pytest.raises(ArgumentError, match="`normalize` is traced"):
        jax.jit(lambda normalize: route(jnp.zeros((4, 12)), top_k=2, normalize=normalize))(True)


@pytest.mark.parametrize(
    ("loss", "given", "argument"),
    [
        (router_z_loss, (jnp.zeros(()),), "logits"),
        (router_z_loss, ([[1.0, 2.0]],), "logits"),
        (load_balancing_loss, ([[0.5, 0.5]], np.ones(2, np.int32)), "scores"),
        (load_balancing_loss, (jnp.ones((4, 2)), [2, 2]), "group_sizes"),
    ],
)
def test_errors_of_the_losses_name_the_argument(loss, given, argument):
    with pytest.raises(ArgumentError) as caught:
        loss(*given)
    assert caught.value.argument == argument


def test_numbers_of_numpy():
    options = {"top_k": 3, "threshold": 0.25, "scale": 1.5, "capacity": 3}
    logits, options = inputs(7, 8, 12, {name: np.asarray(value)[()] for name, value in options.items()})
    assert isinstance(options["top_k"], np.integer)
    compare(jitted(logits, **options), reference(logits, **options))


@pytest.mark.slow
def test_no_tokens():
    logits = jnp.zeros((0, 12))
    routing = jitted(logits, top_k=2)
    assert routing.experts.shape == (0, 2)
    np.testing.assert_array_equal(routing.group_sizes, np.zeros(12))
    for loss in (lambda x: load_balancing_loss(x, routing.group_sizes), router_z_loss):
        value, gradient = jax.jit(jax.value_and_grad(loss))(logits)
        assert value == 0
        assert gradient.shape == (0, 12)


def test_experts_divided_over_explicit_axes():
    logits, options = inputs(8, 16, 12, CASES["sigmoid, bias"])
    bias = options.pop("bias")
    mesh = jax.make_mesh((4, 2), ("data", "model"), (AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        divided = jax.device_put(logits, NamedSharding(mesh, PartitionSpec("data", "model")))
        biases = jax.device_put(bias, NamedSharding(mesh, PartitionSpec("model")))
        routing = jax.jit(lambda x, bias: route(x, bias=bias, **options))(divided, biases)
    compare(routing, reference(logits, bias=bias, **options))


def test_wrong_logits_and_named_kernel():
    with pytest.raises(ArgumentError, match="`logits`"):
        route(jnp.zeros((4, 12), jnp.int32), top_k=2)
    with pytest.raises(UnsupportedError, match="there is no kernel for"):
        route(jnp.zeros((4, 12)), top_k=2, backend="pallas")
    with pytest.raises(ArgumentError, match="`group_sizes`"):
        load_balancing_loss(jnp.zeros((4, 12)), jnp.zeros(3, jnp.int32))
