"""Attention in XLA's own operations: the reference that runs everywhere, and trains.

Queries go in chunks, each against the range of keys that its mask can reach, so blocks above the diagonal or outside
the window are never computed; scores are not kept for the backward pass, which rebuilds them from the log-sum-exp
(Dao et al. 2022, arXiv 2205.14135).
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.kernels.attention.spec import AttentionSpec
from pallas_kernels.products import einsum

MASKED = -1e30  # not -inf: inf - inf in a softmax is NaN


def forward(q, k, v, *, spec: AttentionSpec, q_segments, kv_segments, q_positions, kv_positions, config: object = None):
    """Softmax(scale q k^T) v under the mask of `spec`, softmax and accumulation in float32.

    Args:
      q: [B, T, H, K].
      k: [B, S, G, K], G divides H; query head h reads key head h // (H / G) (arXiv 2305.13245).
      v: [B, S, G, K].
      spec: what is visible.
      q_segments: [B, T] int or None; kv_segments: [B, S], or None for those of the queries; negative ids are padding.
      q_positions: [B, T] int or None, then 0, 1, ...; kv_positions: [B, S].
      config: not used; there are no blocks to size.

    Returns:
      out [B, T, H, K] in the dtype of `q`, and the log-sum-exp of the scores [B, H, T] float32. A query that sees no
      key gives 0 and -inf.
    """
    del config
    if not q.size or not k.size:
        return jnp.zeros_like(q), jnp.full_like(q[..., 0].transpose(0, 2, 1), -jnp.inf, jnp.float32)
    seen = functools.partial(_seen, spec, q_segments, kv_segments, q_positions, kv_positions)
    blind = _may_be_blind(spec, q_segments, q_positions)
    q, k, v = _grouped(q, k.shape[2]), k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    outs, lses = [], []
    for rows, keys in _chunks(spec, q.shape[3], k.shape[2], q_positions is not None):
        scores, _ = _scores(spec, einsum("bgrqk,bgsk->bgrqs", q[:, :, :, rows], k[:, :, keys]))
        mask = seen(rows, keys)
        if mask is not None:
            scores = jnp.where(mask[:, None, None], scores, MASKED)
        top = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        out = einsum("bgrqs,bgsk->bgrqk", weights.astype(v.dtype), v[:, :, keys]) / total
        lse = top + jnp.log(total)
        if blind:
            out, lse = jnp.where(top <= MASKED, 0.0, out), jnp.where(top <= MASKED, -jnp.inf, lse)
        outs.append(out.astype(q.dtype))
        lses.append(lse[..., 0])
    lse = jnp.concatenate(lses, axis=3)
    return _ungrouped(jnp.concatenate(outs, axis=3)), lse.reshape(lse.shape[0], -1, lse.shape[3])


def backward(
    q,
    k,
    v,
    lse,
    delta,
    dout,
    *,
    spec: AttentionSpec,
    q_segments,
    kv_segments,
    q_positions,
    kv_positions,
    config: object = None,
):
    """Gradients of `forward`.

    Args:
      q, k, v, the mask, config: as given to `forward`.
      lse: [B, H, T] float32, finite: 0 where a query sees no key.
      delta: [B, H, T] float32, sum of out * dout over the head minus the gradient of lse.
      dout: [B, T, H, K].

    Returns:
      (dq, dk, dv) in the shapes and dtypes of (q, k, v).
    """
    del config
    if not q.size or not k.size:
        return tuple(jnp.zeros_like(x) for x in (q, k, v))
    # Scores are rebuilt with keys in rows: as [s, r q] the three large products of a chunk need no transposed copy of
    # a matrix of scores, only of q-sized ones.
    seen = functools.partial(_seen, spec, q_segments, kv_segments, q_positions, kv_positions)
    groups, dtype = k.shape[2], q.dtype
    q, dout, k, v = _grouped(q, groups), _grouped(dout, groups), k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    lse, delta = (x.reshape(*q.shape[:4])[:, :, None] for x in (lse, delta))
    dqs, dk, dv = [], None, None
    for rows, keys in _chunks(spec, q.shape[3], k.shape[2], q_positions is not None)[::-1]:
        q_rows, dout_rows = q[:, :, :, rows], dout[:, :, :, rows]
        scores, slope = _scores(spec, einsum("bgsk,bgrqk->bgsrq", k[:, :, keys], q_rows))
        mask = seen(rows, keys)
        if mask is not None:
            scores = jnp.where(mask.transpose(0, 2, 1)[:, None, :, None], scores, MASKED)
        weights = jnp.exp(scores - lse[..., rows])
        dweights = einsum("bgsk,bgrqk->bgsrq", v[:, :, keys], dout_rows)
        dscores = (weights * (dweights - delta[..., rows]) * slope).astype(dtype)
        dqs.append(einsum("bgsk,bgsrq->bgkrq", k[:, :, keys], dscores).astype(dtype))
        dk = _sum(dk, keys, einsum("bgsrq,bgrqk->bgsk", dscores, q_rows), k.shape)
        dv = _sum(dv, keys, einsum("bgsrq,bgrqk->bgsk", weights.astype(dtype), dout_rows), v.shape)
    dq = jnp.concatenate(dqs[::-1], axis=4).transpose(0, 4, 1, 3, 2).reshape(_ungrouped_shape(q))
    return dq, dk.transpose(0, 2, 1, 3).astype(k.dtype), dv.transpose(0, 2, 1, 3).astype(v.dtype)


def _sum(total: jax.Array | None, keys: slice, part: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """`total` and what one chunk adds for its keys; the one that comes first often has all keys, and needs no zeros."""
    if part.shape == shape:
        return part if total is None else total + part
    total = jnp.zeros(shape, jnp.float32) if total is None else total
    return total.at[:, :, keys].add(part)


def _grouped(q: jax.Array, groups: int) -> jax.Array:
    """[B, T, H, K] -> [B, G, H / G, T, K]."""
    batch, length, heads, size = q.shape
    return q.reshape(batch, length, groups, heads // groups, size).transpose(0, 2, 3, 1, 4)


def _ungrouped(q: jax.Array) -> jax.Array:
    """[B, G, R, T, K] -> [B, T, G R, K]."""
    return q.transpose(0, 3, 1, 2, 4).reshape(_ungrouped_shape(q))


def _ungrouped_shape(q: jax.Array) -> tuple[int, int, int, int]:
    batch, groups, repeats, length, size = q.shape
    return batch, length, groups * repeats, size


def _chunks(spec: AttentionSpec, length: int, keys: int, moved: bool) -> list[tuple[slice, slice]]:
    """Ranges of queries, each with the keys it can reach: all of them where positions are `moved` by the caller.

    At least 128 queries, to feed the matrix units; at most 16 ranges, to bound the program's size.
    """
    rows = max(128, -(-length // 16))
    left, right = (-1, -1) if spec.window is None or moved else spec.window
    if spec.causal and not moved:
        right = 0
    ranges = []
    for start in range(0, length, rows):
        stop = min(start + rows, length)
        first = 0 if left < 0 else max(0, start - left)
        last = keys if right < 0 else min(stop + right, keys)
        ranges.append((slice(start, stop), slice(first, last)))
    return ranges


def _scores(spec: AttentionSpec, products: jax.Array) -> tuple[jax.Array, jax.Array | float]:
    """Scores from products q.k, and their derivative by them."""
    scores = products * spec.scale
    if spec.soft_cap is None:
        return scores, spec.scale
    bent = jnp.tanh(scores / spec.soft_cap)
    return bent * spec.soft_cap, (1 - jnp.square(bent)) * spec.scale


def _seen(spec, q_segments, kv_segments, q_positions, kv_positions, rows: slice, keys: slice) -> jax.Array | None:
    """[B or 1, rows, keys] bool: which keys the queries of a chunk see; None where it is all of them."""
    q_at = jnp.arange(rows.start, rows.stop)[None] if q_positions is None else q_positions[:, rows]
    kv_at = jnp.arange(keys.start, keys.stop)[None] if kv_positions is None else kv_positions[:, keys]
    q_at, kv_at = q_at[:, :, None], kv_at[:, None, :]
    parts = [kv_at <= q_at] if spec.causal else []
    if spec.window is not None:
        left, right = spec.window
        parts += [kv_at >= q_at - left] if left >= 0 else []
        parts += [kv_at <= q_at + right] if right >= 0 else []
    if q_segments is not None:
        kv_ids = q_segments if kv_segments is None else kv_segments
        q_ids, kv_ids = q_segments[:, rows, None], kv_ids[:, None, keys]
        parts += [q_ids == kv_ids, q_ids >= 0]
    return functools.reduce(jnp.logical_and, parts) if parts else None


def _may_be_blind(spec: AttentionSpec, q_segments, q_positions) -> bool:
    """Whether a query may see no key; without segments and with the usual positions it sees its own."""
    return q_segments is not None or q_positions is not None
