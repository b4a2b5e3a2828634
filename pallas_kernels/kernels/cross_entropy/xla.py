"""The steps of a chunk of tokens in XLA."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.kernels.cross_entropy.chunks import Steps

_MIN_LOGITS = 256 * 2**20  # bytes; below that, smaller chunks would only lose speed


def tokens_per_chunk(tokens: int, hidden: int, vocabulary: int) -> int:
    """As many as make the float32 logits of a chunk no larger than the gradient of the head, held in any case."""
    most = max(hidden, _MIN_LOGITS // (4 * vocabulary), 1)
    if tokens <= most:
        return max(tokens, 1)
    even = -(-tokens // -(-tokens // most))
    return min(-(-even // 128) * 128, most)


def steps(*, soft_cap: float | None, chunk: int) -> Steps:
    """As `chunks` wants them."""
    sums, gradients = (functools.partial(step, soft_cap=soft_cap) for step in (_sums, _gradients))
    return Steps(sums, gradients, chunk, streams=False)


def _sums(x, w, labels, keep, *, soft_cap):
    logits = jnp.einsum("nd,vd->nv", x, w, preferred_element_type=jnp.float32)
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    picked = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[:, None], axis=-1)[:, 0]
    return picked, jax.nn.logsumexp(logits, axis=-1), logits if keep else None


def _gradients(logits, x, w, labels, lse, dlog_probs, dlse, dw, *, soft_cap):
    dlog_probs, dlse = (jnp.where(labels >= 0, cotangent, 0.0) for cotangent in (dlog_probs, dlse))
    # A token that is not counted has 0 as its lse, against which exp(logits) may overflow.
    probabilities = jnp.exp(logits - jnp.where(labels >= 0, lse, jnp.inf)[:, None])
    hit = jnp.arange(logits.shape[-1]) == labels[:, None]
    dlogits = probabilities * (dlse - dlog_probs)[:, None] + jnp.where(hit, dlog_probs[:, None], 0.0)
    if soft_cap is not None:
        dlogits *= 1 - jnp.square(logits / soft_cap)
    dlogits = dlogits.astype(x.dtype)
    dx = jnp.einsum("nv,vd->nd", dlogits, w, preferred_element_type=jnp.float32).astype(x.dtype)
    part = jnp.einsum("nv,nd->vd", dlogits, x, preferred_element_type=jnp.float32)
    return dx, part if dw is None else dw + part
