"""The architecture of a decoder, as numbers."""

from __future__ import annotations

import dataclasses

from davinci_jax.errors import ConfigError
from davinci_jax.experiment import checks

REMAT_POLICIES = ("none", "save_mlp", "save_attention", "full")
ROUTER_SCORES = ("softmax", "sigmoid")


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
class Moe:
    """A mixture of fine-grained experts in place of the MLP (DeepSeekMoE, Dai et al. 2024, arXiv 2401.06066).

    Each token goes through the `experts_per_token` experts that score highest, weighed by their scores, and through
    the shared expert. Nothing is dropped unless `capacity` says so.

    Attributes:
      experts: routed experts of a layer.
      experts_per_token: the most experts that a token goes through, the shared one not counted.
      expert_size: inner width of a routed expert's SwiGLU.
      shared_size: inner width of the shared expert, through which every token goes; 0 leaves it out. Several shared
        experts are one of their summed width.
      first_dense: this many blocks at the bottom keep a plain MLP of `model.mlp_size`.
      score: "softmax" over the experts, or "sigmoid" of each logit (DeepSeek-V3, arXiv 2412.19437).
      groups: experts form this many equal groups, of which a token uses the best `groups_kept`.
      groups_kept: see `groups`.
      threshold: an expert is used only where its score, the bias included, is at least this; a token may then use
        fewer than `experts_per_token`, or none but the shared one. `None` always uses all of them.
      normalize: divide the weights of a token by their sum.
      scale: factor on the weights.
      bias_rate: step of the bias that balances the experts without a loss (Wang et al. 2024, arXiv 2408.15664):
        added to the scores for the choice alone, and moved after every step by bias_rate * sign(mean load - load).
        0 keeps the bias as it is, `None` has none.
      aux_loss: weight of the load-balancing loss of a layer (Switch, Fedus et al. 2021, arXiv 2101.03961).
      router_z_loss: weight of the squared log-partition of a layer's router (ST-MoE, Zoph et al. 2022,
        arXiv 2202.08906).
      capacity: in training, an expert takes at most capacity * tokens * experts_per_token / experts tokens of a
        device's part of a micro-batch and drops the others; `None` drops none. Evaluation and decoding never drop.
    """

    experts: int
    experts_per_token: int
    expert_size: int
    shared_size: int = 0
    first_dense: int = 0
    score: str = "softmax"
    groups: int = 1
    groups_kept: int = 1
    threshold: float | None = None
    normalize: bool = True
    scale: float = 1.0
    bias_rate: float | None = None
    aux_loss: float = 0.0
    router_z_loss: float = 0.0
    capacity: float | None = None

    def __post_init__(self):
        named = ("experts", "experts_per_token", "expert_size", "groups", "groups_kept", "scale", "capacity")
        checks.positive("model.moe", **{name: getattr(self, name) for name in named})
        checks.within("model.moe", 0, float("inf"), shared_size=self.shared_size, first_dense=self.first_dense)
        checks.within("model.moe", 0, 1, threshold=self.threshold, bias_rate=self.bias_rate)
        checks.within("model.moe", 0, 1, aux_loss=self.aux_loss, router_z_loss=self.router_z_loss)
        checks.one_of("model.moe", ROUTER_SCORES, score=self.score)
        if self.experts % self.groups:
            raise ConfigError(
                "model.moe.groups", self.groups, f"does not divide experts = {self.experts}", "choose a divisor"
            )
        if self.groups_kept > self.groups:
            raise ConfigError(
                "model.moe.groups_kept",
                self.groups_kept,
                f"is more than groups = {self.groups}",
                f"keep at most {self.groups}",
            )
        reachable = self.experts // self.groups * self.groups_kept
        if self.experts_per_token > reachable:
            kept = f" in {self.groups_kept} of {self.groups} groups" if self.groups > 1 else ""
            raise ConfigError(
                "model.moe.experts_per_token",
                self.experts_per_token,
                f"is more than the {reachable} experts{kept}",
                f"choose at most {reachable}",
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A pre-norm decoder of the Qwen and Llama family, dense or with experts.

    Attributes:
      vocab_size: rows of the embedding; at least the tokenizer's number of ids.
      hidden_size: width of the residual stream.
      num_layers: number of blocks.
      num_heads: query heads.
      num_kv_heads: key and value heads; divides `num_heads`.
      head_size: width of a head; even, because rotary embeddings turn pairs.
      mlp_size: inner width of SwiGLU, in the blocks that have no experts.
      max_positions: longest sequence the model is meant for, in tokens.
      rope_base: base of the rotary frequencies.
      rope_scaling: Llama 3.1 scaling, or `None`.
      norm_eps: epsilon inside RMSNorm.
      qkv_bias: bias on the query, key and value projections (Qwen2) or none (Llama).
      qk_norm: RMSNorm with a learned scale on each query and key head before the rotary embedding (Qwen3).
      moe: experts in place of the MLP, or `None`.
      tied_embeddings: output head is the embedding transposed.
      init_std: standard deviation of the normal initialisation; the two projections that write into the
        residual stream use init_std / sqrt(2 * num_layers) (GPT-2, Radford et al. 2019).
      compute_dtype: dtype of activations and matrix products; parameters are float32.
      remat: what the backward pass keeps of a block: "none" recomputes nothing, "save_mlp" keeps all matrix
        products, "save_attention" keeps q, k, v and the attention output, "full" keeps the block's input only;
        with experts all of them keep the router's logits too.
      loss_chunk: tokens per chunk of the cross-entropy, which bounds the logits held at once; the kernels of TPUs have
        blocks of their own.
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
    qk_norm: bool = False
    moe: Moe | None = None
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
        if self.moe is not None and self.moe.first_dense >= self.num_layers:
            raise ConfigError(
                "model.moe.first_dense",
                self.moe.first_dense,
                f"leaves no block of num_layers = {self.num_layers} with experts",
                "lower it, or leave model.moe out",
            )
