"""Causal attention with grouped queries, and attention under an explicit mask for decoding."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

import pallas_kernels as kernels

MASKED = -1e30  # not -inf: inf - inf in a softmax is NaN


def attention(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Causal attention inside documents, by the fastest kernel of the device: `pallas_kernels.attention`.

    Args:
      q: [B, T, H, K].
      k: [B, T, G, K], G divides H.
      v: [B, T, G, K].
      segment_ids: [B, T] int; a token sees keys of its own id only; 0 is padding, which sees nothing and gives 0.

    Returns:
      [B, T, H, K] in the dtype of `q`.
    """
    return kernels.attention(q, k, v, segment_ids=jnp.where(segment_ids > 0, segment_ids, -1))


def masked_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Attention under an explicit mask, for a few queries against a cache.

    Args:
      q: [B, T, H, K].
      k: [B, S, G, K], G divides H.
      v: [B, S, G, K].
      mask: [B, T, S] bool, true where a query may look; a query with no true key gets the mean of the values.

    Returns:
      [B, T, H, K] in the dtype of `q`.
    """
    batch, length, heads, size = q.shape
    q_btgrk = _split_heads(q, k.shape[2])
    scores = jnp.einsum("btgrk,bsgk->bgrts", q_btgrk, k, preferred_element_type=jnp.float32) * size**-0.5
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, MASKED), axis=-1)
    out = jnp.einsum("bgrts,bsgk->btgrk", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return out.reshape(batch, length, heads, size).astype(q.dtype)


def _split_heads(q: jax.Array, groups: int) -> jax.Array:
    """[B, T, H, K] -> [B, T, G, H / G, K], divided over the groups as the key and value heads are."""
    batch, length, heads, size = q.shape
    shape, sharding = (batch, length, groups, heads // groups, size), jax.typeof(q).sharding
    if sharding.mesh.empty:
        return q.reshape(shape)
    # Left to itself, a single group would hand its mesh axis on to the query heads, where the keys have none.
    b, t, h, k = (*sharding.spec, None, None, None, None)[:4]
    return jax.lax.reshape(q, shape, out_sharding=NamedSharding(sharding.mesh, PartitionSpec(b, t, h, None, k)))
