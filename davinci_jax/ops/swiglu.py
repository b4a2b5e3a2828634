"""The gated activation of the MLP."""

import jax
import jax.numpy as jnp


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """SwiGLU (Shazeer 2020, arXiv 2002.05202): silu(gate) * up, computed in float32.

    Args:
      gate: any shape, the branch that goes through the activation.
      up: the same shape.

    Returns:
      The same shape, in the dtype of `gate`.
    """
    return (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(gate.dtype)
