"""`moe_mlp` against a float64 loop over tokens and experts: output, all gradients, batches, meshes, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pallas_kernels.errors import ArgumentError
from pallas_kernels.kernels.moe import MoeConfig, moe_mlp
from pallas_kernels.kernels.routing import route

TOLERANCE = {"float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}
ROUTES = {
    "dropless": {"top_k": 3},
    "threshold": {"top_k": 3, "score": "sigmoid", "threshold": 0.6},
    "capacity": {"top_k": 3, "capacity": 8},
    "nobody": {"top_k": 3, "threshold": 2.0},
}


def arrays(dtype=jnp.float32, tokens=24, width=16, inner=12, experts=6, seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((tokens, width), (experts, width, inner), (experts, width, inner), (experts, inner, width))
    x, *weights = (jnp.asarray(rng.standard_normal(shape) * 0.5, dtype) for shape in shapes)
    return x, jnp.asarray(rng.standard_normal((tokens, experts)), jnp.float32), *weights


def reference(x, experts, weights, gate, up, down, dout):
    """The output, and the gradients of x, weights, gate, up and down, one token and one expert at a time."""
    x, weights, gate, up, down, dout = (np.asarray(a, np.float64) for a in (x, weights, gate, up, down, dout))
    out, dx, dweights = np.zeros_like(x), np.zeros_like(x), np.zeros_like(weights)
    dgate, dup, ddown = np.zeros_like(gate), np.zeros_like(up), np.zeros_like(down)
    for n, j in np.ndindex(experts.shape):
        e, weight = experts[n, j], weights[n, j]
        if e == gate.shape[0]:
            continue
        a, b = x[n] @ gate[e], x[n] @ up[e]
        s = 1 / (1 + np.exp(-a))
        hidden = a * s * b
        out[n] += weight * hidden @ down[e]
        dweights[n, j] = dout[n] @ (hidden @ down[e])
        dhidden = weight * down[e] @ dout[n]
        da, db = dhidden * b * s * (1 + a * (1 - s)), dhidden * a * s
        dx[n] += gate[e] @ da + up[e] @ db
        dgate[e] += np.outer(x[n], da)
        dup[e] += np.outer(x[n], db)
        ddown[e] += weight * np.outer(hidden, dout[n])
    return out, (dx, dweights, dgate, dup, ddown)


def close(got, expected, dtype="float32"):
    scale = max(np.abs(expected).max(), 1.0)
    np.testing.assert_allclose(np.asarray(got, np.float64) / scale, expected / scale, atol=TOLERANCE[dtype])


@jax.jit  # once for all routings of a dtype
def output_and_gradients(x, routing, gate, up, down, dout):
    def f(x, weights, *w):
        return moe_mlp(x, routing._replace(weights=weights), *w)

    out, pull = jax.vjp(f, x, routing.weights, gate, up, down)
    return out, pull(dout)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", ROUTES)
def test_output_and_gradients(case, dtype):
    x, logits, gate, up, down = arrays(dtype)
    routing = jax.jit(functools.partial(route, **ROUTES[case]))(logits)
    dout = jnp.asarray(np.random.default_rng(1).standard_normal(x.shape), dtype)
    out, got = output_and_gradients(x, routing, gate, up, down, dout)
    assert out.dtype == x.dtype
    expected, gradients = reference(x, np.asarray(routing.experts), routing.weights, gate, up, down, dout)
    close(out, expected, dtype)
    for ours, wanted in zip(got, gradients, strict=True):
        close(ours, wanted, dtype)


@pytest.mark.slow
def test_gradient_reaches_the_logits():
    x, logits, *w = arrays()
    loss = jax.jit(lambda logits: jnp.sum(moe_mlp(x, route(logits, top_k=2), *w) ** 2))
    gradient, step = jax.jit(jax.grad(loss))(logits), 1e-3
    direction = gradient / jnp.linalg.norm(gradient)
    slope = (loss(logits + step * direction) - loss(logits - step * direction)) / (2 * step)
    np.testing.assert_allclose(slope, jnp.linalg.norm(gradient), rtol=2e-2)


@pytest.mark.slow
def test_vmap():
    x, logits, *w = arrays(tokens=32)
    several = jax.jit(jax.vmap(layer, (0, 0, None, None, None)))(x.reshape(2, 16, -1), logits.reshape(2, 16, -1), *w)
    close(several.reshape(32, -1), np.asarray(jax.jit(layer)(x, logits, *w), np.float64))


def gradients(layer, dout):
    return jax.grad(lambda *arrays: jnp.sum(layer(*arrays) * dout), (0, 1, 2, 3, 4))


def layer(x, logits, gate, up, down):
    return moe_mlp(x, route(logits, top_k=2), gate, up, down)


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_inner_width_divided_over_a_mesh(axis_type):
    x, logits, *w = arrays()
    dout = jnp.asarray(np.random.default_rng(1).standard_normal(x.shape), jnp.float32)
    expected = jax.jit(gradients(layer, dout))(x, logits, *w)
    mesh = jax.make_mesh((4,), ("model",), (axis_type,))
    columns, rows = PartitionSpec(None, None, "model"), PartitionSpec(None, "model", None)
    with jax.set_mesh(mesh):
        w = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(w, (columns, columns, rows), strict=True)]
        got = jax.jit(gradients(layer, dout))(x, logits, *w)
    for a, b in zip(got, expected, strict=True):
        close(a, np.asarray(b, np.float64))


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_tokens_and_weights_divided_over_a_mesh(axis_type):
    """Tokens over "data", weights over both axes as FSDP with tensor parallelism has them."""
    arrays_ = arrays()
    dout = jnp.asarray(np.random.default_rng(1).standard_normal(arrays_[0].shape), jnp.float32)
    expected = [jax.jit(layer)(*arrays_), *jax.jit(gradients(layer, dout))(*arrays_)]
    mesh = jax.make_mesh((2, 2), ("data", "model"), (axis_type,) * 2)
    columns, rows = PartitionSpec(None, "data", "model"), PartitionSpec(None, "model", "data")
    tokens = PartitionSpec("data", None)
    with jax.set_mesh(mesh):
        specs = (tokens, PartitionSpec("data", "model"), columns, columns, rows)
        arrays_ = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(arrays_, specs, strict=True)]
        dout = jax.device_put(dout, NamedSharding(mesh, tokens))
        got = [jax.jit(layer)(*arrays_), *jax.jit(gradients(layer, dout))(*arrays_)]
    if axis_type == AxisType.Explicit:
        assert [g.sharding.spec for g in got] == [tokens, *specs]
    for a, b in zip(got, expected, strict=True):
        close(a, np.asarray(b, np.float64))


@pytest.mark.slow
def test_no_tokens():
    x, logits, *w = arrays(tokens=0)
    assert jax.jit(layer)(x, logits, *w).shape == (0, 16)
    got = jax.jit(gradients(layer, jnp.zeros_like(x)))(x, logits, *w)
    for gradient, like in zip(got, (x, logits, *w), strict=True):
        np.testing.assert_array_equal(gradient, np.zeros(like.shape))


@pytest.mark.slow
@pytest.mark.parametrize("check_vma", [True, False])
def test_tokens_divided_in_shard_map(check_vma):
    x, logits, *w = arrays()
    dout = jnp.asarray(np.random.default_rng(1).standard_normal(x.shape), jnp.float32)
    mesh = jax.make_mesh((4,), ("data",), (AxisType.Auto,))
    rows, whole = PartitionSpec("data"), PartitionSpec()
    mapped = jax.shard_map(
        layer, mesh=mesh, in_specs=(rows, rows, whole, whole, whole), out_specs=rows, check_vma=check_vma
    )
    got = jax.jit(gradients(mapped, dout))(x, logits, *w)
    for a, b in zip(got, jax.jit(gradients(layer, dout))(x, logits, *w), strict=True):
        close(a, np.asarray(b, np.float64))


def test_residuals_can_be_kept_by_name(capsys):
    policy = jax.checkpoint_policies.save_only_these_names("moe_gate", "moe_up")
    jax.ad_checkpoint.print_saved_residuals(jax.checkpoint(layer, policy=policy), *arrays())
    kept = capsys.readouterr().out
    assert "named 'moe_gate'" in kept
    assert "named 'moe_up'" in kept


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("x", {"x": jnp.zeros((1, 24, 16))}),
        ("routing", {"x": jnp.zeros((25, 16))}),
        ("routing", {"routing": None}),
        ("x", {"x": [[1.0]]}),
        ("down", {"down": None}),
        ("gate", {"gate": jnp.zeros((5, 16, 12))}),
        ("gate", {"gate": jnp.zeros((6, 15, 12))}),
        ("up", {"up": jnp.zeros((6, 16, 13))}),
        ("down", {"down": jnp.zeros((6, 16, 12))}),
        ("down", {"down": jnp.zeros((6, 12, 16), jnp.bfloat16)}),
        ("backend", {"backend": "triton"}),
        ("config", {"config": 5}),
        ("config.up", {"config": MoeConfig(up=5)}),
    ],
)
def test_errors_name_the_argument(argument, change):
    x, logits, gate, up, down = arrays()
    given = {"x": x, "routing": route(logits, top_k=2), "gate": gate, "up": up, "down": down, **change}
    with pytest.raises(ArgumentError) as caught:
        moe_mlp(**given)
    assert caught.value.argument == argument


@pytest.mark.slow
def test_under_scan_and_remat():
    x, logits, *w = arrays()
    stacked = [jnp.stack([a, a * 0.5]) for a in w]

    def two(x):
        step = jax.checkpoint(functools.partial(lambda y, w: (layer(y, logits, *w), None)))
        return jnp.sum(jax.lax.scan(step, x, stacked)[0])

    plain = jax.jit(jax.grad(lambda x: jnp.sum(layer(layer(x, logits, *w), logits, *(a * 0.5 for a in w)))))(x)
    close(jax.jit(jax.grad(two))(x), np.asarray(plain, np.float64))
