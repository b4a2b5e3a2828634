"""Saves a Decoder as a folder that stock transformers loads, without custom code."""

from __future__ import annotations

import contextlib
import json
import math
import operator
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import safetensors
from safetensors.numpy import save_file

from davinci_jax.errors import CheckpointError, ConfigError, nearest
from davinci_jax.experiment import ModelConfig
from davinci_jax.models.decoder import Decoder
from davinci_jax.models.huggingface import layout, tokenizer
from davinci_jax.models.huggingface.config import to_dict
from davinci_jax.models.huggingface.tensorfiles import DTYPES, INDEX, SINGLE

_STORED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def save(
    decoder: Decoder,
    config: ModelConfig,
    folder: str | pathlib.Path,
    tokenizer_file: str | pathlib.Path | None = None,
    *,
    dtype: str = "float32",
    max_file_bytes: int = 4_000_000_000,
) -> None:
    """Writes a folder that `AutoModelForCausalLM` and `AutoTokenizer` of transformers load.

    The architecture is the one of `config.ARCHITECTURES` that computes what `config` describes. The folder appears
    under its name only when it is whole. Host memory holds the tensors of one file at a time.

    Args:
      decoder: parameters, all of them addressable from this process.
      config: its architecture.
      folder: where to write; must not exist or be empty.
      tokenizer_file: the tokenizer of the model, a tokenizer.json; special tokens and the chat template are taken
        from a tokenizer_config.json beside it. `None` writes no tokenizer.
      dtype: of the stored tensors: "float32" keeps every bit, "bfloat16" and "float16" round to nearest.
      max_file_bytes: size above which the weights are spread over several files with an index.

    Raises:
      ConfigError: transformers has no stock architecture with these sizes, an unknown dtype, or a tokenizer with more
        ids than the model.
      DataError: the tokenizer cannot be read.
      CheckpointError: the folder is taken, the disk is full, or a value does not fit float16.
    """
    if dtype not in _STORED:
        raise ConfigError("dtype", dtype, f"is not one of {', '.join(_STORED)}", nearest(dtype, _STORED))
    raw = to_dict(config, dtype)
    files = tokenizer.read(tokenizer_file, config) if tokenizer_file is not None else None
    special = files.special_ids if files else {"bos_token_id": None, "eos_token_id": None}
    shards = _plan(layout.entries(config), DTYPES[_STORED[dtype]].itemsize, max_file_bytes)
    with _appearing(pathlib.Path(folder)) as partial:
        _write_json(partial / "config.json", raw | special)
        _write_json(partial / "generation_config.json", special)
        for name, content in (files.contents if files else {}).items():
            (partial / name).write_bytes(content)
        _write_weights(decoder, shards, dtype, partial)


@contextlib.contextmanager
def _appearing(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a temporary folder that takes the name `folder` at the end, or is removed on an error."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(str(folder), None, "exists and is not an empty folder", "choose another name")
    partial = folder.absolute().parent / f".{folder.name}.partial-{os.getpid()}"
    try:
        partial.mkdir(parents=True)
        yield partial
        os.replace(partial, folder)  # over an empty folder too
    except (OSError, safetensors.SafetensorError) as error:
        remedy = "make room or choose another place; nothing was left behind"
        raise CheckpointError(str(folder), None, f"could not be written ({error})", remedy) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _plan(entries: list[layout.Entry], itemsize: int, max_file_bytes: int) -> list[list[layout.Entry]]:
    """Splits the tensors, in order, into files of at most `max_file_bytes` (or one tensor, if that is larger)."""
    shards, room = [], 0
    for entry in entries:
        size = math.prod(entry.shape) * itemsize
        if not shards or size > room:
            shards.append([])
            room = max_file_bytes
        shards[-1].append(entry)
        room -= size
    return shards


def _write_weights(decoder: Decoder, shards: list[list[layout.Entry]], dtype: str, folder: pathlib.Path) -> None:
    names = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    )
    total, where = 0, {}
    for name, shard in zip(names, shards, strict=True):
        tensors = {entry.name: _tensor(decoder, entry, dtype) for entry in shard}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", folder / name)  # safetensors makes files for their owner only
        total += sum(tensor.nbytes for tensor in tensors.values())
        where |= dict.fromkeys(tensors, name)
    if len(shards) > 1:
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def _tensor(decoder: Decoder, entry: layout.Entry, dtype: str) -> np.ndarray:
    parameter = operator.attrgetter(entry.path)(decoder)[...]
    host = np.asarray(_part(parameter, entry.index) if entry.index else parameter)
    with np.errstate(over="ignore"):
        tensor = np.ascontiguousarray(entry.from_decoder(host), DTYPES[_STORED[dtype]])
    if dtype == "float16" and np.isinf(tensor).any() and not np.isinf(host).any():
        raise CheckpointError(entry.name, None, "holds values above the float16 range", "store as bfloat16 or float32")
    return tensor


# Traced index: one compilation a parameter, not one a layer or expert.
@jax.jit
def _part(parameter: jax.Array, index: tuple[int, ...]) -> jax.Array:
    for place in index:
        parameter = jax.lax.dynamic_index_in_dim(parameter, place, keepdims=False)
    return parameter


def _write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
