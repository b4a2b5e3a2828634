"""One operation on a stream: what it counts, what it writes into lineage, and documents with which it fails."""

import dataclasses
import errno
import gzip
import json
import types

import pytest

from davinci_jax.curation import decontaminate, judges, language, pipeline
from davinci_jax.curation.account import Account
from davinci_jax.curation.corpus import remembered
from davinci_jax.curation.documents import Document
from davinci_jax.curation.pipeline import FunnelStep, Operation, begin, through
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
            if document.text == "odd":
                raise self.error(f"no halves of {document.id}")
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


def ran(operation, *documents, step=None):
    books = Books()
    return list(through(operation, step or row(operation), iter(documents), books)), books


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


def texts(*runs):
    """Documents of (text, how many), one after the other."""
    return [Document(f"{n}-{k}", text) for n, (text, count) in enumerate(runs) for k in range(count)]


@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize(("runs", "stops"), [
    ([("bad", 19)], 0),  # too few to tell
    ([("bad", 20)], 20),
    ([("bad", 200), ("good", 1)], 100),
    ([("good", 1), ("bad", 200)], 0),
    ([("bad", 99), ("good", 1)], 0),
    ([("odd", 50)], 0),  # each in a way of its own
    ([("long", 200)], 0),  # a rule may drop them all
])  # fmt: skip
def test_an_operation_that_fails_with_all_documents_alike_stops_the_task(runs, stops, batch):
    operation, documents = Halves(batch=batch), texts(*runs)
    step = row(operation)
    if stops:
        with pytest.raises(
            DataError, match=r"halves: has failed in the same way.*\(ValueError: no halves of this\)"
        ) as told:
            ran(operation, *documents, step=step)
        assert stops <= int(str(told.value).split("each of ")[1].split()[0]) < stops + batch
    else:
        _, books = ran(operation, *documents, step=step)
        assert step.failed == sum(document.text in ("bad", "odd") for document in documents)
        assert len(books.dropped) == step.failed + sum(document.text == "long" for document in documents)


def test_a_first_pass_that_fails_with_all_documents_alike_stops_the_task():
    class Broken:
        name = "broken"

        def remember(self, document):
            if document.text == "bad":
                raise ValueError("never works")
            return document.text

    failed = {}
    assert list(remembered(Broken(), iter(texts(("bad", 99), ("good", 2))), failed)) == ["good"] * 2
    assert len(failed) == 99
    for count in (20, 1000):
        with pytest.raises(DataError, match=r"has failed in the same way.*never works"):
            list(remembered(Broken(), iter(texts(("bad", count))), {}))


def test_what_an_operation_cannot_load_is_its_trouble_and_no_documents():
    class Loads(DropShort):
        def begin(self):
            raise self.characters

    begin(DropShort(1))  # has nothing to load
    with pytest.raises(DataError, match=r"drop-short: cannot load what it needs \(RecursionError: too deep\)"):
        begin(Loads(RecursionError("too deep")))
    with pytest.raises(DataError, match="no model"):
        begin(Loads(DataError("model", "x", "is no model", "give another")))


def test_numbers_that_are_none_become_null_in_documents_and_rejects(tmp_path):
    odd = {"score": float("nan"), "more": [float("inf"), -float("inf"), 1.5, "ü"]}
    record = {"operation": "o", "level": "L2", "parameters": {"most": float("inf")}}

    def strict(name):
        raise AssertionError(f"{name} is no JSON")

    line = Document("a", "tëxt", metadata=odd, lineage=(record,)).to_json()
    read = json.loads(line, parse_constant=strict)
    assert read["metadata"] == {"score": None, "more": [None, None, 1.5, "ü"]}
    assert (read["lineage"][0]["parameters"], read["text"]) == ({"most": None}, "tëxt")
    step = row(DropShort(5))
    account = Account(tmp_path, [step], 0, TokenCounter(None), tmp_path / "progress")
    account.rejected(step, Document("a", "text", metadata={"score": float("nan"), "raw": b"x"}), "odd")
    account.close()
    line = gzip.decompress((tmp_path / "00-drop-short/rejects.jsonl.gz").read_bytes())
    assert json.loads(line, parse_constant=strict)["metadata"] == {"score": None, "raw": "b'x'"}


@pytest.mark.parametrize("kind", ["decontaminate", "language", "judges"])
def test_what_documents_share_is_loaded_before_them(tmp_path, monkeypatch, kind):
    loaded = []
    if kind == "decontaminate":
        monkeypatch.setattr(decontaminate.Decontaminate, "_index", lambda operation, n: loaded.append(n))
        begin(decontaminate.Decontaminate((str(tmp_path),), ngram=20, report_ngram=13))
        assert loaded == [13, 20]
    elif kind == "language":
        monkeypatch.setattr(language, "_backend", lambda: loaded.append("model"))
        begin(language.KeepLanguages())
        assert loaded == ["model"]
    else:
        monkeypatch.setattr(judges, "load_model", loaded.append)
        begin(judges.EducationalValue("some/folder"))
        assert loaded == ["some/folder"]
