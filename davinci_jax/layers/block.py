"""One pre-norm block of the decoder."""

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from davinci_jax.experiment import ModelConfig
from davinci_jax.layers.attention import Attention
from davinci_jax.layers.mlp import Mlp
from davinci_jax.layers.moe import Load, MoeMlp
from davinci_jax.layers.norm import RMSNorm


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), where mlp is an `Mlp` or, with `config.moe`, a `MoeMlp`."""

    def __init__(self, config: ModelConfig, key: jax.Array, dense: bool = False):
        """`dense` builds a block without experts whatever `config.moe` says."""
        attention_key, mlp_key = jax.random.split(key)
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config, attention_key)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = Mlp(config, mlp_key) if dense or config.moe is None else MoeMlp(config, mlp_key)

    def __call__(
        self, x: jax.Array, segment_ids: jax.Array, cos: jax.Array, sin: jax.Array, training: bool = False
    ) -> tuple[jax.Array, Load | None]:
        """[B, T, D] -> [B, T, D] and the load of the experts, if any; arguments as in `Attention` and `MoeMlp`."""
        x = x + self.attention(self.attention_norm(x), segment_ids, cos, sin)
        return self.feed_forward(x, training)

    def feed_forward(self, x: jax.Array, training: bool = False) -> tuple[jax.Array, Load | None]:
        """The second half of the block; tags its input "mid" for remat policies."""
        x = checkpoint_name(x, "mid")
        if isinstance(self.mlp, Mlp):
            return x + self.mlp(self.mlp_norm(x)), None
        y, load = self.mlp(self.mlp_norm(x), training)
        return x + y, load
