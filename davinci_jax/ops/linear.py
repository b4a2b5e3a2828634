"""Matrix products with parameters."""

import functools

import jax
from jax.sharding import PartitionSpec


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def linear(x: jax.Array, weight: jax.Array, axes: int = 1, out_sharding: PartitionSpec | None = None) -> jax.Array:
    """Contracts the last `axes` axes of `x` with the first of `weight`.

    The product is in the dtype of `x`, accumulated in float32. The gradient of `weight` is written in the weight's
    own dtype straight from the product, so that float32 masters get gradients that were never rounded to bfloat16.

    Args:
      x: [..., *in] in the compute dtype.
      weight: [*in, *out], float32 or the compute dtype.
      axes: how many axes *in has.
      out_sharding: sharding of the result under a mesh with explicit axes.

    Returns:
      [..., *out] in the dtype of `x`.
    """
    return _product(x, weight.astype(x.dtype), range(x.ndim - axes, x.ndim), range(axes), x.dtype, out_sharding)


def _product(lhs, rhs, lhs_axes, rhs_axes, dtype, out_sharding):
    contracting = (tuple(lhs_axes), tuple(rhs_axes))
    return jax.lax.dot_general(
        lhs, rhs, (contracting, ((), ())), preferred_element_type=dtype, out_sharding=out_sharding
    )


def _fwd(x, weight, axes, out_sharding):
    return linear(x, weight, axes, out_sharding), (x, weight)


def _bwd(axes, out_sharding, residuals, dy):
    x, weight = residuals
    rows = x.ndim - axes
    dx = _product(dy, weight.astype(x.dtype), range(rows, dy.ndim), range(axes, weight.ndim), x.dtype, _like(x))
    # Both operands keep rows first: written as autodiff would, XLA on CPU copies each to its transpose.
    dweight = _product(x, dy, range(rows), range(rows), weight.dtype, _like(weight))
    return dx, dweight


def _like(array: jax.Array) -> PartitionSpec | None:
    """Sharding of an array, for `out_sharding`."""
    return None if jax.sharding.get_abstract_mesh().empty else jax.typeof(array).sharding.spec


linear.defvjp(_fwd, _bwd)
