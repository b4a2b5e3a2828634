"""Shipped configs resolve to what is written down, so that a change of any default shows."""

import json
import pathlib

import pytest

from davinci_jax.experiment import CurationConfig, from_json, load_any, load_config, resolve, to_dict, to_json
from davinci_jax.experiment.identity import flatten
from davinci_jax.experiment.serialize import parse

ROOT = pathlib.Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))


def test_configs_are_shipped():
    names = {file.stem for file in CONFIGS}
    assert names >= {"davinci_3b", "davinci_1b", "davinci_160m", "davinci_7b"}
    assert names == {file.stem for file in (ROOT / "tests" / "golden").glob("*.json")}, "see tests/golden/renew.py"


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_config_is_as_written_down(file):
    golden = flatten(json.loads((ROOT / "tests" / "golden" / f"{file.stem}.json").read_text()))
    actual = flatten(to_dict(load_any(file)))
    changes = [
        f"  {name}: was {golden.get(name, 'not there')!r}, is {actual.get(name, 'not there')!r}"
        for name in sorted(golden.keys() | actual.keys())
        if golden.get(name, "not there") != actual.get(name, "not there")
    ]
    renew = f"if this is meant: python tests/golden/renew.py {file.stem}"
    assert not changes, "\n".join([f"configs/{file.name} changed:", *changes, renew])


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_config_survives_its_json(file):
    config = load_any(file)
    text = to_json(config)
    again = parse(CurationConfig, json.loads(text), "") if isinstance(config, CurationConfig) else from_json(text)
    assert to_json(again) == text
    # Parameters of a step have the types of JSON until its operation reads them.
    assert again == resolve(config)


def test_the_run_of_the_report():
    experiment = load_config(ROOT / "configs" / "davinci_3b.py")
    model, optimizer = experiment.model, experiment.optimizer
    assert (model.num_layers, model.hidden_size, model.num_heads, model.num_kv_heads) == (36, 2048, 16, 2)
    assert (model.head_size, model.vocab_size, model.mlp_size, model.max_positions) == (128, 151936, 11008, 4096)
    assert (model.rope_base, model.norm_eps, model.tied_embeddings, model.qkv_bias) == (10000, 1e-6, True, True)
    assert (optimizer.weight_decay, optimizer.beta1, optimizer.beta2) == (0.1, 0.9, 0.95)
    assert experiment.data.sequence_length == 4096
    assert (experiment.evaluation.every_steps, experiment.checkpoint.every_steps) == (5000, 5000)
    assert experiment.checkpoint.keep_every == 5000
