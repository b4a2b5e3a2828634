"""Samples of a run: prompts from held-out documents, what is printed and what is written."""

import json

import jax
import pytest

from davinci_jax.data.build import build_shards
from davinci_jax.data.tokenizer import load_tokenizer
from davinci_jax.errors import ConfigError
from davinci_jax.experiment import (
    Batch,
    DataConfig,
    Experiment,
    LearningRate,
    MeshConfig,
    ModelConfig,
    RunConfig,
    Source,
    Stage,
)
from davinci_jax.inference import run
from davinci_jax.models.decoder import build

# Compiles many programs; left out of the fast subset.
pytestmark = pytest.mark.slow

WORDS = "the cat sat on a mat and saw that it was good "


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """Two domains with held-out documents; those of pairs begin with a question of 30 characters."""
    import tokenizers

    root = tmp_path_factory.mktemp("run")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.models.BPE(vocab={char: n for n, char in enumerate(alphabet)}, merges=[])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    (root / "data").mkdir()
    tokenizer.save(str(root / "data" / "tokenizer.json"))
    for name, spans in (("web", []), ("pairs", [[0, 30]])):
        (root / "data" / "documents" / name).mkdir(parents=True)
        with (root / "data" / "documents" / name / "part.jsonl").open("w") as file:
            for n in range(60):
                text = f"{name} {n:02d} {WORDS * 3}"
                file.write(json.dumps({"id": f"{name}/{n}", "text": text, "questions": spans}) + "\n")
    result = Experiment(
        run=RunConfig(name="t", directory=str(root / "run")),
        model=ModelConfig(
            vocab_size=260, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, head_size=4, mlp_size=24,
            compute_dtype="float32", max_positions=96,
        ),
        data=DataConfig(
            root=str(root / "data"), sequence_length=32, heldout=0.2,
            sources=(
                Source(name="web", domain="General", level="L2", tokens=1e3),
                Source(name="pairs", domain="QA", level="L2", tokens=1e3, loss="answers"),
                Source(name="later", domain="Science", level="L2", tokens=1e3),
            ),
        ),
        curriculum=(
            Stage(
                name="1", tokens=1e3, batch=(Batch(size=8),), learning_rate=LearningRate(peak=1e-3),
                mixture={"General": 1, "QA": 1},
            ),
        ),
        mesh=MeshConfig(fsdp=8),
    )  # fmt: skip
    (root / "run").mkdir()
    for source in result.data.sources[:2]:
        build_shards(result.data, source, load_tokenizer(root / "data" / "tokenizer.json"))
    return result


@pytest.fixture(autouse=True)
def untrained(monkeypatch):
    monkeypatch.setattr(
        run, "load_model", lambda experiment, step: (build(experiment.model, jax.random.key(0)), step or 7)
    )


def test_heldout_documents_are_begun(experiment, capsys):
    samples = run.generate_run(experiment, None, max_new_tokens=5, save=True)
    web, pairs = (sample["prompt"] for sample in samples)
    assert len(web) == run.PROMPT_TOKENS
    assert web.startswith("web ")
    assert pairs == f"{pairs[:9]}{WORDS}"[:30]
    written = json.loads((run.pathlib.Path(experiment.run.path) / "samples.json").read_text())
    assert written["step"] == 7
    assert written["samples"] == samples
    shown = capsys.readouterr().out
    assert "step 7 of" in shown
    assert "samples.json" in shown


def test_prompts_are_given_and_settings_reach_the_sampler(experiment):
    settings = {"max_new_tokens": 20, "temperature": 0.0}
    first = run.generate_run(experiment, ["the cat", "x"], **settings)
    assert [sample["prompt"] for sample in first] == ["the cat", "x"]
    assert first == run.generate_run(experiment, ["the cat", "x"], seed=5, **settings)
    drawn = [run.generate_run(experiment, ["the cat"], max_new_tokens=20, seed=seed, step=3) for seed in (0, 1)]
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([""], {}, "prompt 1: is empty"),
        (["a" * 90], {"max_new_tokens": 7}, "has 90 tokens"),
        (["a"], {"temperature": -1.0}, "temperature = -1.0"),
        (None, {"max_new_tokens": 96}, "more than the 96 positions"),
    ],
)
def test_bad_input_is_told_before_the_model_is_loaded(experiment, monkeypatch, prompts, settings, message):
    monkeypatch.setattr(run, "load_model", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ConfigError, match=message):
        run.generate_run(experiment, prompts, **settings)


def test_a_models_text_cannot_steer_the_terminal():
    assert run.printable("a\x1b[31mb\x07\tc\n\x9bd\u202e") == "a�[31mb�\tc\n�d�"
