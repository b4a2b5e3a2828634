"""The architecture of a decoder, as numbers."""

from __future__ import annotations

import dataclasses

from davinci_jax.errors import ConfigError
from davinci_jax.experiment import checks

REMAT_POLICIES = ("none", "save_mlp", "save_attention", "full")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3.1 frequency scaling of rotary embeddings (Grattafiori et al. 2024, arXiv 2407.21783).

    Attributes:
      factor: how many times longer the context is than the one the base was trained for.
      low_freq_factor: wavelengths above original_max_positions / low_freq_factor are divided by `factor`.
      high_freq_factor: wavelengths below original_max_positions / high_freq_factor stay as they are.
      original_max_positions: context length before scaling, in tokens.
    """

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    def __post_init__(self):
        checks.positive("model.rope_scaling", **dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A pre-norm decoder of the Qwen2 and Llama family.

    Attributes:
      vocab_size: rows of the embedding; at least the tokenizer's number of ids.
      hidden_size: width of the residual stream.
      num_layers: number of blocks.
      num_heads: query heads.
      num_kv_heads: key and value heads; divides `num_heads`.
      head_size: width of a head; even, because rotary embeddings turn pairs.
      mlp_size: inner width of SwiGLU.
      max_positions: longest sequence the model is meant for, in tokens.
      rope_base: base of the rotary frequencies.
      rope_scaling: Llama 3.1 scaling, or `None`.
      norm_eps: epsilon inside RMSNorm.
      qkv_bias: bias on the query, key and value projections (Qwen2) or none (Llama).
      tied_embeddings: output head is the embedding transposed.
      init_std: standard deviation of the normal initialisation; the two projections that write into the
        residual stream use init_std / sqrt(2 * num_layers) (GPT-2, Radford et al. 2019).
      compute_dtype: dtype of activations and matrix products; parameters are float32.
      remat: what the backward pass keeps of a block: "none" recomputes nothing, "save_mlp" keeps all matrix
        products, "save_attention" keeps q, k, v and the attention output, "full" keeps the block's input only.
      loss_chunk: tokens per chunk of the cross-entropy; bounds the logits held at once.
      z_loss: weight of the squared log-partition (PaLM, Chowdhery et al. 2022); 0 leaves it out.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    mlp_size: int
    max_positions: int = 4096
    rope_base: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    qkv_bias: bool = True
    tied_embeddings: bool = True
    init_std: float = 0.02
    compute_dtype: str = "bfloat16"
    remat: str = "full"
    loss_chunk: int = 4096
    z_loss: float = 0.0

    def __post_init__(self):
        checks.positive(
            "model",
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            mlp_size=self.mlp_size,
            max_positions=self.max_positions,
            rope_base=self.rope_base,
            norm_eps=self.norm_eps,
            init_std=self.init_std,
            loss_chunk=self.loss_chunk,
        )
        checks.within("model", 0, 1, z_loss=self.z_loss)
        checks.one_of("model", REMAT_POLICIES, remat=self.remat)
        checks.one_of("model", ("bfloat16", "float32", "float16"), compute_dtype=self.compute_dtype)
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                "model.num_kv_heads",
                self.num_kv_heads,
                f"does not divide num_heads = {self.num_heads}",
                "choose a divisor",
            )
        if self.head_size % 2:
            raise ConfigError(
                "model.head_size", self.head_size, "is odd, and rotary embeddings turn pairs", "choose an even width"
            )
