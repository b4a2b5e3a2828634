"""L0 and L1: dumps of question-and-answer sites, the Posts.xml of Stack Exchange, rebuilt as threads.

A dump lists posts by their number, so an answer stands gigabytes behind its question. The reader streams the file
once, lays posts down in buckets by thread, and reads one bucket at a time: memory is that of a bucket. Entities, which
are what an XML bomb is made of, are refused; a dump declares none.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import pathlib
import re
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO
from xml.parsers import expat

from davinci_jax.curation.documents import Document
from davinci_jax.curation.html import mark_structure
from davinci_jax.curation.inputs import Acquired, no_files
from davinci_jax.curation.pipeline import Reject
from davinci_jax.curation.places import COMPRESSED, Item, Place
from davinci_jax.curation.unpacking import unpacked
from davinci_jax.curation.versions import installed
from davinci_jax.errors import ConfigError, DataError

_QUESTION, _ANSWER = "1", "2"
# Names of authors are left behind; the url leads to them, as the licence asks.
_KEPT = (
    "Id",
    "PostTypeId",
    "ParentId",
    "AcceptedAnswerId",
    "CreationDate",
    "Score",
    "Body",
    "Title",
    "Tags",
    "ContentLicense",
)
_BUCKET_BYTES = 64 * 2**20
_MOST_BUCKETS = 256  # all are open at once, and 1024 files are what a process usually may have open
_TAG = re.compile(r"[<|]([^<>|]+)")


@dataclasses.dataclass(frozen=True)
class StackExchangeReader:
    """The threads of Posts.xml: each is a question with its answers, as JSON of the posts' own fields.

    Attributes:
      site: address of the site, such as "https://math.stackexchange.com", for the url of a thread; "" for none.
      licence: of posts that state none; those of Stack Exchange state theirs in newer dumps.
    """

    site: str = ""
    licence: str = "CC-BY-SA-4.0"
    name = "read-stack-exchange"

    def parameters(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def items(self, place: Place) -> list[Item]:
        endings = tuple(f"posts.xml{ending}" for ending in ("", *COMPRESSED))
        found = [item for item in place.items() if item.path.lower().endswith(endings) or item.path.endswith("/")]
        if not found:
            raise no_files(place, "Posts.xml")
        return found

    def read(self, place: Place, item: Item) -> Iterator[Acquired]:
        with tempfile.TemporaryDirectory(prefix="threads-") as folder, place.open(item) as stream:
            plain = unpacked(stream, item.path, item.size)
            # A dump compresses about six times.
            size = item.size * (6 if item.path.lower().endswith(COMPRESSED) else 1)
            count = min(size // _BUCKET_BYTES + 1, _MOST_BUCKETS)
            for large in _write_buckets(plain, pathlib.Path(folder), count, item.path):
                for bucket in _small(large, count):
                    for posts in _threads(bucket):
                        yield self._acquired(posts)
                    bucket.unlink()

    def _acquired(self, posts: list[dict[str, str]]) -> Acquired:
        question = posts[0]
        number = question["Id"]
        if question.get("PostTypeId") != _QUESTION:
            return Acquired(f"question-{question['ParentId']}", refused="answers whose question is not in the dump")
        metadata: dict[str, Any] = {
            "title": question.get("Title"),
            "tags": _TAG.findall(question.get("Tags", "")),
            "time": question.get("CreationDate"),
            "score": _number(question.get("Score")),
            "url": f"{self.site.rstrip('/')}/questions/{number}" if self.site else None,
        }
        licences = sorted({post.get("ContentLicense", self.licence).replace(" ", "-") for post in posts})
        raw = json.dumps(posts, ensure_ascii=False).encode()
        return Acquired(f"question-{number}", raw=raw, metadata=metadata, licence=" AND ".join(licences))


@dataclasses.dataclass(frozen=True)
class ThreadText:
    """Writes the posts of a thread as one text: title, question, then answers, the accepted one first, by score.

    Attributes:
      min_score: of an answer, at least; the accepted answer stays whatever its score.
      max_answers: that are kept.
      need_answer: whether a thread without a kept answer is rejected.
    """

    min_score: int = 0
    max_answers: int = 20
    need_answer: bool = True
    name = "thread-text"
    level = "L1"

    def __post_init__(self):
        if self.max_answers < 0 or (self.need_answer and self.max_answers == 0):
            raise ConfigError("thread-text.max_answers", self.max_answers, "is too few", "give at least 1")

    def parameters(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "extractor": installed(self.name, "resiliparse")}

    def apply(self, documents: Iterator[Document], reject: Reject) -> Iterator[Document]:
        for document in documents:
            try:
                question, *answers = json.loads(document.raw)
                answers = self._chosen(question, answers)
                text, questions = self._text(question, answers)
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                reject(document, f"is no thread ({type(error).__name__}: {error})"[:300])
                continue
            if self.need_answer and not answers:
                reject(document, "no answer")
            else:
                metadata = {**document.metadata, "answers": len(answers)}
                yield document.with_text(text, questions=questions, metadata=metadata)

    def _chosen(self, question: dict[str, str], answers: list[dict[str, str]]) -> list[dict[str, str]]:
        accepted = question.get("AcceptedAnswerId")
        kept = [post for post in answers if post["Id"] == accepted or _number(post.get("Score")) >= self.min_score]
        kept.sort(key=lambda post: (post["Id"] != accepted, -_number(post.get("Score")), int(post["Id"])))
        return kept[: self.max_answers]

    def _text(self, question: dict[str, str], answers: list[dict[str, str]]) -> tuple[str, tuple[tuple[int, int], ...]]:
        """Returns the text and the characters [start, end) of the question in it."""
        asked = f"# {question.get('Title', 'Question')}\n\n{body_text(question['Body'])}\n\n"
        replies = [f"## Answer\n\n{body_text(post['Body'])}\n\n" for post in answers]
        text = asked + "".join(replies)
        return text.rstrip("\n") + "\n", ((0, len(asked)),) if answers else ()


def body_text(html: str) -> str:
    """Returns the text of a post; nothing of it is a surrounding, so all of it is kept."""
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.html import HTMLTree

    tree = HTMLTree.parse(html)
    mark_structure(tree)
    text = extract_plain_text(tree, preserve_formatting=True, alt_texts=False, list_bullets=False)
    return "\n".join(line.rstrip() for line in text.splitlines()).strip()


def stream_rows(stream: BinaryIO, name: str) -> Iterator[dict[str, str]]:
    """Yields the attributes of every `row` element of an XML file, read in pieces.

    Raises:
      DataError: it is no well-formed XML, or it declares an entity.
    """
    rows: collections.deque[dict[str, str]] = collections.deque()

    def on_start(tag: str, attributes: dict[str, str]) -> None:
        if tag == "row":
            rows.append(attributes)

    def on_entity(*declaration: Any) -> None:
        raise DataError(name, declaration[0], "declares an entity, which no dump does", "give the dump as published")

    parser = expat.ParserCreate()
    parser.StartElementHandler, parser.EntityDeclHandler = on_start, on_entity
    try:
        while piece := stream.read(2**20):
            parser.Parse(piece)
            while rows:
                yield rows.popleft()
        parser.Parse(b"", True)
    except expat.ExpatError as error:
        raise DataError(name, None, f"is no well-formed XML ({error})", "fetch the dump again") from error


def _write_buckets(stream: BinaryIO, folder: pathlib.Path, count: int, name: str) -> list[pathlib.Path]:
    """Writes posts into `count` files by the number of their thread, in the order of the dump."""

    def posts() -> Iterator[tuple[int, str]]:
        for row in stream_rows(stream, name):
            thread = {_QUESTION: row.get("Id"), _ANSWER: row.get("ParentId")}.get(row.get("PostTypeId", ""))
            if thread and thread.isdecimal() and row.get("Id", "").isdecimal():
                post = {field: row[field] for field in _KEPT if field in row}
                yield int(thread) % count, json.dumps([int(thread), post]) + "\n"

    return _scatter(posts(), [folder / f"{n:05d}.jsonl" for n in range(count)])


def _small(bucket: pathlib.Path, buckets: int) -> list[pathlib.Path]:
    """Returns a bucket, one of so many, cut into smaller ones if it is much too large; one thread stays together."""
    size = bucket.stat().st_size
    if size <= 4 * _BUCKET_BYTES:
        return [bucket]
    count = min(size // _BUCKET_BYTES + 1, _MOST_BUCKETS)
    with bucket.open(encoding="utf-8") as lines:
        # All numbers in a bucket have the same remainder.
        placed = ((int(line[1 : line.index(",")]) // buckets % count, line) for line in lines)
        files = _scatter(placed, [bucket.with_suffix(f".{n:05d}") for n in range(count)])
    bucket.unlink()
    return files


def _scatter(lines: Iterable[tuple[int, str]], files: list[pathlib.Path]) -> list[pathlib.Path]:
    """Writes each line into the file of its number; returns the files."""
    with contextlib.ExitStack() as stack:
        out = [stack.enter_context(file.open("w", encoding="utf-8")) for file in files]
        for number, line in lines:
            out[number].write(line)
    return files


def _threads(bucket: pathlib.Path) -> Iterator[list[dict[str, str]]]:
    """Yields the posts of each thread of a bucket, the question first where it is there, threads by number."""
    threads: dict[int, list[dict[str, str]]] = {}
    with bucket.open(encoding="utf-8") as lines:
        for line in lines:
            number, post = json.loads(line)
            threads.setdefault(number, []).append(post)
    for number in sorted(threads):
        yield sorted(threads[number], key=lambda post: (post["PostTypeId"] != _QUESTION, int(post["Id"])))


def _number(value: str | None) -> int:
    return int(value) if value else 0
