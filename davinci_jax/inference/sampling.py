"""The next token from logits: temperature, top-k and nucleus."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from davinci_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
      temperature: the logits are divided by it; 0 takes the most likely token.
      top_k: only the k most likely tokens are drawn; `None` draws from all.
      top_p: only the smallest set of most likely tokens that together have at least this probability, after
        temperature and `top_k` (Holtzman et al. 2020, arXiv 1904.09751); `None` draws from all.
      seed: of the random numbers. A row's numbers depend on its place in the batch, not on the other rows.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self):
        if not self.temperature >= 0:
            raise ConfigError("temperature", self.temperature, "is negative", "give 0 for greedy or a positive number")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError("top_k", self.top_k, "keeps no token", "give at least 1, or leave it out")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError("top_p", self.top_p, "is outside (0, 1]", "give a probability, or leave it out")


def filter_logits(logits: jax.Array, sampling: Sampling) -> tuple[jax.Array, jax.Array]:
    """Returns the candidates of each row, most likely first.

    Args:
      logits: float32 [B, V].
      sampling: with a temperature above 0.

    Returns:
      (logits float32 [B, C] after temperature, minus infinity where a token is not to be drawn; ids int32 [B, C]),
      C = `top_k` or V. Tokens of equal logits are ordered by their id, so exactly `top_k` remain.
    """
    count = min(sampling.top_k or logits.shape[-1], logits.shape[-1])
    values, ids = jax.lax.top_k(logits / sampling.temperature, count)
    if sampling.top_p is not None:
        probabilities = jax.nn.softmax(values, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        first = jnp.arange(count) == 0
        values = jnp.where((before < sampling.top_p) | first, values, -jnp.inf)
    return values, ids


def draw(logits: jax.Array, sampling: Sampling, step: jax.Array, seed: jax.Array | None = None) -> jax.Array:
    """Returns the next token of each row, int32 [B], from logits float32 [B, V].

    Args:
      logits: float32 [B, V].
      sampling: how tokens are drawn.
      step: numbers the draws of a row.
      seed: in the place of `sampling.seed`, where one program is to serve many seeds.
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    values, ids = filter_logits(logits, sampling)
    root = jax.random.key(sampling.seed if seed is None else seed)

    def one(row: jax.Array, values: jax.Array, ids: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(root, row), step)
        return ids[jax.random.categorical(key, values)]

    return jax.vmap(one)(jnp.arange(logits.shape[0]), values, ids)
