"""Where in a row the document of each position lies."""

import jax
import jax.numpy as jnp


def runs(segments: jax.Array) -> tuple[jax.Array, jax.Array]:
    """First and last index of the run of equal ids around each position, [B, T] int32: two scans, linear in T."""
    length = segments.shape[1]
    index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), segments.shape)
    change = segments[:, 1:] != segments[:, :-1]
    edge = jnp.ones_like(change, shape=(change.shape[0], 1))
    first = jax.lax.cummax(jnp.where(jnp.concatenate([edge, change], 1), index, 0), axis=1)
    last = jax.lax.cummin(jnp.where(jnp.concatenate([change, edge], 1), index, length - 1), axis=1, reverse=True)
    return first, last
