"""What a config of curation may say, and the one line for what it may not."""

import pytest

from davinci_jax.curation.registry import build
from davinci_jax.errors import ConfigError
from davinci_jax.experiment import apply_overrides
from davinci_jax.experiment.curation import CuratedSource, CurationConfig, Input, Step

GIVEN = Input(kind="folder", path="raw")


def source(**changes):
    return CuratedSource(**{"name": "s", "domain": "D", "level": "L1", "inputs": (GIVEN,), "recipe": (), **changes})


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: source(inputs=("x",)), r"sources\[s\]\.inputs: lists a str; list Input alone"),
        (lambda: source(inputs="x"), r"sources\[s\]\.inputs: is a str, not a list"),
        (lambda: source(recipe=("drop-short",)), r"sources\[s\]\.recipe: lists a str; list Step alone"),
        (lambda: source(name=5), r"sources\.name = 5: is not text"),
        (lambda: source(domain=None), r"sources\[s\]\.domain: is not text"),
        (lambda: source(name="a b\n"), r"sources\.name = 'a b\\n': cannot be a folder"),
        (lambda: source(name="é" * 101), "has more than 200 bytes"),
        (lambda: Input(kind="folder", path=5), r"input\.path = 5: is not text"),
        (lambda: Input(kind="folder", path=""), r"input\.path = '': is empty"),
        (lambda: Input(kind="folder", path="x", name=5), r"input\.name = 5: is not text"),
        (lambda: Input(kind="folder", path="x", options=[1]), r"input\.options = \[1\]: is not a mapping"),
        (lambda: Step(5), r"step\.operation = 5: is not text"),
        (lambda: Step("drop-short", 5), r"step\.drop-short\.parameters = 5: is not a mapping"),
        (lambda: build(Step("keep-sizes", min_bytes=-5)), r"keep-sizes\.min_bytes = -5: must be at least 0"),
        (lambda: build(Step("near-duplicates", bands=10**9)), r"near-duplicates\.bands .* give at most 4096"),
    ],
)
def test_what_cannot_be_is_one_line(make, told):
    with pytest.raises(ConfigError, match=told) as error:
        make()
    assert "\n" not in str(error.value)


def test_what_can_be_is():
    assert source(name="a b-é" + "x" * 190).inputs == (GIVEN,)
    assert build(Step("near-duplicates", bands=512, rows=8)).columns == 512


def test_an_override_sets_what_a_recipe_leaves_at_its_default():
    recipe = (Step("decontaminate", benchmarks=("b.jsonl",)), Step("drop-short"))
    config = CurationConfig(root="out", sources=(source(recipe=recipe),))
    step = "sources.s.recipe.decontaminate.parameters"
    overrides = [f"{step}.ngram=3", f'{step}.fields=["q"]', "sources.s.inputs.0.options.max_bytes=7"]
    made = apply_overrides(config, overrides).sources[0]
    assert made.recipe[0].parameters == {"benchmarks": ["b.jsonl"], "ngram": 3, "fields": ["q"]}
    assert made.inputs[0].options == {"max_bytes": 7}
    assert build(made.recipe[0]).ngram == 3
    wrong = apply_overrides(config, [f"{step}.ngramm=3"]).sources[0].recipe[0]
    with pytest.raises(ConfigError, match=r"ngramm: is an unknown field; did you mean 'ngram'\?"):
        build(wrong)
    with pytest.raises(ConfigError, match="unknown part 'parameter'"):
        apply_overrides(config, ["sources.s.recipe.drop-short.parameter.characters=3"])
