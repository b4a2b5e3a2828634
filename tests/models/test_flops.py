"""Counts against the parameters of built models and the figures of the daVinci-LLM report."""

import dataclasses

import jax
import pytest

from davinci_jax import sharding
from davinci_jax.experiment import MeshConfig
from davinci_jax.models import decoder as decoders
from davinci_jax.models import flops, presets

PRESETS = ("davinci_3b", "davinci_1b", "davinci_160m", "davinci_7b", "davinci_moe_3b", "davinci_moe_tiny")


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_num_params_counts_what_is_built(name):
    config = getattr(presets, name)()
    with jax.set_mesh(sharding.make_mesh(MeshConfig(), jax.devices()[:1])):
        model = jax.eval_shape(lambda: decoders.build(config, jax.random.key(0)))
    leaves = jax.tree_util.tree_leaves_with_path(model)
    assert flops.num_params(config) == sum(leaf.size for path, leaf in leaves if not decoders.is_state(path))


@pytest.mark.parametrize(
    ("name", "billions"),
    [("davinci_3b", 3.086), ("davinci_1b", 1.544), ("davinci_160m", 0.159), ("davinci_7b", 7.615)],
)
def test_num_params_of_the_presets(name, billions):
    assert flops.num_params(getattr(presets, name)()) / 1e9 == pytest.approx(billions, abs=6e-4)


def test_figures_of_the_mixture():
    """By hand, in the words of the preset's docstring."""
    config = presets.davinci_moe_3b()
    embedding, attention = 151936 * 1024, 2 * 1024 * 128 * (16 + 2)
    expert, norms = 3 * 1024 * 512, 2 * 1024 + 2 * 128
    total = embedding + 28 * (attention + norms) + 7 * expert + 27 * (65 * expert + 64 * 1024) + 1024
    active = total - 27 * 58 * expert
    assert (flops.num_params(config), flops.num_active_params(config)) == (total, active)
    assert (total / 1e9, active / 1e9) == (pytest.approx(3.061, abs=5e-4), pytest.approx(0.598, abs=5e-4))
    assert (active - embedding) / 1e9 == pytest.approx(0.442, abs=5e-4)
    matrices = active - 28 * norms - 1024
    assert flops.flops_per_token(config, 4096) == 6 * matrices + 6 * 28 * 16 * 128 * 4096
    dense = presets.davinci_3b()
    assert flops.num_active_params(dense) == flops.num_params(dense)


def test_figures_of_the_3b_model():
    config = presets.davinci_3b()
    one_less = dataclasses.replace(config, num_layers=config.num_layers - 1)
    assert (flops.num_params(config) - flops.num_params(one_less)) / 1e6 == pytest.approx(77.07, abs=0.01)
    assert flops.flops_per_token(config, 4096) / 1e9 == pytest.approx(20.33, abs=0.005)
    assert flops.flops_per_token(config, 4096, causal=False) / 1e9 == pytest.approx(22.14, abs=0.005)


def test_shape_of_the_3b_model_is_the_reports():
    c = presets.davinci_3b()
    assert (c.num_layers, c.hidden_size, c.num_heads, c.num_kv_heads, c.head_size) == (36, 2048, 16, 2, 128)
    assert (c.mlp_size, c.vocab_size, c.max_positions) == (11008, 151936, 4096)
    assert (c.rope_base, c.norm_eps, c.qkv_bias, c.tied_embeddings) == (10000.0, 1e-6, True, True)


@pytest.mark.parametrize(
    ("kind", "tflops"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU7x", 1153.5),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989.4),
        ("NVIDIA B200", 2250),
    ],
)
def test_peaks(kind, tflops):
    assert flops.peak_flops(kind) == pytest.approx(tflops * 1e12)
    assert flops.peak_flops(kind, "float32") <= flops.peak_flops(kind)


def test_unknown_device_or_dtype_has_no_peak():
    assert flops.peak_flops("cpu") is None
    assert flops.peak_flops("NVIDIA H200", "int4") is None
