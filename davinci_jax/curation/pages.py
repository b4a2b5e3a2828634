"""L1: pages that were read one by one, such as by character recognition, joined to the documents that they are of."""

from __future__ import annotations

import collections
import dataclasses
import json
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from davinci_jax.curation.documents import Document
from davinci_jax.curation.pipeline import Reject, check_writable, is_fatal
from davinci_jax.experiment import checks

UNREAD, BLANK = "unread", "blank page"  # metadata of a page without text: why; a blank one has been read
LEFT_OUT = "pages_left_out"  # metadata of a page: how many of its file, the last ones, were not taken
_PAGES = "pages.jsonl"
_ENDING = re.compile(r"\.[A-Za-z][A-Za-z0-9]{0,4}\Z")
_SEPARATORS = "!/#._ -"
_LONGEST = 9  # digits of a page's number
_REASON = 300  # characters of what a page says of itself
# Numbers that lie wider apart than this many times their count do not count pages: dates, for one.
_SPARSE = 4


class Numbered(NamedTuple):
    """What is remembered of a page.

    Attributes:
      document: name of the document that it is of.
      head: all of its own name before the number: "book/1" and "book_1" are pages 1 of two books of one name.
      number: of the page.
      id: of the page.
      text: blanks at the end not counted.
      unread: why it has no text; "" where it has one, or is blank.
      total: pages of the document as far as the page knows, else 0.
      left_out: how many of these, the last ones, were left out on purpose.
    """

    document: str
    head: str
    number: int
    id: str
    text: str
    unread: str
    total: int
    left_out: int


class Opened(NamedTuple):
    """What becomes of the documents of a task, by their number in it.

    Attributes:
      file: the joined documents, a line each.
      joined: where the line of the document begins that a page becomes, in bytes.
      gone: pages that are in another one's document.
      rejected: why a page is in none.
    """

    file: pathlib.Path
    joined: dict[int, int]
    gone: frozenset[int]
    rejected: dict[int, str]


@dataclasses.dataclass(frozen=True)
class JoinPages:
    """Joins pages to one document in the order of their numbers.

    Numbers end the ids of pages: "book/0003.png", "book.zip!/page-3.jpg" and "book_p3.png" are page 3 of a book. Pages
    are of one document if all before the number is the same; where that of two differs in marks alone, as "book/3" and
    "book_3", each keeps its mark in its name. Of two pages of one number the first that could be read stays, and the
    other is rejected.

    The document is that of its first page with text: its metadata, licence and lineage. `parts` says which characters
    are of which page, by the page's id. `metadata["pages"]` counts the pages, `metadata["pages_missing"]` names those
    that are not in it, one by one or from `page` up to `to`, and why: they could not be read (`Transcribe.unread`),
    there was none of that number, or `pdf-pages` has left them out. What has no number stays as it is.

    Attributes:
      max_pages, max_bytes: pages, and bytes of their text, of one document; the pages of a larger one are rejected.
      max_missing: share of its pages that a document may lack; above it those that there are get rejected.
    """

    max_pages: int = 10_000
    max_bytes: int = 64 * 2**20
    max_missing: float = 1.0
    name = "join-pages"
    level = "L1"

    def __post_init__(self):
        checks.positive(self.name, max_pages=self.max_pages, max_bytes=self.max_bytes)
        checks.within(self.name, 0, 1, max_missing=self.max_missing)

    def parameters(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def remember(self, document: Document) -> Numbered | None:
        name, number = split_name(document.id)
        if number is None:
            return None
        text, total = document.text.rstrip(), document.metadata.get("pages")
        unread = "" if text else str(document.metadata.get(UNREAD, "has no text"))[:_REASON]
        total = total if type(total) is int and 0 < total < 10**_LONGEST else 0
        left_out = document.metadata.get(LEFT_OUT)
        left_out = left_out if type(left_out) is int and 0 < left_out < total else 0
        unread = "" if unread == BLANK else unread
        return Numbered(name, _head(document.id), number, document.id, text, unread, total, left_out)

    def collect(self, remembered: Iterator[Numbered | None], folder: pathlib.Path) -> None:
        with (folder / _PAGES).open("wb") as out:
            for page in remembered:
                out.write(json.dumps(page).encode() + b"\n")

    def reduce(self, collected: Sequence[pathlib.Path], folder: pathlib.Path) -> None:
        """Gathers the pages of each document at the first one that has text.

        Memory: some 400 bytes for each page of the source, and the text of one document.
        """
        documents, heads = _gathered(collected)
        fates: list[dict[str, Any]] = [{"joined": {}, "gone": [], "rejected": {}} for _ in collected]
        with (folder / _PAGES).open("wb") as out:
            for head, (name, places) in documents.items():
                name = name if heads[name] == 1 else head
                pages = _first_of_each(name, places, fates)
                missing = _missing(pages)
                if refused := self._refused(pages, missing):
                    for page in pages:
                        why = refused if page.size else f"{refused}; this one: {page.unread or BLANK}"
                        fates[page.task]["rejected"][page.index] = why
                    continue
                home = next(page for page in pages if page.size)
                for page in pages:
                    if page is not home:
                        fates[page.task]["gone"].append(page.index)
                fates[home.task]["joined"][home.index] = out.tell()
                read = (Numbered(*_read(collected[page.task] / _PAGES, page.start)) for page in pages)
                joined = _Joined(name, [(page.id, page.text) for page in read], _count(pages, missing), missing)
                out.write(json.dumps(joined).encode() + b"\n")
        for task, fate in enumerate(fates):
            (folder / f"{task:06d}.json").write_text(json.dumps(fate), encoding="utf-8")

    def _refused(self, pages: Sequence[_PagePlace], missing: Sequence[dict[str, Any]]) -> str:
        """Why no document is made of pages; "" where one is."""
        size, count = sum(page.size for page in pages), _count(pages, missing)
        lacking = sum(map(_length, missing))
        if not size:
            return "no page of its document has text"
        if len(pages) > self.max_pages:
            return f"its document has {len(pages)} pages, above {self.max_pages}"
        if size > self.max_bytes:
            return f"its document has {size} bytes of text, above {self.max_bytes}"
        if lacking > self.max_missing * count:
            return f"{lacking} of {count} pages of its document are missing, above a share of {self.max_missing:g}"
        return ""

    def open(self, reduced: pathlib.Path, task: int) -> Opened:
        fate = json.loads((reduced / f"{task:06d}.json").read_text(encoding="utf-8"))
        joined, rejected = (
            {int(index): value for index, value in fate[name].items()} for name in ("joined", "rejected")
        )
        return Opened(reduced / _PAGES, joined, frozenset(fate["gone"]), rejected)

    def apply(self, document: Document, number: int, opened: Opened, reject: Reject) -> Iterator[Document]:
        if number in opened.joined:
            yield from _join(document, _Joined(*_read(opened.file, opened.joined[number])), reject)
        elif number in opened.rejected:
            reject(document, opened.rejected[number])
        elif number not in opened.gone:
            yield document


def split_name(name: str) -> tuple[str, int | None]:
    """Returns (name of a document, number of the page) of a page's name, (the name, `None`) where it has no number."""
    head, digits = _head(name), _ENDING.sub("", name)
    digits, head = digits[len(head) :], head.rstrip(_SEPARATORS)
    for word in ("page", "p"):
        before = head[: -len(word)]
        if head.lower().endswith(word) and before.endswith(tuple(_SEPARATORS)):
            head = before.rstrip(_SEPARATORS)
            break
    return (head, int(digits)) if head and 0 < len(digits) <= _LONGEST else (name, None)


def _head(name: str) -> str:
    """Returns what comes before the number that ends a page's name."""
    return _ENDING.sub("", name).rstrip("0123456789")


class _PagePlace(NamedTuple):
    """Where a page lies and what `Numbered` says of it; `size`: bytes of its text."""

    number: int
    id: str
    task: int
    index: int
    start: int
    size: int
    unread: str
    total: int
    left_out: int


class _Joined(NamedTuple):
    """A document that is made of pages: (id, text) of each, how many there should be, which are missing and why."""

    name: str
    texts: list[tuple[str, str]]
    pages: int
    missing: list[dict[str, Any]]


def _gathered(
    collected: Sequence[pathlib.Path],
) -> tuple[dict[str, tuple[str, list[_PagePlace]]], collections.Counter[str]]:
    """Returns the name and the pages of each document by their head, and how many documents have a name."""
    documents: dict[str, tuple[str, list[_PagePlace]]] = {}
    for task, path in enumerate(collected):
        for index, start, page in _lines(path / _PAGES):
            if page is not None:
                size = len(page.text.encode("utf-8", "surrogatepass"))
                place = _PagePlace(
                    page.number, page.id, task, index, start, size, page.unread, page.total, page.left_out
                )
                documents.setdefault(page.head, (page.document, []))[1].append(place)
    return documents, collections.Counter(name for name, _ in documents.values())


def _first_of_each(name: str, places: list[_PagePlace], fates: list[dict[str, Any]]) -> list[_PagePlace]:
    """Returns one page of each number, in order, the best read and then the first by name; the others are rejected."""
    places.sort(key=lambda page: (page.number, not page.size, page.unread != "", *page))
    pages: list[_PagePlace] = []
    for page in places:
        if pages and pages[-1].number == page.number:
            why = f"is page {page.number} of {name}, and so is {pages[-1].id}"
            fates[page.task]["rejected"][page.index] = why
        else:
            pages.append(page)
    return pages


def _lines(file: pathlib.Path) -> Iterator[tuple[int, int, Numbered | None]]:
    """Yields (number of a document in its task, where its line begins, its page)."""
    start = 0
    with file.open("rb") as lines:
        for index, line in enumerate(lines):
            fields = json.loads(line)
            yield index, start, Numbered(*fields) if fields else None
            start += len(line)


def _read(file: pathlib.Path, start: int) -> Any:
    with file.open("rb") as lines:
        lines.seek(start)
        return json.loads(lines.readline())


def _join(first: Document, joined: _Joined, reject: Reject) -> Iterator[Document]:
    """Yields the document that pages become; `first` is the first of them with text.

    Should it fail all pages are rejected here: where the others are met, nobody knows of it.
    """
    try:
        document = _joined_document(first, joined)
        check_writable(document)
    except Exception as error:
        if is_fatal(error):
            raise
        why = f"its document cannot be made ({type(error).__name__}: {error})"[:1000]
        reject(first, why)
        for name, text in joined.texts:
            if name != first.id:
                reject(Document(id=name, text=text), why)
    else:
        yield document


def _joined_document(first: Document, joined: _Joined) -> Document:
    text, parts = "", []
    for name, said in filter(lambda page: page[1], joined.texts):
        text += "\n\n" if text else ""
        parts.append((name, len(text), len(text) + len(said)))
        text += said
    dropped = (UNREAD, LEFT_OUT)  # the one is told page by page, and so is the other
    metadata = {name: value for name, value in first.metadata.items() if name not in dropped}
    path = str(metadata.get("path", ""))
    if path and first.id.endswith(path):  # it is the page's own, not that of the file that the page is cut from
        metadata["path"] = joined.name[len(first.id) - len(path) :] or path
    metadata |= {"pages": joined.pages}
    metadata |= {"pages_missing": joined.missing} if joined.missing else {}
    return first.with_text(f"{text}\n", id=joined.name, group=joined.name, parts=tuple(parts), metadata=metadata)


def _missing(pages: Sequence[_PagePlace]) -> list[dict[str, Any]]:
    """Returns the pages that are not there, in order, and why: one, or from `page` up to `to`."""
    total, left_out = max((page.total, page.left_out) for page in pages)
    first, last = pages[0].number, pages[-1].number
    if total >= last:  # else it counts something else
        first, last = min(first, 1), total
    else:
        total = left_out = 0
    counted = total or last - first <= _SPARSE * len(pages)
    missing, expected = [], first
    for page in pages:
        missing += _gap(expected, page.number - 1, last - left_out) if counted else []
        missing += [{"page": page.number, "why": page.unread}] if page.unread else []
        expected = page.number + 1
    return missing + _gap(expected, last, last - left_out)


def _gap(first: int, last: int, divided: int) -> list[dict[str, Any]]:
    """Returns the pages from one to another as missing; those above `divided` were left out by `pdf-pages`."""
    runs = (
        (first, min(last, divided), "is not among the pages"),
        (max(first, divided + 1), last, "is not read: its file has more than max_pages"),
    )
    return [
        {"page": start, **({"to": end} if end > start else {}), "why": why} for start, end, why in runs if start <= end
    ]


def _length(run: dict[str, Any]) -> int:
    return run.get("to", run["page"]) - run["page"] + 1


def _count(pages: Sequence[_PagePlace], missing: Sequence[dict[str, Any]]) -> int:
    """Returns how many pages the document of these should have."""
    return sum(not page.unread for page in pages) + sum(map(_length, missing))
