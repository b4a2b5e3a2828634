"""Root mean square normalisation."""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import layout, partition
from pallas_kernels.arguments import Backend, as_number
from pallas_kernels.errors import ArgumentError
from pallas_kernels.kernels.elementwise.checks import check_backend, check_floating

OUT, INVERSE = "rms_norm_out", "rms_norm_inverse"  # names for remat policies


def rms_norm(
    x: jax.Array, scale: jax.Array, eps: float = 1e-6, *, backend: Backend = "auto", config: None = None
) -> jax.Array:
    """RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467): x / sqrt(mean(x^2) + eps) * scale, computed in float32.

    The backward pass keeps x, scale and one float32 for each row, named "rms_norm_inverse" for remat policies; the
    result is named "rms_norm_out". On explicit mesh axes the result is divided like `x`, and `scale` laid out to fit.

    Args:
      x: [..., D], any float dtype.
      scale: [D].
      eps: added to the mean square, a number of Python or NumPy.
      backend: "auto" and "xla" are the same here.
      config: None; there is nothing to configure.

    Returns:
      [..., D] in the dtype of `x`.

    Raises:
      ArgumentError: shapes or dtypes that do not fit; it names the argument.
      UnsupportedError: backend="pallas".
    """
    check_backend("rms_norm", backend, config)
    check_floating("rms_norm", x=x, scale=scale)
    if x.ndim == 0 or scale.shape != x.shape[-1:]:
        raise ArgumentError("rms_norm", "scale", f"has shape {scale.shape} with x {x.shape}", "give [D]")
    eps = as_number("rms_norm", "eps", eps)
    if eps < 0:
        raise ArgumentError("rms_norm", "eps", f"is {eps}", "give a number, not negative")
    x, scale = jnp.asarray(x), jnp.asarray(scale)
    scale = layout.divide(scale, layout.entries(x)[-1])
    return _rms_norm(*partition.vary_alike(x, scale), eps)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rms_norm(x, scale, eps):
    return _fwd(x, scale, eps)[0]


def _fwd(x, scale, eps):
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    out = (x32 * inverse * scale.astype(jnp.float32)).astype(x.dtype)
    return checkpoint_name(out, OUT), (x, scale, checkpoint_name(inverse, INVERSE))


def _bwd(eps, residuals, dout):
    x, scale, inverse = residuals
    normed, dout = x.astype(jnp.float32) * inverse, dout.astype(jnp.float32)
    dnormed = dout * scale.astype(jnp.float32)
    dx = inverse * (dnormed - normed * jnp.mean(dnormed * normed, axis=-1, keepdims=True))
    dscale = jnp.sum(dout * normed, axis=range(x.ndim - 1))
    return dx.astype(x.dtype), dscale.astype(scale.dtype)


_rms_norm.defvjp(_fwd, _bwd)
