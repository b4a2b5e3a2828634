"""Routing in XLA's operations. Places are counted: an expert's first plus the earlier tokens of that expert."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import layout, target
from pallas_kernels.kernels.routing.spec import RoutingSpec


def scores(logits: jax.Array, spec: RoutingSpec) -> jax.Array:
    """[N, E] -> [N, E] float32."""
    logits = logits.astype(jnp.float32)
    return jax.nn.softmax(logits, axis=-1) if spec.score == "softmax" else jax.nn.sigmoid(logits)


def select(scores: jax.Array, bias: jax.Array | None, spec: RoutingSpec) -> jax.Array:
    """The chosen experts, [N, k] int32, in the order of their biased scores; E where the threshold leaves fewer."""
    experts = scores.shape[1]
    biased = scores if bias is None else scores + bias.astype(jnp.float32)
    if spec.groups is not None:
        biased = _keep_groups(biased, *spec.groups)
    best, chosen = lax.top_k(biased, spec.top_k)
    if spec.threshold is not None:
        chosen = jnp.where(best < spec.threshold, experts, chosen)  # so that a NaN is chosen, and seen in the weights
    return chosen.astype(jnp.int32)


def _keep_groups(biased: jax.Array, number: int, kept: int) -> jax.Array:
    """-inf in all groups but the best."""
    grouped = biased.reshape(biased.shape[0], number, -1)
    two = lax.top_k(grouped, min(2, grouped.shape[2]))[0]
    best = lax.top_k(jnp.sum(two, axis=-1), kept)[1]
    keep = jnp.any(best[:, :, None] == jnp.arange(number), axis=1)
    return jnp.where(keep[:, :, None], grouped, -jnp.inf).reshape(biased.shape)


def scores_of(scores: jax.Array, chosen: jax.Array) -> jax.Array:
    """[N, k] float32: the scores of the chosen, 0 where there is none."""
    return jnp.sum(jnp.where(_one_hot(chosen, scores.shape[1]), scores[:, None], 0.0), axis=-1)


def weights(mine: jax.Array, spec: RoutingSpec) -> jax.Array:
    """[N, k] float32, of the scores of the chosen."""
    if spec.normalize:
        total = jnp.sum(mine, axis=-1, keepdims=True)
        mine = mine / jnp.where(total > 0, total, 1.0)
    return mine * spec.scale


def spread(dmine: jax.Array, chosen: jax.Array, experts: int) -> jax.Array:
    """[N, E] float32, the gradient of the scores for that of the scores of the chosen."""
    return jnp.sum(jnp.where(_one_hot(chosen, experts), dmine[..., None], 0.0), axis=1)


def sort(chosen: jax.Array, experts: int, spec: RoutingSpec) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(experts [N, k], group_sizes [E], permutation [N k], inverse [N k]); with a capacity, later ones go to E."""
    chosen = layout.whole(chosen)  # on explicit mesh axes sums along tokens must be asked for; a few bytes a token
    routed = _one_hot(chosen, experts)
    mine = jnp.any(routed, axis=1).astype(jnp.int32)  # a token has an expert once at most
    before = jnp.cumsum(mine, axis=0) - mine
    rank = jnp.sum(jnp.where(routed, before[:, None], 0), axis=-1)
    sizes = jnp.sum(mine, axis=0)
    if spec.capacity is not None:
        chosen = jnp.where(rank < spec.capacity, chosen, experts)
        sizes = jnp.minimum(sizes, spec.capacity)
    starts = jnp.cumsum(sizes) - sizes
    first = jnp.sum(jnp.where(_one_hot(chosen, experts), starts, 0), axis=-1)
    inverse = with_absent((first + rank).reshape(-1), chosen, sizes)
    return chosen, sizes, permutation(chosen, inverse, experts), inverse


def with_absent(places: jax.Array, chosen: jax.Array, sizes: jax.Array) -> jax.Array:
    """[N k]: those that have no expert come after all others."""
    absent = (chosen == len(sizes)).astype(jnp.int32).reshape(-1)
    last = jnp.sum(sizes) + jnp.cumsum(absent) - absent
    return jnp.where(absent == 1, last, places)


def permutation(chosen: jax.Array, inverse: jax.Array, experts: int) -> jax.Array:
    """[N k], what `inverse` undoes: scattered, or on TPU, where a scatter is serial, sorted by expert and number."""
    count = inverse.shape[0]
    numbers, bits = lax.iota(jnp.int32, count), max(count - 1, 1).bit_length()
    if target.current().platform != "tpu" or experts.bit_length() + bits > 31:
        return jnp.zeros(count, jnp.int32).at[inverse].set(numbers, unique_indices=True)
    return lax.sort((chosen.reshape(-1) << bits) | numbers, is_stable=False) & (2**bits - 1)


def _one_hot(chosen: jax.Array, experts: int) -> jax.Array:
    """[N, k, E] bool."""
    return chosen[..., None] == jnp.arange(experts, dtype=jnp.int32)
