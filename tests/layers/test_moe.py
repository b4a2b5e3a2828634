"""The mixture of experts against float64 NumPy, token by token; its initial scale; its load."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from davinci_jax import layers
from davinci_jax.experiment import ModelConfig, Moe

# Compiles many programs; left out of the fast subset.
pytestmark = pytest.mark.slow

MOE = Moe(experts=8, experts_per_token=3, expert_size=12, shared_size=20, score="sigmoid", scale=1.5, bias_rate=0.1)
CONFIG = ModelConfig(
    vocab_size=64, hidden_size=16, num_layers=8, num_heads=2, num_kv_heads=1, head_size=8, mlp_size=24,
    compute_dtype="float32", init_std=0.4, moe=MOE,
)  # fmt: skip
SOFTMAX = Moe(experts=6, experts_per_token=2, expert_size=12, normalize=False)
CASES = {
    "sigmoid, bias, shared": MOE,
    "groups": dataclasses.replace(MOE, groups=4, groups_kept=2),
    "softmax": SOFTMAX,
    "threshold": dataclasses.replace(SOFTMAX, experts_per_token=4, threshold=0.22, normalize=True),
    "capacity": dataclasses.replace(SOFTMAX, capacity=1.0),
}


def build(moe):
    config = dataclasses.replace(CONFIG, moe=moe)
    layer = jax.jit(lambda key: layers.MoeMlp(config, key))(jax.random.key(0))
    if layer.balance is not None:
        layer.balance[...] = 0.3 * jax.random.normal(jax.random.key(1), layer.balance.shape)
    return layer


def reference(layer, x):
    """(y [N, D], choices [N][...], unheard choices) of tokens x [N, D], one token and one expert at a time."""
    moe = layer.config
    wide = {name: np.asarray(getattr(layer, name)[...], np.float64) for name in ("router", "expert_gate", "expert_up")}
    down = np.asarray(layer.expert_down[...], np.float64)
    bias = np.zeros(moe.experts) if layer.balance is None else np.asarray(layer.balance[...], np.float64)
    room = np.inf
    if moe.capacity is not None:
        room = np.ceil(moe.capacity * len(x) * moe.experts_per_token / moe.experts)
    taken, unheard = np.zeros(moe.experts, int), 0
    out, choices = np.zeros(x.shape), []
    for n, token in enumerate(np.asarray(x, np.float64)):
        logits = token @ wide["router"]
        scores = np.exp(logits) / np.exp(logits).sum() if moe.score == "softmax" else 1 / (1 + np.exp(-logits))
        biased = scores + bias
        if moe.groups > 1:
            parts = biased.reshape(moe.groups, -1)
            best = np.argsort(-np.sort(parts, axis=1)[:, -2:].sum(axis=1))[: moe.groups_kept]
            hidden = np.setdiff1d(np.arange(moe.groups), best)
            biased = np.where(np.isin(np.arange(moe.experts) // parts.shape[1], hidden), -np.inf, biased)
        chosen = np.argsort(-biased)[: moe.experts_per_token]
        if moe.threshold is not None:
            chosen = [e for e in chosen if biased[e] >= moe.threshold]
        choices.append(chosen)
        total = sum(scores[e] for e in chosen) if moe.normalize else 1.0
        for e in chosen:
            taken[e] += 1
            if taken[e] > room:
                unheard += 1
                continue
            gate = token @ wide["expert_gate"][e]
            hidden = gate / (1 + np.exp(-gate)) * (token @ wide["expert_up"][e])
            out[n] += moe.scale * scores[e] / total * (hidden @ down[e])
    if layer.shared is not None:
        gate, up, last = (np.asarray(getattr(layer.shared, n)[...], np.float64) for n in ("gate", "up", "down"))
        x = np.asarray(x, np.float64)
        out += (x @ gate / (1 + np.exp(-(x @ gate))) * (x @ up)) @ last
    return out, choices, unheard


@pytest.mark.parametrize("name", CASES)
def test_output_and_load_equal_the_reference(name):
    layer = build(CASES[name])
    x = np.random.default_rng(0).normal(size=(2, 15, 16)).astype(np.float32)
    y, load = jax.jit(lambda layer, x: layer(x, training=True))(layer, x)
    want, choices, unheard = reference(layer, x.reshape(30, 16))
    np.testing.assert_allclose(np.asarray(y).reshape(30, 16), want, atol=2e-5, rtol=1e-5)
    counts = np.bincount(np.concatenate(choices).astype(int), minlength=layer.config.experts)
    np.testing.assert_array_equal(load.counts, counts)
    assert int(load.dropped) == unheard
    if name == "capacity":
        assert unheard > 0
        assert int(jax.jit(layer)(jnp.asarray(x))[1].dropped) == 0  # not in training: nothing is dropped
    if name == "threshold":
        assert len({len(chosen) for chosen in choices}) > 1


def test_gradients_reach_the_router_and_the_experts_and_not_the_bias():
    """Along a random direction in every parameter, against differences of the float64 reference."""
    layer, rng = build(dataclasses.replace(MOE, aux_loss=0.0)), np.random.default_rng(1)
    x = rng.normal(size=(1, 12, 16)).astype(np.float32)
    weight = rng.normal(size=(12, 16))
    gradients = jax.jit(jax.grad(lambda layer: jnp.sum(layer(jnp.asarray(x))[0][0] * weight)))(layer)
    leaves, structure = jax.tree.flatten(layer)
    for i, (path, gradient) in enumerate(jax.tree_util.tree_leaves_with_path(gradients)):
        if "balance" in jax.tree_util.keystr(path):
            np.testing.assert_array_equal(gradient, 0)
            continue
        step = 1e-3 * rng.normal(size=gradient.shape)
        values = [
            (reference(structure.unflatten([*leaves[:i], leaves[i] + sign * step, *leaves[i + 1 :]]), x[0])[0] * weight)
            for sign in (1, -1)
        ]
        change, slope = (values[0] - values[1]).sum() / 2, (np.asarray(gradient) * step).sum()
        scale = np.linalg.norm(gradient) * np.linalg.norm(step) / gradient.size**0.5
        assert scale > 0
        assert abs(slope - change) < 0.02 * scale, jax.tree_util.keystr(path)


def test_losses_of_the_router_equal_their_formulas():
    layer = build(MOE)
    x = np.random.default_rng(2).normal(size=(2, 9, 16)).astype(np.float32)
    _, load = jax.jit(layer)(jnp.asarray(x))
    logits = x.reshape(18, 16).astype(np.float64) @ np.asarray(layer.router[...], np.float64)
    scores = 1 / (1 + np.exp(-logits))
    share = np.asarray(load.counts) / (18 * 3)
    wanted = 8 * (share * (scores / scores.sum(1, keepdims=True)).mean(0)).sum()
    np.testing.assert_allclose(load.balance_loss, wanted, rtol=1e-5)
    np.testing.assert_allclose(load.z_loss, (np.log(np.exp(logits).sum(1)) ** 2).mean(), rtol=1e-5)


def test_the_router_stays_in_float32():
    """In bfloat16 the input is rounded and nothing after it: the choice is that of exact scores of what was given."""
    layer = build(SOFTMAX)
    x = jnp.asarray(np.random.default_rng(3).normal(size=(1, 400, 16)), jnp.bfloat16)
    y, load = jax.jit(layer)(x)
    assert y.dtype == jnp.bfloat16
    _, choices, _ = reference(layer, np.asarray(x[0], np.float32))
    np.testing.assert_array_equal(load.counts, np.bincount(np.concatenate(choices), minlength=6))


@pytest.mark.parametrize(
    ("name", "shape", "std"),
    [
        ("router", (16, 8), 0.4),
        ("expert_gate", (8, 16, 12), 0.4),
        ("expert_up", (8, 16, 12), 0.4),
        ("expert_down", (8, 12, 16), 0.4 / 4),  # sqrt(2 * 8 layers) = 4
        ("shared.gate", (16, 20), 0.4),
        ("shared.down", (20, 16), 0.4 / 4),
    ],
)
def test_matrices_begin_normal_with_the_stated_scale(name, shape, std):
    layer = layers.MoeMlp(CONFIG, jax.random.key(5))
    module, _, leaf = name.rpartition(".")
    value = np.asarray(getattr(getattr(layer, module) if module else layer, leaf)[...])
    assert (value.shape, value.dtype) == (shape, np.float32)
    assert abs(value.std() / std - 1) < 5 / (2 * value.size) ** 0.5
    np.testing.assert_array_equal(layer.balance[...], np.zeros(8))


def test_no_two_experts_begin_alike():
    layer = layers.MoeMlp(CONFIG, jax.random.key(6))
    flat = [np.asarray(w[...])[e].ravel() for w in (layer.expert_gate, layer.expert_up) for e in range(8)]
    assert np.abs(np.corrcoef(flat) - np.eye(16)).max() < 0.5
