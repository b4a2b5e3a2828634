"""The gated activation of an MLP."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import layout, partition
from pallas_kernels.arguments import Backend
from pallas_kernels.errors import ArgumentError
from pallas_kernels.kernels.elementwise.checks import check_backend, check_floating

OUT = "swiglu_out"  # name for remat policies


def swiglu(gate: jax.Array, up: jax.Array, *, backend: Backend = "auto", config: None = None) -> jax.Array:
    """SwiGLU (Shazeer 2020, arXiv 2002.05202): silu(gate) * up, computed in float32.

    The backward pass keeps `gate` and `up` only. The result is named "swiglu_out" for remat policies.
    On explicit mesh axes it is divided like `gate`, and `up` laid out to fit.

    Args:
      gate: any shape, the branch that goes through the activation.
      up: the same shape.
      backend: "auto" and "xla" are the same here.
      config: None; there is nothing to configure.

    Returns:
      The same shape, in the dtype of `gate`.

    Raises:
      ArgumentError: shapes or dtypes that do not fit; it names the argument.
      UnsupportedError: backend="pallas".
    """
    check_backend("swiglu", backend, config)
    check_floating("swiglu", gate=gate, up=up)
    if gate.shape != up.shape:
        raise ArgumentError("swiglu", "up", f"has shape {up.shape}, gate has {gate.shape}", "give both the same")
    gate, up = jnp.asarray(gate), jnp.asarray(up)
    up = layout.divide(up, *layout.entries(gate))
    return _swiglu(*partition.vary_alike(gate, up))


@jax.custom_vjp
def _swiglu(gate, up):
    return (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(gate.dtype)


def _fwd(gate, up):
    return checkpoint_name(_swiglu(gate, up), OUT), (gate, up)


def _bwd(residuals, dout):
    return tuple(x.astype(like.dtype) for x, like in zip(gradients(*residuals, dout), residuals, strict=True))


def gradients(gate: jax.Array, up: jax.Array, dout: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Gradients of gate and up in float32, for that of silu(gate) * up."""
    gate, up, dout = (x.astype(jnp.float32) for x in (gate, up, dout))
    sigmoid = jax.nn.sigmoid(gate)
    return dout * up * sigmoid * (1 + gate * (1 - sigmoid)), dout * gate * sigmoid


_swiglu.defvjp(_fwd, _bwd)
