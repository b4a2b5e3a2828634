"""Cross-entropy of a linear head in float64 NumPy, with its gradients in closed form."""

import numpy as np


def reference(x, w, labels, dlog_probs, dlse, soft_cap=None):
    """(log_probs, lse, dx, dw) for cotangents of the first two; x [N, D], w [V, D]; a negative label is not counted."""
    x, w, dlog_probs, dlse = (np.asarray(a, np.float64) for a in (x, w, dlog_probs, dlse))
    counted = labels >= 0
    raw = x @ w.T
    logits, slope = raw, np.ones_like(raw)
    if soft_cap is not None:
        logits = soft_cap * np.tanh(raw / soft_cap)
        slope = 1 / np.cosh(raw / soft_cap) ** 2
    top = logits.max(1, keepdims=True)
    lse = top[:, 0] + np.log(np.exp(logits - top).sum(1))
    onehot = np.eye(len(w))[np.where(counted, labels, 0)]
    probabilities = np.exp(logits - lse[:, None])
    dlogits = dlog_probs[:, None] * (onehot - probabilities) + dlse[:, None] * probabilities
    dlogits *= slope * counted[:, None]
    log_probs = (logits * onehot).sum(1) - lse
    return np.where(counted, log_probs, 0), np.where(counted, lse, 0), dlogits @ w, dlogits.T @ x


def loss_and_gradients(x, w, labels, z_loss=0.0, soft_cap=None, reduction="mean"):
    """(loss, log_probs, lse, dx, dw) of the reduced loss."""
    log_probs, lse, *_ = reference(x, w, labels, 0 * labels, 0 * labels, soft_cap)
    scale = 1 / max((labels >= 0).sum(), 1) if reduction == "mean" else 1.0
    ones = np.ones(len(labels))
    _, _, dx, dw = reference(x, w, labels, -scale * ones, scale * 2 * z_loss * lse, soft_cap)
    return scale * (z_loss * lse**2 - log_probs).sum(), log_probs, lse, dx, dw


def inputs(tokens, hidden, vocabulary, seed=0, scale=1.0):
    """Random (x, w, labels), a few tokens of which have no label."""
    rng = np.random.default_rng(seed)
    x, w = scale * rng.normal(size=(tokens, hidden)), rng.normal(size=(vocabulary, hidden)) / np.sqrt(hidden)
    labels = rng.integers(0, vocabulary, tokens)
    labels[rng.random(tokens) < 0.15] = -1
    labels[:1] = vocabulary - 1
    return x.astype(np.float32), w.astype(np.float32), labels.astype(np.int32)
