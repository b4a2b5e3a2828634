"""Causal attention with grouped queries, and attention under an explicit mask for decoding."""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec

MASKED = -1e30  # not -inf: inf - inf in a softmax is NaN
RESIDUAL = "attention_out"  # name of what a remat policy may keep, so that the backward pass need not run forward


def attention(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Causal attention inside documents: softmax(q k^T / sqrt(K)) v over keys s <= t of the same segment.

    Query head h reads key head h // (H / G) (Ainslie et al. 2023, arXiv 2305.13245); keys are not repeated. Queries
    go in chunks, each against its causal prefix of keys, so blocks above the diagonal are never computed; scores
    are not kept for the backward pass, which rebuilds them from the log-sum-exp (Dao et al. 2022, arXiv 2205.14135).
    Softmax and accumulation are float32.

    Args:
      q: [B, T, H, K].
      k: [B, T, G, K], G divides H.
      v: [B, T, G, K].
      segment_ids: [B, T] int; a token sees keys of its own id only.

    Returns:
      [B, T, H, K] in the dtype of `q`.
    """
    batch, length, heads, size = q.shape
    q_bgrtk = _split_heads(q, k.shape[2]).transpose(0, 2, 3, 1, 4)
    out_bgrtk = _attention(q_bgrtk, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), segment_ids)
    return out_bgrtk.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, size)


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


def _chunks(length: int) -> list[tuple[int, int]]:
    """Query ranges: at least 128 rows, to feed the matrix units; at most 16 of them, to bound the program's size."""
    rows = max(128, -(-length // 16))
    return [(start, min(start + rows, length)) for start in range(0, length, rows)]


def _scores(q: jax.Array, k: jax.Array, segment_ids: jax.Array, start: int, stop: int) -> jax.Array:
    """Masked float32 scores [B, G, R, stop - start, stop] of one chunk of queries against its prefix of keys."""
    scores = jnp.einsum("bgrqk,bgsk->bgrqs", q[..., start:stop, :], k[:, :, :stop], preferred_element_type=jnp.float32)
    seen = _seen(segment_ids, start, stop)[:, None, None]
    return jnp.where(seen, scores * q.shape[-1] ** -0.5, MASKED)


def _seen(segment_ids: jax.Array, start: int, stop: int) -> jax.Array:
    """[B, stop - start, stop] bool: which keys of the prefix a chunk of queries may look at."""
    causal = jnp.arange(start, stop)[:, None] >= jnp.arange(stop)
    return causal & (segment_ids[:, start:stop, None] == segment_ids[:, None, :stop])


@jax.custom_vjp
def _attention(q, k, v, segment_ids):
    return _forward(q, k, v, segment_ids)[0]


def _forward(q, k, v, segment_ids):
    """q [B, G, R, T, K], k and v [B, G, T, K] -> (out like q, log-sum-exp [B, G, R, T] float32)."""
    outs, lses = [], []
    for start, stop in _chunks(q.shape[3]):
        scores = _scores(q, k, segment_ids, start, stop)
        top = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        out = jnp.einsum(
            "bgrqs,bgsk->bgrqk", weights.astype(v.dtype), v[:, :, :stop], preferred_element_type=jnp.float32
        )
        outs.append((out / total).astype(q.dtype))
        lses.append((top + jnp.log(total))[..., 0])
    return jnp.concatenate(outs, axis=3), jnp.concatenate(lses, axis=3)


def _attention_fwd(q, k, v, segment_ids):
    out, lse = (checkpoint_name(x, RESIDUAL) for x in _forward(q, k, v, segment_ids))
    return out, (q, k, v, segment_ids, out, lse)


def _attention_bwd(residuals, dout):
    # Scores are rebuilt with keys in rows: as [s, r q] the three large products of a chunk need no transposed copy of
    # a matrix of scores, only of q-sized ones.
    q, k, v, segment_ids, out, lse = residuals
    delta = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), axis=-1)
    einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    dqs, dks, dvs = [], [], []
    for start, stop in _chunks(q.shape[3]):
        q_rows, dout_rows = q[..., start:stop, :], dout[..., start:stop, :]
        lse_rows, delta_rows = (x[:, :, None, :, start:stop] for x in (lse, delta))
        scores = einsum("bgsk,bgrqk->bgsrq", k[:, :, :stop], q_rows) * q.shape[-1] ** -0.5
        seen = _seen(segment_ids, start, stop).transpose(0, 2, 1)[:, None, :, None]
        weights = jnp.exp(jnp.where(seen, scores, MASKED) - lse_rows)
        dweights = einsum("bgsk,bgrqk->bgsrq", v[:, :, :stop], dout_rows)
        dscores = (weights * (dweights - delta_rows) * q.shape[-1] ** -0.5).astype(q.dtype)
        dqs.append(einsum("bgsk,bgsrq->bgkrq", k[:, :, :stop], dscores).astype(q.dtype))
        dks.append(einsum("bgsrq,bgrqk->bgsk", dscores, q_rows))
        dvs.append(einsum("bgsrq,bgrqk->bgsk", weights.astype(q.dtype), dout_rows))
    dk, dv = (_sum_prefixes(parts).astype(x.dtype) for parts, x in ((dks, k), (dvs, v)))
    return jnp.concatenate(dqs, axis=4).transpose(0, 1, 3, 4, 2), dk, dv, None


def _sum_prefixes(parts: list[jax.Array]) -> jax.Array:
    """Sum of arrays [B, G, S_i, K] of growing S_i, each short one taken as zero behind its end."""
    total = parts[-1]
    for part in parts[:-1]:
        total = total.at[:, :, : part.shape[2]].add(part)
    return total


_attention.defvjp(_attention_fwd, _attention_bwd)
