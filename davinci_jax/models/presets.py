"""Architectures by name. All use the Qwen2 vocabulary of 151,936 ids, rotary base 10,000 and 4,096 positions."""

from davinci_jax.experiment import ModelConfig

QWEN2_VOCABULARY = 151936


def davinci_3b() -> ModelConfig:
    """daVinci-LLM 3B (arXiv 2603.27164, table 4), the shape of Qwen2.5-3B: 3.086 B parameters, tied."""
    return ModelConfig(
        vocab_size=QWEN2_VOCABULARY,
        hidden_size=2048,
        num_layers=36,
        num_heads=16,
        num_kv_heads=2,
        head_size=128,
        mlp_size=11008,
    )


def davinci_1b() -> ModelConfig:
    """The shape of Qwen2-1.5B (arXiv 2407.10671, table 1): 1.544 B parameters, 1.310 B without the embedding, tied."""
    return ModelConfig(
        vocab_size=QWEN2_VOCABULARY,
        hidden_size=1536,
        num_layers=28,
        num_heads=12,
        num_kv_heads=2,
        head_size=128,
        mlp_size=8960,
    )


def davinci_160m() -> ModelConfig:
    """159 M parameters, tied, for ablations: 62 M in the blocks, 97 M in the embedding.

    A shape of our own, deep and thin: head 64 and two key and value heads as in Qwen2-0.5B (arXiv 2407.10671,
    table 1), MLP of 8/3 the width rounded up to 256 (Touvron et al. 2023, arXiv 2302.13971).
    """
    return ModelConfig(
        vocab_size=QWEN2_VOCABULARY,
        hidden_size=640,
        num_layers=14,
        num_heads=10,
        num_kv_heads=2,
        head_size=64,
        mlp_size=1792,
    )


def davinci_7b() -> ModelConfig:
    """The shape of Qwen2-7B (arXiv 2407.10671, table 1): 7.615 B parameters, untied."""
    return ModelConfig(
        vocab_size=QWEN2_VOCABULARY,
        hidden_size=3584,
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
        head_size=128,
        mlp_size=18944,
        tied_embeddings=False,
    )
