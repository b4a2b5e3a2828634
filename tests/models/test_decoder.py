"""The decoder against a float64 NumPy forward pass, and what causality and packing promise."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from davinci_jax import sharding
from davinci_jax.errors import ConfigError
from davinci_jax.experiment import MeshConfig, ModelConfig, RopeScaling
from davinci_jax.models import decoder as decoders

# Compiles many programs; left out of the fast subset.
pytestmark = pytest.mark.slow

CONFIG = ModelConfig(
    vocab_size=80,
    hidden_size=32,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_size=8,
    mlp_size=48,
    init_std=0.3,
    compute_dtype="float32",
    remat="none",
    loss_chunk=20,
)
UNTIED = dataclasses.replace(
    CONFIG, tied_embeddings=False, qkv_bias=False, rope_scaling=RopeScaling(factor=4.0, original_max_positions=16)
)


@pytest.fixture(autouse=True)
def mesh():
    with jax.set_mesh(sharding.make_mesh(MeshConfig(), jax.devices()[:1])) as mesh:
        yield mesh


@functools.cache
def build(config):
    model = decoders.build(config, jax.random.key(1))
    if config.qkv_bias:  # zeros at the start: give them values, or a wrong bias would go unseen
        for i, name in enumerate(("q_bias", "k_bias", "v_bias")):
            bias = getattr(model.blocks.attention, name)
            bias[...] = jax.random.normal(jax.random.key(i), bias.shape)
    return model


def packed(batch=2, length=24, seed=0):
    """Rows of three documents: tokens, labels, segment ids and positions."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 80, (batch, length))
    segments = np.repeat([[1, 2, 3]], batch, 0).repeat([7, 11, 6], axis=1)
    positions = np.concatenate([np.arange(7), np.arange(11), np.arange(6)])[None].repeat(batch, 0)
    labels = np.where(np.roll(segments, -1, 1) == segments, np.roll(tokens, -1, 1), -1)
    return tuple(jnp.asarray(x, jnp.int32) for x in (tokens, labels, segments, positions))


def reference_logits(model, tokens, segments, positions):
    """The forward pass in float64 NumPy, one layer at a time, keys repeated for their query heads."""
    c = model.config

    def wide(p):
        return np.asarray(p[...], np.float64)

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_eps) * scale

    frequencies = c.rope_base ** (-np.arange(0, c.head_size, 2) / c.head_size)
    if c.rope_scaling is not None:
        s, waves = c.rope_scaling, 2 * np.pi / frequencies
        smooth = (s.original_max_positions / waves - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
        smooth = np.where(waves > s.original_max_positions / s.low_freq_factor, 0, smooth)
        smooth = np.where(waves < s.original_max_positions / s.high_freq_factor, 1, smooth)
        frequencies = (1 - smooth) * frequencies / s.factor + smooth * frequencies
    angle = np.asarray(positions)[:, :, None, None] * frequencies

    def turn(x):
        a, b = np.split(x, 2, -1)
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)

    mask = (np.asarray(segments)[:, :, None] == np.asarray(segments)[:, None]) & np.tri(tokens.shape[1], dtype=bool)
    x, att, mlp = wide(model.embed)[np.asarray(tokens)], model.blocks.attention, model.blocks.mlp
    for layer in range(c.num_layers):
        y = norm(x, wide(model.blocks.attention_norm.scale)[layer])
        q, k, v = (np.einsum("btd,dhk->bthk", y, wide(p)[layer]) for p in (att.q_proj, att.k_proj, att.v_proj))
        if c.qkv_bias:
            q, k, v = (y + wide(p)[layer] for y, p in ((q, att.q_bias), (k, att.k_bias), (v, att.v_bias)))
        k, v = (np.repeat(y, c.num_heads // c.num_kv_heads, axis=2) for y in (turn(k), v))
        scores = np.einsum("bthk,bshk->bhts", turn(q), k) / np.sqrt(c.head_size)
        weights = np.exp(np.where(mask[:, None], scores, -np.inf) - scores.max(-1, keepdims=True))
        y = np.einsum("bhts,bshk->bthk", weights / weights.sum(-1, keepdims=True), v)
        x = x + np.einsum("bthk,hkd->btd", y, wide(att.o_proj)[layer])
        y = norm(x, wide(model.blocks.mlp_norm.scale)[layer])
        gate = y @ wide(mlp.gate)[layer]
        x = x + (gate / (1 + np.exp(-gate)) * (y @ wide(mlp.up)[layer])) @ wide(mlp.down)[layer]
    head = wide(model.embed).T if model.head is None else wide(model.head)
    return norm(x, wide(model.final_norm.scale)) @ head


@pytest.mark.parametrize("config", [CONFIG, UNTIED], ids=["tied_bias", "untied_scaled"])
def test_logits_and_losses_equal_the_reference(config):
    model, (tokens, labels, segments, positions) = build(config), packed()
    want = reference_logits(model, tokens, segments, positions)
    logits = jax.jit(decoders.Decoder.logits)(model, tokens, segments, positions)
    np.testing.assert_allclose(logits, want, atol=2e-4, rtol=1e-4)
    nll, lse_squared = jax.jit(decoders.token_losses)(model, tokens, labels, segments, positions)
    lse = np.log(np.exp(want).sum(-1))
    valid = np.asarray(labels) >= 0
    picked = np.take_along_axis(want, np.maximum(labels, 0)[..., None], -1)[..., 0]
    np.testing.assert_allclose(nll, np.where(valid, lse - picked, 0), atol=2e-4, rtol=1e-4)
    np.testing.assert_allclose(lse_squared, np.where(valid, lse**2, 0), atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("config", [CONFIG, UNTIED], ids=["tied_bias", "untied_scaled"])
def test_gradients_equal_finite_differences_of_the_reference(config):
    """Along a random direction in each parameter, in float64: every backward pass written by hand takes part."""
    model, (tokens, labels, segments, positions) = build(config), packed()
    valid = np.asarray(labels) >= 0

    def reference_loss(model):
        logits = reference_logits(model, tokens, segments, positions)
        lse = np.log(np.exp(logits).sum(-1))
        picked = np.take_along_axis(logits, np.maximum(labels, 0)[..., None], -1)[..., 0]
        return ((lse - picked + 0.1 * lse**2) * valid).sum() / valid.sum()

    def loss(model):
        nll, lse_squared = decoders.token_losses(model, tokens, labels, segments, positions)
        return (nll + 0.1 * lse_squared).sum() / valid.sum()

    gradients = jax.tree.leaves(jax.jit(jax.grad(loss))(model))
    leaves, structure = jax.tree.flatten(model)
    rng = np.random.default_rng(0)
    for i, (leaf, gradient) in enumerate(zip(leaves, gradients, strict=True)):
        step = 1e-4 * rng.normal(size=leaf.shape)
        up, down = (np.asarray(leaf + sign * step, np.float32) for sign in (1, -1))
        moved = [structure.unflatten([*leaves[:i], jnp.asarray(x), *leaves[i + 1 :]]) for x in (up, down)]
        change = reference_loss(moved[0]) - reference_loss(moved[1])
        difference = np.asarray(up, np.float64) - down
        slope = (np.asarray(gradient, np.float64) * difference).sum()
        scale = np.linalg.norm(gradient) * np.linalg.norm(difference) / leaf.size**0.5
        assert abs(slope - change) < 2e-3 * scale, leaf.shape


def test_bfloat16_compute_stays_near_the_reference():
    config = dataclasses.replace(CONFIG, compute_dtype="bfloat16", init_std=0.1)
    model, (tokens, labels, segments, positions) = build(config), packed()
    want = reference_logits(model, tokens, segments, positions)
    logits = jax.jit(decoders.Decoder.logits)(model, tokens, segments, positions)
    assert logits.dtype == jnp.float32
    assert np.abs(logits - want).max() < 0.03 * np.abs(want).max()

    def loss(model):
        nll, _ = decoders.token_losses(model, tokens, labels, segments, positions)
        return nll.mean(), nll

    grads, nll = jax.eval_shape(jax.grad(loss, has_aux=True), model)
    assert {leaf.dtype for leaf in jax.tree.leaves((grads, nll))} == {jnp.dtype(jnp.float32)}


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", "save_mlp", "save_attention"])
def test_remat_changes_no_gradient(remat):
    tokens, labels, segments, positions = packed()
    model = build(CONFIG)

    def gradients(policy):
        def loss(leaves):
            again = jax.tree.unflatten(jax.tree.structure(build(policy)), leaves)
            return decoders.token_losses(again, tokens, labels, segments, positions)[0].mean()

        return jax.jit(jax.grad(loss))(jax.tree.leaves(model))

    other = gradients(dataclasses.replace(CONFIG, remat=remat))
    for got, want in zip(other, gradients(CONFIG), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6, rtol=1e-5)


def test_remat_policies_keep_what_they_say():
    """Bytes saved per layer and token, in units of a float32: full keeps x, the others what their names promise."""
    tokens, labels, segments, positions = packed()
    qkv_and_out, mid, mlp_in, lse = (4 + 2 + 2 + 4) * 8, 32, 2 * 48, 4
    expected = {"full": 32, "save_attention": 32 + qkv_and_out + lse, "save_mlp": 32 + qkv_and_out + lse + mid + mlp_in}
    for remat, per_token in expected.items():
        model = build(dataclasses.replace(CONFIG, remat=remat))

        def loss(model):
            return decoders.token_losses(model, tokens, labels, segments, positions)[0].sum()

        residuals = jax.tree.leaves(jax.eval_shape(lambda model, loss=loss: jax.vjp(loss, model)[1], model))
        stacked = [x for x in residuals if x.ndim > 2 and x.shape[0] == 3 and x.size % tokens.size == 0]
        parameters = {leaf.shape for leaf in jax.tree.leaves(model)}
        assert sum(x.size for x in stacked if x.shape not in parameters) == 3 * tokens.size * per_token, remat


def test_later_tokens_change_no_earlier_logits():
    model, (tokens, _, _, _) = build(CONFIG), packed()
    ones, positions = jnp.ones_like(tokens), jnp.broadcast_to(jnp.arange(24), (2, 24))
    run = jax.jit(lambda tokens: model.logits(tokens, ones, positions))
    first, second = run(tokens), run(tokens.at[:, 13].add(1))
    np.testing.assert_array_equal(first[:, :13], second[:, :13])
    assert np.abs(first - second)[:, 13:].max(-1).min() > 1e-4  # every later token notices


def test_documents_in_a_row_do_not_see_each_other():
    model, (tokens, _, segments, positions) = build(CONFIG), packed()
    run = jax.jit(model.logits)
    first = run(tokens, segments, positions)
    second = run(jnp.where(segments == 2, (tokens + 1) % 80, tokens), segments, positions)
    outside = np.asarray(segments) != 2
    np.testing.assert_array_equal(np.asarray(first)[outside], np.asarray(second)[outside])
    alone = run(tokens[:, 7:18], jnp.ones((2, 11), jnp.int32), positions[:, 7:18])
    np.testing.assert_allclose(first[:, 7:18], alone, atol=1e-4)  # packing equals being alone


def test_initialisation_is_scaled_as_stated():
    config = dataclasses.replace(CONFIG, init_std=0.02, tied_embeddings=False, vocab_size=800)
    model = decoders.build(config, jax.random.key(0))
    assert np.std(model.embed[...]) == pytest.approx(0.02, rel=0.03)
    assert np.std(model.head[...]) == pytest.approx(0.02, rel=0.03)
    for layer in range(3):
        assert np.std(model.blocks.mlp.gate[layer]) == pytest.approx(0.02, rel=0.1)
        assert np.std(model.blocks.mlp.down[layer]) == pytest.approx(0.02 / 6**0.5, rel=0.1)
    first, second = np.asarray(model.blocks.mlp.gate[:2])
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.1


def test_axes_that_do_not_divide_are_named():
    config = dataclasses.replace(CONFIG, hidden_size=36)
    with jax.set_mesh(sharding.make_mesh(MeshConfig())), pytest.raises(ConfigError, match=r"model.hidden_size = 36.*8"):
        decoders.build(config, jax.random.key(0))
