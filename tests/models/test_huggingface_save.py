"""Saving: exact round trips, files that stock transformers reads, and nothing half-written."""

import dataclasses
import json
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from safetensors import safe_open
from safetensors.numpy import load_file

from davinci_jax import sharding
from davinci_jax.data import tokenizer as data_tokenizer
from davinci_jax.data import train_tokenizer
from davinci_jax.errors import CheckpointError, ConfigError, DataError
from davinci_jax.experiment import MeshConfig, ModelConfig, Moe, RopeScaling
from davinci_jax.models import decoder as decoder_lib
from davinci_jax.models import huggingface
from davinci_jax.models.huggingface import saving
from davinci_jax.models.huggingface import tokenizer as tokenizer_module

# Compiles many programs; left out of the fast subset.
pytestmark = pytest.mark.slow

SIZES = {"vocab_size": 320, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "head_size": 8, "mlp_size": 40}
CONFIGS = {
    "qwen2-tied": ModelConfig(**SIZES, num_kv_heads=2, qkv_bias=True, tied_embeddings=True, rope_base=1e6),
    "qwen2-wide-heads": ModelConfig(**(SIZES | {"head_size": 16}), num_kv_heads=1, tied_embeddings=False),
    "llama": ModelConfig(**SIZES, num_kv_heads=4, qkv_bias=False, tied_embeddings=False, norm_eps=1e-5),
    "llama-scaled": ModelConfig(
        **SIZES, num_kv_heads=1, qkv_bias=False, rope_scaling=RopeScaling(factor=8.0, original_max_positions=64)
    ),
    "qwen3": ModelConfig(**(SIZES | {"head_size": 16}), num_kv_heads=2, qkv_bias=False, qk_norm=True),
    "qwen3-moe": ModelConfig(
        **SIZES,
        num_kv_heads=2,
        qkv_bias=False,
        qk_norm=True,
        tied_embeddings=False,
        moe=Moe(experts=4, experts_per_token=2, expert_size=12, first_dense=1),
    ),
    "glm4-moe": ModelConfig(
        **(SIZES | {"num_layers": 3}),
        num_kv_heads=2,
        qk_norm=True,
        moe=Moe(
            experts=6,
            experts_per_token=2,
            expert_size=12,
            shared_size=24,
            first_dense=1,
            score="sigmoid",
            groups=3,
            groups_kept=2,
            scale=1.5,
            bias_rate=0.0,
        ),
    ),
}
TEXTS = ["def f(x):\n    return x + 1", "Grüße, 世界! 🙂", "  two  spaces", "", "12345 it's\r\n\n\tx"]


@pytest.fixture(autouse=True)
def one_device_mesh():
    with jax.set_mesh(sharding.make_mesh(MeshConfig(), jax.devices()[:1])):
        yield


def random_decoder(config):
    """Every leaf random, biases and scales too, so that none can be lost unnoticed."""
    rng = np.random.default_rng(0)

    def draw(leaf):
        return jax.device_put(np.asarray(leaf) + 0.2 * rng.standard_normal(leaf.shape, np.float32), leaf.sharding)

    return jax.tree.map(draw, decoder_lib.build(config, jax.random.key(0)))


def edit(parameter, index, values):
    array = np.array(parameter[...])
    array[index] = values
    parameter[...] = jax.device_put(array, parameter[...].sharding)


def bits(decoder):
    return [np.asarray(leaf).view(np.uint32) for leaf in jax.tree.leaves(decoder)]


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory):
    """A tokenizer.json of 300 ids as `davinci shard` trains it: byte-level BPE of Qwen2's kind."""
    tokenizer = train_tokenizer.train(iter([pathlib.Path(__file__).read_text()]), 299)
    tokenizer.add_special_tokens(["<|im_end|>"])
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="session")
def gpt2_tokenizer_file(tokenizer_file, tmp_path_factory):
    """The same, but cut as GPT-2 cuts."""
    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_file))
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    path = tmp_path_factory.mktemp("gpt2") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_keeps_every_bit(tmp_path, name):
    config = CONFIGS[name]
    decoder = random_decoder(config)
    huggingface.save(decoder, config, tmp_path / "out")
    read, loaded = huggingface.load(tmp_path / "out")
    assert read == config
    assert jax.tree.structure(loaded) == jax.tree.structure(decoder)
    for a, b in zip(bits(decoder), bits(loaded), strict=True):
        np.testing.assert_array_equal(a, b)


def test_special_values_survive(tmp_path):
    config = CONFIGS["llama"]
    values = np.array([np.nan, np.inf, -np.inf, -0.0, 1e-45, np.finfo(np.float32).max], np.float32)
    decoder = random_decoder(config)
    edit(decoder.embed, np.s_[3, :6], values)
    huggingface.save(decoder, config, tmp_path / "out")
    _, loaded = huggingface.load(tmp_path / "out")
    np.testing.assert_array_equal(np.asarray(loaded.embed[...])[3, :6].view(np.uint32), values.view(np.uint32))


def test_saved_from_eight_devices_equals_saved_from_one(tmp_path):
    config = CONFIGS["qwen2-tied"]
    one = decoder_lib.build(config, jax.random.key(3))
    huggingface.save(one, config, tmp_path / "one")
    with jax.set_mesh(sharding.make_mesh(MeshConfig(fsdp=8))):
        layout = decoder_lib.build(config, jax.random.key(3))
        eight = jax.tree.map(lambda x, like: jax.device_put(np.asarray(x), like.sharding), one, layout)
        huggingface.save(eight, config, tmp_path / "eight")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "eight")]
    assert files[0] == files[1]


def test_several_files_with_an_index(tmp_path):
    config = CONFIGS["llama"]
    decoder = random_decoder(config)
    huggingface.save(decoder, config, tmp_path / "out", max_file_bytes=40_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    count = len(files)
    assert count > 2
    assert files == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == files
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(decoder))
    for file in files:
        with safe_open(tmp_path / "out" / file, framework="np") as opened:
            assert opened.metadata() == {"format": "pt"}
            tensors = [opened.get_tensor(name) for name in opened.keys()]  # noqa: SIM118 - no mapping
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors) <= 40_000
    _, loaded = huggingface.load(tmp_path / "out")
    for a, b in zip(bits(decoder), bits(loaded), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("dtype", "stored"), [("bfloat16", ml_dtypes.bfloat16), ("float16", np.float16)])
def test_stored_dtype(tmp_path, dtype, stored):
    config = CONFIGS["qwen2-tied"]
    decoder = random_decoder(config)
    huggingface.save(decoder, config, tmp_path / "out", dtype=dtype)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == dtype
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {array.dtype for array in weights.values()} == {np.dtype(stored)}
    down = np.asarray(decoder.blocks.mlp.down[...])[1].T.astype(stored)
    np.testing.assert_array_equal(weights["model.layers.1.mlp.down_proj.weight"], down)


def test_float16_overflow_is_an_error(tmp_path):
    config = CONFIGS["llama"]
    decoder = random_decoder(config)
    edit(decoder.final_norm.scale, 0, 1e6)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: holds values above the float16 range"):
        huggingface.save(decoder, config, tmp_path / "out", dtype="float16")
    assert list(tmp_path.iterdir()) == []


def test_unknown_dtype(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'bfloat16'"):
        huggingface.save(random_decoder(CONFIGS["llama"]), CONFIGS["llama"], tmp_path / "out", dtype="bfloat")


def test_nothing_is_overwritten(tmp_path):
    config = CONFIGS["llama"]
    decoder = random_decoder(config)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("taken", "file"):
        with pytest.raises(CheckpointError, match="exists and is not an empty folder"):
            huggingface.save(decoder, config, tmp_path / name)
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["notes.txt"]
    (tmp_path / "empty").mkdir()
    huggingface.save(decoder, config, tmp_path / "empty")
    huggingface.save(decoder, config, tmp_path / "new" / "deep" / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "new", "taken"]


def test_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "save_file", fail)
    with pytest.raises(CheckpointError, match=r"could not be written .*No space left"):
        huggingface.save(random_decoder(CONFIGS["llama"]), CONFIGS["llama"], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_tokenizer_files(tmp_path, tokenizer_file):
    config = CONFIGS["qwen2-tied"]
    huggingface.save(random_decoder(config), config, tmp_path / "out", tokenizer_file)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == tokenizer_file.read_bytes()
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["eos_token"] == "<|endoftext|>"
    assert json.loads((tmp_path / "out" / "special_tokens_map.json").read_text()) == {"eos_token": "<|endoftext|>"}
    for name in ("config.json", "generation_config.json"):
        raw = json.loads((tmp_path / "out" / name).read_text())
        assert (raw["eos_token_id"], raw["bos_token_id"]) == (298, None)


def test_settings_beside_the_tokenizer(tmp_path, tokenizer_file):
    shutil.copy(tokenizer_file, tmp_path / "tokenizer.json")
    beside = {
        "eos_token": {"content": "<|im_end|>", "special": True},
        "pad_token": "<|endoftext|>",
        "chat_template": "{{ messages }}",
        "auto_map": {"AutoTokenizer": "evil.Tokenizer"},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(beside))
    config = CONFIGS["llama"]
    huggingface.save(random_decoder(config), config, tmp_path / "out", tmp_path / "tokenizer.json")
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert (settings["eos_token"], settings["pad_token"]) == ("<|im_end|>", "<|endoftext|>")
    assert settings["chat_template"] == "{{ messages }}"
    assert "auto_map" not in settings
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 299


def test_tokenizer_that_cannot_be_used(tmp_path, tokenizer_file):
    config = CONFIGS["llama"]
    decoder = random_decoder(config)
    small = dataclasses.replace(config, vocab_size=299)
    with pytest.raises(ConfigError, match="vocab_size = 299: is below the 300 ids"):
        huggingface.save(random_decoder(small), small, tmp_path / "out", tokenizer_file)
    (tmp_path / "bad.json").write_text("{}")
    (tmp_path / "spm.model").write_bytes(b"\x0a")
    for name in ("bad.json", "spm.model", "none.json"):
        with pytest.raises(DataError, match=name):
            huggingface.save(decoder, config, tmp_path / "out", tmp_path / name)
    shutil.copy(tokenizer_file, tmp_path / "tokenizer.json")
    beside = {'{"eos_token": "</s>"}': "eos_token = '</s>': is no", '{"pad_token": [1]}': "pad_token = ", "[]": "JSON"}
    for settings, told in beside.items():
        (tmp_path / "tokenizer_config.json").write_text(settings)
        with pytest.raises(DataError, match=told):
            huggingface.save(decoder, config, tmp_path / "out", tmp_path / "tokenizer.json")
    assert not (tmp_path / "out").exists()


def test_end_of_text_is_found_as_the_data_pipeline_finds_it():
    assert tokenizer_module.END_OF_TEXT == data_tokenizer.END_OF_TEXT


def test_tokenizer_that_transformers_would_cut_differently(tmp_path, gpt2_tokenizer_file):
    config = CONFIGS["qwen2-tied"]
    with pytest.raises(DataError, match="differs from Qwen2's tokenizer in normalizer, pre_tokenizer"):
        huggingface.save(random_decoder(config), config, tmp_path / "out", gpt2_tokenizer_file)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        (("pre_tokenizer", "pretokenizers", 0, "pattern", "Regex"), r"\d", "pre_tokenizer"),
        (("pre_tokenizer", "pretokenizers", 1, "add_prefix_space"), True, "pre_tokenizer"),
        (("normalizer",), None, "normalizer"),
        (("model", "byte_fallback"), True, "model.byte_fallback"),
        (("model", "ignore_merges"), True, "model.ignore_merges"),
        (("added_tokens", 0, "content"), "<eos>", "<|endoftext|>"),
    ],
)
def test_every_part_of_a_qwen2_tokenizer_counts(tmp_path, tokenizer_file, path, value, told):
    parts = json.loads(tokenizer_file.read_text())
    inner = parts
    for key in path[:-1]:
        inner = inner[key]
    assert inner[path[-1]] != value
    inner[path[-1]] = value
    (tmp_path / "tokenizer.json").write_text(json.dumps(parts))
    with pytest.raises(DataError, match=f"differs from Qwen2's tokenizer in {re.escape(told)},"):
        tokenizer_module.read(tmp_path / "tokenizer.json", CONFIGS["qwen2-tied"])


# Below: what stock transformers makes of a saved folder.


@pytest.mark.parity
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("max_file_bytes", [10**9, 40_000])
def test_transformers_computes_the_same_logits(tmp_path, name, max_file_bytes):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = dataclasses.replace(CONFIGS[name], compute_dtype="float32")
    decoder = random_decoder(config)
    huggingface.save(decoder, config, tmp_path / "out", max_file_bytes=max_file_bytes)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    architecture = type(model).__name__.removesuffix("ForCausalLM").lower()
    assert architecture == name.split("-")[0] + ("moe" if config.moe else "")
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 40), dtype=np.int32)
    with torch.no_grad():
        theirs = model(input_ids=torch.from_numpy(tokens).long()).logits.numpy()
    positions = jnp.broadcast_to(jnp.arange(40), tokens.shape)
    ours = decoder.logits(jnp.asarray(tokens), jnp.ones_like(tokens), positions)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("name", "kind"),
    [("qwen2-tied", "tokenizer_file"), ("llama", "tokenizer_file"), ("llama", "gpt2_tokenizer_file")],
)
def test_transformers_encodes_the_same_ids(tmp_path, request, name, kind):
    transformers = pytest.importorskip("transformers")
    file = request.getfixturevalue(kind)
    huggingface.save(random_decoder(CONFIGS[name]), CONFIGS[name], tmp_path / "out", file)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "out"), data_tokenizer.load_tokenizer(file)
    assert (theirs.eos_token_id, len(theirs)) == (ours.eos_id, ours.vocab_size)
    code = pathlib.Path(__file__).read_text().replace("<|endoftext|>", "").replace("<|im_end|>", "")
    for text in (*TEXTS, code):
        ids = theirs(text)["input_ids"]
        np.testing.assert_array_equal(ids, ours.encode(text), err_msg=text[:40])
        assert theirs.decode(ids, skip_special_tokens=True) == text
    # Only a spelt-out special token differs: transformers parses it, a training document cannot end itself.
    assert ours.eos_id in theirs("<|endoftext|>")["input_ids"]
    assert ours.eos_id not in ours.encode("<|endoftext|>")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.generation_config.eos_token_id == ours.eos_id


@pytest.mark.parity
def test_qwen2_tokenizer_is_the_one_of_transformers():
    module = pytest.importorskip("transformers.models.qwen2.tokenization_qwen2")
    assert module.PRETOKENIZE_REGEX == tokenizer_module.QWEN2_SPLIT
