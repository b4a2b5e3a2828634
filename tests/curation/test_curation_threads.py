"""Posts.xml of a question-and-answer site, written here: threads, memory, and XML that is an attack."""

import gzip
import html
import io
import json
import random
import resource
import tracemalloc

import pytest

from davinci_jax.curation import threads
from davinci_jax.curation.documents import Document
from davinci_jax.curation.places import Place
from davinci_jax.curation.threads import StackExchangeReader, ThreadText, stream_rows
from davinci_jax.errors import DataError

HEAD = '<?xml version="1.0" encoding="utf-8"?>\n<posts>\n'


def escaped(value):
    return html.escape(str(value)).replace("\n", "&#xA;")


def row(**fields):
    return "  <row " + " ".join(f'{name}="{escaped(value)}"' for name, value in fields.items()) + " />\n"


def question(number, title="How?", body="<p>Please.</p>", **fields):
    return row(Id=number, PostTypeId=1, Title=title, Body=body, Score=3, Tags="<a><b-c>", OwnerUserId=9, **fields)


def answer(number, parent, body="<p>So.</p>", score=1, **fields):
    return row(Id=number, PostTypeId=2, ParentId=parent, Body=body, Score=score, **fields)


def read(tmp_path, *rows, name="Posts.xml", **options):
    raw = (HEAD + "".join(rows) + "</posts>\n").encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    place, reader = Place(str(tmp_path), "inputs"), StackExchangeReader(**options)
    return [found for item in reader.items(place) for found in reader.read(place, item)]


def text_of(found, **options):
    rejects = []
    given = Document(id="d", raw=found.raw, metadata=found.metadata)
    kept = list(ThreadText(**options).apply(iter([given]), lambda document, reason: rejects.append(reason)))
    return (kept[0] if kept else None), (rejects[0] if rejects else None)


@pytest.mark.parametrize("name", ["Posts.xml", "math.Posts.xml.gz"])
def test_answers_come_back_to_their_question(tmp_path, name):
    found = read(
        tmp_path,
        answer(1, 5),  # before its question
        question(2, title="Why & how?", CreationDate="2020-01-02T03:04:05", ContentLicense="CC BY-SA 4.0"),
        row(Id=3, PostTypeId=4, Body="a tag wiki"),
        question(5),
        answer(9, 2, score=-2),
        answer(11, 2, score=7),
        name=name,
        site="https://math.example/",
    )
    assert [thread.name for thread in found] == ["question-2", "question-5"]
    assert [post["Id"] for post in json.loads(found[0].raw)] == ["2", "9", "11"]
    assert found[0].metadata == {
        "title": "Why & how?", "tags": ["a", "b-c"], "time": "2020-01-02T03:04:05", "score": 3,
        "url": "https://math.example/questions/2",
    }  # fmt: skip
    assert found[0].licence == "CC-BY-SA-4.0"
    assert b"OwnerUserId" not in found[0].raw


def test_a_thread_is_title_question_and_answers_with_the_accepted_one_first(tmp_path):
    (found,) = read(
        tmp_path,
        question(
            1, "A sum?", "<p>What is <code>1+1</code>?</p><pre><code>x = 1 &lt; 2\n\ny</code></pre>", AcceptedAnswerId=4
        ),
        answer(2, 1, "<p>Three votes, <b>two</b>.</p>", score=3),
        answer(3, 1, "<p>Bad.</p>", score=-1),
        answer(4, 1, "<p>Accepted: $x_1$</p><ul><li>one</li></ul>", score=-5),
        answer(5, 1, "<p>Also three.</p>", score=3),
    )
    document, _ = text_of(found)
    assert document.text == (
        "# A sum?\n\nWhat is `1+1`?\n\n```\nx = 1 < 2\n\ny\n```\n\n## Answer\n\nAccepted: $x_1$\n\n  - one\n\n"
        "## Answer\n\nThree votes, two.\n\n## Answer\n\nAlso three.\n"
    )
    ((start, end),) = document.questions
    assert document.text[start:end].endswith("y\n```\n\n")
    assert document.text[end:].startswith("## Answer")
    assert document.metadata["answers"] == 3
    assert text_of(found, max_answers=1)[0].text.count("## Answer") == 1
    assert text_of(found, min_score=-9)[0].text.count("## Answer") == 4


def test_threads_without_an_answer_and_answers_without_a_question(tmp_path):
    found = read(tmp_path, question(1), answer(3, 2))
    assert text_of(found[0]) == (None, "no answer")
    assert text_of(found[0], need_answer=False)[0].questions == ()
    assert found[1].refused == "answers whose question is not in the dump"
    assert text_of(threads.Acquired("x", raw=b"{}"))[1].startswith("is no thread")
    assert text_of(threads.Acquired("x", raw=b"[3]"))[1].startswith("is no thread")


def test_buckets_change_the_memory_and_not_the_threads(tmp_path, monkeypatch):
    generator = random.Random(1)
    rows = [question(n) for n in range(1, 60)] + [answer(n, generator.randint(1, 59)) for n in range(60, 300)]
    generator.shuffle(rows)
    whole = {thread.name: thread.raw for thread in read(tmp_path, *rows)}
    monkeypatch.setattr(threads, "_BUCKET_BYTES", 2000)
    assert {thread.name: thread.raw for thread in read(tmp_path, *rows)} == whole
    assert len(whole) == 59


def test_a_large_dump_opens_no_more_files_than_a_process_may(tmp_path, monkeypatch):
    rows = [question(n) for n in range(1, 60)]
    monkeypatch.setattr(threads, "_BUCKET_BYTES", 1)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, before[1]))
    try:
        assert len(read(tmp_path, *rows)) == 59
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_buckets_of_a_dump_too_large_for_their_number_are_cut(tmp_path, monkeypatch):
    rows = [question(n) for n in range(1, 200)] + [answer(1000 + n, n) for n in range(1, 200)]
    whole = {thread.name: thread.raw for thread in read(tmp_path, *rows)}
    sizes, real = [], threads._threads
    monkeypatch.setattr(threads, "_BUCKET_BYTES", 1000)
    monkeypatch.setattr(threads, "_MOST_BUCKETS", 12)
    monkeypatch.setattr(threads, "_threads", lambda bucket: sizes.append(bucket.stat().st_size) or real(bucket))
    assert {thread.name: thread.raw for thread in read(tmp_path, *rows)} == whole
    assert len(whole) == 199
    assert max(sizes) <= 4000


class Endless(io.RawIOBase):
    """A dump of `size` bytes that is never held in memory."""

    def __init__(self, size):
        self.left, self.buffer = size, HEAD.encode()

    def read(self, count=-1):
        while self.left > 0 and len(self.buffer) < count:
            self.buffer += row(Id=self.left, PostTypeId=1, Body="x" * 1000).encode()
            self.left -= 1050
            if self.left <= 0:
                self.buffer += b"</posts>"
        out, self.buffer = self.buffer[:count], self.buffer[count:]
        return out


@pytest.mark.slow
def test_the_dump_is_streamed():
    tracemalloc.start()
    assert sum(1 for _ in stream_rows(Endless(20_000_000), "Posts.xml")) > 15_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8_000_000


BOMB = """<?xml version="1.0"?><!DOCTYPE posts [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>
<posts><row Id="1" PostTypeId="1" Body="&b;"/></posts>"""
OUTSIDE = """<?xml version="1.0"?><!DOCTYPE posts [<!ENTITY a SYSTEM "file:///etc/hostname">]>
<posts><row Id="1" PostTypeId="1" Body="x"/></posts>"""


@pytest.mark.parametrize(
    ("xml", "told"),
    [
        (BOMB, "declares an entity"),
        (OUTSIDE, "declares an entity"),
        (HEAD + "<row Id='1'", "no well-formed XML"),
        (HEAD + "<row Id='1'/>", "no well-formed XML"),
        ("", "no well-formed XML"),
        ("<posts>&undefined;</posts>", "no well-formed XML"),
    ],
)
def test_xml_that_is_damaged_or_an_attack_is_refused(xml, told):
    with pytest.raises(DataError, match=told):
        list(stream_rows(io.BytesIO(xml.encode()), "Posts.xml"))


def test_a_place_without_a_dump(tmp_path):
    (tmp_path / "Users.xml").write_text("<users/>")
    with pytest.raises(DataError, match=r"no Posts\.xml"):
        StackExchangeReader().items(Place(str(tmp_path), "inputs"))
