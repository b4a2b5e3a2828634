"""Text from a decoder: batched sampling with a cache of keys and values."""

from davinci_jax.inference.generate import generate, generate_ids
from davinci_jax.inference.sampling import Sampling

__all__ = ["Sampling", "generate", "generate_ids"]
