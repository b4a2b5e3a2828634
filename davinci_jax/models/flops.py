"""Parameters, training FLOPs, and the peak rates that turn them into a utilisation.

A multiply and an add are two FLOPs. Training costs three forward passes: one forward, two backward. Recomputation
under a remat policy is not counted, so the utilisation is MFU (Chowdhery et al. 2022, arXiv 2204.02311, appendix B).
"""

from __future__ import annotations

from davinci_jax.experiment import ModelConfig

# Dense peak of one JAX device in TFLOP/s: (bfloat16 or float16, float32 at JAX's default matmul precision).
# On a TPU the latter runs as one bfloat16 pass, on a GPU as TF32. A device is a chip, on TPU7x one of its two cores.
# The first prefix of `device_kind` that fits counts.
# Sources: Google Cloud TPU documentation, system architecture pages of v4, v5e, v5p, v6e and TPU7x (Ironwood,
# 2307 a chip); NVIDIA data sheets of A100 (2021), H100 (2023), H200 (2024) and HGX B200 (2025), figures without
# sparsity; SXM boards unless named.
_PEAK_TFLOPS = (
    ("TPU v4", 275.0, 275.0),
    ("TPU v5 lite", 197.0, 197.0),
    ("TPU v5e", 197.0, 197.0),
    ("TPU v5", 459.0, 459.0),
    ("TPU v6 lite", 918.0, 918.0),
    ("TPU v6e", 918.0, 918.0),
    ("TPU7x", 1153.5, 1153.5),
    ("NVIDIA A100", 312.0, 156.0),
    ("NVIDIA H100 PCIe", 756.0, 378.0),
    ("NVIDIA H100 NVL", 835.0, 417.5),
    ("NVIDIA H100", 989.4, 494.7),
    ("NVIDIA GH200", 989.4, 494.7),
    ("NVIDIA H200 NVL", 835.0, 417.5),
    ("NVIDIA H200", 989.4, 494.7),
    ("NVIDIA B200", 2250.0, 1125.0),
)


def num_params(config: ModelConfig) -> int:
    """Number of parameters; a tied head counts once. The bias that balances experts is state and does not count."""
    embeddings = config.vocab_size * config.hidden_size * (1 if config.tied_embeddings else 2)
    return embeddings + _blocks_params(config, active=False) + config.hidden_size


def num_active_params(config: ModelConfig) -> int:
    """Number of parameters that work on one token: all but the routed experts that it is not sent to.

    A tied embedding counts, because as the head it multiplies every token; an untied one counts with the head, as in
    `num_params`.
    """
    return num_params(config) - _blocks_params(config, active=False) + _blocks_params(config, active=True)


def _blocks_params(config: ModelConfig, active: bool) -> int:
    dense, routed = _num_blocks(config)
    mlps = dense * _mlp_matrices(config) + routed * _moe_matrices(config, active)
    return config.num_layers * _attention_params(config) + mlps


def flops_per_token(config: ModelConfig, sequence_length: int, *, causal: bool = True) -> float:
    """Training FLOPs of one token: 6 x matrix entries + 12 L H K T of attention, halved where causal.

    Args:
      config: the model.
      sequence_length: T, the tokens a sequence holds; documents packed into it are not taken into account.
      causal: count the half of the attention matrix that causality leaves; else all of it, the PaLM convention.

    Returns:
      FLOPs per token, forward and backward. The output head counts, the embedding look-up does not; of the experts
      those count that a token is sent to, the router and the shared one included.
    """
    dense, routed = _num_blocks(config)
    mlps = dense * _mlp_matrices(config) + routed * _moe_matrices(config, active=True)
    matrices = config.num_layers * _attention_matrices(config) + mlps + config.vocab_size * config.hidden_size
    width = config.num_heads * config.head_size
    attention = 12.0 * config.num_layers * width * sequence_length
    return 6.0 * matrices + (attention / 2 if causal else attention)


def peak_flops(device_kind: str, dtype: str = "bfloat16") -> float | None:
    """Dense peak of one device in FLOP/s, or `None` for a device or dtype that the table lacks.

    Args:
      device_kind: `jax.Device.device_kind`.
      dtype: compute dtype of the matrix products: bfloat16, float16 or float32.
    """
    column = {"bfloat16": 1, "float16": 1, "float32": 2}.get(dtype)
    for row in _PEAK_TFLOPS:
        if column is not None and device_kind.startswith(row[0]):
            return row[column] * 1e12
    return None


def _num_blocks(config: ModelConfig) -> tuple[int, int]:
    """Number of blocks (without experts, with experts)."""
    dense = config.num_layers if config.moe is None else config.moe.first_dense
    return dense, config.num_layers - dense


def _attention_matrices(config: ModelConfig) -> int:
    """Entries of the four matrices of a block's attention."""
    return config.hidden_size * 2 * (config.num_heads + config.num_kv_heads) * config.head_size


def _attention_params(config: ModelConfig) -> int:
    """Parameters of a block without its MLP: attention with biases, and the norms."""
    bias = (config.num_heads + 2 * config.num_kv_heads) * config.head_size if config.qkv_bias else 0
    norms = 2 * config.hidden_size + (2 * config.head_size if config.qk_norm else 0)
    return _attention_matrices(config) + bias + norms


def _mlp_matrices(config: ModelConfig) -> int:
    """Entries of the three matrices of a plain MLP."""
    return 3 * config.hidden_size * config.mlp_size


def _moe_matrices(config: ModelConfig, active: bool) -> int:
    """Entries of a block's router and experts, all of them or those that work on one token."""
    moe = config.moe
    if moe is None:
        return 0
    experts = moe.experts_per_token if active else moe.experts
    return config.hidden_size * (moe.experts + 3 * (experts * moe.expert_size + moe.shared_size))
