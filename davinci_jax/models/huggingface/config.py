"""Maps a Hugging Face config.json to a ModelConfig and back.

Two stock architectures cover the decoder: Qwen2ForCausalLM (bias on q, k and v) and LlamaForCausalLM (no bias). What a
config.json asks for beyond them is refused by name, because a model that loads and computes something else is worse
than one that does not load.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

from davinci_jax.errors import ConfigError
from davinci_jax.experiment import ModelConfig, RopeScaling

ARCHITECTURES = {"Qwen2ForCausalLM": "qwen2", "LlamaForCausalLM": "llama"}
_DEFAULT_MAX_POSITIONS = {"qwen2": 32768, "llama": 2048}
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
      The architecture. What a Hugging Face config does not describe (compute_dtype, remat, loss_chunk, z_loss) keeps
      the default of ModelConfig; use `dataclasses.replace` to change it before loading weights.

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
    rope_base, rope_scaling = _rope(keys, max_positions)
    return ModelConfig(
        vocab_size=keys.integer("vocab_size"),
        hidden_size=hidden_size,
        num_layers=keys.integer("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=_num_kv_heads(keys, model_type, num_heads),
        head_size=_head_size(keys, hidden_size, num_heads),
        mlp_size=keys.integer("intermediate_size"),
        max_positions=max_positions,
        rope_base=rope_base,
        rope_scaling=rope_scaling,
        norm_eps=keys.number("rms_norm_eps", 1e-6),
        qkv_bias=model_type == "qwen2",
        tied_embeddings=keys.flag("tie_word_embeddings", False),
        init_std=keys.number("initializer_range", 0.02),
    )


def to_dict(config: ModelConfig, dtype: str = "float32") -> dict[str, Any]:
    """Maps a ModelConfig to the content of a config.json that stock transformers reads.

    Args:
      config: the architecture; compute_dtype, remat, loss_chunk and z_loss have no counterpart and are left out.
      dtype: of the stored tensors, "float32", "bfloat16" or "float16".

    Raises:
      ConfigError: transformers has no stock architecture with these sizes.
    """
    architecture = "Qwen2ForCausalLM" if config.qkv_bias else "LlamaForCausalLM"
    if config.hidden_size % config.num_heads:
        raise ConfigError(
            "model.num_heads",
            config.num_heads,
            f"does not divide hidden_size = {config.hidden_size}, which {architecture} demands even where head_size is "
            "given",
            "keep this model in its own format",
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
    if config.qkv_bias:
        raw |= {"use_sliding_window": False, "sliding_window": None, "max_window_layers": config.num_layers}
    else:
        raw |= {"attention_bias": False, "mlp_bias": False}
    # Qwen2 of transformers 4 takes hidden_size / num_attention_heads and knows no head_dim.
    if not config.qkv_bias or config.head_size * config.num_heads != config.hidden_size:
        raw["head_dim"] = config.head_size
    return raw


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
    if bias != (model_type == "qwen2"):
        supported = "qwen2 has bias on q, k and v; llama has none"
        raise keys.fail("attention_bias", f"is not supported for model_type {model_type!r}", supported)
    if keys.flag("mlp_bias", False):
        raise keys.fail("mlp_bias", "is not supported", "only false is")
    layer_types = keys.get("layer_types", [], (list,), "a list of names")
    if any(layer_type != "full_attention" for layer_type in layer_types):
        raise keys.fail("layer_types", "is not supported", 'only "full_attention" in every layer is')
    # Qwen2 slides the layers from max_window_layers on; layer_types, where given, has the last word.
    if model_type == "qwen2" and not layer_types and keys.flag("use_sliding_window", False):
        windowed = keys.integer("max_window_layers", 28) < keys.integer("num_hidden_layers")
        if windowed and keys.raw.get("sliding_window", 4096) is not None:
            raise keys.fail("use_sliding_window", "is not supported", "only full attention in every layer is")


def _num_kv_heads(keys: _Keys, model_type: str, num_heads: int) -> int:
    if model_type == "qwen2" and "num_key_value_heads" not in keys.raw:
        raise keys.fail("num_key_value_heads", "is missing", "a whole number is needed")
    return keys.integer("num_key_value_heads", num_heads)


def _head_size(keys: _Keys, hidden_size: int, num_heads: int) -> int:
    if keys.raw.get("head_dim") is None and (num_heads < 1 or hidden_size % num_heads):
        problem = f"does not divide hidden_size = {hidden_size} and head_dim is not given"
        raise keys.fail("num_attention_heads", problem, "give head_dim or a divisor")
    return keys.integer("head_dim", hidden_size // max(num_heads, 1))


def _rope(keys: _Keys, max_positions: int) -> tuple[float, RopeScaling | None]:
    """Reads the rotary base and scaling from the old keys, the new one, or both where they agree."""
    old = keys.get("rope_scaling", {}, (dict,), "an object")
    new = keys.get("rope_parameters", {}, (dict,), "an object")
    for key in old.keys() & new.keys():
        if old[key] != new[key]:
            raise keys.fail("rope_scaling", f"contradicts rope_parameters in {key!r}", "remove one of the two")
    rope = _Keys({**new, **old}, f"{keys.where}: {'rope_parameters' if new else 'rope_scaling'}")
    kind = rope.raw.get("rope_type", rope.raw.get("type", "default"))
    if kind not in ("default", "llama3") or any(isinstance(value, dict) for value in rope.raw.values()):
        raise keys.fail("rope_parameters" if new else "rope_scaling", "is not supported", "default and llama3 are")
    for place in (keys, rope):
        if place.number("partial_rotary_factor", 1.0) != 1.0:
            raise place.fail("partial_rotary_factor", "is not supported", "only 1.0 is")
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
