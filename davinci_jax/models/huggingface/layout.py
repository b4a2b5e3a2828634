"""Which Hugging Face tensor is which part of the decoder.

Hugging Face stores one tensor a layer, one an expert, and a linear map as [out, in]; the decoder stacks the layers on
axis 0 and the experts on axis 1, stores a linear map as [in, out] and keeps heads as an axis of their own.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from davinci_jax.experiment import ModelConfig

HEAD = "lm_head.weight"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One Hugging Face tensor.

    Attributes:
      name: its name, such as "model.layers.3.mlp.up_proj.weight".
      shape: its shape in the file.
      path: where the parameter lies in the decoder, such as "blocks.mlp.up".
      index: which part of the parameter it is, on its first axes: (), (layer,) or (layer, expert).
      linear: whether the file holds the transposed map, [out, in].
    """

    name: str
    shape: tuple[int, ...]
    path: str
    index: tuple[int, ...]
    linear: bool

    def to_decoder(self, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The tensor as the decoder holds it at `index`, of `shape`; a view, nothing is copied."""
        return (tensor.T if self.linear else tensor).reshape(shape)

    def from_decoder(self, parameter: np.ndarray) -> np.ndarray:
        """The parameter at `index` as the file holds it."""
        return parameter.reshape(self.shape[::-1]).T if self.linear else parameter.reshape(self.shape)


def entries(config: ModelConfig) -> list[Entry]:
    """All tensors of a model in the order of its forward pass."""
    d, v = config.hidden_size, config.vocab_size
    out = [Entry("model.embed_tokens.weight", (v, d), "embed", (), False)]
    for layer in range(config.num_layers):
        out += _layer_entries(config, layer)
    out.append(Entry("model.norm.weight", (d,), "final_norm.scale", (), False))
    if not config.tied_embeddings:
        out.append(Entry(HEAD, (v, d), "head", (), True))
    return out


def _layer_entries(config: ModelConfig, layer: int) -> list[Entry]:
    """The tensors of one block, whose parameters are in `blocks` or, at the bottom of a mixture, in `dense_blocks`."""
    dense = config.moe.first_dense if config.moe else 0
    stack, index = ("dense_blocks", layer) if layer < dense else ("blocks", layer - dense)
    weights = _attention(config)
    weights |= _mlp("mlp", "mlp", config, config.mlp_size) if config.moe is None or layer < dense else _moe(config)
    found = []
    for name, (path, shape) in weights.items():
        linear = len(shape) == 2
        where = [(name, (index,))]
        if "{expert}" in name:
            where = [(name.format(expert=expert), (index, expert)) for expert in range(config.moe.experts)]
        found += [Entry(f"model.layers.{layer}.{n}", shape, f"{stack}.{path}", i, linear) for n, i in where]
    return found


def _attention(config: ModelConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensor of a block -> (parameter, shape): attention and the norms."""
    d, heads, kv_heads = config.hidden_size, config.num_heads * config.head_size, config.num_kv_heads * config.head_size
    weights = {
        "input_layernorm.weight": ("attention_norm.scale", (d,)),
        "self_attn.q_proj.weight": ("attention.q_proj", (heads, d)),
        "self_attn.k_proj.weight": ("attention.k_proj", (kv_heads, d)),
        "self_attn.v_proj.weight": ("attention.v_proj", (kv_heads, d)),
        "self_attn.o_proj.weight": ("attention.o_proj", (d, heads)),
        "post_attention_layernorm.weight": ("mlp_norm.scale", (d,)),
    }
    if config.qkv_bias:
        for which, size in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            weights[f"self_attn.{which}_proj.bias"] = (f"attention.{which}_bias", (size,))
    if config.qk_norm:
        for which in ("q", "k"):
            weights[f"self_attn.{which}_norm.weight"] = (f"attention.{which}_norm.scale", (config.head_size,))
    return weights


def _mlp(name: str, path: str, config: ModelConfig, size: int, prefix: str = "") -> dict:
    d = config.hidden_size
    return {
        f"{name}.gate_proj.weight": (f"{path}.{prefix}gate", (size, d)),
        f"{name}.up_proj.weight": (f"{path}.{prefix}up", (size, d)),
        f"{name}.down_proj.weight": (f"{path}.{prefix}down", (d, size)),
    }


def _moe(config: ModelConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """As `_attention`, for the experts; "{expert}" stands for the number of one."""
    moe = config.moe
    weights = {"mlp.gate.weight": ("mlp.router", (moe.experts, config.hidden_size))}
    if moe.bias_rate is not None:
        weights["mlp.gate.e_score_correction_bias"] = ("mlp.balance", (moe.experts,))
    weights |= _mlp("mlp.experts.{expert}", "mlp", config, moe.expert_size, "expert_")
    if moe.shared_size:
        weights |= _mlp("mlp.shared_experts", "mlp.shared", config, moe.shared_size)
    return weights
