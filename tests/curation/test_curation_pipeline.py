"""One operation on a stream: what it counts, what it writes into lineage, and documents with which it fails."""

import dataclasses
import errno
import gzip
import json
import types

import pytest

from davinci_jax.curation import pipeline
from davinci_jax.curation.account import Account
from davinci_jax.curation.documents import Document
from davinci_jax.curation.pipeline import FunnelStep, Operation, through
from davinci_jax.curation.rules import DropShort
from davinci_jax.curation.tokens import TokenCounter
from davinci_jax.errors import DataError


class Books:
    """A witness that writes everything down."""

    def __init__(self):
        self.taken, self.given, self.dropped = [], [], []

    def took(self, step, document):
        self.taken.append(document.id)

    def gave(self, step, document, before):
        self.given.append((document.id, before.text if before else None))

    def rejected(self, step, document, reason):
        self.dropped.append((document.id, reason))


@dataclasses.dataclass(frozen=True)
class Halves:
    """Cuts a document in two, and fails with some."""

    error: type = ValueError
    batch: int = 1
    name = "halves"
    level = "L4"

    def parameters(self):
        return {"batch": self.batch}

    def apply(self, documents, reject):
        for document in documents:
            if document.text == "bad":
                raise self.error("no halves of this")
            if document.text == "long":
                reject(document, "too long")
            elif document.text == "surrogate":
                yield document.with_text("\ud800")
            elif document.text == "metadata":
                yield dataclasses.replace(document, metadata={"raw": b"no JSON"})
            else:
                for n in range(2):
                    yield dataclasses.replace(document.with_text(document.text[n::2]), id=f"{document.id}#{n}")


def row(operation):
    return FunnelStep(operation.name, operation.level, operation.parameters())


def ran(operation, *documents):
    books = Books()
    return list(through(operation, row(operation), iter(documents), books)), books


def test_a_record_joins_the_lineage_and_the_level_is_the_highest():
    assert isinstance(DropShort(2), Operation)
    first = {"operation": "acquire", "level": "L0", "parameters": {}}
    [kept], books = ran(DropShort(2), Document("1", "ab", level="L5", lineage=(first,)), Document("2", "a"))
    assert kept.level == "L5"
    assert kept.lineage == (first, {"operation": "drop-short", "level": "L2", "parameters": {"characters": 2}})
    assert books.taken == ["1", "2"]
    assert books.given == [("1", "ab")]
    assert books.dropped == [("2", "1 characters, below 2")]


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_a_document_with_which_an_operation_fails_takes_no_other_with_it(batch):
    texts = {"a": "1234", "b": "bad", "c": "long", "d": "5678", "e": "surrogate", "f": "metadata"}
    results, books = ran(Halves(batch=batch), *(Document(id, text) for id, text in texts.items()))
    assert [(document.id, document.text) for document in results] == [
        ("a#0", "13"),
        ("a#1", "24"),
        ("d#0", "57"),
        ("d#1", "68"),
    ]
    assert [document.lineage[-1]["from"] for document in results] == ["a", "a", "d", "d"]
    reasons = dict(books.dropped)
    assert reasons["b"] == "halves failed (ValueError: no halves of this)"
    assert reasons["c"] == "too long"
    assert "surrogates not allowed" in reasons["e"]
    assert reasons["f"] == "halves failed (TypeError: Object of type bytes is not JSON serializable)"
    assert sorted(books.taken) == list("abcdef")


def test_a_reject_with_metadata_that_cannot_be_written_takes_no_other_with_it(tmp_path):
    loop = {}
    loop["loop"] = loop
    step = row(DropShort(5))
    account = Account(tmp_path, [step], 0, TokenCounter(None), tmp_path / "progress")
    for n, metadata in enumerate([{"raw": b"x"}, {("a", 1): 2}, loop, {}]):
        account.rejected(step, Document(str(n), "text", metadata=metadata), "odd")
    account.close()
    with gzip.open(tmp_path / "00-drop-short/rejects.jsonl.gz", "rt") as lines:
        records = list(map(json.loads, lines))
    cannot = "cannot be written"
    assert [record.get("metadata") for record in records] == [{"raw": "b'x'"}, cannot, cannot, None]


@pytest.mark.parametrize(
    "error",
    [
        lambda text: DataError("endpoint", None, text, "start it"),
        lambda text: OSError(errno.ENOSPC, "No space left on device"),
        lambda text: ImportError("no module"),
    ],
)
@pytest.mark.parametrize("batch", [1, 3])
def test_trouble_of_the_machine_or_the_config_stops_the_task(error, batch):
    with pytest.raises((DataError, OSError, ImportError)):
        ran(Halves(error=error, batch=batch), Document("a", "12"), Document("b", "bad"))


def test_the_seconds_of_an_operation_are_its_own(monkeypatch):
    def upstream():
        for n in range(3):
            now[0] += 100
            yield Document(str(n), "x")

    class Slow(DropShort):
        def apply(self, documents, reject):
            now[0] += 1
            return super().apply(documents, reject)

    now = [0]
    monkeypatch.setattr(pipeline, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    step = row(DropShort(1))
    assert len(list(through(Slow(1), step, upstream(), Books()))) == 3
    assert step.seconds == 3
