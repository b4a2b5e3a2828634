"""The TPU kernels in the interpreter against float64 NumPy: ragged blocks, two cores, races."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cross_entropy_reference import inputs, loss_and_gradients, reference
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import target
from pallas_kernels.errors import UnsupportedError
from pallas_kernels.kernels.cross_entropy import TpuCrossEntropyConfig, XlaCrossEntropyConfig, linear_cross_entropy, tpu

CONFIG = TpuCrossEntropyConfig(
    chunk=16, forward_tokens=16, forward_vocabulary=128, backward_tokens=8, backward_vocabulary=128
)
D = 128


def interpreting(chosen=target.TPU_V5P, races=False):
    # Memory that is not an array's holds NaN: it must not reach a result.
    params = pltpu.InterpretParams(
        detect_races=races, num_cores_or_threads=chosen.cores, out_of_bounds_reads="uninitialized"
    )
    return target.interpreting(chosen, params)


def close(got, want, tolerance=2e-5):
    want = np.asarray(want)
    np.testing.assert_allclose(
        np.asarray(got, np.float64), want, rtol=tolerance, atol=tolerance * max(np.abs(want).max(), 1e-2)
    )


@pytest.mark.slow
def test_loss_and_gradients_on_two_cores_without_races():
    """Three blocks of ids on two cores, the last one ragged; two chunks of tokens, the last one shorter."""
    x, w, labels = inputs(21, D, 300)
    with interpreting(races=True):
        (loss, aux), grads = jax.value_and_grad(
            lambda x, w: linear_cross_entropy(x, w, labels, z_loss=0.1, soft_cap=2.0, config=CONFIG),
            argnums=(0, 1),
            has_aux=True,
        )(x, w)
    assert not interpret_pallas_call.races.races_found
    for got, want in zip((loss, *aux, *grads), loss_and_gradients(x, w, labels, 0.1, 2.0), strict=True):
        close(got, want)


@pytest.mark.slow
def test_forward_alone_streams_all_tokens():
    x, w, labels = inputs(21, D, 300, scale=5.0)
    with interpreting():
        program = jax.make_jaxpr(lambda x: linear_cross_entropy(x, w, labels, config=CONFIG))(x)
        loss, aux = linear_cross_entropy(x, w, labels, config=CONFIG)
    assert str(program).count("scan[") == 0
    want = loss_and_gradients(x, w, labels)
    for got, expected in zip((loss, *aux), want[:3], strict=True):
        close(got, expected)


@pytest.mark.slow
def test_cotangents_by_token_in_bfloat16():
    x, w, labels = inputs(16, D, 256)
    x, w = (jnp.asarray(a, jnp.bfloat16) for a in (x, w))
    rng = np.random.default_rng(1)
    cotangents = [jnp.asarray(rng.normal(size=16), jnp.float32) for _ in range(2)]
    with interpreting(target.TPU_V6E):
        run = lambda x, w: linear_cross_entropy(x, w, labels, reduction="none", config=CONFIG)[1]  # noqa: E731
        aux, pullback = jax.vjp(run, x, w)
        grads = pullback(type(aux)(*cotangents))
    assert [g.dtype for g in grads] == [jnp.bfloat16] * 2
    want = reference(x.astype(jnp.float32), w.astype(jnp.float32), labels, *cotangents)
    for got, expected, tolerance in zip((*aux, *grads), want, (1e-5, 1e-5, 0.02, 0.02), strict=True):
        close(got.astype(jnp.float32), expected, tolerance)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("tokens", "vocabulary"), [(1, 515), (16, 200), (24, 128), (39, 384)])
def test_any_number_of_tokens_and_ids(tokens, vocabulary):
    x, w, labels = inputs(tokens, D, vocabulary, seed=tokens)
    with interpreting():
        loss, grads = jax.value_and_grad(
            lambda x, w: linear_cross_entropy(x, w, labels, config=CONFIG)[0], argnums=(0, 1)
        )(x, w)
    want = loss_and_gradients(x, w, labels)
    for got, expected in zip((loss, *grads), (want[0], *want[3:]), strict=True):
        close(got, expected)


@pytest.mark.parametrize(
    ("dtype", "hidden", "vocabulary", "reason"),
    [
        (jnp.float16, 128, 512, "float16"),
        (jnp.bfloat16, 100, 512, "multiple of 128"),
        (jnp.bfloat16, 128, 100, "smaller"),
        (jnp.float32, 2**17, 512, "VMEM"),
    ],
)
def test_cases_without_a_kernel_fall_back_unless_it_is_asked_for(dtype, hidden, vocabulary, reason):
    x, w = jax.ShapeDtypeStruct((8, hidden), dtype), jax.ShapeDtypeStruct((vocabulary, hidden), dtype)

    def trace(backend):
        return jax.eval_shape(lambda x, w: linear_cross_entropy(x, w, jnp.zeros(8, int), backend=backend), x, w)

    with interpreting():
        with pytest.raises(UnsupportedError, match=reason):
            trace("pallas")
        trace("auto")


def test_auto_takes_the_kernels_on_tpu_and_an_xla_config_does_not():
    x, w, labels = inputs(8, D, 256)
    with interpreting():
        for config, kernels in ((None, True), (XlaCrossEntropyConfig(4), False)):
            program = jax.make_jaxpr(lambda x, c=config: linear_cross_entropy(x, w, labels, config=c)[0])(x)
            assert ("cross_entropy_logits" in str(program)) == kernels


def test_blocks_shrink_until_they_fit():
    with interpreting():
        for hidden in (128, 2048, 4096, 8192):
            config = tpu.fit(tpu.DEFAULT, hidden, 2)
            assert config.chunk % config.backward_tokens == 0
            assert config.backward_vocabulary % 128 == 0
        assert tpu.fit(tpu.DEFAULT, 8192, 2) != tpu.DEFAULT
