"""The gated MLP of a block."""

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from davinci_jax import ops, sharding
from davinci_jax.experiment import ModelConfig
from davinci_jax.layers import parameters


class Mlp(nnx.Module):
    """SwiGLU MLP: down(silu(x gate) * (x up)), without bias.

    Parameters, float32: gate [D, F], up [D, F], down [F, D]. Products are in the dtype of the input.
    """

    def __init__(self, config: ModelConfig, key: jax.Array, size: int | None = None):
        """`size` is the inner width F; `None` takes `config.mlp_size`."""
        d, f, std = config.hidden_size, size or config.mlp_size, config.init_std
        gate_key, up_key, down_key = jax.random.split(key, 3)
        self.gate = parameters.normal(gate_key, (d, f), std, "embed", "mlp")
        self.up = parameters.normal(up_key, (d, f), std, "embed", "mlp")
        down_std = parameters.residual_std(std, config.num_layers)
        self.down = parameters.normal(down_key, (f, d), down_std, "mlp", "embed")

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D], same dtype; tags "mlp_in" for remat policies."""
        inner, outer = sharding.out("batch", "sequence", "mlp"), sharding.out("batch", "sequence", None)
        gate = checkpoint_name(ops.linear(x, self.gate[...], 1, inner), "mlp_in")
        up = checkpoint_name(ops.linear(x, self.up[...], 1, inner), "mlp_in")
        return ops.linear(ops.swiglu(gate, up), self.down[...], 1, outer)
