"""Root mean square normalisation."""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467): x / sqrt(mean(x^2) + eps) * scale.

    Args:
      x: [..., D], any float dtype; computed in float32.
      scale: [D].
      eps: added to the mean square.

    Returns:
      [..., D] in the dtype of `x`.
    """
    return _fwd(x, scale, eps)[0]


def _fwd(x, scale, eps):
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * inverse * scale.astype(jnp.float32)).astype(x.dtype), (x, scale, inverse)


def _bwd(eps, residuals, dout):
    x, scale, inverse = residuals
    normed, dout = x.astype(jnp.float32) * inverse, dout.astype(jnp.float32)
    dnormed = dout * scale.astype(jnp.float32)
    dx = inverse * (dnormed - normed * jnp.mean(dnormed * normed, axis=-1, keepdims=True))
    dscale = jnp.sum(dout * normed, axis=range(x.ndim - 1))
    return dx.astype(x.dtype), dscale.astype(scale.dtype)


rms_norm.defvjp(_fwd, _bwd)
