"""Duplicates: estimates against true similarities, clusters against a plain search, planted copies, tasks."""

import json
import math
import random

import numpy as np
import pytest
from corpus_passes import run

from davinci_jax.curation.corpus import CorpusOperation
from davinci_jax.curation.documents import Document
from davinci_jax.curation.duplicates import ExactDuplicates, _clusters
from davinci_jax.curation.minhash import NearDuplicates
from davinci_jax.curation.normalise import ngram_hashes, normalise, word_hashes
from davinci_jax.errors import ConfigError


def sentence(generator, words=200):
    return " ".join("".join(generator.choice("abcdefghijklmnop") for _ in range(6)) for _ in range(words))


def changed(generator, text, share):
    """The text with a share of its words replaced, at least one if the share is not 0."""
    words = text.split()
    for place in generator.sample(range(len(words)), math.ceil(share * len(words))):
        words[place] = "".join(generator.choice("qrstuvwxyz") for _ in range(6))
    return " ".join(words)


def ids(kept):
    return [document.id for task in kept for document in task]


def documents(*texts):
    return [Document(id=f"d{n}", text=text) for n, text in enumerate(texts)]


def split(items, sizes):
    items = iter(items)
    return [[next(items) for _ in range(size)] for size in sizes]


def test_they_are_corpus_operations():
    assert isinstance(NearDuplicates(), CorpusOperation)
    assert isinstance(ExactDuplicates(), CorpusOperation)
    assert NearDuplicates().parameters() == {
        "bands": 14, "rows": 8, "shingle": 5, "normalise_numbers": False, "max_characters": 500_000, "seed": 1,
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0, 0.01, 0.02, 0.05, 0.2])
def test_the_share_of_equal_hashes_estimates_the_similarity(share):
    generator = random.Random(7)
    operation = NearDuplicates(bands=64, rows=32)  # 2,048 hashes: standard error about 0.01
    text = sentence(generator, 2000)
    other = changed(generator, text, share)
    shingles = [{tuple(t.split()[n : n + 5]) for n in range(1996)} for t in (text, other)]
    true = len(shingles[0] & shingles[1]) / len(shingles[0] | shingles[1])
    equal = np.mean(operation.signature(text) == operation.signature(other))
    assert abs(equal - true) < 0.05


@pytest.mark.slow
def test_recall_of_planted_copies_follows_the_banding_curve(tmp_path):
    """The recall table: copies with 0, 1, 2 and 4 % of their words changed, against what theory says of them."""
    generator, table = random.Random(11), {}
    for share in (0.0, 0.01, 0.02, 0.04):
        originals = [sentence(generator) for _ in range(120)]
        copies = [changed(generator, text, share) for text in originals]
        _, rejects = run(NearDuplicates(), [documents(*originals, *copies)], tmp_path / str(share))
        gone = dict(rejects)
        # A copy goes for its own original, and nothing else goes.
        assert all(gone[name] == f"near-duplicate of d{int(name[1:]) - 120}" for name in gone)
        similar = (1 - share) ** 5
        similar = similar / (2 - similar)
        table[share] = (len(gone) / 120, 1 - (1 - similar**8) ** 14)
    assert table[0.0][0] == 1.0
    assert table[0.01][0] >= 0.97
    for share, (found, expected) in table.items():
        assert abs(found - expected) < 0.11, (share, found, expected)


def test_case_punctuation_accents_and_blanks_do_not_hide_a_copy(tmp_path):
    text = "The Café in the old town, it is said, was naïve about money; so it closed early in the year."
    copy = "the cafe\n in the OLD town it is said\twas naive about money so it closed (early) in the year"
    kept, rejects = run(NearDuplicates(), [documents(text, copy)], tmp_path)
    assert ids(kept) == ["d0"]
    assert rejects == [("d1", "near-duplicate of d0")]
    assert kept[0][0].metadata == {"duplicates": 1}


def test_mathematics_that_differs_in_numbers_stays_unless_numbers_are_normalised(tmp_path):
    """The trap: with every number a 0, a thousand exercises of one template are one document."""
    template = "Solve the equation {} x plus {} equals {} for x and write down every step of the solution please."
    exercises = [template.format(n, n * 7 + 1, n * 31 + 5) for n in range(20)]
    kept, _ = run(NearDuplicates(), [documents(*exercises)], tmp_path / "off")
    assert len(ids(kept)) == 20
    kept, _ = run(NearDuplicates(normalise_numbers=True), [documents(*exercises)], tmp_path / "on")
    assert ids(kept) == ["d0"]


def test_numbers_of_any_script_with_a_decimal_part_are_one():
    assert normalise("3.14 x2 ١٢ 1,000 7", True).split() == ["0", "x0", "0", "0", "0"]
    assert normalise("3.14 X2", False).split() == ["3", "14", "x2"]


def test_hashing_by_stretches_is_hashing_of_the_whole_text():
    text = "Naïve, CAFÉ-like 3.14 — end.of\u00a0line\nÅngström's x_1 \u0130stanbul ΟΔΟΣ 1,5"
    whole = normalise(text, True).split()
    assert word_hashes(True).of(text).tolist() == [word_hashes(True)[word][0] for word in whole]


def test_ngram_hashes_tell_order_and_differ():
    words = np.array([1, 2, 3, 1, 2, 3, 3, 2, 1], np.uint64)
    hashes = ngram_hashes(words, 3)
    assert hashes[0] == hashes[3]
    assert len(set(hashes.tolist())) == 6
    assert len(ngram_hashes(words, 10)) == 0


def test_short_documents_are_compared_with_no_other(tmp_path):
    kept, rejects = run(NearDuplicates(), [documents("one two three four", "one two three four", "", "")], tmp_path)
    assert rejects == []
    assert len(ids(kept)) == 4


def test_a_huge_document_is_looked_at_up_to_the_bound():
    generator = random.Random(2)
    operation = NearDuplicates(max_characters=1000)
    head = sentence(generator, 300)
    assert (operation.signature(head) == operation.signature(head[:1000] + " " + sentence(generator, 300))).mean() > 0.9
    assert (operation.signature(head) == operation.signature(head[:1000] * 1)).all()


def test_blocks_of_shingles_give_the_smallest_hash_of_all(monkeypatch):
    from davinci_jax.curation import minhash

    text = sentence(random.Random(3), 700)
    whole = NearDuplicates().signature(text)
    monkeypatch.setattr(minhash, "_BLOCK", 64)
    minhash._scratch.cache_clear()
    try:
        assert (NearDuplicates().signature(text) == whole).all()
    finally:
        minhash._scratch.cache_clear()


def plain_clusters(keys):
    """First document of each cluster, by walking from document to document."""
    labels = list(range(len(keys)))
    for start in range(len(keys)):
        if labels[start] != start:
            continue
        reached, ahead = {start}, [start]
        while ahead:
            at = ahead.pop()
            near = [
                n
                for n in range(len(keys))
                if n not in reached and any(a == b for a, b in zip(keys[at], keys[n], strict=True))
            ]
            reached |= set(near)
            ahead += near
        for n in reached:
            labels[n] = min(labels[n], start)
    return labels


def test_clusters_are_those_of_a_plain_search():
    generator = np.random.default_rng(4)
    for spread in (8, 30, 90):
        keys = generator.integers(0, spread, (60, 3)).astype(np.uint64)
        record = np.concatenate([np.arange(60, dtype=np.uint64)[:, None], keys], axis=1)
        # Keys of different columns are different things.
        labels = _clusters([record[:25], record[25:25], record[25:]], 3, 1)
        assert labels.tolist() == plain_clusters(keys.tolist())


def test_any_number_of_tasks_keeps_the_same_documents(tmp_path):
    generator = random.Random(5)
    originals = [sentence(generator, 60) for _ in range(20)]
    texts = originals + [changed(generator, text, 0.01) for text in originals[::2]] + ["", "short"] + originals[:3]
    generator.shuffle(texts)
    given = documents(*texts)
    for operation in (NearDuplicates(), ExactDuplicates()):
        outcomes = []
        for n, sizes in enumerate([(35,), (10, 25), (0, 12, 0, 23), (1,) * 35]):
            kept, rejects = run(operation, split(given, sizes), tmp_path / f"{operation.name}{n}")
            counts = {document.id: document.metadata.get("duplicates") for task in kept for document in task}
            outcomes.append((ids(kept), rejects, counts))
        assert all(outcome == outcomes[0] for outcome in outcomes)
        assert outcomes[0][1]


def test_exact_duplicates_ignore_blanks_around_and_nothing_else(tmp_path):
    texts = ["same text", " same text\n", "same  text", "Same text", "half \ud800", "half \ud800"]
    kept, rejects = run(ExactDuplicates(), [documents(*texts)], tmp_path)
    assert ids(kept) == ["d0", "d2", "d3", "d4"]
    assert rejects == [("d1", "same text as d0"), ("d5", "same text as d4")]


def test_names_that_an_extraction_put_in_do_not_tell_documents_apart(tmp_path):
    pages = [Document(id=n, text=f"module.{n}\n\nthe page", parts=((n, 10, 18),)) for n in "ab"]
    kept, _ = run(ExactDuplicates(), [pages], tmp_path)
    assert ids(kept) == ["a"]


def test_a_source_without_documents(tmp_path):
    for operation in (NearDuplicates(), ExactDuplicates()):
        assert run(operation, [[], []], tmp_path / operation.name) == ([[], []], [])


def test_what_tasks_read_is_json(tmp_path):
    run(ExactDuplicates(), [documents("a", "a")], tmp_path)
    assert json.loads((tmp_path / "reduced" / "000000.json").read_text()) == {"gone": {"1": "d0"}, "stay": {"0": 1}}


def test_parameters_that_are_no_counts():
    with pytest.raises(ConfigError, match=r"near-duplicates\.bands"):
        NearDuplicates(bands=0)


@pytest.mark.parametrize(
    ("error", "is_fatal"),
    [(ValueError("odd"), False), (ConfigError("f", 1, "is odd", "mend it"), True), (OSError(2, "no file"), True)],
)
def test_a_document_whose_keys_cannot_be_made_is_rejected_alone(error, is_fatal, tmp_path, monkeypatch):
    real = ExactDuplicates.keys

    def keys(operation, document):
        if document.text == "odd":
            raise error
        return real(operation, document)

    monkeypatch.setattr(ExactDuplicates, "keys", keys)
    tasks = [documents("a", "odd", "odd", "b", "a")]
    if is_fatal:
        with pytest.raises(type(error)):
            run(ExactDuplicates(), tasks, tmp_path)
    else:
        kept, rejects = run(ExactDuplicates(), tasks, tmp_path)
        assert ids(kept) == ["d0", "d3"]
        failed = "exact-duplicates failed (ValueError: odd)"
        assert rejects == [("d1", failed), ("d2", failed), ("d4", "same text as d0")]
