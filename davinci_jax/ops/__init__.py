"""Pure functions of arrays that a decoder is made of; they import jax and nothing else of the project.

Each op is the place where a kernel is chosen for the device it runs on.
"""

from davinci_jax.ops.attention import attention, masked_attention
from davinci_jax.ops.cross_entropy import cross_entropy
from davinci_jax.ops.embedding import embedding_lookup
from davinci_jax.ops.linear import linear
from davinci_jax.ops.norm import rms_norm
from davinci_jax.ops.rope import apply_rope, rope_frequencies, rope_table
from davinci_jax.ops.swiglu import swiglu

__all__ = [
    "apply_rope",
    "attention",
    "cross_entropy",
    "embedding_lookup",
    "linear",
    "masked_attention",
    "rms_norm",
    "rope_frequencies",
    "rope_table",
    "swiglu",
]
