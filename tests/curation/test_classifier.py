"""The classifier against NumPy, SciPy and a task whose answer is known; fastText against a model written by hand."""

import collections
import json
import math
import pathlib
import sys
import zlib

import jax
import numpy as np
import pytest
from raw_files import fasttext_model
from scipy.optimize import minimize_scalar

from davinci_jax.curation import classifier, fasttext, judges, labels, metrics
from davinci_jax.curation.documents import Document
from davinci_jax.curation.labels import LabelledText
from davinci_jax.curation.ngrams import NGrams
from davinci_jax.errors import ConfigError, DataError

SMALL = {"ngrams": NGrams(bits=12), "training": classifier.Training(epochs=6, batch=32)}
TOPICS = {
    "0": ["sale", "click", "banner", "offer", "price", "cart"],
    "1": ["club", "match", "player", "season", "coach", "goal"],
    "2": ["proof", "lemma", "theorem", "integral", "energy", "cell"],
}


def texts(count, noise=0.0, seed=0):
    """Texts whose topic words give their class away, except for a share whose label is drawn anew."""
    random = np.random.default_rng(seed)
    out = []
    for n in range(count):
        topic = str(random.integers(3))
        words = random.choice(TOPICS[topic], 4).tolist() + [f"w{w}" for w in random.integers(0, 500, 20)]
        random.shuffle(words)
        label = topic if random.random() >= noise else str(random.integers(3))
        out.append(LabelledText(" ".join(words), label, f"g{n}"))
    return out


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier") / "value"
    card = classifier.train(texts(900, noise=0.3), folder, name="educational value", note="planted", **SMALL)
    return folder, card


def test_a_row_is_counts_of_hashed_ngrams():
    text = "A b, a B!"
    tokens = ["a", "b", ",", "a", "b", "!"]
    places = collections.Counter()
    for order in (1, 2, 3):
        for n in range(len(tokens) - order + 1):
            gram = 0
            for token in tokens[n : n + order]:
                gram = (gram * 0xC2B2AE3D27D4EB4F + zlib.crc32(token.encode()) + 1) % 2**64
            places[(gram * 0x9E3779B97F4A7C15 % 2**64) >> 52] += 1
    norm = math.sqrt(sum(math.log1p(count) ** 2 for count in places.values()))
    found, weights = NGrams(orders=3, bits=12).row(text)
    assert found.tolist() == sorted(places)
    np.testing.assert_allclose(weights, [math.log1p(places[place]) / norm for place in sorted(places)], rtol=1e-6)


@pytest.mark.parametrize("text", ["", " \n", "x", "\ud800", "a" * 10**6, "no-blanks" * 10**5])
def test_any_text_has_a_row(text):
    places, weights = NGrams(words=50).row(text)
    assert len(places) == len(weights) <= 100
    assert not len(weights) or abs(np.linalg.norm(weights) - 1) < 1e-5
    assert np.all((places >= 0) & (places < 2**18))


def test_a_batch_holds_its_rows():
    ngrams = NGrams(bits=10)
    rows = ngrams.rows(["a b c", "", "c d", "a b c d e f"])
    places, weights, owners = rows.gather(np.array([3, 1, 0]))
    assert len(places) == 1024
    for owner, text in enumerate(["a b c d e f", "", "a b c"]):
        mine = (owners == owner) & (weights > 0)
        np.testing.assert_array_equal(places[mine], ngrams.row(text)[0])
        np.testing.assert_array_equal(weights[mine], ngrams.row(text)[1])


def test_it_learns_what_can_be_learned_and_no_more(trained):
    _, card = trained
    heldout = card["heldout"]
    # Of 30 % labels drawn anew a third is right by chance: 80 % is the best that there is.
    assert 0.68 < heldout["accuracy"] < 0.92
    assert heldout["accuracy"] > heldout["most_frequent"] + 0.2
    assert heldout["texts"] == sum(card["labels"]["heldout"].values()) > 30
    assert card["temperature"] > 1.1  # labels are noisy, a model that fits them is too sure of itself
    # The least log-loss on texts that set the temperature; on others as good, up to chance.
    assert heldout["log_loss"] < card["heldout_uncalibrated"]["log_loss"] + 0.05
    assert set(heldout["thresholds"]) == {"1", "2"}


@pytest.mark.slow
def test_the_same_labels_give_the_same_files_and_others_do_not(trained, tmp_path):
    folder, card = trained
    again = classifier.train(texts(900, noise=0.3), tmp_path / "b", name="educational value", note="planted", **SMALL)
    assert again == card
    for name in (classifier.WEIGHTS_FILE, classifier.CARD_FILE):
        assert (tmp_path / "b" / name).read_bytes() == (folder / name).read_bytes()
    other = classifier.train(texts(900, noise=0.3)[:-1], tmp_path / "c", name="educational value", **SMALL)
    assert other["labels"]["sha256"] != card["labels"]["sha256"]


def test_a_path_that_comes_to_mean_another_model_is_read_again(tmp_path, monkeypatch):
    for name, label in (("here", "good"), ("there", "bad")):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        some = [LabelledText(text.text, label if n % 2 else "other") for n, text in enumerate(texts(40))]
        classifier.train(some, pathlib.Path("model"), name="planted", **SMALL)
        assert label in classifier.load("model").classes


@pytest.mark.slow
def test_what_is_loaded_says_what_jax_says(trained):
    folder, card = trained
    model = classifier.load(str(folder))
    given = ["proof of the lemma", "", "match goal player"]
    rows = [model.ngrams.row(text) for text in given]
    logits = [
        jax.numpy.asarray(model.weights)[places].T @ jax.numpy.asarray(weights) + model.bias for places, weights in rows
    ]
    expected = jax.nn.softmax(jax.numpy.stack(logits) / card["temperature"], axis=1)
    np.testing.assert_allclose(model.probabilities(given), expected, atol=1e-5)
    assert model.classes == ("0", "1", "2")
    assert model.probabilities(["theorem integral"])[0].argmax() == 2


def test_damage_is_named(trained, tmp_path):
    folder, _ = trained
    for name in (classifier.WEIGHTS_FILE, classifier.CARD_FILE):
        copy = tmp_path / name
        copy.mkdir()
        for file in folder.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        content = bytearray((copy / name).read_bytes())
        content[len(content) // 2] ^= 255
        (copy / name).write_bytes(content)
        with pytest.raises(DataError, match="is no classifier"):
            classifier.load(str(copy))
    with pytest.raises(DataError, match=r"is no classifier \(card\.json: No such file or directory\); train one"):
        classifier.load(str(tmp_path / "none"))
    (tmp_path / "diary.txt").write_text("dear")
    with pytest.raises(DataError, match="holds other files"):
        classifier.train(texts(60), tmp_path, name="x", **SMALL)


def test_temperature_is_that_of_scipy():
    random = np.random.default_rng(0)
    logits, targets = random.normal(size=(400, 4)) * 6, random.integers(0, 4, 400)

    def loss(temperature):
        probabilities = classifier.softmax(logits / temperature)
        return -np.log(probabilities[np.arange(400), targets]).mean()

    expected = minimize_scalar(loss, bounds=(0.05, 20), method="bounded", options={"xatol": 1e-6}).x
    assert abs(classifier.fit_temperature(logits, targets) - expected) < 2e-3 * expected


def test_metrics_of_a_case_worked_by_hand():
    probabilities = np.array([[0.8, 0.2], [0.6, 0.4], [0.3, 0.7], [0.95, 0.05]])
    found = metrics.measure(probabilities, np.array([0, 1, 1, 0]), ("1", "5"))
    assert found["confusion"] == [[2, 0], [1, 1]]
    assert (found["accuracy"], found["most_frequent"]) == (0.75, 0.5)
    assert found["classes"]["1"] == {"precision": 0.6667, "recall": 1.0, "texts": 2}
    assert found["macro_f1"] == round((0.8 + 2 / 3) / 2, 4)
    assert found["log_loss"] == round(-np.log([0.8, 0.4, 0.7, 0.95]).mean(), 4)
    # Bins of 0.8, 0.6, 0.7 and 0.95: |0.2| + |0.6| + |0.3| + |0.05|, over 4.
    assert found["calibration_error"] == round((0.2 + 0.6 + 0.3 + 0.05) / 4, 4)
    assert found["mean_absolute_error"] == round((0.8 + 2.4 + 1.2 + 0.2) / 4, 4)
    assert found["thresholds"] == {"5": {"kept": 0.0, "precision": 0.0, "recall": 0.0}}
    assert "thresholds" not in metrics.measure(probabilities, np.array([0, 1, 1, 0]), ("a", "5"))


def test_labels_of_a_person_and_of_a_model(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"text": "t", "label": 3, "id": "x"}\n\n{"text": "u", "metadata": {"grade": "good"}, "group": "g"}\n'
    )
    with pytest.raises(DataError, match=r"a\.jsonl:3.*no label 'label'"):
        labels.read_labels(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_text(
        '{"text": "t", "grade": 3, "id": "x"}\n{"text": "u", "metadata": {"grade": "b"}}\n'
    )
    assert labels.read_labels(tmp_path, "grade") == [LabelledText("t", "3", "x"), LabelledText("u", "b", "")]
    for line, what in (("no", "is not JSON"), ("[]", "has no"), ('{"text": "t", "label": true}', "has no label")):
        (tmp_path / "a.jsonl").write_text(line)
        with pytest.raises(DataError, match=what):
            labels.read_labels(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="is no JSONL file"):
        labels.read_labels(tmp_path / "none.jsonl")


def test_texts_of_a_group_are_in_one_part_and_stay_there():
    some = texts(200)
    parts = labels.divide(some)
    assert {part: len(found) for part, found in parts.items()}.keys() == set(labels.PARTS)
    assert 0.7 < len(parts["train"]) / 200 < 0.9
    more = labels.divide(some + texts(100, seed=1))
    assert all(set(parts[part]) <= set(more[part]) for part in parts)
    with pytest.raises(DataError, match="fewer than two classes"):
        labels.divide([LabelledText("a", "x")] * 9)
    with pytest.raises(DataError, match=r"no text to train from|too few texts"):
        labels.divide([LabelledText("a", "x"), LabelledText("b", "y")])


def judged(operation, *given):
    rejects = {}
    documents = [Document(id=f"d{n}", text=text, level="L2") for n, text in enumerate(given)]
    kept = list(operation.apply(iter(documents), lambda document, why: rejects.setdefault(document.id, why)))
    return kept, rejects


def test_judges_select_and_never_edit(trained):
    folder, _ = trained
    given = "proof lemma theorem", "sale click banner", ""
    kept, rejects = judged(judges.EducationalValue(model=str(folder), threshold=1.4), *given)
    assert [(document.id, document.text) for document in kept] == [("d0", given[0])]
    expected = classifier.load(str(folder)).probabilities(given[:1])[0] @ [0, 1, 2]
    assert kept[0].metadata["educational_value"] == round(float(expected), 4)
    assert "educational value 0." in rejects["d1"]
    kept, rejects = judged(judges.Domain(model=str(folder), keep=("2",)), *given[:2])
    assert [document.metadata["domain"] for document in kept] == ["2"]
    assert list(rejects) == ["d1"]
    kept, rejects = judged(judges.DocumentType(model=str(folder), drop=("0",), probability=0.999), *given[:2])
    assert [document.metadata["document_type"] for document in kept] == ["2", "0"]
    kept, _ = judged(judges.Domain(model=str(folder)), *given)
    assert [document.text for document in kept] == list(given)
    with pytest.raises(ConfigError, match="is no class of the model"):
        judges.Domain(model=str(folder), keep=("3",))


def test_parameters_name_what_a_model_holds_not_where_it_lies(trained, tmp_path):
    folder, card = trained
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    here, there = (judges.EducationalValue(model=str(place)).parameters() for place in (folder, tmp_path))
    assert here == there
    assert here["model"] == card["sha256"]
    assert json.dumps(here)


WORDS, CLASSES = ("proof", "lemma", "click", "sale"), ("__label__good", "__label__bad")


@pytest.fixture
def fasttext_file(tmp_path):
    """A supervised softmax model of fastText's format 12, with (file, input [4, 3], output [2, 3])."""
    random = np.random.default_rng(0)
    inputs, outputs = random.normal(size=(4, 3)).astype("<f4"), random.normal(size=(2, 3)).astype("<f4")
    file = tmp_path / "model.bin"
    file.write_bytes(fasttext_model(WORDS, CLASSES, inputs, outputs))
    return file, inputs, outputs


def test_fasttext_says_what_its_matrices_say(fasttext_file):
    file, inputs, outputs = fasttext_file
    model = fasttext.load(str(file))
    assert model.classes == ("bad", "good")
    hidden = inputs[[0, 3, 0]].mean(axis=0)
    expected = classifier.softmax((outputs @ hidden).astype(np.float64))[::-1]
    np.testing.assert_allclose(model.probabilities(["proof\nunknown sale proof"])[0], expected, atol=1e-4)
    best = "good" if expected[1] > expected[0] else "bad"
    kept, _ = judged(judges.Domain(model=str(file), keep=(best,)), "proof sale proof")
    assert kept[0].metadata["domain"] == best


def test_fasttext_that_cannot_be_used(fasttext_file, tmp_path, monkeypatch):
    with pytest.raises(DataError, match="does not exist"):
        judges.load_model(str(tmp_path / "none.ftz"))
    (tmp_path / "text.bin").write_text("hello")
    with pytest.raises(DataError, match="is no supervised fastText model"):
        judges.load_model(str(tmp_path / "text.bin"))
    monkeypatch.setitem(sys.modules, "fasttext", None)
    fasttext._load.cache_clear()
    with pytest.raises(DataError, match=r"needs a fastText backend.*pip install"):
        judges.load_model(str(fasttext_file[0]))
