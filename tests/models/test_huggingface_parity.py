"""The decoder computes what transformers computes: against recorded references, and live in the parity tier."""

import dataclasses
import importlib.util
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from davinci_jax import sharding
from davinci_jax.experiment import MeshConfig
from davinci_jax.models import decoder as decoder_lib
from davinci_jax.models import huggingface
from davinci_jax.models.huggingface import layout

REFERENCES = pathlib.Path(__file__).parent.parent / "references"
CASES = sorted(path.name for path in (REFERENCES / "models").iterdir())
INPUTS = ("tokens", "labels", "segment_ids", "positions")
LOGITS_ATOL, GRADIENT_RTOL = 1e-4, 1e-3


@pytest.fixture(autouse=True)
def one_device_mesh():
    with jax.set_mesh(sharding.make_mesh(MeshConfig(), jax.devices()[:1])):
        yield


def load_float32(folder):
    config = dataclasses.replace(huggingface.read_config(folder), compute_dtype="float32", remat="none")
    return config, huggingface.load_weights(config, folder)


def tensors(tree, config):
    """A decoder, or gradients in its shape, as Hugging Face tensors by name."""
    leaves = {huggingface.parameter_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    arrays = {path: np.asarray(leaf) for path, leaf in leaves.items()}
    return {
        entry.name: entry.from_decoder(arrays[entry.path][entry.index])
        for entry in layout.entries(config)
        if not entry.name.endswith("e_score_correction_bias")  # state, which has no gradient
    }


@jax.jit
def forward(decoder, inputs):
    return decoder.logits(inputs["tokens"], inputs["segment_ids"], inputs["positions"])


@jax.jit
def logits_loss_and_gradients(decoder, inputs):
    def mean_loss(decoder):
        nll, _ = decoder_lib.token_losses(decoder, **inputs)
        return jnp.sum(nll) / jnp.sum(inputs["labels"] != -1)

    logits = decoder.logits(inputs["tokens"], inputs["segment_ids"], inputs["positions"])
    return logits, *jax.value_and_grad(mean_loss)(decoder)


def place(expected):
    placement = jax.sharding.NamedSharding(jax.sharding.get_mesh(), sharding.spec("batch", "sequence"))
    return {name: jax.device_put(expected[name], placement) for name in INPUTS}


def logits_error(folder, expected):
    """Largest absolute error of the logits."""
    _, decoder = load_float32(folder)
    return np.max(np.abs(np.asarray(forward(decoder, place(expected))) - expected["logits"]))


def errors(folder, expected):
    """Largest absolute errors of logits and loss, largest error of a gradient relative to its largest entry."""
    config, decoder = load_float32(folder)
    logits, loss, gradients = logits_loss_and_gradients(decoder, place(expected))
    found = tensors(gradients, config)
    wanted = {name.removeprefix("gradient:"): array for name, array in expected.items() if "gradient:" in name}
    assert found.keys() == wanted.keys()
    relative = [np.max(np.abs(found[name] - wanted[name])) / np.max(np.abs(wanted[name])) for name in wanted]
    return np.max(np.abs(np.asarray(logits) - expected["logits"])), abs(float(loss) - expected["loss"]), max(relative)


def assert_parity(folder, expected):
    logits, loss, gradient = errors(folder, expected)
    assert logits < LOGITS_ATOL
    assert loss < LOGITS_ATOL
    assert gradient < GRADIENT_RTOL


def assert_no_parity(folder, expected):
    logits, _, gradient = errors(folder, expected)
    assert logits > 100 * LOGITS_ATOL
    assert gradient > 10 * GRADIENT_RTOL


MARKS = {
    "qwen2_tied_4_2": (),
    "qwen3_moe_tied_4_4": pytest.mark.exhaustive, "glm4_moe_untied_4_1": pytest.mark.exhaustive,
}  # fmt: skip


@pytest.mark.parametrize("case", [pytest.param(case, marks=MARKS.get(case, pytest.mark.slow)) for case in CASES])
def test_recorded_logits_loss_and_gradients(case):
    folder = REFERENCES / "models" / case
    assert_parity(folder, load_file(folder / "expected.safetensors"))


def swapped(case, target, pairs):
    """A copy of a reference in which tensors of the same shape have changed names."""
    shutil.copytree(REFERENCES / "models" / case, target)
    weights = load_file(target / "model.safetensors")
    names = {name: name for name in weights}
    for a, b in pairs:
        for name in weights:
            if a in name:
                names[name], names[name.replace(a, b)] = name.replace(a, b), name
    assert any(name != new for name, new in names.items())
    save_file({new: weights[name] for name, new in names.items()}, target / "model.safetensors")
    return target


@pytest.mark.slow
@pytest.mark.parametrize("case", ["qwen2_tied_4_2", "llama_untied_4_4"])
@pytest.mark.parametrize(
    "pairs",
    [
        [("mlp.gate_proj", "mlp.up_proj")],
        [("layers.0.mlp.gate_proj", "layers.0.mlp.up_proj")],
        [("self_attn.k_proj", "self_attn.v_proj")],
        [("layers.0.", "layers.1.")],
        [("input_layernorm", "post_attention_layernorm")],
        [("layers.1.self_attn.o_proj", "layers.0.self_attn.o_proj")],
    ],
    ids=["gate-up", "gate-up-of-one-layer", "k-v", "layers", "norms", "o-of-two-layers"],
)
def test_swapped_tensors_are_noticed(tmp_path, case, pairs):
    expected = load_file(REFERENCES / "models" / case / "expected.safetensors")
    assert_no_parity(swapped(case, tmp_path / "swapped", pairs), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "pairs"),
    [
        ("qwen3_tied_4_2", [("self_attn.q_norm", "self_attn.k_norm")]),
        ("qwen3_moe_untied_4_2", [("experts.0.", "experts.3.")]),
        ("qwen3_moe_untied_4_2", [("experts.2.gate_proj", "experts.2.up_proj")]),
        pytest.param(
            "qwen3_moe_tied_4_4", [("layers.0.mlp.gate.", "layers.1.mlp.gate.")], marks=pytest.mark.exhaustive
        ),
        ("glm4_moe_tied_4_2", [("experts.1.", "experts.5.")]),
        ("glm4_moe_tied_4_2", [("shared_experts.gate_proj", "shared_experts.up_proj")]),
    ],
    ids=["q-k-norms", "experts", "gate-up-of-one-expert", "routers", "experts-of-glm", "shared-gate-up"],
)
def test_swapped_tensors_of_experts_are_noticed(tmp_path, case, pairs):
    expected = load_file(REFERENCES / "models" / case / "expected.safetensors")
    assert_no_parity(swapped(case, tmp_path / "swapped", pairs), expected)


@pytest.mark.slow
def test_a_bias_that_is_not_loaded_is_noticed(tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(REFERENCES / "models" / "glm4_moe_tied_4_2", folder)
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    save_file(weights | {name: np.zeros_like(weights[name])}, folder / "model.safetensors")
    assert logits_error(folder, load_file(folder / "expected.safetensors")) > 10 * LOGITS_ATOL


@pytest.mark.slow
def test_swapped_head_and_embedding_are_noticed(tmp_path):
    expected = load_file(REFERENCES / "models" / "llama_untied_4_4" / "expected.safetensors")
    folder = swapped("llama_untied_4_4", tmp_path / "swapped", [("lm_head", "model.embed_tokens")])
    assert_no_parity(folder, expected)


@pytest.mark.parametrize(
    ("case", "key", "value"),
    [
        ("qwen2_tied_4_2", "rope_parameters", {"rope_type": "default", "rope_theta": 10000.0}),
        ("llama_tied_4_2_scaled", "rope_parameters", {"rope_type": "default", "rope_theta": 100.0}),
        ("llama_untied_4_4", "rms_norm_eps", 1e-2),
        *(
            pytest.param(*change, marks=pytest.mark.slow)
            for change in (
                ("qwen3_moe_untied_4_2", "norm_topk_prob", False),
                ("qwen3_moe_untied_4_2", "num_experts_per_tok", 3),
                ("glm4_moe_tied_4_2", "routed_scaling_factor", 1.0),
                ("glm4_moe_tied_4_2", "topk_group", 4),
            )
        ),
    ],
)
def test_another_config_is_noticed(tmp_path, case, key, value):
    folder = tmp_path / "other"
    shutil.copytree(REFERENCES / "models" / case, folder)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {key: value}))
    assert logits_error(folder, load_file(folder / "expected.safetensors")) > 10 * LOGITS_ATOL


# Below: live against torch and transformers.


@pytest.fixture
def references():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    spec = importlib.util.spec_from_file_location("make_model_references", REFERENCES / "make_model_references.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parity
def test_recorded_references_are_what_transformers_computes(references):
    assert sorted(references.CASES) == CASES
    for number, case in enumerate(references.CASES):
        recorded = load_file(REFERENCES / "models" / case / "expected.safetensors")
        model = references.build(references.CASES[case], seed=number)
        live = references.compute(model, references.batch(model.config.vocab_size, seed=number))
        assert live.keys() <= recorded.keys()
        for name, array in live.items():
            np.testing.assert_allclose(array, recorded[name], rtol=1e-4, atol=1e-5, err_msg=f"{case} {name}")


@pytest.mark.parity
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1), (6, 3)])
@pytest.mark.parametrize(
    ("model_type", "tied", "scaled"),
    [("qwen2", True, False), ("qwen2", False, True), ("llama", False, False), ("qwen3", True, True)],
)
def test_live_logits_loss_and_gradients(references, tmp_path, model_type, heads, tied, scaled):
    rope = references.LLAMA3 if scaled else references.DEFAULT
    sizes = {"hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 3, "head_dim": 8}
    model = references.build((model_type, *heads, tied, rope, sizes), seed=11)
    model.save_pretrained(tmp_path)
    inputs = references.batch(model.config.vocab_size, seed=12)
    assert_parity(tmp_path, {**inputs, **references.compute(model, inputs)})


@pytest.mark.parity
@pytest.mark.parametrize("case", ["qwen3_moe_untied_4_2", "glm4_moe_tied_4_2", "glm4_moe_untied_4_1"])
def test_live_mixtures(references, tmp_path, case):
    """Other sizes than those recorded: more experts, more layers, two of them dense."""
    *head, further = references.CASES[case]
    qwen = head[0] == "qwen3_moe"
    more = {"mlp_only_layers": [0, 1], "num_experts": 10} if qwen else {"first_k_dense_replace": 2, "topk_group": 3}
    model = references.build((*head, {**further, **more, "num_hidden_layers": 4, "num_experts_per_tok": 4}), seed=21)
    model.save_pretrained(tmp_path)
    inputs = references.batch(model.config.vocab_size, seed=22)
    assert_parity(tmp_path, {**inputs, **references.compute(model, inputs)})
