"""Auxiliary losses of a router, as pure functions of what `route` gives."""

import jax
import jax.numpy as jnp

from pallas_kernels.arguments import check_arrays
from pallas_kernels.errors import ArgumentError


def load_balancing_loss(scores: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """E * sum over experts of (share of the assignments) * (mean share of the scores): 1 if balanced, E at worst.

    Switch Transformer's loss (Fedus et al. 2021, arXiv 2101.03961) for any number of experts a token; a token's scores
    are divided by their sum, which changes softmax scores not at all. Of tokens that several devices hold in equal
    numbers, it is the mean of the devices' losses with the sizes of all together.

    Args:
      scores: [N, E] float32, of `Routing`; the loss has a gradient to them alone.
      group_sizes: [E] int32, of `Routing`.

    Returns:
      A float32 scalar; 0 without tokens.
    """
    check_arrays("load_balancing_loss", scores=scores, group_sizes=group_sizes)
    if scores.ndim != 2 or group_sizes.shape != scores.shape[1:]:
        problem = f"has shape {group_sizes.shape} for scores {scores.shape}"
        raise ArgumentError("load_balancing_loss", "group_sizes", problem, "give one size an expert")
    shares = scores / jnp.maximum(jnp.sum(scores, axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    mean_shares = jnp.sum(shares, axis=0) / max(scores.shape[0], 1)
    assigned = group_sizes.astype(jnp.float32)
    return scores.shape[1] * jnp.sum(assigned / jnp.maximum(jnp.sum(assigned), 1.0) * mean_shares)


def router_z_loss(logits: jax.Array) -> jax.Array:
    """[N, E] -> the mean of log-sum-exp(logits)^2, which keeps logits small (ST-MoE, arXiv 2202.08906).

    A float32 scalar; 0 without tokens.
    """
    check_arrays("router_z_loss", logits=logits)
    if logits.ndim == 0:
        raise ArgumentError("router_z_loss", "logits", "has shape ()", "give (tokens, experts)")
    squares = jnp.square(jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1))
    return jnp.sum(squares) / max(squares.size, 1)
