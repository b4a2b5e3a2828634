"""Architectures by name. All but the tiny one have the Qwen2 vocabulary of 151,936 ids and 4,096 positions."""

from davinci_jax.experiment import ModelConfig, Moe

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


def davinci_moe_3b() -> ModelConfig:
    """3.061 B parameters, of which 0.598 B work on a token, tied: 64 fine-grained experts, six and a shared one used.

    A shape of our own: width and depth of Qwen3-0.6B (arXiv 2505.09388, table 1), heads of davinci_3b with QK-norm,
    experts of half the width as in DeepSeekMoE 16B (arXiv 2401.06066, table 1: 64 routed, six used, the first block
    dense). In millions: embedding and head 155.6; attention 4.72 a block; experts 27 x 64 x 1.573, of which 27 x 6;
    shared 27 x 1.573; routers 27 x 0.066; first MLP 11.0, as wide as the seven experts that a token uses later.
    Active parameters count the embedding, because it is the head too; without it they are 0.442 B.

    Sigmoid scores balanced by a bias (arXiv 2412.19437). Weights add up to 2.45, the root of six: experts that
    disagree then write as much into the residual stream as one MLP does (Moonlight, arXiv 2502.16982, appendix).
    """
    return ModelConfig(
        vocab_size=QWEN2_VOCABULARY,
        hidden_size=1024,
        num_layers=28,
        num_heads=16,
        num_kv_heads=2,
        head_size=128,
        mlp_size=7 * 512,
        qkv_bias=False,
        qk_norm=True,
        moe=Moe(
            experts=64,
            experts_per_token=6,
            expert_size=512,
            shared_size=512,
            first_dense=1,
            score="sigmoid",
            scale=2.45,
            bias_rate=1e-3,
        ),
    )


def davinci_moe_tiny() -> ModelConfig:
    """davinci_moe_3b in small, for the quickstart: 2.06 M parameters, 1.02 M of them active, 4,096 ids, float32."""
    return ModelConfig(
        vocab_size=4096,
        hidden_size=128,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_size=32,
        mlp_size=192,
        max_positions=256,
        qkv_bias=False,
        qk_norm=True,
        init_std=128**-0.5,
        compute_dtype="float32",
        remat="none",
        loss_chunk=512,
        moe=Moe(
            experts=16,
            experts_per_token=2,
            expert_size=64,
            shared_size=64,
            first_dense=1,
            score="sigmoid",
            scale=1.41,
            bias_rate=1e-3,
        ),
    )
