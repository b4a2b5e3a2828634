"""Pure functions of arrays that a decoder is made of; they import jax, and of the project `pallas_kernels` alone.

Each op is the place where a kernel is chosen for the device it runs on.
"""

from davinci_jax.ops.attention import attention, masked_attention
from davinci_jax.ops.cross_entropy import cross_entropy, cross_entropy_sum
from davinci_jax.ops.embedding import embedding_lookup
from davinci_jax.ops.linear import linear
from davinci_jax.ops.moe import (
    gather_weight,
    load_balance_loss,
    moe_mlp,
    route,
    router_logits,
    router_z_loss,
    sum_over,
)
from davinci_jax.ops.norm import rms_norm
from davinci_jax.ops.rope import apply_rope, rope_frequencies, rope_table
from davinci_jax.ops.swiglu import swiglu

__all__ = [
    "apply_rope",
    "attention",
    "cross_entropy",
    "cross_entropy_sum",
    "embedding_lookup",
    "gather_weight",
    "linear",
    "load_balance_loss",
    "masked_attention",
    "moe_mlp",
    "rms_norm",
    "rope_frequencies",
    "rope_table",
    "route",
    "router_logits",
    "router_z_loss",
    "sum_over",
    "swiglu",
]
