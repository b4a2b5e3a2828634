"""Loads a Hugging Face folder into a Decoder, tensor by tensor."""

from __future__ import annotations

import collections
import functools
import itertools
import pathlib

import jax
import numpy as np
from jax.sharding import NamedSharding, SingleDeviceSharding

from davinci_jax.experiment import ModelConfig
from davinci_jax.models import decoder as decoder_lib
from davinci_jax.models.huggingface import layout, tensorfiles
from davinci_jax.models.huggingface.config import read_config


def load(folder: str | pathlib.Path) -> tuple[ModelConfig, decoder_lib.Decoder]:
    """Loads a Qwen2, Qwen2.5, Qwen3, Qwen3-MoE, GLM-4-MoE or Llama model from a local Hugging Face folder.

    Args:
      folder: holds config.json and model.safetensors, or model.safetensors.index.json and the files it lists.

    Returns:
      The architecture, and the decoder with float32 parameters divided over the current mesh.

    Raises:
      ConfigError: config.json asks for something the decoder does not do, or the mesh does not divide the model.
      CheckpointError: the weights are missing, damaged or do not fit config.json.
    """
    config = read_config(folder)
    return config, load_weights(config, folder)


def load_weights(config: ModelConfig, folder: str | pathlib.Path) -> decoder_lib.Decoder:
    """Loads the weights of a Hugging Face folder as a decoder of `config`; see `load`.

    Each process reads only the slices that its own devices hold, one tensor at a time: beyond the parameters
    themselves, host memory holds one stacked parameter of one device.
    """
    decoder_lib.check_divides(config)
    wanted = layout.entries(config)
    stored = tensorfiles.find(folder)
    tensorfiles.check(stored, wanted, folder)
    by_path = collections.defaultdict(list)
    for entry in wanted:
        by_path[entry.path].append((entry, stored[entry.name]))
    abstract = jax.eval_shape(functools.partial(decoder_lib.build, config), jax.random.key(0))
    return jax.tree_util.tree_map_with_path(lambda path, leaf: _read(by_path[parameter_path(path)], leaf), abstract)


def parameter_path(path: tuple) -> str:
    """Dotted name of a decoder leaf, as `layout.Entry.path` spells it."""
    return ".".join(key.name for key in path if key.name != "value")  # "value" is the array inside an nnx.Param


def _read(parts: list[tuple[layout.Entry, tensorfiles.StoredTensor]], leaf: jax.ShapeDtypeStruct) -> jax.Array:
    stored, stacked = {entry.index: (entry, tensor) for entry, tensor in parts}, len(parts[0][0].index)

    def read_slice(index: tuple[slice, ...]) -> np.ndarray:
        places = [range(size)[part] for part, size in zip(index[:stacked], leaf.shape, strict=False)]
        out = None
        for here in itertools.product(*(enumerate(one) for one in places)):
            entry, tensor = stored[tuple(place for _, place in here)]
            part = entry.to_decoder(tensor.view(), leaf.shape[stacked:])[index[stacked:]]
            out = np.empty((*map(len, places), *part.shape), np.float32) if out is None else out
            out[tuple(number for number, _ in here)] = part
        return out

    return jax.make_array_from_callback(leaf.shape, _placement(leaf), read_slice)


def _placement(leaf: jax.ShapeDtypeStruct) -> jax.sharding.Sharding:
    # Shapes traced under a mesh carry an abstract one; placing data needs its devices.
    if leaf.sharding is None:
        return SingleDeviceSharding(jax.devices()[0])
    return NamedSharding(jax.sharding.get_mesh(), leaf.sharding.spec)
