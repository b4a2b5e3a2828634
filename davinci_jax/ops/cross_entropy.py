"""Cross-entropy of a linear head, without ever holding the logits of all tokens."""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def cross_entropy(x: jax.Array, head: jax.Array, labels: jax.Array, chunk: int) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihood and squared log-partition of each token, for logits = x head^T.

    Logits exist for `chunk` tokens at a time, in float32. Those of the last chunk are kept for the backward pass,
    which begins with it; those of the others are rebuilt, one matrix product more. The gradient of `head` is summed
    in float32.

    Args:
      x: [N, D], the final hidden states, in the compute dtype.
      head: [V, D]; cast to the dtype of `x`.
      labels: [N] int, the target ids; -1 marks a token without one, which gives 0 and no gradient.
      chunk: tokens per chunk.

    Returns:
      (nll, lse_squared), both [N] float32. The mean of the second is the z-loss of PaLM (Chowdhery et al. 2022,
      arXiv 2204.02311).
    """
    return _fwd(x, head, labels, chunk)[0]


def _logits(x: jax.Array, head: jax.Array) -> jax.Array:
    return jnp.einsum("nd,vd->nv", x, head, preferred_element_type=jnp.float32)


def _forward_chunk(x, head, labels):
    """Returns ((nll, lse_squared), lse, logits) of one chunk."""
    logits = _logits(x, head)
    lse = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[:, None], axis=-1)[:, 0]
    valid = labels >= 0
    return (jnp.where(valid, lse - picked, 0.0), jnp.where(valid, jnp.square(lse), 0.0)), lse, logits


def _backward_chunk(logits, x, head, labels, lse, dnll, dlse_squared):
    """Returns (dx, dhead) of one chunk, dhead in float32."""
    valid = labels >= 0
    dnll = jnp.where(valid, dnll, 0.0)
    dlse = dnll + jnp.where(valid, 2 * lse * dlse_squared, 0.0)
    hit = jnp.arange(logits.shape[-1]) == labels[:, None]
    dlogits = jnp.exp(logits - lse[:, None]) * dlse[:, None] - jnp.where(hit, dnll[:, None], 0.0)
    dlogits = dlogits.astype(x.dtype)
    dx = jnp.einsum("nv,vd->nd", dlogits, head, preferred_element_type=jnp.float32).astype(x.dtype)
    return dx, jnp.einsum("nv,nd->vd", dlogits, x, preferred_element_type=jnp.float32)


def _fwd(x, head, labels, chunk):
    cast = head.astype(x.dtype)
    split = _last_chunk(len(x), chunk)
    last, last_lse, last_logits = _forward_chunk(x[split:], cast, labels[split:])

    def body(_, part):
        return None, _forward_chunk(part[0], cast, part[1])[:2]

    out, lse = last, last_lse
    if split:
        _, first = jax.lax.scan(body, None, _chunks((x[:split], labels[:split]), chunk))
        out, lse = jax.tree.map(lambda a, b: jnp.concatenate((a.reshape(-1), b)), first, (last, last_lse))
    return out, (x, head, labels, lse, last_logits)


def _bwd(chunk, residuals, cotangents):
    x, head, labels, lse, last_logits = residuals
    cast = head.astype(x.dtype)
    split = _last_chunk(len(x), chunk)
    last_x, last_labels, *last = (part[split:] for part in (x, labels, lse, *cotangents))
    dx, dhead = _backward_chunk(last_logits, last_x, cast, last_labels, *last)

    def body(dhead, part):
        part_x, part_labels, *rest = part
        dx, part_dhead = _backward_chunk(_logits(part_x, cast), part_x, cast, part_labels, *rest)
        return dhead + part_dhead, dx

    if split:
        parts = tuple(part[:split] for part in (x, labels, lse, *cotangents))
        dhead, first_dx = jax.lax.scan(body, dhead, _chunks(parts, chunk))
        dx = jnp.concatenate((first_dx.reshape(split, -1), dx))
    return dx, dhead.astype(head.dtype), None


def _last_chunk(count: int, chunk: int) -> int:
    """Where the last chunk begins: the others are full, so nothing is padded."""
    return (count - 1) // chunk * chunk


def _chunks(arrays: tuple[jax.Array, ...], chunk: int) -> tuple[jax.Array, ...]:
    return tuple(array.reshape(-1, chunk, *array.shape[1:]) for array in arrays)


cross_entropy.defvjp(_fwd, _bwd)
