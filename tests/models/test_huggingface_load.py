"""Loading weights: dtypes, files, meshes, and every way in which a folder can be wrong."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from davinci_jax import sharding
from davinci_jax.errors import CheckpointError, ConfigError
from davinci_jax.experiment import MeshConfig
from davinci_jax.models import huggingface

REFERENCES = pathlib.Path(__file__).parent.parent / "references" / "models"
TIED, UNTIED = "qwen2_tied_4_2", "llama_untied_4_4"


@pytest.fixture
def mesh():
    with jax.set_mesh(sharding.make_mesh(MeshConfig(), jax.devices()[:1])):
        yield


@pytest.fixture
def folder(tmp_path):
    """A copy of a reference to damage."""
    target = tmp_path / "model"

    def copy(case):
        shutil.copytree(REFERENCES / case, target)
        return target

    return copy


def rewrite(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def leaves(decoder):
    return {huggingface.parameter_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(decoder)}


def split(folder):
    """Spreads model.safetensors over two files with an index."""
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    files = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({name: weights[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in files.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    return index


@pytest.mark.usefixtures("mesh")
def test_values_lie_where_their_names_say():
    _, decoder = huggingface.load(REFERENCES / UNTIED)
    weights, found = load_file(REFERENCES / UNTIED / "model.safetensors"), leaves(decoder)
    assert all(leaf.dtype == np.float32 for leaf in found.values())
    assert sum(leaf.size for leaf in found.values()) == sum(tensor.size for tensor in weights.values())
    q = weights["model.layers.1.self_attn.q_proj.weight"]  # [heads * head_size, hidden]
    np.testing.assert_array_equal(found["blocks.attention.q_proj"][1, :, 2, 3], q[2 * 8 + 3])
    o = weights["model.layers.0.self_attn.o_proj.weight"]  # [hidden, heads * head_size]
    np.testing.assert_array_equal(found["blocks.attention.o_proj"][0, 3, 5], o[:, 3 * 8 + 5])
    np.testing.assert_array_equal(found["blocks.mlp.up"][1], weights["model.layers.1.mlp.up_proj.weight"].T)
    np.testing.assert_array_equal(found["head"], weights["lm_head.weight"].T)


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"fsdp": 4, "replica": 2}])
def test_same_values_on_every_mesh(sizes):
    with jax.set_mesh(sharding.make_mesh(MeshConfig(), jax.devices()[:1])):
        _, one = huggingface.load(REFERENCES / TIED)
    with jax.set_mesh(sharding.make_mesh(MeshConfig(**sizes))):
        _, many = huggingface.load(REFERENCES / TIED)
    for path, leaf in leaves(many).items():
        np.testing.assert_array_equal(leaf, leaves(one)[path], err_msg=path)
    gate = leaves(many)["blocks.mlp.gate"]
    assert gate.addressable_shards[0].data.shape == (2, 32 // sizes["fsdp"], 40)


def test_heads_divided_over_devices():
    devices = np.array(jax.devices()).reshape(1, 2, 1, 4, 1, 1)
    types = (jax.sharding.AxisType.Explicit,) * 6
    _, one = huggingface.load(REFERENCES / UNTIED)  # no mesh at all
    with jax.set_mesh(jax.sharding.Mesh(devices, sharding.MESH_AXES, axis_types=types)):
        _, many = huggingface.load(REFERENCES / UNTIED)
    for path, leaf in leaves(many).items():
        np.testing.assert_array_equal(leaf, leaves(one)[path], err_msg=path)
    assert leaves(many)["blocks.attention.o_proj"].addressable_shards[0].data.shape == (2, 1, 8, 16)


@pytest.mark.usefixtures("mesh")
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_widens_exactly(folder, dtype):
    folder = folder(TIED)
    rewrite(folder, lambda weights: weights.update({name: array.astype(dtype) for name, array in weights.items()}))
    _, decoder = huggingface.load(folder)
    embed = load_file(REFERENCES / TIED / "model.safetensors")["model.embed_tokens.weight"]
    np.testing.assert_array_equal(leaves(decoder)["embed"], embed.astype(dtype).astype(np.float32))


@pytest.mark.usefixtures("mesh")
def test_several_files(folder):
    folder = folder(UNTIED)
    split(folder)
    _, decoder = huggingface.load(folder)
    _, whole = huggingface.load(REFERENCES / UNTIED)
    for path, leaf in leaves(decoder).items():
        np.testing.assert_array_equal(leaf, leaves(whole)[path])


@pytest.mark.usefixtures("mesh")
def test_redundant_head_and_old_constants(folder):
    folder = folder(TIED)

    def change(weights):
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].copy()
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)

    rewrite(folder, change)
    config, decoder = huggingface.load(folder)
    assert config.tied_embeddings
    assert decoder.head is None
    rewrite(folder, lambda weights: weights["lm_head.weight"].__setitem__((79, 31), 7.0))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: differs from model\.embed_tokens\.weight"):
        huggingface.load(folder)


def drop(name):
    return lambda weights: weights.pop(name)


def put(name, array):
    return lambda weights: weights.update({name: array})


@pytest.mark.usefixtures("mesh")
@pytest.mark.parametrize(
    ("case", "change", "told"),
    [
        (UNTIED, drop("lm_head.weight"), ["1 missing: lm_head.weight"]),
        (TIED, drop("model.layers.1.self_attn.q_proj.bias"), ["1 missing: model.layers.1.self_attn.q_proj.bias"]),
        (UNTIED, put("model.layers.2.mlp.up_proj.weight", np.ones(3, np.float32)), ["1 unexpected", "layers.2.mlp"]),
        (UNTIED, put("model.layers.0.self_attn.q_proj.bias", np.ones(32, np.float32)), ["1 unexpected", "q_proj.bias"]),
        (UNTIED, put("model.norm.weight", np.ones(31, np.float32)), ["model.norm.weight [31] instead of [32]"]),
        (UNTIED, put("model.norm.weight", np.array(1, np.float32)), ["model.norm.weight [] instead of [32]"]),
        (UNTIED, put("model.norm.weight", np.ones(32, np.int32)), ["dtype", "model.norm.weight I32"]),
        (UNTIED, dict.clear, ["21 missing: model.embed_tokens.weight", "and 13 more"]),
    ],
)
def test_tensors_that_do_not_fit(folder, case, change, told):
    folder = folder(case)
    rewrite(folder, change)
    with pytest.raises(CheckpointError) as caught:
        huggingface.load(folder)
    assert "\n" not in str(caught.value)
    for part in told:
        assert part in str(caught.value)


@pytest.mark.usefixtures("mesh")
def test_all_troubles_in_one_error(folder):
    folder = folder(UNTIED)

    def change(weights):
        weights["model.wrong.weight"] = weights.pop("lm_head.weight")
        weights["model.norm.weight"] = np.ones(3, np.float32)

    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=r"1 missing: lm_head.*1 unexpected: model.wrong.*1 wrong shape"):
        huggingface.load(folder)


@pytest.mark.usefixtures("mesh")
def test_pickled_weights_are_never_opened(folder):
    folder = folder(UNTIED)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickle is never loaded"):
        huggingface.load(folder)


@pytest.mark.usefixtures("mesh")
@pytest.mark.parametrize("keep", [0.0, 0.00005, 0.01, 0.5, 0.99999])
def test_truncated_file(folder, keep):
    path = folder(UNTIED) / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is damaged"):
        huggingface.load(path.parent)


@pytest.mark.usefixtures("mesh")
def test_garbled_headers_raise_nothing_else(folder):
    path = folder(UNTIED) / "model.safetensors"
    content, rng = path.read_bytes(), np.random.default_rng(0)
    header = 8 + int.from_bytes(content[:8], "little")
    refused = 0
    for _ in range(60):
        garbled = bytearray(content)
        for _ in range(rng.integers(1, 4)):
            garbled[rng.integers(header)] = rng.integers(256)
        path.write_bytes(garbled)
        try:
            huggingface.load(path.parent)
        except CheckpointError:
            refused += 1
    assert refused > 30  # a change of white space or metadata passes, and may


@pytest.mark.usefixtures("mesh")
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda index: index["weight_map"].update({"lm_head.weight": "../../secret.safetensors"}),
            "outside its folder",
        ),
        (lambda index: index["weight_map"].update({"lm_head.weight": "gone.safetensors"}), "missing: gone.safetensors"),
        (lambda index: index["weight_map"].pop("lm_head.weight"), "not listed: lm_head.weight"),
        (lambda index: index["weight_map"].update({"x": "model-00001-of-00002.safetensors"}), "not there: x in"),
        (dict.clear, "weight_map"),
    ],
)
def test_index_that_does_not_fit(folder, change, told):
    folder = folder(UNTIED)
    index = split(folder)
    change(index)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=told):
        huggingface.load(folder)


def test_mesh_that_does_not_divide_the_model(folder):
    folder = folder(UNTIED)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"hidden_size": 36}))
    mesh = sharding.make_mesh(MeshConfig(fsdp=8))
    with jax.set_mesh(mesh), pytest.raises(ConfigError, match="hidden_size"):
        huggingface.load(folder)


MEASURE = """
import resource, sys, jax
from davinci_jax.models import huggingface
jax.devices()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
_, decoder = huggingface.load(sys.argv[1])
jax.block_until_ready(decoder)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) * 1024 / sum(leaf.nbytes for leaf in jax.tree.leaves(decoder)))
"""


@pytest.mark.slow
def test_host_memory_stays_near_one_copy(tmp_path):
    raw = json.loads((REFERENCES / UNTIED / "config.json").read_text())
    raw |= {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 16, "vocab_size": 8192, "head_dim": 128}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    tensors = {
        entry.name: np.ones(entry.shape, np.float32) for entry in huggingface.layout.entries(huggingface.from_dict(raw))
    }
    assert sum(tensor.nbytes for tensor in tensors.values()) > 300e6
    save_file(tensors, tmp_path / "model.safetensors")
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    ratio = float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
    assert ratio < 1.4
