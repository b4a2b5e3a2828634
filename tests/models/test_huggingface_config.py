"""config.json to ModelConfig and back; what the decoder does not do is refused by name."""

import dataclasses
import json

import pytest

from davinci_jax.errors import ConfigError
from davinci_jax.experiment import ModelConfig, Moe, RopeScaling
from davinci_jax.models import flops, huggingface, presets

# Qwen2.5-3B, as published (transformers 4 keys).
QWEN2_5_3B = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 32768,
    "max_window_layers": 36,
    "model_type": "qwen2",
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
# Llama 3.2 1B, as published.
LLAMA_3_2_1B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}

# Qwen3-30B-A3B, as published.
QWEN3_30B_A3B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
# The keys of GLM-4.5 with heads that are turned whole.
GLM4_MOE = {
    "architectures": ["Glm4MoeForCausalLM"],
    "attention_bias": True,
    "first_k_dense_replace": 3,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "initializer_range": 0.02,
    "intermediate_size": 12288,
    "max_position_embeddings": 131072,
    "model_type": "glm4_moe",
    "moe_intermediate_size": 1536,
    "n_group": 4,
    "n_routed_experts": 160,
    "n_shared_experts": 2,
    "norm_topk_prob": True,
    "num_attention_heads": 96,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 92,
    "num_key_value_heads": 8,
    "partial_rotary_factor": 1.0,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "routed_scaling_factor": 2.5,
    "tie_word_embeddings": False,
    "topk_group": 2,
    "use_qk_norm": True,
    "vocab_size": 151552,
}
QWEN3_0_6B = {key: QWEN2_5_3B[key] for key in QWEN2_5_3B if key not in ("architectures", "model_type")}
QWEN3_0_6B |= {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 128, "hidden_size": 1024,
    "attention_bias": False,
}  # fmt: skip


def test_qwen3_30b_a3b():
    config = huggingface.from_dict(QWEN3_30B_A3B)
    assert config.moe == Moe(experts=128, experts_per_token=8, expert_size=768, normalize=True)
    assert (config.qk_norm, config.qkv_bias, config.head_size) == (True, False, 128)
    assert flops.num_params(config) / 1e9 == pytest.approx(30.5, abs=0.05)
    assert flops.num_active_params(config) / 1e9 == pytest.approx(3.3, abs=0.1)  # as its name says
    renamed = {key: value for key, value in QWEN3_30B_A3B.items() if key != "num_experts"} | {"num_local_experts": 128}
    assert huggingface.from_dict(renamed) == config


def test_glm4_moe():
    config = huggingface.from_dict(GLM4_MOE)
    assert config.moe == Moe(
        experts=160, experts_per_token=8, expert_size=1536, shared_size=3072, first_dense=3, score="sigmoid", groups=4,
        groups_kept=2, scale=2.5, bias_rate=0.0,
    )  # fmt: skip
    assert (config.qk_norm, config.qkv_bias, config.norm_eps) == (True, True, 1e-5)


def test_the_shipped_mixture_has_a_stock_architecture():
    config = presets.davinci_moe_3b()
    raw = huggingface.to_dict(config)
    assert raw["architectures"] == ["Glm4MoeForCausalLM"]
    kept = dataclasses.replace(
        config, moe=dataclasses.replace(config.moe, bias_rate=0.0), compute_dtype="bfloat16", remat="full"
    )
    assert huggingface.from_dict(raw) == kept


@pytest.mark.parametrize(
    ("model", "moe", "told"),
    [
        ({"qkv_bias": True, "moe": None}, {}, "qkv_bias"),
        ({}, {"threshold": 0.1}, "moe.threshold = 0.1"),
        ({}, {"bias_rate": None}, "moe.bias_rate"),
        ({}, {"shared_size": 0}, "moe.shared_size"),
        ({}, {"shared_size": 700}, "moe.shared_size"),
        ({}, {"score": "softmax"}, "moe.shared_size"),
        ({}, {"score": "softmax", "shared_size": 0}, "moe.scale"),
        ({"qk_norm": False}, {"score": "softmax"}, "qk_norm"),
    ],
)
def test_mixtures_without_a_stock_architecture(model, moe, told):
    config = presets.davinci_moe_3b()
    config = dataclasses.replace(config, **{"moe": dataclasses.replace(config.moe, **moe), **model})
    with pytest.raises(ConfigError) as caught:
        huggingface.to_dict(config)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_qwen2_5_3b():
    assert huggingface.from_dict(QWEN2_5_3B) == ModelConfig(
        vocab_size=151936,
        hidden_size=2048,
        num_layers=36,
        num_heads=16,
        num_kv_heads=2,
        head_size=128,
        mlp_size=11008,
        max_positions=32768,
        rope_base=1e6,
        norm_eps=1e-6,
        qkv_bias=True,
        tied_embeddings=True,
    )


def test_llama_3_2_1b():
    config = huggingface.from_dict(LLAMA_3_2_1B)
    assert (config.head_size, config.norm_eps, config.rope_base) == (64, 1e-5, 5e5)
    assert not config.qkv_bias
    assert config.rope_scaling == RopeScaling(
        factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192
    )


def test_new_and_old_rope_keys_mean_the_same():
    new = {key: value for key, value in LLAMA_3_2_1B.items() if key not in ("rope_theta", "rope_scaling")}
    new["rope_parameters"] = {**LLAMA_3_2_1B["rope_scaling"], "rope_theta": 500000.0}
    assert huggingface.from_dict(new) == huggingface.from_dict(LLAMA_3_2_1B)
    both = LLAMA_3_2_1B | {"rope_parameters": new["rope_parameters"]}
    assert huggingface.from_dict(both) == huggingface.from_dict(LLAMA_3_2_1B)


def test_llama_2_has_no_rope_and_no_kv_keys():
    gone = ("rope_theta", "rope_scaling", "head_dim", "num_key_value_heads", "max_position_embeddings")
    config = huggingface.from_dict({key: value for key, value in LLAMA_3_2_1B.items() if key not in gone})
    assert (config.rope_base, config.num_kv_heads, config.head_size, config.max_positions) == (1e4, 32, 64, 2048)


@pytest.mark.parametrize(
    "raw", [QWEN2_5_3B, LLAMA_3_2_1B, QWEN2_5_3B | {"head_dim": 96}, QWEN3_0_6B, QWEN3_30B_A3B, GLM4_MOE]
)
def test_round_trip(raw):
    config = huggingface.from_dict(raw)
    written = json.loads(json.dumps(huggingface.to_dict(config)))
    assert huggingface.from_dict(written) == config
    assert written["architectures"] == raw["architectures"]
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == raw["rope_theta"]


@pytest.mark.parametrize(
    ("base", "change", "told"),
    [
        (QWEN2_5_3B, {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}, "architectures"),
        (QWEN2_5_3B, {"architectures": None, "model_type": "mistral"}, "model_type = 'mistral'"),
        (QWEN2_5_3B, {"architectures": None, "model_type": None}, "model_type"),
        (QWEN2_5_3B, {"model_type": "llama"}, "model_type = 'llama': contradicts"),
        (QWEN2_5_3B, {"architectures": ["Qwen2ForCausalLM", "LlamaForCausalLM"]}, "architectures"),
        (QWEN2_5_3B, {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        (QWEN2_5_3B, {"use_sliding_window": True, "max_window_layers": 28}, "use_sliding_window = True"),
        (QWEN2_5_3B, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        (QWEN2_5_3B, {"attention_bias": False}, "attention_bias = False"),
        (QWEN2_5_3B, {"quantization_config": {"bits": 4}}, "quantization_config"),
        (QWEN2_5_3B, {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling"),
        (QWEN2_5_3B, {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_parameters"),
        (QWEN2_5_3B, {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters"),
        (QWEN2_5_3B, {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}, "rope_theta = 1000000.0"),
        (QWEN2_5_3B, {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        (QWEN2_5_3B, {"hidden_size": None}, "hidden_size: is missing"),
        (QWEN2_5_3B, {"hidden_size": "2048"}, "hidden_size = '2048': is not a whole number"),
        (QWEN2_5_3B, {"num_hidden_layers": True}, "num_hidden_layers = True"),
        (QWEN2_5_3B, {"num_hidden_layers": 0}, "num_layers = 0"),
        (QWEN2_5_3B, {"num_attention_heads": 15}, "num_attention_heads = 15"),
        (QWEN2_5_3B, {"num_attention_heads": 0}, "num_attention_heads = 0"),
        (QWEN2_5_3B, {"num_key_value_heads": 3}, "num_kv_heads = 3"),
        (QWEN2_5_3B, {"tie_word_embeddings": "yes"}, "tie_word_embeddings = 'yes'"),
        (QWEN2_5_3B, {"rms_norm_eps": float("nan")}, "rms_norm_eps = nan: is not a finite number"),
        (QWEN3_0_6B, {"attention_bias": True}, "attention_bias = True"),
        (QWEN3_30B_A3B, {"decoder_sparse_step": 2}, "decoder_sparse_step = 2"),
        (QWEN3_30B_A3B, {"mlp_only_layers": [1]}, "mlp_only_layers = [1]"),
        (QWEN3_30B_A3B, {"mlp_only_layers": list(range(48))}, "first_dense = 48"),
        (QWEN3_30B_A3B, {"use_sliding_window": True, "sliding_window": 4096}, "use_sliding_window = True"),
        (QWEN3_30B_A3B, {"num_experts_per_tok": 200}, "experts_per_token = 200"),
        (GLM4_MOE, {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        (GLM4_MOE, {"partial_rotary_factor": None}, "partial_rotary_factor"),
        (GLM4_MOE, {"n_group": 3}, "groups = 3: does not divide experts = 160"),
        (GLM4_MOE, {"topk_group": 5}, "groups_kept = 5"),
        (LLAMA_3_2_1B, {"attention_bias": True}, "attention_bias = True"),
        (LLAMA_3_2_1B, {"mlp_bias": True}, "mlp_bias = True"),
        (LLAMA_3_2_1B, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor: is missing"),
        (LLAMA_3_2_1B, {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "contradicts"),
    ],
)
def test_refused_in_one_line(base, change, told):
    with pytest.raises(ConfigError) as caught:
        huggingface.from_dict(base | change)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ODD = [None, True, False, 0, -1, 1, 1.5, 10**400, float("inf"), float("nan"), "", "x", [], [[]], [{}], [None], {}]
ODD += [{"a": {}}, {"rope_type": []}, {"rope_type": None}, {"rope_theta": "x"}, LLAMA3, LLAMA3 | {"factor": -1}]
ODD += [LLAMA3 | {"original_max_position_embeddings": value} for value in (float("inf"), float("nan"), 0, "8192")]
ODD += [LLAMA3 | {"high_freq_factor": 1.0}]
FURTHER = ("rope_parameters", "layer_types", "partial_rotary_factor", "original_max_position_embeddings")


@pytest.mark.parametrize("base", [QWEN2_5_3B, LLAMA_3_2_1B, QWEN3_30B_A3B, GLM4_MOE], ids=lambda raw: raw["model_type"])
def test_odd_values_raise_nothing_else(base):
    refused = []
    for key in (*base, *FURTHER):
        for value in ODD:
            try:
                huggingface.from_dict(base | {key: value})
            except ConfigError as error:
                refused.append(str(error))
    assert len(refused) > 300
    assert not any("\n" in line for line in refused)


def test_unused_sliding_window_passes():
    expected = huggingface.from_dict(QWEN2_5_3B)
    for change in ({"use_sliding_window": True}, {"layer_types": ["full_attention"] * 36, "use_sliding_window": True}):
        assert huggingface.from_dict(QWEN2_5_3B | change) == expected


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe"])
def test_damaged_file(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.json"):
        huggingface.read_config(tmp_path)


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        huggingface.read_config(tmp_path)


def test_sizes_that_transformers_refuses():
    config = dataclasses.replace(huggingface.from_dict(LLAMA_3_2_1B), hidden_size=2049)
    with pytest.raises(ConfigError, match="num_heads = 32: does not divide hidden_size = 2049"):
        huggingface.to_dict(config)
