"""Attention against a float64 NumPy reference that repeats keys and loops over rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from davinci_jax import ops


def reference(q, k, v, mask):
    """Attention of one head at a time: q [B, T, H, K], k and v [B, S, G, K], mask [B, T, S] -> [B, T, H, K]."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for b, t, h in np.ndindex(q.shape[:3]):
        g = h * k.shape[2] // q.shape[2]
        keys = np.flatnonzero(mask[b, t])
        scores = k[b, keys, g] @ q[b, t, h] / np.sqrt(q.shape[3])
        weights = np.exp(scores - scores.max())
        out[b, t, h] = (weights / weights.sum()) @ v[b, keys, g]
    return out


def inputs(length, heads, groups, size=8, batch=2, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((batch, length, heads, size), (batch, length, groups, size), (batch, length, groups, size))
    q, k, v = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    borders = np.sort(rng.integers(0, length, (batch, 3)), axis=1)
    return q, k, v, 1 + (np.arange(length)[None, :, None] >= borders[:, None]).sum(-1)


def causal(segments):
    same = segments[:, :, None] == segments[:, None, :]
    return same & np.tri(segments.shape[1], dtype=bool)


@pytest.mark.parametrize(
    ("length", "heads", "groups"),
    [(7, 2, 2), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((130, 4, 2), (300, 6, 1)))],
)
def test_attention_equals_the_reference(length, heads, groups):
    q, k, v, segments = inputs(length, heads, groups)
    out = jax.jit(ops.attention)(q, k, v, jnp.asarray(segments))
    np.testing.assert_allclose(out, reference(q, k, v, causal(segments)), atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (3, 1)])
def test_attention_gradients_equal_plain_autodiff_in_float64(heads, groups):
    length = 140
    q, k, v, segments = inputs(length, heads, groups)
    cotangent = np.random.default_rng(1).normal(size=q.shape)

    def pull(f, dtype):
        arrays = [jnp.asarray(x, dtype) for x in (q, k, v, cotangent)]
        return jax.jit(lambda *x: jax.vjp(f, *x[:3])[1](x[3]))(*arrays)

    grads = pull(lambda *x: ops.attention(*x, jnp.asarray(segments)), jnp.float32)
    with jax.enable_x64(True):

        def plain(q, k, v):
            k, v = (jnp.repeat(x, heads // groups, axis=2) for x in (k, v))
            scores = jnp.einsum("bthk,bshk->bhts", q, k) / np.sqrt(q.shape[-1])
            scores = jnp.where(causal(segments)[:, None], scores, -jnp.inf)
            return jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(scores, -1), v)

        expected = pull(plain, jnp.float64)
    for got, want in zip(grads, expected, strict=True):
        np.testing.assert_allclose(got, want, atol=5e-6)


@pytest.mark.slow
def test_attention_in_bfloat16_stays_within_its_rounding():
    q, k, v, segments = inputs(140, 4, 2, dtype=jnp.bfloat16)
    out = jax.jit(ops.attention)(q, k, v, jnp.asarray(segments))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), reference(q, k, v, causal(segments)), atol=0.02)


def test_attention_survives_large_scores():
    q, k, v, segments = inputs(140, 2, 1)

    @jax.jit
    def run(q):
        out, pullback = jax.vjp(lambda q: ops.attention(q, k, v, jnp.asarray(segments)), q)
        return out, pullback(out)[0]

    out, gradient = run(1e4 * q)
    np.testing.assert_allclose(out, reference(1e4 * q, k, v, causal(segments)), atol=1e-2)
    assert np.isfinite(gradient).all()


@pytest.mark.slow
def test_padding_sees_nothing():
    q, k, v, segments = inputs(20, 2, 1)
    segments[:, 15:] = 0
    out = jax.jit(ops.attention)(q, k, v, jnp.asarray(segments))
    assert (out[:, 15:] == 0).all()
    np.testing.assert_allclose(
        out[:, :15], jax.jit(ops.attention)(*(x[:, :15] for x in (q, k, v, segments))), atol=1e-6
    )


@pytest.mark.slow
def test_masked_attention_equals_the_reference():
    q, k, v, _ = inputs(9, 4, 2)
    mask = np.random.default_rng(2).random((2, 3, 9)) < 0.5
    mask[..., 0] = True
    out = ops.masked_attention(q[:, :3], k, v, jnp.asarray(mask))
    np.testing.assert_allclose(out, reference(q[:, :3], k, v, mask), atol=1e-6)
