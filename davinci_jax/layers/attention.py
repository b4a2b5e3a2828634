"""Grouped-query attention with rotary positions."""

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from davinci_jax import ops, sharding
from davinci_jax.experiment import ModelConfig
from davinci_jax.layers import parameters
from davinci_jax.layers.norm import RMSNorm


class Attention(nnx.Module):
    """Causal self-attention with H query heads on G key and value heads of width K.

    Parameters, float32: q_proj [D, H, K], k_proj and v_proj [D, G, K], o_proj [H, K, D], and with
    `config.qkv_bias` q_bias [H, K], k_bias and v_bias [G, K] (else `None`). Biases begin at zero. With
    `config.qk_norm` the modules q_norm and k_norm have a scale [K] each, shared by the heads (else `None`).
    """

    def __init__(self, config: ModelConfig, key: jax.Array):
        d, h, g, k = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_size
        q_key, k_key, v_key, o_key = jax.random.split(key, 4)
        std = config.init_std
        self.q_proj = parameters.normal(q_key, (d, h, k), std, "embed", "heads", "head_size")
        self.k_proj = parameters.normal(k_key, (d, g, k), std, "embed", "kv_heads", "head_size")
        self.v_proj = parameters.normal(v_key, (d, g, k), std, "embed", "kv_heads", "head_size")
        o_std = parameters.residual_std(std, config.num_layers)
        self.o_proj = parameters.normal(o_key, (h, k, d), o_std, "heads", "head_size", "embed")
        bias = config.qkv_bias
        self.q_bias = parameters.constant(0.0, (h, k), "heads", "head_size") if bias else None
        self.k_bias = parameters.constant(0.0, (g, k), "kv_heads", "head_size") if bias else None
        self.v_bias = parameters.constant(0.0, (g, k), "kv_heads", "head_size") if bias else None
        self.q_norm = RMSNorm(k, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(k, config.norm_eps) if config.qk_norm else None

    def project(self, x: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values of [B, T, D], normalised where asked for, rotary positions applied.

        Args:
          x: [B, T, D] in the compute dtype.
          cos: [B, T, K / 2] float32, from `ops.rope_table`.
          sin: [B, T, K / 2] float32.

        Returns:
          q [B, T, H, K], k and v [B, T, G, K], in the dtype of `x`, tagged "qkv" for remat policies.
        """
        q = _project(x, self.q_proj, self.q_bias, "heads")
        k = _project(x, self.k_proj, self.k_bias, "kv_heads")
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = ops.apply_rope(q, cos, sin), ops.apply_rope(k, cos, sin)
        v = _project(x, self.v_proj, self.v_bias, "kv_heads")
        return checkpoint_name(q, "qkv"), checkpoint_name(k, "qkv"), checkpoint_name(v, "qkv")

    def output(self, heads: jax.Array) -> jax.Array:
        """Mixes heads [B, T, H, K] into [B, T, D]."""
        return ops.linear(heads, self.o_proj[...], 2, sharding.out("batch", "sequence", None))

    def __call__(self, x: jax.Array, segment_ids: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D]; `segment_ids` [B, T] as in `ops.attention`, `cos` and `sin` as in `project`."""
        return self.output(_local_attention(*self.project(x, cos, sin), segment_ids))


def _project(x: jax.Array, weight: nnx.Param, bias: nnx.Param | None, heads: str) -> jax.Array:
    y = ops.linear(x, weight[...], 1, sharding.out("batch", "sequence", heads, "head_size"))
    return y if bias is None else (y + bias[...]).astype(x.dtype)  # in float32, and so is the gradient's sum


def _local_attention(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """`ops.attention` on each device's own rows and heads; sequences are whole on a device."""
    if jax.sharding.get_abstract_mesh().empty:
        return ops.attention(q, k, v, segment_ids)
    heads = sharding.spec("batch", None, "heads", "head_size")
    kv_heads = sharding.spec("batch", None, "kv_heads", "head_size")
    rows = sharding.spec("batch", None)
    specs = (heads, kv_heads, kv_heads, rows)
    arrays = (jax.sharding.reshard(x, s) for x, s in zip((q, k, v, segment_ids), specs, strict=True))
    out = jax.shard_map(ops.attention, in_specs=specs, out_specs=heads)(*arrays)
    return sharding.constrain(out, "batch", "sequence", "heads", "head_size")
