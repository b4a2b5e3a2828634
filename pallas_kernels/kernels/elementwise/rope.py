"""Rotary position embeddings, in the rotate-half layout of Llama and Qwen."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import layout, partition
from pallas_kernels.arguments import Backend
from pallas_kernels.errors import ArgumentError
from pallas_kernels.kernels.elementwise.checks import check_backend, check_floating

OUT = "rope_out"  # name for remat policies


def rope(x: jax.Array, cos: jax.Array, sin: jax.Array, *, backend: Backend = "auto", config: None = None) -> jax.Array:
    """Turns the pairs (x[i], x[i + K/2]) by the angle of their position (arXiv 2104.09864), in float32.

    The backward pass keeps `cos` and `sin` only. The result is named "rope_out" for remat policies. On explicit mesh
    axes it is divided like `x`, and the tables laid out to fit.

    Args:
      x: [..., T, H, K], K even; queries or keys.
      cos: [..., T, K / 2] of position x frequency, a constant: it gets no gradient.
      sin: [..., T, K / 2], likewise.
      backend: "auto" and "xla" are the same here.
      config: None; there is nothing to configure.

    Returns:
      [..., T, H, K] in the dtype of `x`.

    Raises:
      ArgumentError: shapes or dtypes that do not fit; it names the argument.
      UnsupportedError: backend="pallas".
    """
    check_backend("rope", backend, config)
    check_floating("rope", x=x, cos=cos, sin=sin)
    if x.ndim < 3 or x.shape[-1] % 2:
        remedy = "give (..., sequence, heads, head size), the last even"
        raise ArgumentError("rope", "x", f"has shape {x.shape}", remedy)
    for name, table in (("cos", cos), ("sin", sin)):
        if table.shape != (*x.shape[:-2], x.shape[-1] // 2):
            problem = f"has shape {table.shape} with x {x.shape}"
            raise ArgumentError("rope", name, problem, "give (..., sequence, half the head size)")
    x, cos, sin = (jnp.asarray(array) for array in (x, cos, sin))
    tokens = layout.entries(x)[:-2]
    cos, sin = layout.divide(cos, *tokens, None), layout.divide(sin, *tokens, None)
    return _rope(*partition.vary_alike(x, cos, sin))


@jax.custom_vjp
def _rope(x, cos, sin):
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return jnp.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1).astype(x.dtype)


def _fwd(x, cos, sin):
    return checkpoint_name(_rope(x, cos, sin), OUT), (cos, sin)


def _bwd(residuals, dout):
    cos, sin = residuals
    return _rope(dout, cos, -sin), None, None  # a rotation's transpose turns the other way


_rope.defvjp(_fwd, _bwd)
