"""How parameters begin: always float32, with a sharding, and with the same numbers on every mesh."""

import jax
import jax.numpy as jnp
from flax import nnx

from davinci_jax import sharding


def normal(key: jax.Array, shape: tuple[int, ...], std: float, *logical: str | None) -> nnx.Param:
    """A parameter drawn from a normal distribution of standard deviation `std`; axes named by `logical`."""
    return nnx.Param(std * jax.random.normal(key, shape, jnp.float32, out_sharding=sharding.out(*logical)))


def constant(value: float, shape: tuple[int, ...], *logical: str | None) -> nnx.Param:
    """A parameter of one value; axes named by `logical`."""
    return nnx.Param(jnp.full(shape, value, jnp.float32, out_sharding=sharding.out(*logical)))


def state(value: float, shape: tuple[int, ...], *logical: str | None) -> nnx.Variable:
    """What a model carries along and no gradient changes, beginning at one value; axes named by `logical`."""
    return nnx.Variable(jnp.full(shape, value, jnp.float32, out_sharding=sharding.out(*logical)))


def residual_std(init_std: float, num_layers: int) -> float:
    """Standard deviation of a projection that writes into the residual stream.

    A stack of L blocks adds 2 L terms to the stream; dividing by sqrt(2 L) keeps its variance independent of the
    depth (GPT-2, Radford et al. 2019).
    """
    return init_std / (2 * num_layers) ** 0.5
