"""References found by BM25, against BM25 worked out document by document."""

import collections
import dataclasses
import math
import re

import corpus_passes
import numpy as np
import pytest
import scripted_server

from davinci_jax.curation.documents import Document
from davinci_jax.curation.generation.background import WriteBackground
from davinci_jax.curation.retrieval import BringReferences, _terms

FILLER = "kala mora tivu sena rolo pika duta wemi goba lufa".split()  # noqa: SIM905


def corpus(count=40, seed=0):
    """Documents in pairs: 2n uses five rare terms that 2n + 1 explains among others."""
    random = np.random.default_rng(seed)
    documents = []
    for n in range(count):
        rare = [f"concept{n // 2}x{k}" for k in range(5)]
        extra = [f"detail{n}x{k}" for k in range(6)]
        words = [*rare, *extra, *random.choice(FILLER, int(random.integers(10, 60))).tolist()]
        random.shuffle(words)
        documents.append(Document(id=f"d{n:02}", text=" ".join(words) + ".", group=f"g{n}", questions=((0, 4),)))
    return documents


def made_by(operation, documents, folder, tasks=2):
    size = -(-len(documents) // tasks)
    cut = [documents[task * size : (task + 1) * size] for task in range(tasks)]
    kept, rejects = corpus_passes.run(operation, cut, folder)
    assert rejects == []
    return [document for task in kept for document in task]


def bm25(query, documents, k1=1.2, b=0.75):
    """Scores of all documents for a query, one at a time."""
    counted = [collections.Counter(re.findall(r"[^\W_]{3,}", document.text.lower())) for document in documents]
    average = sum(c.total() for c in counted) / len(counted)
    scores = []
    for c in counted:
        score = 0.0
        for term in query:
            df = sum(term in other for other in counted)
            idf = math.log(1 + (len(counted) - df + 0.5) / (df + 0.5))
            score += idf * c[term] * (k1 + 1) / (c[term] + k1 * (1 - b + b * c.total() / average))
        scores.append(score)
    return scores


def test_references_are_the_documents_that_share_rare_terms(tmp_path):
    documents = corpus()
    operation = BringReferences(count=2)
    made = made_by(operation, documents, tmp_path)
    for n, document in enumerate(made):
        (reference,) = document.metadata["references"]
        assert reference["id"] == f"d{n ^ 1:02}"
        assert document.text == f"Background\n\n[1] {reference['id']}\n{documents[n ^ 1].text}\n\n{documents[n].text}"
        ((start, end),) = document.questions
        assert document.text[start:end] == documents[n].text[:4]
        rare = [f"concept{n // 2}x{k}" for k in range(5)]
        # The terms of its own that no other document has find nobody but itself.
        assert abs(reference["score"] - bm25(rare, documents)[n ^ 1]) < 1e-3


def test_marks_end_where_the_text_before_the_references_ends(tmp_path):
    documents = [
        dataclasses.replace(
            document,
            text=f"{document.text} \n\n",
            questions=((2, len(document.text) + 3), (len(document.text), len(document.text) + 3)),
            parts=(("all", 0, len(document.text) + 2),),
        )
        for document in corpus(8)
    ]
    operation = BringReferences(place="after")
    for before, after in zip(documents, made_by(operation, documents, tmp_path), strict=True):
        assert "\n\nReferences\n\n" in after.text
        assert [after.text[start:end] for start, end in after.questions] == [before.text.rstrip()[2:]]
        assert [(name, after.text[start:end]) for name, start, end in after.parts] == [("all", before.text.rstrip())]


def test_any_number_of_tasks_gives_the_same(tmp_path):
    documents, operation = corpus(), BringReferences(count=3, shared=2, frequent=1.0)
    results = []
    for tasks in (1, 3):
        made = made_by(operation, documents, tmp_path / str(tasks), tasks)
        results.append([document.metadata for document in made])
    assert results[0] == results[1]
    assert any(len(metadata["references"]) == 3 for metadata in results[0])


def test_no_document_is_its_own_reference_nor_what_says_the_same(tmp_path):
    documents = corpus(8)
    documents[1] = Document(id="copy", text=documents[0].text, group="other")
    documents[3] = Document(id="sibling", text=documents[3].text, group=documents[2].group)
    operation = BringReferences(place="metadata")
    made = made_by(operation, documents, tmp_path)
    assert made[0].metadata["references"] == made[2].metadata["references"] == []
    assert [item["id"] for item in made[4].metadata["references"]] == ["d05"]
    assert [document.text for document in made] == [document.text for document in documents]


@pytest.mark.parametrize(
    "documents", [[], [Document(id="a", text="")], [Document(id="a", text="one two three four five")]]
)
def test_a_corpus_that_is_too_small(documents, tmp_path):
    operation = BringReferences(place="after")
    made = made_by(operation, documents, tmp_path, tasks=1)
    assert [document.text for document in made] == [document.text for document in documents]
    assert len(operation.open(tmp_path / "reduced", 0).terms) == (5 if documents and documents[0].text else 0)


def test_terms_are_words_of_three_letters_or_more():
    assert _terms("A ab ABC abc a_bc")[1].tolist() == [2]


TEXT = "The resistivity of the sample falls below the critical temperature, as Onnes observed in mercury at 4 kelvin."
NEEDED = [
    {"id": "r", "text": "Below the critical temperature a superconductor has no resistivity. It was found in 1911."}
]


@pytest.mark.parametrize(
    ("said", "written"),
    [
        ("A superconductor has no resistivity below its critical temperature [1].", True),
        ("A superconductor has no resistivity below its critical temperature.", False),
        ("A superconductor has no resistivity below its critical temperature [2].", False),
        ("A superconductor has no resistivity; found in 1912 [1].", False),
        ("NONE", False),
        ("", False),
    ],
)
def test_a_background_rests_on_its_references(said, written, tmp_path):
    documents = [Document(id="d", text=TEXT, metadata={"references": NEEDED}), Document(id="e", text=TEXT)]
    with scripted_server.serve(lambda payload, times: f"<BACKGROUND>{said}</BACKGROUND>") as server:
        operation = WriteBackground(endpoint=server.url, model="m", store=str(tmp_path), attempts=1)
        made = list(operation.apply(iter(documents), None))
        assert len(server.payloads) == 1
        assert scripted_server.material(server.payloads[0], "REFERENCE 1") == [NEEDED[0]["text"]]
    assert made[0].text == (f"Background\n\n{said}\n\n{TEXT}" if written else TEXT)
    assert (made[0].metadata["background"] == "written") is written
    assert made[1].text == TEXT
