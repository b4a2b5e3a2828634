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
    """Number of parameters; a tied head counts once."""
    embeddings = config.vocab_size * config.hidden_size * (1 if config.tied_embeddings else 2)
    return embeddings + config.num_layers * num_layer_params(config) + config.hidden_size


def num_layer_params(config: ModelConfig) -> int:
    """Number of parameters of one block, norms and biases included."""
    bias = (config.num_heads + 2 * config.num_kv_heads) * config.head_size if config.qkv_bias else 0
    return _layer_matrices(config) + bias + 2 * config.hidden_size


def flops_per_token(config: ModelConfig, sequence_length: int, *, causal: bool = True) -> float:
    """Training FLOPs of one token: 6 x matrix entries + 12 L H K T of attention, halved where causal.

    Args:
      config: the model.
      sequence_length: T, the tokens a sequence holds; documents packed into it are not taken into account.
      causal: count the half of the attention matrix that causality leaves; else all of it, the PaLM convention.

    Returns:
      FLOPs per token, forward and backward. The output head counts, the embedding look-up does not.
    """
    matrices = config.num_layers * _layer_matrices(config) + config.vocab_size * config.hidden_size
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


def _layer_matrices(config: ModelConfig) -> int:
    """Entries of the seven matrices of a block."""
    attention = 2 * (config.num_heads + config.num_kv_heads) * config.head_size
    return config.hidden_size * (attention + 3 * config.mlp_size)
