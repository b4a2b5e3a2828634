"""Scores on Hopper: from products of queries and keys to exponents of two, and which of them are visible."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.kernels import hopper_device as device
from pallas_kernels.kernels.attention.spec import AttentionSpec

LOG2E = math.log2(math.e)


def shared(ref, batch: jax.Array) -> jax.Array | int:
    """The index along a leading dimension, which is 1 where all of the batch is alike."""
    return batch if ref.shape[0] > 1 else 0


def linear(spec: AttentionSpec) -> bool:
    """Whether scores need nothing but a positive factor."""
    return spec.soft_cap is None and spec.scale > 0


def exponent(spec: AttentionSpec) -> float:
    """What scores out of `capped` are multiplied by to become exponents of two."""
    return spec.scale * LOG2E if linear(spec) else LOG2E


def capped(scores: jax.Array, spec: AttentionSpec) -> jax.Array:
    """Soft-capped and scaled scores; as they are where `exponent` can do the scaling."""
    if spec.soft_cap is not None:
        # tanh through exp2: the instruction for tanh is good to 11 bits only.
        power = jnp.exp2(scores * (2 * LOG2E * spec.scale / spec.soft_cap))
        return spec.soft_cap - 2 * spec.soft_cap / (power + 1)
    return scores * spec.scale if spec.scale <= 0 else scores


def uncapped(gradient: jax.Array, scores: jax.Array, spec: AttentionSpec) -> jax.Array:
    """The gradient before `capped`, which gave `scores`, without the scale."""
    if spec.soft_cap is None:
        return gradient
    slope = scores * (1 / spec.soft_cap)
    return gradient * (1 - slope * slope)


class Mask:
    """Which elements of a tile of scores are visible, for queries along one axis and keys along the other."""

    def __init__(self, limits: Sequence, batch: jax.Array, queries, shape: tuple[int, int], queries_along: int):
        """`limits`: references to the arrays of `Bounds`; `queries`: the slice of the tile's queries."""
        first, last, *positions = limits
        self._shape, self._batch, self._axis = shape, batch, queries_along
        self._first, self._last = (self._vector(x, queries, queries_along) for x in (first, last))
        self._positions = None
        if positions:
            lowest, highest, self._positions = positions
            self._lowest, self._highest = (self._vector(x, queries, queries_along) for x in (lowest, highest))

    def __call__(self, scores: jax.Array, begin: jax.Array, hidden: float) -> jax.Array:
        """`scores` with `hidden` for invisible ones; the tile's keys begin with number `begin`."""
        keys = device.iota(self._shape, 1 - self._axis)
        seen = (keys >= self._spread(self._first - begin)) & (keys < self._spread(self._last - begin))
        if self._positions is not None:
            block = pl.ds(begin, self._shape[1 - self._axis])
            position = self._spread(self._vector(self._positions, block, 1 - self._axis), 1 - self._axis)
            seen &= (position >= self._spread(self._lowest)) & (position <= self._spread(self._highest))
        return jnp.where(seen, scores, hidden)

    def _vector(self, ref, window, axis: int) -> jax.Array:
        return device.load_vector(ref.at[shared(ref, self._batch), window], reduced=1 - axis)

    def _spread(self, x: jax.Array, axis: int | None = None) -> jax.Array:
        return lax.broadcast_in_dim(x, self._shape, (self._axis if axis is None else axis,))
