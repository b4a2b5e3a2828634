"""Attention and its gradients in float64 NumPy, one query at a time: slow, plain, from the formulas alone."""

import numpy as np


def visible(spec, batch, length, keys, q_segments=None, kv_segments=None, q_positions=None, kv_positions=None):
    """[B, T, S] bool: which keys a query sees."""
    mask = np.ones((batch, length, keys), bool)
    p = np.tile(np.arange(length), (batch, 1)) if q_positions is None else np.asarray(q_positions)
    s = np.tile(np.arange(keys), (batch, 1)) if kv_positions is None else np.asarray(kv_positions)
    ahead = s[:, None, :] - p[:, :, None]
    if spec.causal:
        mask &= ahead <= 0
    left, right = spec.window or (-1, -1)
    if left >= 0:
        mask &= ahead >= -left
    if right >= 0:
        mask &= ahead <= right
    if q_segments is not None:
        kv_segments = q_segments if kv_segments is None else kv_segments
        own, other = np.asarray(q_segments)[:, :, None], np.asarray(kv_segments)[:, None, :]
        mask &= (own == other) & (own >= 0)
    return mask


def attention(q, k, v, mask, *, scale, soft_cap=None, sinks=None, dout=None, dlse=None):
    """(out, lse), and given `dout` and `dlse` also (dq, dk, dv, dsinks); shapes as in `pallas_kernels.attention`."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out, lse = np.zeros(q.shape), np.full((q.shape[0], q.shape[2], q.shape[1]), -np.inf)
    dq, dk, dv = np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
    dsinks = np.zeros(q.shape[2])
    for b, t, h in np.ndindex(q.shape[:3]):
        g = h * k.shape[2] // q.shape[2]
        keys = np.flatnonzero(mask[b, t])
        raw = scale * (k[b, keys, g] @ q[b, t, h])
        scores = raw if soft_cap is None else soft_cap * np.tanh(raw / soft_cap)
        everything = scores if sinks is None else np.append(scores, sinks[h])
        if not len(everything):
            continue
        top = everything.max()
        lse[b, h, t] = top + np.log(np.exp(everything - top).sum())
        weights = np.exp(scores - lse[b, h, t])
        out[b, t, h] = weights @ v[b, keys, g]
        if dout is None:
            continue
        upper = np.asarray(dout[b, t, h], np.float64)
        dlse_here = 0.0 if dlse is None else float(dlse[b, h, t])
        inner = upper @ out[b, t, h]
        dscores = weights * (v[b, keys, g] @ upper - inner + dlse_here)
        if sinks is not None:
            dsinks[h] += np.exp(sinks[h] - lse[b, h, t]) * (dlse_here - inner)
        draw = dscores * scale if soft_cap is None else dscores * scale * (1 - np.tanh(raw / soft_cap) ** 2)
        dq[b, t, h] = draw @ k[b, keys, g]
        dk[b, keys, g] += np.outer(draw, q[b, t, h])
        dv[b, keys, g] += np.outer(weights, upper)
    return (out, lse) if dout is None else (out, lse, dq, dk, dv, dsinks)
