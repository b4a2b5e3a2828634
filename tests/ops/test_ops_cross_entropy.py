"""Chunked cross-entropy against float64 NumPy, values and gradients in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from davinci_jax import ops
from pallas_kernels import target

N, D, V = 37, 12, 50


def reference(x, head, labels, dnll, dlse_squared):
    """Returns (nll, lse^2, dx, dhead) in float64 for cotangents dnll and dlse_squared of the two losses."""
    x, head = np.asarray(x, np.float64), np.asarray(head, np.float64)
    logits = x @ head.T
    top = logits.max(-1, keepdims=True)
    lse = (top + np.log(np.exp(logits - top).sum(-1, keepdims=True)))[:, 0]
    valid = labels >= 0
    nll = np.where(valid, lse - logits[np.arange(len(x)), labels], 0)
    probabilities = np.exp(logits - lse[:, None])
    onehot = np.eye(head.shape[0])[labels] * valid[:, None]
    dlogits = (dnll * valid)[:, None] * (probabilities - onehot)
    dlogits += (dlse_squared * valid * 2 * lse)[:, None] * probabilities
    return nll, np.where(valid, lse**2, 0), dlogits @ head, dlogits.T @ x


def inputs(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, V, N)
    labels[[0, 5, 36]] = -1
    x, head = jnp.asarray(rng.normal(size=(N, D)), dtype), jnp.asarray(rng.normal(size=(V, D)), jnp.float32)
    return x, head, labels, rng.normal(size=N), rng.normal(size=N)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [1, 8, 36, 37, 1000])
def test_values_and_gradients_equal_the_reference(chunk):
    x, head, labels, dnll, dlse_squared = inputs()

    @jax.jit
    def run(x, head, cotangents):
        out, pullback = jax.vjp(lambda x, head: ops.cross_entropy(x, head, jnp.asarray(labels), chunk), x, head)
        return *out, *pullback(cotangents)

    cotangents = (dnll.astype(np.float32), dlse_squared.astype(np.float32))
    for got, want in zip(run(x, head, cotangents), reference(x, head, labels, dnll, dlse_squared), strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [8, N])
def test_the_sum_and_its_gradients_equal_the_reference(chunk):
    x, head, labels, *_ = inputs()

    def total(x, head):
        return ops.cross_entropy_sum(x, head, jnp.asarray(labels), chunk, 0.1)

    (value, nll), (dx, dhead) = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(x, head)
    want = reference(x, head, labels, np.ones(N), np.full(N, 0.1))
    np.testing.assert_allclose(nll, want[0], rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(value, want[0].sum() + 0.1 * want[1].sum(), rtol=1e-5)
    np.testing.assert_allclose(dx, want[2], rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(dhead, want[3], rtol=1e-5, atol=2e-5)


def test_the_sum_never_computes_logits_twice():
    x, head, labels, *_ = inputs()
    program = jax.make_jaxpr(
        jax.grad(lambda x, head: ops.cross_entropy_sum(x, head, jnp.asarray(labels), 36, 0.1)[0], argnums=(0, 1))
    )(x, head)
    assert str(program).count("dot_general") == 2 * 3  # of the scan, and of the last chunk


@pytest.mark.parametrize(("on", "kernels"), [(target.TPU_V5P, True), (target.H200, False)], ids=["tpu", "gpu"])
def test_a_device_with_kernels_runs_them(on, kernels):
    shapes = jnp.zeros((256, 128), jnp.bfloat16), jnp.zeros((512, 128)), jnp.zeros(256, jnp.int32)

    def both(x, head, labels):
        nll, _ = ops.cross_entropy(x, head, labels, 64)
        return nll.sum(), jax.grad(lambda x: ops.cross_entropy_sum(x, head, labels, 64, 0.0)[0])(x)

    with target.compiling_for(on):
        program = str(jax.make_jaxpr(both)(*shapes))
    assert (program.count("pallas_call[") >= 3) == kernels
    assert ("dot_general" in program.split("pallas_call[")[0]) == (not kernels)


@pytest.mark.slow
def test_tokens_without_a_target_give_zero_and_no_gradient():
    x, head, _labels, *_ = inputs()

    def run(x, head):
        return ops.cross_entropy(x, head, jnp.full(N, -1), 8)

    out, pullback = jax.vjp(run, x, head)
    assert not np.any(out)
    assert not any(np.any(g) for g in pullback((jnp.ones(N), jnp.ones(N))))


@pytest.mark.slow
def test_bfloat16_states_give_float32_losses_and_gradients_in_the_input_dtypes():
    x, head, labels, dnll, dlse_squared = inputs(jnp.bfloat16)
    head = head.astype(jnp.bfloat16).astype(jnp.float32)
    out, pullback = jax.vjp(lambda x, head: ops.cross_entropy(x, head, jnp.asarray(labels), 8), x, head)
    want = reference(x.astype(jnp.float32), head, labels, dnll, 0 * dlse_squared)
    np.testing.assert_allclose(out[0], want[0], atol=1e-5)  # products and sums are float32: no bfloat16 loss
    dx, dhead = pullback((jnp.asarray(dnll, jnp.float32), jnp.zeros(N)))
    assert (dx.dtype, dhead.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(dx.astype(jnp.float32), want[2], atol=0.02 * np.abs(want[2]).max())
    np.testing.assert_allclose(dhead, want[3], atol=0.01 * np.abs(want[3]).max())


def test_large_logits_do_not_overflow():
    x, head, labels, *_ = inputs()
    nll, lse_squared = ops.cross_entropy(100 * x, head, jnp.asarray(labels), 8)
    want = reference(100 * x, head, labels, np.ones(N), np.ones(N))
    np.testing.assert_allclose(nll, want[0], rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(lse_squared, want[1], rtol=1e-5)


def test_only_a_chunk_of_the_logits_is_ever_held():
    """Peak memory of forward and backward for 64 chunks is an eighth of all logits."""
    n, d, v, chunk = 4096, 8, 1000, 64
    shapes = (jax.ShapeDtypeStruct((n, d), jnp.float32), jax.ShapeDtypeStruct((v, d), jnp.float32))

    def loss(x, head):
        return ops.cross_entropy(x, head, jnp.zeros(n, jnp.int32), chunk)[0].sum()

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < n * v * 4 / 8


@pytest.mark.parametrize(("chunk", "products"), [(N, 1 + 2), (N - 1, 2 * (1 + 3))])
def test_logits_of_a_single_chunk_are_not_computed_again(chunk, products):
    """Products in the program: one chunk needs three; else the scan and the last chunk each one forward, three back."""
    x, head, labels, *_ = inputs()
    program = jax.make_jaxpr(
        jax.grad(lambda x, head: ops.cross_entropy(x, head, jnp.asarray(labels), chunk)[0].sum(), argnums=(0, 1))
    )(x, head)
    assert str(program).count("dot_general") == products
