"""The recipes for books, papers and questions are made of steps that exist, with parameters that they take."""

import pathlib

import pytest

from davinci_jax.curation import classifier, registry
from davinci_jax.curation.labels import LabelledText
from davinci_jax.curation.ngrams import NGrams
from davinci_jax.experiment.load import load_any

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("name", ["curation_science", "curation_qa"])
def test_every_step_can_be_built(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_any(CONFIGS / f"{name}.py")
    fields = next(
        (step.parameters["keep"] for s in config.sources for step in s.recipe if step.operation == "domain"), ()
    )
    for model, classes in (("educational-value", "012345"), ("domain", fields)):
        labels = [LabelledText(f"text {n} of {name}", name) for name in classes for n in range(40)]
        if labels:
            classifier.train(labels, f"models/{model}", name=model, ngrams=NGrams(bits=8))
    (tmp_path / "benchmarks.jsonl").write_text('{"question": "What is it?"}\n')
    for source in config.sources:
        operations = [registry.build(step) for step in source.recipe]
        assert max(operation.level for operation in operations) == source.level
        for operation in operations:
            operation.parameters()
