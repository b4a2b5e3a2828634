"""One pre-norm block of the decoder."""

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from davinci_jax.experiment import ModelConfig
from davinci_jax.layers.attention import Attention
from davinci_jax.layers.mlp import Mlp
from davinci_jax.layers.norm import RMSNorm


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, key: jax.Array):
        attention_key, mlp_key = jax.random.split(key)
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config, attention_key)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = Mlp(config, mlp_key)

    def __call__(self, x: jax.Array, segment_ids: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D]; the other arguments as in `Attention`."""
        x = x + self.attention(self.attention_norm(x), segment_ids, cos, sin)
        return self.feed_forward(x)

    def feed_forward(self, x: jax.Array) -> jax.Array:
        """The second half of the block; tags its input "mid" for remat policies."""
        x = checkpoint_name(x, "mid")
        return x + self.mlp(self.mlp_norm(x))
