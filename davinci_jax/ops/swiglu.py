"""The gated activation of the MLP."""

import jax
import jax.numpy as jnp


@jax.custom_vjp
def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """SwiGLU (Shazeer 2020, arXiv 2002.05202): silu(gate) * up, computed in float32.

    Args:
      gate: any shape, the branch that goes through the activation.
      up: the same shape.

    Returns:
      The same shape, in the dtype of `gate`.
    """
    return (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(gate.dtype)


def _fwd(gate, up):
    return swiglu(gate, up), (gate, up)


def _bwd(residuals, dout):
    gate, up, dout = (x.astype(jnp.float32) for x in (*residuals, dout))
    sigmoid = jax.nn.sigmoid(gate)
    dgate = dout * up * sigmoid * (1 + gate * (1 - sigmoid))
    return tuple(x.astype(residuals[0].dtype) for x in (dgate, dout * gate * sigmoid))


swiglu.defvjp(_fwd, _bwd)
