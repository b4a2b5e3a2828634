"""linear_cross_entropy in XLA against float64 NumPy: losses, all gradients, masks, chunks, meshes, vmap."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cross_entropy_reference import inputs, loss_and_gradients, reference
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import supported, target
from pallas_kernels.errors import ArgumentError, UnsupportedError
from pallas_kernels.kernels.cross_entropy import TpuCrossEntropyConfig, XlaCrossEntropyConfig, linear_cross_entropy
from pallas_kernels.kernels.cross_entropy.xla import tokens_per_chunk

N, D, V = 37, 12, 50


def close(got, want, tolerance=2e-5):
    want = np.asarray(want)
    np.testing.assert_allclose(
        np.asarray(got, np.float64), want, rtol=tolerance, atol=tolerance * max(np.abs(want).max(initial=0), 1e-2)
    )


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("config", [None, XlaCrossEntropyConfig(8), XlaCrossEntropyConfig(36)])
def test_reduced_losses_and_gradients_equal_the_reference(reduction, config):
    x, w, labels = inputs(N, D, V)

    def run(x, w):
        return linear_cross_entropy(
            x, w, jnp.asarray(labels), z_loss=0.01, soft_cap=2.0, reduction=reduction, config=config
        )

    (loss, aux), grads = jax.jit(jax.value_and_grad(run, argnums=(0, 1), has_aux=True))(x, w)
    for got, want in zip((loss, *aux, *grads), loss_and_gradients(x, w, labels, 0.01, 2.0, reduction), strict=True):
        assert got.dtype == jnp.float32
        close(got, want)
    close(jax.jit(run)(x, w)[0], loss)  # computed otherwise when nothing is differentiated


@pytest.mark.slow
@settings(max_examples=5, deadline=None)
@given(
    tokens=st.sampled_from([0, 1, 13]),
    chunk=st.sampled_from([None, 4]),
    soft_cap=st.sampled_from([None, 1.5]),
    reduction=st.sampled_from(["none", "mean"]),
    seed=st.integers(0, 100),
)
def test_log_probs_and_lse_have_gradients_of_their_own(tokens, chunk, soft_cap, reduction, seed):
    x, w, labels = inputs(tokens, D, V, seed, scale=3.0)
    rng = np.random.default_rng(seed)
    cotangents = [rng.normal(size=tokens).astype(np.float32) for _ in range(2)]

    def run(x, w):
        config = None if chunk is None else XlaCrossEntropyConfig(chunk)
        return linear_cross_entropy(x, w, labels, soft_cap=soft_cap, reduction=reduction, config=config)[1]

    @jax.jit
    def pull(x, w):
        aux, pullback = jax.vjp(run, x, w)
        return *aux, *pullback(type(aux)(*cotangents))

    for got, want in zip(pull(x, w), reference(x, w, labels, *cotangents, soft_cap), strict=True):
        close(got, want)


@pytest.mark.slow
def test_a_loss_and_its_log_probs_may_be_differentiated_together():
    x, w, labels = inputs(N, D, V)

    def run(x, w):
        loss, aux = linear_cross_entropy(x, w, labels, reduction="sum", config=XlaCrossEntropyConfig(8))
        return loss - 2 * aux.log_probs.sum() + aux.lse.sum()

    ones = np.ones(N)
    for got, want in zip(
        jax.jit(jax.grad(run, argnums=(0, 1)))(x, w), reference(x, w, labels, -3 * ones, ones)[2:], strict=True
    ):
        close(got, want)


def test_masked_tokens_count_neither_in_the_loss_nor_in_the_mean():
    x, w, labels = inputs(N, D, V)
    mask = np.arange(N) % 3 > 0
    x[~mask] = 1e4  # exp of their logits overflows

    def run(x, w):
        return linear_cross_entropy(x, w, labels, label_mask=jnp.asarray(mask), z_loss=0.1)[0]

    got = jax.jit(jax.value_and_grad(run, argnums=(0, 1)))(x, w)
    want = loss_and_gradients(np.where(mask[:, None], x, 0), w, np.where(mask, labels, -1), 0.1)
    close(got[0], want[0])
    close(got[1][1], want[4])
    assert not np.any(got[1][0][~mask])


def test_no_counted_token_gives_zero():
    x, w, _ = inputs(N, D, V)
    loss, grads = jax.value_and_grad(lambda x, w: linear_cross_entropy(x, w, np.full(N, -1))[0], (0, 1))(x, w)
    assert loss == 0
    assert not any(np.any(g) for g in grads)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_gives_float32_losses_and_an_unrounded_head_gradient(dtype):
    x, w, labels = inputs(N, D, V)
    x, w = jnp.asarray(x, dtype), jnp.asarray(w, dtype).astype(jnp.float32)
    loss, (dx, dw) = jax.jit(jax.value_and_grad(lambda x, w: linear_cross_entropy(x, w, labels)[0], (0, 1)))(x, w)
    want = loss_and_gradients(x.astype(jnp.float32), w, labels)
    assert (loss.dtype, dx.dtype, dw.dtype) == (jnp.float32, dtype, jnp.float32)
    close(loss, want[0], 1e-5)  # products and sums are float32: no rounding of the loss
    close(dx.astype(jnp.float32), want[3], 0.02)
    close(dw, want[4], 0.02)


@pytest.mark.slow
def test_small_gradients_of_a_mean_survive_float16():
    """Divided by the number of tokens before it is rounded, the gradient of a logit would be 0 in float16."""
    x, w = np.ones((4096, 2), np.float16), np.zeros((3000, 2), np.float32)
    dw = jax.jit(jax.grad(lambda w: linear_cross_entropy(x, w, np.zeros(4096, np.int32))[0]))(w)
    close(dw[1:], np.full((2999, 2), 1 / 3000), 1e-2)


@pytest.mark.slow
def test_logits_of_all_tokens_are_never_held():
    shapes = jax.ShapeDtypeStruct((4096, 8), jnp.float32), jax.ShapeDtypeStruct((1000, 8), jnp.float32)
    labels = jnp.zeros(4096, jnp.int32)
    for reduction in ("mean", "none"):

        def loss(x, w, reduction=reduction):
            return linear_cross_entropy(x, w, labels, reduction=reduction, config=XlaCrossEntropyConfig(64))[0].mean()

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*shapes).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < 4096 * 1000 * 4 / 8


def test_chunks_hold_no_more_than_the_gradient_of_the_head():
    for tokens, hidden, vocabulary in ((32768, 2048, 151936), (10**6, 8192, 256000), (100, 64, 1000), (0, 8, 8)):
        chunk = tokens_per_chunk(tokens, hidden, vocabulary)
        assert 1 <= chunk <= max(tokens, 1)
        assert chunk * vocabulary * 4 <= max(vocabulary * hidden * 4, 2**28)
    assert tokens_per_chunk(32768, 2048, 151936) == 2048


def products(reduction, chunk):
    x, w, labels = inputs(N, D, V)

    def loss(x, w):
        return linear_cross_entropy(x, w, labels, reduction=reduction, config=XlaCrossEntropyConfig(chunk))[0].sum()

    return str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(x, w)).count("dot_general")


def test_a_reduced_loss_takes_three_products_a_chunk():
    assert products("mean", N) == 3
    assert products("mean", 8) == 2 * 3  # one scan, and the last chunk
    assert products("none", N) == 3
    assert products("none", 8) == 2 * 4


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_tokens_divided_over_a_mesh(axis_type, reduction):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(axis_type,) * 2)
    x, w, labels = inputs(4 * 6, D, V)
    want = loss_and_gradients(x, w, labels)
    divided = NamedSharding(mesh, P("a", "b"))
    with jax.set_mesh(mesh):

        def loss(x, w, labels):
            losses = linear_cross_entropy(x, w, labels, reduction=reduction, config=XlaCrossEntropyConfig(2))[0]
            return losses if reduction == "mean" else losses.sum() / (labels >= 0).sum()

        args = (
            jax.device_put(x.reshape(4, 6, D), divided),
            jnp.asarray(w),
            jax.device_put(labels.reshape(4, 6), divided),
        )
        run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        value, (dx, dw) = run(*args)
        assert "all-gather" not in run.lower(*args).compile().as_text()
    close(value, want[0])
    close(dx.reshape(-1, D), want[3])
    close(dw, want[4])


@pytest.mark.parametrize("others", [None, AxisType.Explicit, AxisType.Auto])
def test_inside_shard_map(others):
    """Over all axes of the mesh, and where it leaves one to the arrays' types or to the partitioner."""
    sizes, names = ((8,), ("a",)) if others is None else ((4, 2), ("a", "b"))
    mesh = jax.make_mesh(sizes, names, axis_types=(others or AxisType.Auto,) * len(names))
    x, w, labels = inputs(24, D, V)

    def local(x, w, labels):
        loss, _ = linear_cross_entropy(x, w, labels, z_loss=0.1, reduction="sum", config=XlaCrossEntropyConfig(2))
        return jax.lax.psum(loss, "a")

    run = jax.shard_map(local, in_specs=(P("a"), P(), P("a")), out_specs=P(), axis_names={"a"})
    with jax.set_mesh(mesh):
        divided = NamedSharding(mesh, P("a"))
        arrays = jax.device_put(x, divided), jnp.asarray(w), jax.device_put(labels, divided)
        value, grads = jax.jit(jax.value_and_grad(run, argnums=(0, 1)))(*arrays)
    want = loss_and_gradients(x, w, labels, 0.1, reduction="sum")
    for got, expected in zip((value, *grads), (want[0], *want[3:]), strict=True):
        close(got, expected)


@pytest.mark.slow
def test_vmap_over_tokens_and_over_heads():
    x, w, labels = inputs(2 * N, D, V)
    x, labels, heads = (jnp.asarray(a) for a in (x.reshape(2, N, D), labels.reshape(2, N), np.stack((w, 2 * w))))
    w = jnp.asarray(w)

    def grad(x, w, labels):
        return jax.grad(lambda x, w: linear_cross_entropy(x, w, labels)[0], argnums=(0, 1))(x, w)

    for axes, pick in (((0, None, 0), lambda n: w), ((0, 0, 0), lambda n: heads[n])):
        got = jax.vmap(grad, axes)(x, w if axes[1] is None else heads, labels)
        for n in range(2):
            want = loss_and_gradients(x[n], pick(n), labels[n])
            close(got[0][n], want[3])
            close(got[1][n], want[4])
    forward = jax.make_jaxpr(jax.vmap(lambda x, labels: linear_cross_entropy(x, w, labels)[0]))(x, labels)
    assert str(forward).count("dot_general") == 1  # one product of all tokens, not one for each element


def test_remat_policies_can_keep_the_gradients():
    x, w, labels = inputs(N, D, V)

    def count(*names):
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        loss = jax.checkpoint(lambda x, w: linear_cross_entropy(x, w, labels)[0], policy=policy)
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(x, w).as_text().count("dot_general")

    assert count("cross_entropy_dx", "cross_entropy_dw") == 3
    assert count() == 6


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"x": [[1.0]]}, "x"),
        ({"w": None}, "w"),
        ({"w": np.zeros((V, D + 1), np.float32)}, "w"),
        ({"w": np.zeros((V, D), np.int32)}, "w"),
        ({"x": np.zeros((N, D), np.int32)}, "x"),
        ({"x": np.zeros(D, np.float32)}, "x"),
        ({"labels": np.zeros(N - 1, np.int32)}, "labels"),
        ({"labels": np.zeros(N, np.float32)}, "labels"),
        ({"label_mask": np.zeros(N, np.int32)}, "label_mask"),
        ({"z_loss": -1.0}, "z_loss"),
        ({"soft_cap": 0.0}, "soft_cap"),
        ({"reduction": "max"}, "reduction"),
        ({"backend": "cuda"}, "backend"),
        ({"config": XlaCrossEntropyConfig(0)}, "config"),
        ({"config": XlaCrossEntropyConfig(2.5)}, "config"),
        ({"config": TpuCrossEntropyConfig(24, 8, 128, 16, 128)}, "config"),
        ({"config": TpuCrossEntropyConfig(16, 8, 100, 16, 128)}, "config"),
        ({"config": 8}, "config"),
        ({"labels": np.full(N, V, np.int32)}, "labels"),
        ({"labels": "none"}, "labels"),
        ({"z_loss": "1"}, "z_loss"),
        ({"backend": "xla", "config": TpuCrossEntropyConfig(8, 8, 128, 8, 128)}, "config"),
    ],
)
def test_bad_arguments_are_named(change, argument):
    x, w, labels = inputs(N, D, V)
    with pytest.raises(ArgumentError) as error:
        linear_cross_entropy(**({"x": x, "w": w, "labels": labels} | change))
    assert error.value.argument == argument


def test_numbers_of_numpy_and_lists_of_labels():
    x, w, labels = inputs(N, D, V)
    options = {"z_loss": np.float32(0.125), "soft_cap": np.float32(2.0)}
    loss = linear_cross_entropy(x, w, jnp.asarray(labels), **options)[0]
    close(loss, loss_and_gradients(x, w, labels, 0.125, 2.0)[0])
    assert linear_cross_entropy(x, w, labels.tolist(), **options)[0] == loss


def test_a_masked_label_may_be_any():
    x, w, labels = inputs(N, D, V)
    mask = np.arange(N) > 3
    given = np.where(mask, labels, V).astype(np.int32)
    close(
        linear_cross_entropy(x, w, given, label_mask=mask)[0],
        loss_and_gradients(x, w, np.where(mask, labels, -1))[0],
    )


def test_a_head_divided_over_explicit_axes():
    """As FSDP and tensor parallelism divide it, with tokens over one of the axes too, and labels over none."""
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    x, w, labels = inputs(24, D, V)
    want = loss_and_gradients(x, w, labels)
    with jax.set_mesh(mesh):
        x, w = (
            jax.device_put(array, NamedSharding(mesh, spec)) for array, spec in ((x, P("a", "b")), (w, P("b", "a")))
        )
        run = jax.jit(jax.value_and_grad(lambda x, w: linear_cross_entropy(x, w, labels)[0], argnums=(0, 1)))
        value, (dx, dw) = run(x, w)
    assert (dx.sharding.spec, dw.sharding.spec) == (x.sharding.spec, w.sharding.spec)
    for got, expected in zip((value, dx, dw), (want[0], *want[3:]), strict=True):
        close(got, expected)


def test_generations_without_a_kernel_take_xla():
    x, w, labels = inputs(N, 128, 256)
    run = jax.jit(lambda x: linear_cross_entropy(x, w, labels)[0])
    with target.compiling_for(target.Target("tpu", "TPU v4", 2)):
        assert supported(linear_cross_entropy, x, w, labels) == "there is no kernel for TPU v4"
        assert "cross_entropy_logits" not in str(jax.make_jaxpr(run)(x))
    with target.compiling_for(target.TPU_V6E):
        assert "cross_entropy_logits" in str(jax.make_jaxpr(run)(x))


def test_a_kernel_that_is_not_there_is_an_error_that_names_the_fallback():
    x, w, labels = inputs(N, D, V)
    with pytest.raises(UnsupportedError, match="xla"):
        linear_cross_entropy(x, w, labels, backend="pallas")
