"""Flax NNX modules: parameters with logical axis names, whose bodies call `davinci_jax.ops`.

A module is a pytree: build it once under a mesh, then pass it through `jax.jit`, `jax.grad`, `jax.vmap` and
`jax.lax.scan` like any other tree.
"""

from davinci_jax.layers.attention import Attention
from davinci_jax.layers.block import Block
from davinci_jax.layers.mlp import Mlp
from davinci_jax.layers.moe import Load, MoeMlp
from davinci_jax.layers.norm import RMSNorm

__all__ = ["Attention", "Block", "Load", "Mlp", "MoeMlp", "RMSNorm"]
