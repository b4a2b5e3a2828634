"""Recipes, resolved JSON and run directories as experiments."""

import pytest
from experiments import small

from davinci_jax.errors import ConfigError, DataError
from davinci_jax.experiment import load_config, resolve, to_json

HEAD = "from experiments import small\nfrom davinci_jax.experiment import *\n"


def recipe(folder, text: str) -> str:
    file = folder / "recipe.py"
    file.write_text(HEAD + text)
    return str(file)


def test_recipe_json_and_run_directory_are_the_same(tmp_path):
    (tmp_path / "experiment.json").write_text(to_json(small()))
    path = recipe(tmp_path, "config = small\n")
    loaded = [load_config(name) for name in (path, tmp_path / "experiment.json", tmp_path)]
    assert loaded == [resolve(small())] * 3
    assert isinstance(loaded[0].data.sources[0].tokens, float)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"has no function config\(\); let config\(\) return an Experiment or a CurationConfig"),
        ("config = 3\n", r"has no function config\(\)"),
        ("config = dict\n", r"config\(\) returned a value of type dict; return an Experiment or a CurationConfig"),
        ("def config(:\n", r"recipe\.py:3.*cannot be run \(SyntaxError"),
        ("import nothing_of_the_kind\n", r"recipe\.py:3.*No module named 'nothing_of_the_kind'"),
        ("def config():\n    return small() / 0\n", r"recipe\.py:4.*cannot be run \(TypeError"),
        (
            "def config():\n    return OptimizerConfig(beta_1=0.9)\n",
            r"recipe\.py:4.*OptimizerConfig has no field 'beta_1'; did you mean 'beta1'",
        ),
        ("def config():\n    return OptimizerConfig(beta1=1.5)\n", r"optimizer\.beta1 = 1\.5: is outside \[0, 1\]"),
        (
            "def config():\n    return LearningRate(peak=1, warmup_steps=-1)\n",
            r"warmup_steps = -1: must be at least 0 and finite; give 0 or more",
        ),
        (
            "import dataclasses as d\ndef config():\n    return d.replace(small(), run=RunConfig(name='x', seed=.5))\n",
            r"run\.seed = 0\.5: is not a whole number",
        ),
        ("def config():\n    return RunConfig(name=3)\n", r"^run\.name = 3: is not text; put it in quotes"),
    ],
)
def test_recipes_that_are_none(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(recipe(tmp_path, text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "model=replace(small().model, vocab_size='4096')",
            r"^model\.vocab_size = '4096': is not a number; give a number",
        ),
        ("model=replace(small().model, z_loss='0')", r"^model\.z_loss = '0': is not a number"),
        ("mesh=MeshConfig(fsdp='8')", r"^mesh\.fsdp = '8': is not a number"),
        ("data=replace(small().data, sources=None)", r"^data\.sources: is None, not a list; give a list of Source"),
        ("data=replace(small().data, sources=['web'])", r"^data\.sources: lists a str; list Source alone"),
        ("curriculum=small().curriculum[0]", r"^curriculum: is a Stage, not a list; give a list of Stage"),
        (
            "curriculum=(replace(small().curriculum[0], batch=Batch(size=2)),)",
            r"^curriculum\[1\]\.batch: is a Batch, not a list; give a list of Batch",
        ),
        ("curriculum=(replace(small().curriculum[0], name=1),)", r"^curriculum\.name = 1: is not text"),
    ],
)
def test_a_value_of_another_kind_is_named_with_its_field(tmp_path, change, message):
    text = f"from dataclasses import replace\ndef config():\n    return replace(small(), {change})\n"
    with pytest.raises(ConfigError, match=message):
        load_config(recipe(tmp_path, text))


def test_other_user_errors_of_a_recipe_pass_through(tmp_path):
    text = "from davinci_jax.errors import DataError\ndef config():\n    raise DataError('x', None, 'y', 'z')\n"
    with pytest.raises(DataError, match="x: y; z"):
        load_config(recipe(tmp_path, text))


def test_files_that_are_no_config(tmp_path):
    with pytest.raises(ConfigError, match=r"does not exist; name a recipe such as configs/quickstart\.py"):
        load_config(str(tmp_path / "none.py"))
    with pytest.raises(ConfigError, match=r"holds no experiment\.json"):
        load_config(str(tmp_path))
    (tmp_path / "x.yaml").write_text("run: {}")
    with pytest.raises(ConfigError, match="is neither a Python recipe nor JSON"):
        load_config(str(tmp_path / "x.yaml"))
    (tmp_path / "x.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(str(tmp_path / "x.json"))
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ConfigError, match="run: is missing"):
        load_config(str(tmp_path / "x.json"))
