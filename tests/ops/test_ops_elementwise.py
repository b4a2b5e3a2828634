"""RMSNorm, SwiGLU, rotary embeddings and the embedding lookup against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from davinci_jax import ops


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


@pytest.mark.parametrize(("dtype", "atol"), [(jnp.float32, 2e-6), (jnp.bfloat16, 0.02)])
def test_rms_norm_equals_the_reference(dtype, atol):
    x, scale = normal(3, 5, 16, dtype=dtype), normal(16, seed=1)
    wide = np.asarray(x, np.float64)
    want = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-3) * np.asarray(scale)
    out = ops.rms_norm(x, scale, 1e-3)
    assert out.dtype == dtype
    np.testing.assert_allclose(out.astype(jnp.float32), want, atol=atol)


def test_rms_norm_squares_in_float32():
    """Squares of 300 overflow float16, not the norm."""
    assert np.isfinite(ops.rms_norm(jnp.full((4,), 300, jnp.float16), jnp.ones(4), 1e-6)).all()


def test_rms_norm_gradient_equals_finite_differences():
    x, scale, weight = (np.random.default_rng(seed).normal(size=8) for seed in range(3))

    def f(x):
        return float((weight * x / np.sqrt((x**2).mean() + 1e-3) * scale).sum())

    want = [(f(x + h) - f(x - h)) / 2e-6 for h in 1e-6 * np.eye(8)]

    def loss(x):
        return (jnp.asarray(weight) * ops.rms_norm(x, jnp.asarray(scale), 1e-3)).sum()

    np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(x, jnp.float32)), want, atol=1e-5)


@pytest.mark.parametrize(("dtype", "atol"), [(jnp.float32, 1e-6), (jnp.bfloat16, 0.05)])
def test_swiglu_equals_the_reference(dtype, atol):
    gate, up = 3 * normal(64, dtype=dtype), normal(64, seed=1, dtype=dtype)
    wide = np.asarray(gate, np.float64)
    out = ops.swiglu(gate, up)
    assert out.dtype == dtype
    np.testing.assert_allclose(out.astype(jnp.float32), wide / (1 + np.exp(-wide)) * np.asarray(up), atol=atol)


def test_rope_turns_pairs_as_complex_numbers():
    x, positions = normal(2, 5, 3, 8), np.array([[0, 1, 2, 0, 1], [7, 8, 9, 10, 4000]])
    cos, sin = ops.rope_table(jnp.asarray(positions), ops.rope_frequencies(8, 10000.0))
    wide = np.asarray(x, np.float64)
    turned = (wide[..., :4] + 1j * wide[..., 4:]) * np.exp(
        1j * positions[:, :, None, None] * 10000.0 ** (-np.arange(4) / 4)
    )
    np.testing.assert_allclose(
        ops.apply_rope(x, cos, sin), np.concatenate([turned.real, turned.imag], -1), atol=1e-3, rtol=1e-3
    )


def test_rope_scores_depend_on_the_distance_only():
    q, k = normal(1, 1, 1, 16), normal(1, 1, 1, 16, seed=1)
    frequencies = ops.rope_frequencies(16, 500.0)

    def score(i, j):
        def turn(x, p):
            return ops.apply_rope(x, *ops.rope_table(jnp.full((1, 1), p), frequencies))

        return float((turn(q, i) * turn(k, j)).sum())

    assert score(5, 2) == pytest.approx(score(105, 102), abs=1e-4)
    assert score(5, 2) != pytest.approx(score(5, 3), abs=1e-3)


def test_llama_scaling_keeps_short_waves_and_stretches_long_ones():
    """Figures of Llama 3.1 (base 500,000, head 128, factor 8), one wave of each kind worked out by hand."""
    plain = ops.rope_frequencies(128, 500000.0)
    scaled = ops.rope_frequencies(128, 500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
    waves = 2 * np.pi / plain
    np.testing.assert_array_equal(scaled[waves < 2048], plain[waves < 2048])
    np.testing.assert_allclose(scaled[waves > 8192], plain[waves > 8192] / 8, rtol=1e-6)
    i = int(np.flatnonzero((waves > 2048) & (waves < 8192))[0])
    smooth = (8192 / waves[i] - 1) / 3
    np.testing.assert_allclose(scaled[i], (1 - smooth) * plain[i] / 8 + smooth * plain[i], rtol=1e-6)


def test_embedding_lookup_and_its_gradient():
    table, tokens = normal(7, 3), jnp.array([[1, 1, 6], [0, 1, 6]])
    np.testing.assert_array_equal(ops.embedding_lookup(table, tokens), np.asarray(table)[np.asarray(tokens)])
    weight = normal(2, 3, 3, seed=1)
    want = np.zeros((7, 3))
    np.add.at(want, np.asarray(tokens), np.asarray(weight))
    got = jax.grad(lambda table: (ops.embedding_lookup(table, tokens) * weight).sum())(table)
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_swiglu_gradient_equals_finite_differences():
    gate, up, weight = (np.random.default_rng(seed).normal(size=9) for seed in range(3))

    def f(gate, up):
        return (weight * gate / (1 + np.exp(-gate)) * up).sum()

    steps = 1e-6 * np.eye(9)
    want = (
        [(f(gate + h, up) - f(gate - h, up)) / 2e-6 for h in steps],
        [(f(gate, up + h) - f(gate, up - h)) / 2e-6 for h in steps],
    )
    arrays = (jnp.asarray(x, jnp.float32) for x in (gate, up))
    got = jax.grad(lambda gate, up: (jnp.asarray(weight) * ops.swiglu(gate, up)).sum(), argnums=(0, 1))(*arrays)
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.slow
def test_rope_gradient_is_the_turn_back():
    """A rotation preserves products, so turning the gradient of <turn(x), turn(y)> back gives y."""
    x, y, positions = normal(1, 4, 2, 8), normal(1, 4, 2, 8, seed=1), jnp.array([[0, 3, 50, 999]])
    table = ops.rope_table(positions, ops.rope_frequencies(8, 100.0))
    gradient = jax.grad(lambda x: (ops.apply_rope(x, *table) * ops.apply_rope(y, *table)).sum())(x)
    np.testing.assert_allclose(gradient, y, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("inner", "outer"), [((6,), (5,)), ((6,), (2, 3)), ((2, 3), (5,))])
def test_linear_and_its_gradients_equal_the_reference(inner, outer):
    x, weight, dy = normal(2, 4, *inner), normal(*inner, *outer, seed=1), normal(2, 4, *outer, seed=2)
    wide = [np.asarray(a, np.float64).reshape(shape) for a, shape in ((x, (8, 6)), (weight, (6, -1)), (dy, (8, -1)))]
    y, pullback = jax.vjp(lambda x, weight: ops.linear(x, weight, len(inner)), x, weight)
    np.testing.assert_allclose(y.reshape(8, -1), wide[0] @ wide[1], atol=1e-5)
    dx, dweight = pullback(dy)
    np.testing.assert_allclose(dx.reshape(8, 6), wide[2] @ wide[1].T, atol=1e-5)
    np.testing.assert_allclose(dweight.reshape(6, -1), wide[0].T @ wide[2], atol=1e-5)


def test_linear_in_bfloat16_gives_float32_masters_an_unrounded_gradient():
    x, weight = jnp.ones((300, 1), jnp.bfloat16), normal(1, 1)
    y, pullback = jax.vjp(ops.linear, x, weight)
    dx, dweight = pullback(jnp.ones_like(y))
    assert (y.dtype, dx.dtype, dweight.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    assert float(dweight[0, 0]) == 300  # bfloat16 steps by 2 from 256 on, but 301 would tell
    assert float(jax.vjp(ops.linear, x.at[0].set(2), weight)[1](jnp.ones_like(y))[1][0, 0]) == 301
