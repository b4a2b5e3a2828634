"""Training a tokenizer: the form of the file, determinism, the sample, and what it leaves alone."""

import dataclasses
import json

import pytest

from davinci_jax.data.documents import is_held_out
from davinci_jax.data.tokenizer import load_tokenizer
from davinci_jax.data.train_tokenizer import sample, train_tokenizer
from davinci_jax.errors import DataError
from davinci_jax.experiment import Batch, DataConfig, Experiment, LearningRate, ModelConfig, RunConfig, Source, Stage
from davinci_jax.text import QWEN2_SPLIT

WORDS = (
    "alpha",
    "beta",
    "gamma",
    "delta",
    "epsilon",
    "zeta",
    "theta",
    "iota",
    "kappa",
    "lambda",
    "omicron",
    "sigma",
    "tau",
)


def experiment(root, vocab_size=300, mixture=(("A", 3), ("B", 1))):
    sources = (
        Source(name="one", domain="A", level="L2", tokens=1),
        Source(name="two", domain="A", level="L2", tokens=1),
        Source(name="three", domain="B", level="L2", tokens=1),
    )
    stage = Stage(
        name="s",
        tokens=100,
        batch=(Batch(size=1),),
        learning_rate=LearningRate(peak=1e-3),
        mixture=dict(mixture),
    )
    return Experiment(
        run=RunConfig(name="x"),
        model=ModelConfig(
            vocab_size=vocab_size, hidden_size=8, num_layers=1, num_heads=1, num_kv_heads=1, head_size=8, mlp_size=8
        ),
        data=DataConfig(root=str(root), sources=sources, sequence_length=16),
        curriculum=(stage,),
    )


@pytest.fixture
def root(tmp_path):
    for name in ("one", "two", "three"):
        folder = tmp_path / "documents" / name
        folder.mkdir(parents=True)
        lines = []
        for n in range(400):
            words = [WORDS[(n * 7 + k * k) % len(WORDS)] for k in range(16)]
            lines.append(json.dumps({"id": f"{name}/{n}", "text": f"{name} {n} " + " ".join(words)}))
        lines.insert(5, "{not json")
        (folder / "documents.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def quiet(line):
    pass


def test_the_file_has_the_form_of_qwen2(root):
    path = train_tokenizer(experiment(root), log=quiet)
    fields = json.loads(path.read_text())
    assert fields["normalizer"] == {"type": "NFC"}
    split, byte_level = fields["pre_tokenizer"]["pretokenizers"]
    assert (split["pattern"], split["behavior"]) == ({"Regex": QWEN2_SPLIT}, "Isolated")
    assert (byte_level["type"], byte_level["add_prefix_space"], byte_level["use_regex"]) == ("ByteLevel", False, False)
    assert fields["decoder"]["type"] == "ByteLevel"
    assert json.loads((root / "tokenizer_config.json").read_text())["eos_token"] == "<|endoftext|>"
    tokenizer = load_tokenizer(path)
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (300, 299)
    assert len(tokenizer.encode(" alpha beta")) < 10
    assert tokenizer.encode("12").size == 2  # digits stay apart


def test_the_same_documents_give_the_same_file(root):
    path = train_tokenizer(experiment(root), log=quiet)
    first = path.read_bytes()
    path.unlink()
    assert train_tokenizer(experiment(root), log=quiet).read_bytes() == first


def test_a_tokenizer_that_is_there_is_left_alone(root):
    (root / "tokenizer.json").write_text("mine")
    (root / "tokenizer_config.json").write_text("mine too")
    train_tokenizer(experiment(root), log=quiet)
    assert (root / "tokenizer.json").read_text() == "mine"
    (root / "tokenizer.json").unlink()
    train_tokenizer(experiment(root), log=quiet)
    assert (root / "tokenizer_config.json").read_text() == "mine too"


def test_the_sample_follows_the_mixture_and_its_bound(root):
    def sizes(limit):
        counts = dict.fromkeys(("one", "two", "three"), 0)
        for text in sample(experiment(root), limit):
            counts[text.split()[0]] += len(text)
        return counts

    whole = sizes(10**9)
    assert whole == sizes(10**9)
    assert min(whole.values()) > 30_000
    part = sizes(40_000)
    assert part["one"] == pytest.approx(15_000, rel=0.3)
    assert part["two"] == pytest.approx(15_000, rel=0.3)
    assert part["three"] == pytest.approx(10_000, rel=0.3)


def test_held_out_documents_are_not_in_the_sample(root):
    made = experiment(root)
    heldout = dataclasses.replace(made, data=dataclasses.replace(made.data, heldout=0.5))
    kept = set(sample(heldout, 10**9))
    for line in (root / "documents/one/documents.jsonl").read_text().splitlines():
        if line != "{not json":
            document = json.loads(line)
            assert (document["text"] in kept) != is_held_out(document["id"], 0.5)
    assert 450 < len(kept) < 750


def test_too_few_documents_and_too_small_a_vocabulary_are_told(root):
    with pytest.raises(DataError, match="ids that the documents give"):
        train_tokenizer(experiment(root, vocab_size=50_000), log=quiet)
    with pytest.raises(DataError, match="has no room for 256 bytes"):
        train_tokenizer(experiment(root, vocab_size=256), log=quiet)
    assert not (root / "tokenizer.json").exists()
    (root / "documents/two/documents.jsonl").unlink()
    with pytest.raises(DataError, match=r"documents/two.*holds no \.jsonl"):
        train_tokenizer(experiment(root), log=quiet)
