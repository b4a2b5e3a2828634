"""Maps a Hugging Face config.json to a ModelConfig and back.

Stock architectures that cover the decoder: Qwen2ForCausalLM (bias on q, k and v), LlamaForCausalLM (no bias),
Qwen3ForCausalLM (no bias, q and k normalised), and with experts Qwen3MoeForCausalLM (softmax scores, no shared expert)
and Glm4MoeForCausalLM (sigmoid scores with a balancing bias, shared experts). What a config.json asks for beyond them
is refused by name, because a model that loads and computes something else is worse than one that does not load.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

from davinci_jax.errors import ConfigError
from davinci_jax.experiment import ModelConfig, Moe, RopeScaling

ARCHITECTURES = {
    "Qwen2ForCausalLM": "qwen2",
    "LlamaForCausalLM": "llama",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "Glm4MoeForCausalLM": "glm4_moe",
}
_DEFAULT_MAX_POSITIONS = {"qwen2": 32768, "llama": 2048, "qwen3": 32768, "qwen3_moe": 32768, "glm4_moe": 131072}
_OWN_KEEPING = "keep this model in its own format"
_DEFAULT_ROPE_BASE = 10000.0
_LLAMA3_KEYS = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_positions": "original_max_position_embeddings",
}


def read_config(folder: str | pathlib.Path) -> ModelConfig:
    """Reads config.json of a Hugging Face folder.

    Args:
      folder: a local folder that holds config.json.

    Returns:
      The architecture. What a Hugging Face config does not describe (compute_dtype, remat, loss_chunk, z_loss, and how
      experts are balanced) keeps the default of ModelConfig, and a bias that balances experts stays as it is stored;
      use `dataclasses.replace` to change it before loading weights.

    Raises:
      ConfigError: config.json is missing, is not JSON, or asks for something the decoder does not do.
    """
    path = pathlib.Path(folder) / "config.json"
    if not path.is_file():
        raise ConfigError(str(path), None, "no such file", "name a folder with config.json and *.safetensors")
    return from_dict(_parse(path), where=str(path))


def _parse(path: pathlib.Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise ConfigError(str(path), None, f"not JSON ({error})", "download the file again") from None
    if not isinstance(raw, dict):
        raise ConfigError(str(path), None, "holds no JSON object", "download the file again")
    return raw


def from_dict(raw: dict[str, Any], where: str = "config.json") -> ModelConfig:
    """Maps the content of a config.json to a ModelConfig.

    Args:
      raw: the parsed JSON; keys of transformers 4 (rope_theta, rope_scaling) and 5 (rope_parameters) are both read.
      where: the file's name for error messages.

    Raises:
      ConfigError: a key is missing, has the wrong type, contradicts another or is not supported.
    """
    keys = _Keys(raw, where)
    model_type = _model_type(keys)
    _refuse_other_computations(keys, model_type)
    hidden_size, num_heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
    max_positions = keys.integer("max_position_embeddings", _DEFAULT_MAX_POSITIONS[model_type])
    rope_base, rope_scaling = _rope(keys, max_positions, turned=0.5 if model_type == "glm4_moe" else 1.0)
    return ModelConfig(
        vocab_size=keys.integer("vocab_size"),
        hidden_size=hidden_size,
        num_layers=keys.integer("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=_num_kv_heads(keys, model_type, num_heads),
        head_size=_head_size(keys, model_type, hidden_size, num_heads),
        mlp_size=keys.integer("intermediate_size"),
        max_positions=max_positions,
        rope_base=rope_base,
        rope_scaling=rope_scaling,
        norm_eps=keys.number("rms_norm_eps", 1e-5 if model_type == "glm4_moe" else 1e-6),
        qkv_bias=keys.flag("attention_bias", model_type == "qwen2"),
        qk_norm=model_type in ("qwen3", "qwen3_moe") or (model_type == "glm4_moe" and keys.flag("use_qk_norm", False)),
        moe=_moe(keys, model_type),
        tied_embeddings=keys.flag("tie_word_embeddings", False),
        init_std=keys.number("initializer_range", 0.02),
    )


def to_dict(config: ModelConfig, dtype: str = "float32") -> dict[str, Any]:
    """Maps a ModelConfig to the content of a config.json that stock transformers reads.

    Args:
      config: the architecture; compute_dtype, remat, loss_chunk, z_loss, and of the experts the losses, bias_rate and
        capacity, which act in training only, have no counterpart and are left out.
      dtype: of the stored tensors, "float32", "bfloat16" or "float16".

    Raises:
      ConfigError: transformers has no stock architecture with these sizes.
    """
    architecture = _architecture(config)
    model_type = ARCHITECTURES[architecture]
    if model_type in ("qwen2", "llama") and config.hidden_size % config.num_heads:
        raise ConfigError(
            "model.num_heads",
            config.num_heads,
            f"does not divide hidden_size = {config.hidden_size}, which {architecture} demands even where head_size is "
            "given",
            _OWN_KEEPING,
        )
    rope = {"rope_theta": config.rope_base, "rope_type": "default"}
    if config.rope_scaling is not None:
        scaling = {key: getattr(config.rope_scaling, field) for field, key in _LLAMA3_KEYS.items()}
        rope |= {"rope_type": "llama3", **scaling}
    raw = {
        "architectures": [architecture],
        "model_type": ARCHITECTURES[architecture],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "initializer_range": config.init_std,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_embeddings,
        # transformers 5 reads rope_parameters; transformers 4, vLLM and llama.cpp read rope_theta and rope_scaling.
        "rope_parameters": rope,
        "rope_theta": config.rope_base,
        "rope_scaling": None if config.rope_scaling is None else {k: rope[k] for k in rope if k != "rope_theta"},
        "attention_dropout": 0.0,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    if model_type in ("qwen2", "qwen3"):
        raw |= {"use_sliding_window": False, "sliding_window": None, "max_window_layers": config.num_layers}
    if model_type == "llama":
        raw |= {"mlp_bias": False}
    if model_type != "qwen2":
        raw |= {"attention_bias": config.qkv_bias}
    # Qwen2 of transformers 4 takes hidden_size / num_attention_heads and knows no head_dim.
    if model_type != "qwen2" or config.head_size * config.num_heads != config.hidden_size:
        raw["head_dim"] = config.head_size
    if config.moe is not None:
        raw |= _moe_to_dict(config, model_type)
    return raw


def _architecture(config: ModelConfig) -> str:
    """The stock architecture that computes what `config` describes; raises `ConfigError` where there is none."""
    if config.moe is not None:
        return _moe_architecture(config)
    if config.qk_norm and config.qkv_bias:
        supported = "of the stock architectures with normalised queries and keys none has bias on q, k and v alone"
        raise ConfigError("model.qkv_bias", True, supported, _OWN_KEEPING)
    return "Qwen3ForCausalLM" if config.qk_norm else "Qwen2ForCausalLM" if config.qkv_bias else "LlamaForCausalLM"


def _moe_architecture(config: ModelConfig) -> str:
    """Softmax scores: Qwen3-MoE; sigmoid scores: GLM-4-MoE. Each has what the other lacks."""
    moe = config.moe
    if moe.score == "softmax":
        name = "Qwen3MoeForCausalLM"
        needed = {"shared_size": 0, "groups": 1, "scale": 1.0, "bias_rate": None, "threshold": None}
        if not config.qk_norm:
            raise ConfigError("model.qk_norm", False, f"has no counterpart in {name}", _OWN_KEEPING)
        if config.qkv_bias:
            raise ConfigError("model.qkv_bias", True, f"has no counterpart in {name}", _OWN_KEEPING)
    else:
        name, needed = "Glm4MoeForCausalLM", {"threshold": None}
        if moe.bias_rate is None:
            raise ConfigError("model.moe.bias_rate", None, f"must be set for {name}, which has the bias", "set it to 0")
        if not moe.shared_size or moe.shared_size % moe.expert_size:
            problem = f"is no multiple of expert_size = {moe.expert_size}, which {name} demands"
            raise ConfigError("model.moe.shared_size", moe.shared_size, problem, _OWN_KEEPING)
    for field, value in needed.items():
        if getattr(moe, field) != value:
            problem = f"has no counterpart in {name}, which has {value!r}"
            raise ConfigError(f"model.moe.{field}", getattr(moe, field), problem, _OWN_KEEPING)
    return name


def _moe_to_dict(config: ModelConfig, model_type: str) -> dict[str, Any]:
    moe = config.moe
    shared = {
        "num_experts_per_tok": moe.experts_per_token,
        "moe_intermediate_size": moe.expert_size,
        "norm_topk_prob": moe.normalize,
        "output_router_logits": False,
    }
    if model_type == "qwen3_moe":
        return shared | {
            "num_experts": moe.experts,
            "decoder_sparse_step": 1,
            "mlp_only_layers": list(range(moe.first_dense)),
            "use_sliding_window": False,
            "sliding_window": None,
        }
    return shared | {
        "n_routed_experts": moe.experts,
        "n_shared_experts": moe.shared_size // moe.expert_size,
        "first_k_dense_replace": moe.first_dense,
        "n_group": moe.groups,
        "topk_group": moe.groups_kept,
        "routed_scaling_factor": moe.scale,
        "use_qk_norm": config.qk_norm,
        "num_nextn_predict_layers": 0,
        "partial_rotary_factor": 1.0,
    }


class _Keys:
    """Typed look-up in a config.json: a key that is absent or null takes the default, if there is one."""

    def __init__(self, raw: dict[str, Any], where: str):
        self.raw, self.where = raw, where

    def fail(self, key: str, problem: str, remedy: str) -> ConfigError:
        return ConfigError(f"{self.where}: {key}", self.raw.get(key), problem, remedy)

    def get(self, key: str, default: Any, types: tuple[type, ...], wanted: str) -> Any:
        value = self.raw.get(key)
        if value is None:
            if default is None:
                raise self.fail(key, "is missing", f"{wanted} is needed")
            return default
        # bool is a subclass of int, and "num_hidden_layers": true is no count.
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise self.fail(key, f"is not {wanted}", f"write {wanted}")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        return self.get(key, default, (int,), "a whole number")

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default, (int, float), "a number")
        if not abs(value) < 1e300:  # NaN and infinity, which JSON of Python knows, and integers beyond any float
            raise self.fail(key, "is not a finite number", "write a number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        return self.get(key, default, (bool,), "true or false")


def _model_type(keys: _Keys) -> str:
    supported = f"supported are {', '.join(ARCHITECTURES)}"
    names = keys.get("architectures", [], (list,), "a list of names")
    by_name = {ARCHITECTURES.get(name) for name in names if isinstance(name, str)}
    if names and (len(names) != 1 or by_name <= {None}):
        raise keys.fail("architectures", "is not supported", supported)
    model_type = keys.raw.get("model_type")
    if model_type not in ARCHITECTURES.values() and not (names and model_type is None):
        raise keys.fail("model_type", "is not supported", supported)
    if names and model_type not in (None, *by_name):
        raise keys.fail("model_type", f"contradicts architectures = {names}", supported)
    return model_type or by_name.pop()


def _refuse_other_computations(keys: _Keys, model_type: str) -> None:
    if keys.raw.get("hidden_act", "silu") != "silu":
        raise keys.fail("hidden_act", "is not supported", 'only "silu" is')
    if keys.raw.get("quantization_config") is not None:
        raise keys.fail("quantization_config", "is not supported", "convert the weights to bfloat16 first")
    bias = keys.flag("attention_bias", model_type == "qwen2")
    if model_type != "glm4_moe" and bias != (model_type == "qwen2"):
        supported = "qwen2 has bias on q, k and v; llama and qwen3 have none"
        raise keys.fail("attention_bias", f"is not supported for model_type {model_type!r}", supported)
    if keys.flag("mlp_bias", False):
        raise keys.fail("mlp_bias", "is not supported", "only false is")
    _refuse_windows(keys, model_type)


def _refuse_windows(keys: _Keys, model_type: str) -> None:
    layer_types = keys.get("layer_types", [], (list,), "a list of names")
    if any(layer_type != "full_attention" for layer_type in layer_types):
        raise keys.fail("layer_types", "is not supported", 'only "full_attention" in every layer is')
    if model_type not in ("qwen2", "qwen3", "qwen3_moe") or layer_types or not keys.flag("use_sliding_window", False):
        return
    # Qwen2 and Qwen3 slide the layers from max_window_layers on, Qwen3-MoE all; layer_types, where given, has the last
    # word.
    first = 0 if model_type == "qwen3_moe" else keys.integer("max_window_layers", 28)
    if first < keys.integer("num_hidden_layers") and keys.raw.get("sliding_window", 4096) is not None:
        raise keys.fail("use_sliding_window", "is not supported", "only full attention in every layer is")


def _moe(keys: _Keys, model_type: str) -> Moe | None:
    """The experts of Qwen3-MoE or GLM-4-MoE; absent keys have the defaults of transformers."""
    if model_type == "qwen3_moe":
        if keys.integer("decoder_sparse_step", 1) != 1:
            raise keys.fail("decoder_sparse_step", "is not supported", "only 1 is: experts in every layer")
        dense = keys.get("mlp_only_layers", [], (list,), "a list of layers")
        if dense != list(range(len(dense))):
            raise keys.fail("mlp_only_layers", "is not supported", "only the first layers, in order, may lack experts")
        # Older files say num_experts, transformers 5 writes num_local_experts.
        return Moe(
            experts=keys.integer("num_experts", keys.integer("num_local_experts", 128)),
            experts_per_token=keys.integer("num_experts_per_tok", 8),
            expert_size=keys.integer("moe_intermediate_size", 768),
            first_dense=len(dense),
            normalize=keys.flag("norm_topk_prob", False),
        )
    if model_type == "glm4_moe":
        expert_size = keys.integer("moe_intermediate_size", 1408)
        return Moe(
            experts=keys.integer("n_routed_experts", 128),
            experts_per_token=keys.integer("num_experts_per_tok", 8),
            expert_size=expert_size,
            shared_size=keys.integer("n_shared_experts", 1) * expert_size,
            first_dense=keys.integer("first_k_dense_replace", 1),
            score="sigmoid",
            groups=keys.integer("n_group", 1),
            groups_kept=keys.integer("topk_group", 1),
            normalize=keys.flag("norm_topk_prob", True),
            scale=keys.number("routed_scaling_factor", 1.0),
            bias_rate=0.0,
        )
    return None


def _num_kv_heads(keys: _Keys, model_type: str, num_heads: int) -> int:
    if model_type != "llama" and "num_key_value_heads" not in keys.raw:
        raise keys.fail("num_key_value_heads", "is missing", "a whole number is needed")
    return keys.integer("num_key_value_heads", num_heads)


def _head_size(keys: _Keys, model_type: str, hidden_size: int, num_heads: int) -> int:
    if model_type == "qwen3":
        return keys.integer("head_dim", 128)
    if keys.raw.get("head_dim") is None and (num_heads < 1 or hidden_size % num_heads):
        problem = f"does not divide hidden_size = {hidden_size} and head_dim is not given"
        raise keys.fail("num_attention_heads", problem, "give head_dim or a divisor")
    return keys.integer("head_dim", hidden_size // max(num_heads, 1))


def _rope(keys: _Keys, max_positions: int, turned: float) -> tuple[float, RopeScaling | None]:
    """Reads the rotary base and scaling from the old keys, the new one, or both where they agree.

    `turned` is the part of a head that is turned where no key says so.
    """
    old = keys.get("rope_scaling", {}, (dict,), "an object")
    new = keys.get("rope_parameters", {}, (dict,), "an object")
    for key in old.keys() & new.keys():
        if old[key] != new[key]:
            raise keys.fail("rope_scaling", f"contradicts rope_parameters in {key!r}", "remove one of the two")
    rope = _Keys({**new, **old}, f"{keys.where}: {'rope_parameters' if new else 'rope_scaling'}")
    kind = rope.raw.get("rope_type", rope.raw.get("type", "default"))
    if kind not in ("default", "llama3") or any(isinstance(value, dict) for value in rope.raw.values()):
        raise keys.fail("rope_parameters" if new else "rope_scaling", "is not supported", "default and llama3 are")
    places = [place for place in (keys, rope) if place.raw.get("partial_rotary_factor") is not None] or [keys]
    for place in places:
        if place.number("partial_rotary_factor", turned) != 1.0:
            raise place.fail(
                "partial_rotary_factor", "is not supported", f"only 1.0 is; without the key it is {turned}"
            )
    bases = {place.number("rope_theta") for place in (keys, rope) if place.raw.get("rope_theta") is not None}
    if len(bases) > 1:
        raise keys.fail("rope_theta", f"contradicts rope_parameters.rope_theta = {rope.raw['rope_theta']}", "keep one")
    base = bases.pop() if bases else _DEFAULT_ROPE_BASE
    if kind == "default":
        return base, None
    defaults = {"original_max_positions": keys.raw.get("original_max_position_embeddings", max_positions)}
    numbers = {field: rope.number(key, defaults.get(field)) for field, key in _LLAMA3_KEYS.items()}
    if numbers["high_freq_factor"] <= numbers["low_freq_factor"]:
        raise rope.fail("high_freq_factor", "is not above low_freq_factor", "Llama 3.1 has 4.0 and 1.0")
    numbers["original_max_positions"] = int(numbers["original_max_positions"])
    return base, RopeScaling(**numbers)
