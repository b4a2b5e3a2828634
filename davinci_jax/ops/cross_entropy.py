"""Cross-entropy of a linear head, without ever holding the logits of all tokens."""

import jax
import jax.numpy as jnp

from pallas_kernels import XlaCrossEntropyConfig, linear_cross_entropy, supported


def cross_entropy(x: jax.Array, head: jax.Array, labels: jax.Array, chunk: int) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihood and squared log-partition of each token, for logits = x head^T.

    The kernels of `pallas_kernels.linear_cross_entropy` where the device has some; elsewhere logits exist for `chunk`
    tokens at a time, in float32. If one chunk holds all tokens, the backward pass uses them again; else it rebuilds
    them, one matrix product more. The gradient of `head` is summed in float32.

    Args:
      x: [N, D], the final hidden states, in the compute dtype.
      head: [V, D]; cast to the dtype of `x`.
      labels: [N] int, the target ids; -1 marks a token without one, which gives 0 and no gradient.
      chunk: tokens per chunk.

    Returns:
      (nll, lse_squared), both [N] float32. The mean of the second is the z-loss of PaLM (Chowdhery et al. 2022,
      arXiv 2204.02311).
    """
    nll, aux = linear_cross_entropy(x, head, labels, reduction="none", config=_chunks(x, head, labels, chunk))
    return nll, jnp.square(aux.lse)


def cross_entropy_sum(
    x: jax.Array, head: jax.Array, labels: jax.Array, chunk: int, z_loss: float
) -> tuple[jax.Array, jax.Array]:
    """The sum over all tokens of what `cross_entropy` gives, for training: its gradients never rebuild the logits.

    Args:
      x, head, labels, chunk: see `cross_entropy`.
      z_loss: weight of the squared log-partition.

    Returns:
      (total, nll): float32 scalar, nll + z_loss lse^2 summed; and nll [N] float32, to look at: no gradient flows back.
    """
    config = _chunks(x, head, labels, chunk)
    total, aux = linear_cross_entropy(x, head, labels, reduction="sum", z_loss=z_loss, config=config)
    return total, jax.lax.stop_gradient(-aux.log_probs)


def _chunks(x: jax.Array, head: jax.Array, labels: jax.Array, chunk: int) -> XlaCrossEntropyConfig | None:
    """Chunks of so many tokens, where no kernel, which has blocks of its own, takes the case."""
    return None if supported(linear_cross_entropy, x, head, labels) is None else XlaCrossEntropyConfig(chunk)
