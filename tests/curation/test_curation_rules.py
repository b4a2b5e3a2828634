"""Rules at their borders, and what a pipeline keeps account of."""

import pytest

from davinci_jax.curation.documents import Document
from davinci_jax.curation.pipeline import Operation, Pipeline, show_funnel
from davinci_jax.curation.rules import DropDuplicates, DropGarbled, DropPaths, DropShort, DropUnparsable


class Given:
    """Acquires documents that a test gives."""

    name, level = "given", "L0"

    def __init__(self, *documents):
        self.documents = documents

    def parameters(self):
        return {"count": len(self.documents)}

    def apply(self, documents, reject):
        yield from documents
        yield from self.documents


class Upper:
    """An operation of a level below the rules before it."""

    name, level = "upper", "L1"

    def parameters(self):
        return {}

    def apply(self, documents, reject):
        for document in documents:
            yield Document(id=document.id, text=document.text.upper(), level=document.level, lineage=document.lineage)


def kept(rule, *documents):
    return [document.id for document in rule.apply(iter(documents), lambda document, reason: None)]


def document(text, id="d", **fields):
    return Document(id=id, text=text, **fields)


def test_short_counts_characters_without_the_blanks_around_and_without_names():
    rule = DropShort(5)
    assert kept(rule, document("ééééé", "5"), document("éééé", "4"), document("  abcd \n", "blanks")) == ["5"]
    page = document("a.very.long.name\n\nabcd", parts=(("a", 18, 22),))
    assert kept(rule, page) == []


@pytest.mark.parametrize(
    "character", ["\x00", "\x07", "\x1b", "\x7f", "\x80", "\x9f", "\ue000", "\ufffd", "\U000f0000"]
)
def test_garbled_characters(character):
    rule = DropGarbled(0.1)
    assert kept(rule, document(character * 11 + "a" * 89)) == []
    assert kept(rule, document(character * 10 + "a" * 90)) == ["d"]


@pytest.mark.parametrize("character", ["\t", "\n", "\f", "\r", "\xa0", "é", "数", "🙂", "\u200b"])
def test_characters_of_text_are_not_garbled(character):
    assert kept(DropGarbled(0.0), document(character * 100)) == ["d"]


def test_duplicates_differ_in_blanks_around_only_and_the_first_stays():
    documents = [document("a b", "1"), document("\na b ", "2"), document("a  b", "3")]
    documents.append(document("name a b", "4", parts=(("n", 5, 8),)))
    assert kept(DropDuplicates(), *documents) == ["1", "3"]


def test_paths_and_programs():
    names = ["python/test/a.py", "python/test.py", "python/a/tests/b/c.py", "python/testing/a.py", "python/named.py"]
    rule = DropPaths(("python/named.py",))
    assert kept(rule, *(document("x", name) for name in names)) == ["python/test.py", "python/testing/a.py"]
    texts = {"good": "x = '\\d'\n", "bad": "x = = 1\n", "null": "x = 1\0\n", "print": "print 'x'\n"}
    assert kept(DropUnparsable(), *(document(text, id) for id, text in texts.items())) == ["good"]


def test_a_pipeline_counts_and_keeps_the_highest_level():
    rejects = []
    operations = [Given(document("ab", "1"), document("é" * 9, "2"), document("é" * 9, "3")), DropShort(3)]
    operations += [DropDuplicates(), Upper()]
    assert all(isinstance(operation, Operation) for operation in operations)
    pipeline = Pipeline(
        operations, lambda operation, document, reason: rejects.append((operation, document.id, reason))
    )
    [result] = pipeline.run()
    assert (result.id, result.text, result.level) == ("2", "É" * 9, "L2")
    assert [(step["operation"], step["level"], step["parameters"]) for step in result.lineage] == [
        ("drop-short", "L2", {"characters": 3}),
        ("drop-duplicates", "L2", {"match": "exact"}),
        ("upper", "L1", {}),
    ]
    assert rejects == [
        ("drop-short", "1", "2 characters, below 3"),
        ("drop-duplicates", "3", "same text as 2"),
    ]
    counts = [(s.documents_in, s.bytes_in, s.documents_out, s.bytes_out, s.rejected) for s in pipeline.funnel]
    assert counts == [(0, 0, 3, 38, 0), (3, 38, 2, 36, 1), (2, 36, 1, 18, 1), (1, 18, 1, 18, 0)]
    shown = show_funnel(pipeline.funnel).splitlines()
    assert len(shown) == 5
    assert shown[2].split() == ["L2", "drop-short", "3", "->", "2", "0.00", "->", "0.00", "1"]
