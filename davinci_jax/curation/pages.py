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
from davinci_jax.curation.pipeline import Reject

UNREAD, BLANK = "unread", "blank page"  # metadata of a page without text: why; a blank one has been read
_PAGES = "pages.jsonl"
_ENDING = re.compile(r"\.[A-Za-z][A-Za-z0-9]{0,4}\Z")
_SEPARATORS = "!/#._ -"
_LONGEST = 9  # digits of a page's number
# Numbers that lie wider apart than this many times their count do not count pages: dates, for one.
_SPARSE = 4


class Numbered(NamedTuple):
    """What is remembered of a page.

    Attributes:
      document: id of the document that it is of.
      number: of the page.
      id: of the page.
      text: blanks at the end not counted.
      unread: why it has no text; "" where it has one, or is blank.
      total: pages of the document as far as the page knows, else 0.
    """

    document: str
    number: int
    id: str
    text: str
    unread: str
    total: int


class Opened(NamedTuple):
    """What becomes of the documents of a task, by their number in it.

    Attributes:
      file: the pages of joined documents, a line each.
      joined: where the line of the document begins that a page becomes, in bytes.
      gone: pages that are in another one's document.
      unread: why a page is rejected; so is every page of a document none of whose pages has text.
    """

    file: pathlib.Path
    joined: dict[int, int]
    gone: frozenset[int]
    unread: dict[int, str]


@dataclasses.dataclass(frozen=True)
class JoinPages:
    """Joins pages to one document in the order of their numbers.

    Numbers end the ids of pages: "book/0003.png", "book.zip!/page-3.jpg" and "book_p3.png" are page 3 of a book. The
    document is that of its first page with text: its metadata, licence and lineage. `parts` says which characters are
    of which page, by the page's id. `metadata["pages"]` counts the pages, `metadata["pages_missing"]` names those that
    are not in it and why: they could not be read (`Transcribe.unread`), or there was none of that number. What has no
    number stays as it is.
    """

    name = "join-pages"
    level = "L1"

    def parameters(self) -> dict[str, Any]:
        return {}

    def remember(self, document: Document) -> Numbered | None:
        name, number = split_name(document.id)
        if number is None:
            return None
        text, total = document.text.rstrip(), document.metadata.get("pages")
        unread = "" if text else str(document.metadata.get(UNREAD, "has no text"))
        total = total if isinstance(total, int) else 0
        return Numbered(name, number, document.id, text, "" if unread == BLANK else unread, total)

    def collect(self, remembered: Iterator[Numbered | None], folder: pathlib.Path) -> None:
        with (folder / _PAGES).open("wb") as out:
            for page in remembered:
                out.write(json.dumps(page).encode() + b"\n")

    def reduce(self, collected: Sequence[pathlib.Path], folder: pathlib.Path) -> None:
        """Gathers the pages of each document at the first one that has text; memory: some 300 bytes for each page."""
        documents: dict[str, list[_Place]] = collections.defaultdict(list)
        for task, path in enumerate(collected):
            for index, start, page in _lines(path / _PAGES):
                if page is not None:
                    place = _Place(page.number, page.id, task, index, start, bool(page.text), page.unread)
                    documents[page.document].append(place)
        fates = [{"joined": {}, "gone": [], "unread": {}} for _ in collected]
        with (folder / _PAGES).open("wb") as out:
            for places in documents.values():
                places.sort()
                home = next((place for place in places if place.has_text), None)
                for place in places:
                    if home is None:
                        fates[place.task]["unread"][place.index] = place.unread or BLANK
                    elif place is not home:
                        fates[place.task]["gone"].append(place.index)
                if home is not None:
                    fates[home.task]["joined"][home.index] = out.tell()
                    pages = [_read(collected[place.task] / _PAGES, place.start) for place in places]
                    out.write(json.dumps(pages).encode() + b"\n")
        for task, fate in enumerate(fates):
            (folder / f"{task:06d}.json").write_text(json.dumps(fate), encoding="utf-8")

    def open(self, reduced: pathlib.Path, task: int) -> Opened:
        fate = json.loads((reduced / f"{task:06d}.json").read_text(encoding="utf-8"))
        joined, unread = ({int(index): value for index, value in fate[name].items()} for name in ("joined", "unread"))
        return Opened(reduced / _PAGES, joined, frozenset(fate["gone"]), unread)

    def apply(self, document: Document, number: int, opened: Opened, reject: Reject) -> Iterator[Document]:
        if number in opened.joined:
            yield _join(document, [Numbered(*page) for page in _read(opened.file, opened.joined[number])])
        elif number in opened.unread:
            reject(document, f"no page of its document has text; this one: {opened.unread[number]}")
        elif number not in opened.gone:
            yield document


def split_name(name: str) -> tuple[str, int | None]:
    """Returns (name of a document, number of the page) of a page's name, (the name, `None`) where it has no number."""
    stem = _ENDING.sub("", name)
    head = stem.rstrip("0123456789")
    digits = stem[len(head) :]
    head = head.rstrip(_SEPARATORS)
    for word in ("page", "p"):
        before = head[: -len(word)]
        if head.lower().endswith(word) and before.endswith(tuple(_SEPARATORS)):
            head = before.rstrip(_SEPARATORS)
            break
    return (head, int(digits)) if head and 0 < len(digits) <= _LONGEST else (name, None)


class _Place(NamedTuple):
    """Where a page lies; places are sorted by page."""

    number: int
    id: str
    task: int
    index: int
    start: int
    has_text: bool
    unread: str


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


def _join(first: Document, pages: Sequence[Numbered]) -> Document:
    """Returns the document of pages, in order, of which `first` is the first one with text."""
    text, parts = "", []
    for page in filter(lambda page: page.text, pages):
        text += "\n\n" if text else ""
        parts.append((page.id, len(text), len(text) + len(page.text)))
        text += page.text
    missing = _missing(pages)
    metadata = {name: value for name, value in first.metadata.items() if name != UNREAD}
    path = str(metadata.get("path", ""))
    if path and first.id.endswith(path):  # it is the page's own, not that of the file that the page is cut from
        metadata["path"] = split_name(path)[0]
    read = {page.number for page in pages if not page.unread}
    metadata |= {"pages": len(read | {item["page"] for item in missing})}
    metadata |= {"pages_missing": missing} if missing else {}
    name = pages[0].document
    return first.with_text(f"{text}\n", id=name, group=name, parts=tuple(parts), metadata=metadata)


def _missing(pages: Sequence[Numbered]) -> list[dict[str, Any]]:
    """Returns the number of each page that is not there, in order, and why."""
    read = {page.number for page in pages if not page.unread}
    why = {page.number: page.unread for page in pages if page.number not in read}
    first, last = pages[0].number, max(pages[-1].number, *(page.total for page in pages))
    first = min(first, 1) if any(page.total for page in pages) else first
    if last - first <= _SPARSE * len(pages):
        why = {number: "is not among the pages" for number in range(first, last + 1) if number not in read} | why
    return [{"page": number, "why": why[number]} for number in sorted(why)]
