"""Cross-entropy of a linear head, without ever holding the logits of all tokens."""

import jax
import jax.numpy as jnp

from pallas_kernels.kernels.cross_entropy import XlaCrossEntropyConfig, linear_cross_entropy


def cross_entropy(x: jax.Array, head: jax.Array, labels: jax.Array, chunk: int) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihood and squared log-partition of each token, for logits = x head^T.

    Logits exist for `chunk` tokens at a time, in float32. If one chunk holds all tokens, the backward pass uses them
    again; else it rebuilds them, one matrix product more. The gradient of `head` is summed in float32.

    Args:
      x: [N, D], the final hidden states, in the compute dtype.
      head: [V, D]; cast to the dtype of `x`.
      labels: [N] int, the target ids; -1 marks a token without one, which gives 0 and no gradient.
      chunk: tokens per chunk.

    Returns:
      (nll, lse_squared), both [N] float32. The mean of the second is the z-loss of PaLM (Chowdhery et al. 2022,
      arXiv 2204.02311).
    """
    nll, aux = linear_cross_entropy(x, head, labels, reduction="none", config=XlaCrossEntropyConfig(chunk))
    return nll, jnp.square(aux.lse)
