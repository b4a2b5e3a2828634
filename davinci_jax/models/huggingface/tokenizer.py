"""The tokenizer files of a saved folder, as AutoTokenizer of transformers reads them."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import tokenizers

from davinci_jax.errors import ConfigError, DataError
from davinci_jax.experiment import ModelConfig
from davinci_jax.text import END_OF_TEXT, QWEN2_SPLIT

_QWEN2_PARTS = {
    "normalizer": {"type": "NFC"},
    "pre_tokenizer": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": QWEN2_SPLIT}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ],
    },
    "decoder": {"type": "ByteLevel"},
    "model": {"type": "BPE"},
}
_PLAIN_BPE = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclasses.dataclass(frozen=True)
class TokenizerFiles:
    """What to write beside the weights.

    Attributes:
      contents: file name -> bytes.
      special_ids: "bos_token_id" and "eos_token_id", `None` where the tokenizer has none.
    """

    contents: dict[str, bytes]
    special_ids: dict[str, int | None]


def read(file: str | pathlib.Path, config: ModelConfig) -> TokenizerFiles:
    """Prepares the tokenizer files of a model from its tokenizer.json.

    The file itself is copied byte for byte. Special tokens and the chat template come from a tokenizer_config.json
    beside it; without one, the end of text is the first name of `END_OF_TEXT` in the vocabulary.

    Raises:
      DataError: the file is missing, damaged, of another kind, its end-of-text token is unknown, or transformers
        would cut text in another way than it does.
      ConfigError: it has more ids than the model.
    """
    file = pathlib.Path(file)
    if file.is_dir():
        file = file / "tokenizer.json"
    if not file.is_file():
        raise DataError(str(file), None, "no such file", "name the tokenizer.json that the model was trained with")
    if file.suffix != ".json":
        remedy = "convert it to a tokenizer.json, or save without a tokenizer"
        raise DataError(str(file), None, "is no tokenizer.json, and transformers cuts text differently", remedy)
    content = file.read_bytes()
    try:
        vocabulary = tokenizers.Tokenizer.from_buffer(content).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library raises bare Exception
        reason = str(error).split("\n")[0][:160]
        raise DataError(str(file), None, f"cannot be read as a tokenizer ({reason})", "copy it again") from None
    largest = max(vocabulary.values(), default=-1)
    if largest >= config.vocab_size:
        problem = f"is below the {largest + 1} ids of {file}"
        raise ConfigError(
            "model.vocab_size", config.vocab_size, problem, "use the tokenizer the model was trained with"
        )
    beside = _beside(file.with_name("tokenizer_config.json"))
    named = {key: _content(beside.get(key)) for key in _SPECIAL}
    named["eos_token"] = named["eos_token"] or next((name for name in END_OF_TEXT if name in vocabulary), "")
    for key, name in named.items():
        if name is not None and not (isinstance(name, str) and name in vocabulary):
            remedy = "name one in a tokenizer_config.json beside it"
            raise DataError(f"{file}: {key}", name or None, "is no token of it", remedy)
    if config.qkv_bias:
        _check_qwen2(json.loads(content), vocabulary, file)
    special = {key: name for key, name in named.items() if name is not None}
    return TokenizerFiles(
        {
            "tokenizer.json": content,
            "tokenizer_config.json": _json(_tokenizer_config(beside, special, config)),
            "special_tokens_map.json": _json(special),
        },
        {f"{key}_id": vocabulary.get(named[key]) for key in ("bos_token", "eos_token")},
    )


def _check_qwen2(parts: dict[str, Any], vocabulary: dict[str, int], file: pathlib.Path) -> None:
    """Raises unless the tokenizer is what transformers makes of it in the folder of a Qwen2 model.

    For that architecture AutoTokenizer of transformers 5 takes the vocabulary and the merges of tokenizer.json but
    puts Qwen2's own normaliser and split in place of the file's, and adds `<|endoftext|>` if it is missing.
    """
    other = [part for part, wanted in _QWEN2_PARTS.items() if not _contains(parts.get(part), wanted)]
    other += [f"model.{key}" for key in _PLAIN_BPE if parts["model"].get(key)]
    other += [token for token in ("<|endoftext|>",) if token not in vocabulary]
    if other:
        problem = f"differs from Qwen2's tokenizer in {', '.join(other)}, and transformers would give other ids"
        remedy = "save without a tokenizer, and load this one with transformers.PreTrainedTokenizerFast"
        raise DataError(str(file), None, problem, remedy)


def _contains(found: Any, wanted: Any) -> bool:
    """Whether JSON holds what is wanted; keys beyond it, such as trim_offsets, do not change ids."""
    if isinstance(wanted, dict):
        return isinstance(found, dict) and all(_contains(found.get(key), value) for key, value in wanted.items())
    if isinstance(wanted, list):
        pairs = isinstance(found, list) and len(found) == len(wanted)
        return pairs and all(_contains(a, b) for a, b in zip(found, wanted, strict=True))
    return found == wanted


def _tokenizer_config(beside: dict[str, Any], special: dict[str, str], config: ModelConfig) -> dict[str, Any]:
    kept = {key: beside[key] for key in ("chat_template", "additional_special_tokens") if beside.get(key)}
    return {
        # The class that takes tokenizer.json as it is; model-specific classes rebuild it from parts.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_positions,
        "clean_up_tokenization_spaces": False,
        **kept,
        **special,
    }


def _beside(file: pathlib.Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        raw = json.loads(file.read_bytes())
    except ValueError as error:
        raise DataError(str(file), None, f"is not JSON ({error})", "mend or remove it") from None
    if not isinstance(raw, dict):
        raise DataError(str(file), None, "holds no JSON object", "mend or remove it")
    return raw


def _content(token: Any) -> Any:
    """The text of a token, which is written as a string or as an object with its properties."""
    return token.get("content") if isinstance(token, dict) else token


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
