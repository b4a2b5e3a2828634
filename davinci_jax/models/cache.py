"""Decoding with a cache of keys and values."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from davinci_jax import ops, sharding
from davinci_jax.experiment import ModelConfig
from davinci_jax.layers import Block
from davinci_jax.models.decoder import Decoder


class Cache(NamedTuple):
    """Keys and values of the tokens so far. Rows of different length are aligned at their end.

    Attributes:
      keys: [L, B, S, G, K] in the compute dtype, rotary positions applied.
      values: [L, B, S, G, K].
      padding: [B] int32, how many tokens at the start of a row are padding.
      length: int32 scalar, how many of the S places are filled, padding included.
    """

    keys: jax.Array
    values: jax.Array
    padding: jax.Array
    length: jax.Array


def init_cache(config: ModelConfig, batch: int, length: int, padding: jax.Array | None = None) -> Cache:
    """An empty cache.

    Args:
      config: the model.
      batch: B, rows decoded together; the mesh's batch axes must divide it.
      length: S, the most tokens a row can hold, its padding, prompt and continuation together.
      padding: [B] int32, tokens to ignore at the start of each row: prompts of different length are padded on the
        left. `None` means no padding.

    Returns:
      A cache for `decode`.
    """
    shape = (config.num_layers, batch, length, config.num_kv_heads, config.head_size)
    out_sharding = sharding.out("layers", "batch", None, "kv_heads", "head_size")
    keys, values = (jnp.zeros(shape, config.compute_dtype, out_sharding=out_sharding) for _ in range(2))
    padding = jnp.zeros(batch, jnp.int32) if padding is None else jnp.asarray(padding, jnp.int32)
    return Cache(keys, values, sharding.constrain(padding, "batch"), jnp.int32(0))


def decode(decoder: Decoder, cache: Cache, tokens: jax.Array) -> tuple[jax.Array, Cache]:
    """Appends tokens and predicts the next one.

    The first call takes the prompts, padded on the left as `cache.padding` says; later calls take the tokens chosen,
    T = 1. A long prompt may come in pieces, which bounds the scores held at once (B x H x T x S). The caller keeps
    the total within the cache's S: this cannot be checked inside `jax.jit`.

    Args:
      decoder: the model.
      cache: from `init_cache` or an earlier call; donate it, so that it is written in place.
      tokens: [B, T] int32.

    Returns:
      (logits [B, V] float32 of the token that follows the last one, the cache with the tokens appended).
    """
    index = cache.length + jnp.arange(tokens.shape[1])
    cos, sin = decoder.rope(sharding.constrain(jnp.maximum(index - cache.padding[:, None], 0), "batch", "sequence"))
    places = jnp.arange(cache.keys.shape[2])
    mask = (places <= index[:, None]) & (places >= cache.padding[:, None, None])

    def body(carry, block):
        x, keys, values, layer = carry
        x, keys, values = _block(block, x, keys, values, layer, cache.length, mask, cos, sin)
        return (x, keys, values, layer + 1), None

    carry = (decoder.embed_tokens(tokens), cache.keys, cache.values, jnp.int32(0))
    for stack in decoder.stacks():
        carry, _ = jax.lax.scan(body, carry, stack)
    x, keys, values, _ = carry
    logits = decoder.project(decoder.final_norm(x[:, -1:]))[:, 0]
    return logits, Cache(keys, values, cache.padding, cache.length + tokens.shape[1])


def _block(block: Block, x, keys, values, layer, length, mask, cos, sin):
    """One block on new tokens [B, T, D], writing their keys and values at `length` of this layer."""
    q, k, v = block.attention.project(block.attention_norm(x), cos, sin)
    k, v = (sharding.constrain(new[None], "layers", "batch", None, "kv_heads", "head_size") for new in (k, v))
    keys, values = (
        jax.lax.dynamic_update_slice(store, new, (layer, 0, length, 0, 0)) for store, new in ((keys, k), (values, v))
    )
    here = (jax.lax.dynamic_index_in_dim(store, layer, keepdims=False) for store in (keys, values))
    x = x + block.attention.output(ops.masked_attention(q, *here, mask))
    return block.feed_forward(x)[0], keys, values
