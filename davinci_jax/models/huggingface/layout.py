"""Which Hugging Face tensor is which part of the decoder.

Hugging Face stores one tensor a layer and a linear map as [out, in]; the decoder stacks the layers on axis 0, stores a
linear map as [in, out] and keeps heads as an axis of their own.
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
      layer: index on axis 0 of the parameter; `None` where the parameter is not stacked.
      linear: whether the file holds the transposed map, [out, in].
    """

    name: str
    shape: tuple[int, ...]
    path: str
    layer: int | None
    linear: bool

    def to_decoder(self, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The tensor as the decoder holds one layer of it, `shape`; a view, nothing is copied."""
        return (tensor.T if self.linear else tensor).reshape(shape)

    def from_decoder(self, parameter: np.ndarray) -> np.ndarray:
        """One layer of the parameter as the file holds it."""
        return parameter.reshape(self.shape[::-1]).T if self.linear else parameter.reshape(self.shape)


def entries(config: ModelConfig) -> list[Entry]:
    """All tensors of a model in the order of its forward pass."""
    d, v = config.hidden_size, config.vocab_size
    out = [Entry("model.embed_tokens.weight", (v, d), "embed", None, False)]
    for layer in range(config.num_layers):
        out += _layer_entries(config, layer)
    out.append(Entry("model.norm.weight", (d,), "final_norm.scale", None, False))
    if not config.tied_embeddings:
        out.append(Entry(HEAD, (v, d), "head", None, True))
    return out


def _layer_entries(config: ModelConfig, layer: int) -> list[Entry]:
    d, f = config.hidden_size, config.mlp_size
    heads, kv_heads = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
    weights = {
        "input_layernorm.weight": ("attention_norm.scale", (d,)),
        "self_attn.q_proj.weight": ("attention.q_proj", (heads, d)),
        "self_attn.k_proj.weight": ("attention.k_proj", (kv_heads, d)),
        "self_attn.v_proj.weight": ("attention.v_proj", (kv_heads, d)),
        "self_attn.o_proj.weight": ("attention.o_proj", (d, heads)),
        "post_attention_layernorm.weight": ("mlp_norm.scale", (d,)),
        "mlp.gate_proj.weight": ("mlp.gate", (f, d)),
        "mlp.up_proj.weight": ("mlp.up", (f, d)),
        "mlp.down_proj.weight": ("mlp.down", (d, f)),
    }
    if config.qkv_bias:
        for which, size in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            weights[f"self_attn.{which}_proj.bias"] = (f"attention.{which}_bias", (size,))
    return [
        Entry(f"model.layers.{layer}.{name}", shape, f"blocks.{path}", layer, len(shape) == 2)
        for name, (path, shape) in weights.items()
    ]
