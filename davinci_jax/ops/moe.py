"""What a mixture of experts is made of: a router, experts on the tokens sent to them, and the router's losses."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

import pallas_kernels as kernels
from pallas_kernels import moe_mlp, route

__all__ = ["gather_weight", "load_balance_loss", "moe_mlp", "route", "router_logits", "router_z_loss", "sum_over"]


def router_logits(x: jax.Array, router: jax.Array) -> jax.Array:
    """x router, in float32 whatever the dtypes, because near ties decide which expert works.

    Args:
      x: [N, D].
      router: [D, E].

    Returns:
      [N, E] float32.
    """
    return jnp.matmul(x.astype(jnp.float32), router.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def gather_weight(weight: jax.Array, dtype: jax.typing.DTypeLike, axis_name: str, axis: int) -> jax.Array:
    """A weight that is divided along `axis` over a mesh axis, whole; for use inside `jax.shard_map`.

    It travels in `dtype`; its gradient is summed over the devices and divided again in the dtype of the weight.

    Args:
      weight: this device's part.
      dtype: of the result, the compute dtype.
      axis_name: the mesh axis.
      axis: the array axis that is divided over it.
    """
    return jax.lax.all_gather(weight.astype(dtype), axis_name, axis=axis, tiled=True)


def _gather_fwd(weight, dtype, axis_name, axis):
    return gather_weight(weight, dtype, axis_name, axis), jnp.zeros((), weight.dtype)


def _gather_bwd(dtype, axis_name, axis, residual, dwhole):
    dwhole = dwhole.astype(residual.dtype)
    return (jax.lax.psum_scatter(dwhole, axis_name, scatter_dimension=axis, tiled=True),)


gather_weight.defvjp(_gather_fwd, _gather_bwd)


def sum_over(x: jax.Array, axes: Sequence[str]) -> jax.Array:
    """Sum of `x` over mesh axes inside `jax.shard_map`; `x` itself where there are none."""
    return jax.lax.psum(x, tuple(axes)) if axes else x


def load_balance_loss(scores: jax.Array, counts: jax.Array, axes: Sequence[str] = ()) -> jax.Array:
    """`pallas_kernels`' load-balancing loss over the tokens of all devices: 1 where even, E where one expert gets all.

    Args:
      scores: [N, E] float32, of this device's tokens.
      counts: [E] int32, choices over all devices.
      axes: mesh axes that the tokens are divided over, inside `jax.shard_map`; every device has as many.

    Returns:
      float32 scalar, the same on every device; its gradient goes to `scores` alone.
    """
    # The loss is linear in the scores' mean shares, so the mean of the devices' losses is that of all tokens.
    return _mean_over(kernels.load_balancing_loss(scores, counts), axes)


def router_z_loss(logits: jax.Array, axes: Sequence[str] = ()) -> jax.Array:
    """`pallas_kernels`' router z-loss over the tokens of all devices.

    Args:
      logits: [N, E] float32, of this device's tokens.
      axes: as in `load_balance_loss`.

    Returns:
      float32 scalar, the same on every device.
    """
    return _mean_over(kernels.router_z_loss(logits), axes)


def _mean_over(x: jax.Array, axes: Sequence[str]) -> jax.Array:
    return jax.lax.pmean(x, tuple(axes)) if axes else x
