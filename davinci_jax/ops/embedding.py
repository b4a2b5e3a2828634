"""Rows of the embedding table."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec


def embedding_lookup(table: jax.Array, tokens: jax.Array, out_sharding: PartitionSpec | None = None) -> jax.Array:
    """Rows of `table` for token ids.

    The gradient is summed in the dtype of `table`; keep that float32, because a frequent token collects thousands
    of terms. Ids must lie in [0, V): an id outside is moved to the nearest row.

    Args:
      table: [V, D].
      tokens: [...] int.
      out_sharding: sharding of the result; needed when `table` is divided.

    Returns:
      [..., D] in the dtype of `table`.
    """
    return table.at[jnp.asarray(tokens)].get(mode="clip", wrap_negative_indices=False, out_sharding=out_sharding)
