"""Rules at their borders."""

import pytest

from davinci_jax.curation.documents import Document
from davinci_jax.curation.licences import KeepLicences
from davinci_jax.curation.rules import DropGarbled, DropPaths, DropShort, DropUnparsable


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


def test_paths_and_programs():
    names = ["python/test/a.py", "python/test.py", "python/a/tests/b/c.py", "python/testing/a.py", "python/named.py"]
    rule = DropPaths(("python/named.py",))
    assert kept(rule, *(document("x", name) for name in names)) == ["python/test.py", "python/testing/a.py"]
    texts = {"good": "x = '\\d'\n", "bad": "x = = 1\n", "null": "x = 1\0\n", "print": "print 'x'\n"}
    assert kept(DropUnparsable(), *(document(text, id) for id, text in texts.items())) == ["good"]


def test_bytes_that_no_step_has_read_are_told_as_such():
    """They would seem short or empty; where a rule does not look at the text, its own reason stands."""
    page = document("", raw=b"<p>text</p>", licence="GPL-3.0-only")
    for rule, expected in ((DropShort(5), "no text yet: put a step"), (KeepLicences(), "licence GPL-3.0-only")):
        told = []
        assert list(rule.apply(iter([page]), lambda _, reason, told=told: told.append(reason))) == []
        assert told[0].startswith(expected)
