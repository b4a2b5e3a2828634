"""L6: passages of other documents of the corpus that a document leans on, found by BM25 and put beside it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
import re
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from davinci_jax.curation.documents import Document
from davinci_jax.curation.generation.chunks import cut
from davinci_jax.curation.pipeline import Reject
from davinci_jax.curation.spans import put
from davinci_jax.experiment import checks

PLACES = ("before", "after", "metadata")
_TERM = re.compile(r"[^\W_]{3,}")
# Robertson and Zaragoza 2009, The Probabilistic Relevance Framework: the usual middle of both constants' ranges.
_K1, _B = 1.2, 0.75
# A passage whose terms the document has to this share says nothing that it does not say itself.
_KNOWN = 0.8


@dataclasses.dataclass(frozen=True, kw_only=True)
class BringReferences:
    """Puts passages of other documents beside a document: background that it takes for granted.

    A query is the document's own terms of the highest weight (count times inverse document frequency). Passages of the
    same document or group, and passages that say what the document says already, are no references. Terms are told
    apart by a 32-bit hash; equal scores go to the earlier passage, so the same corpus gives the same references.

    Attributes:
      count: the most references of a document.
      passage: the most characters of a passage.
      terms: terms of a query.
      shared: terms of the query that a passage must have.
      frequent: terms that are in more than this share of the passages find nothing.
      place: write references "before" or "after" the text, or into the "metadata" only; there they are in any case.
    """

    count: int = 3
    passage: int = 800
    terms: int = 16
    shared: int = 4
    frequent: float = 0.1
    place: str = "before"
    name = "bring-references"
    level = "L6"

    def __post_init__(self):
        checks.positive(self.name, count=self.count, passage=self.passage, terms=self.terms, shared=self.shared)
        checks.within(self.name, 0, 1, frequent=self.frequent)
        checks.one_of(self.name, PLACES, place=self.place)

    def parameters(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def remember(self, document: Document) -> list[tuple[bytes, np.ndarray, np.ndarray]]:
        """Returns (line, terms uint32 [T], counts uint16 [T]) of each passage that has terms enough."""
        found = []
        for start, end in cut(document.text, self.passage):
            text = document.text[start:end].strip()
            terms, counts = _terms(text)
            if len(terms) >= self.shared:
                record = {"id": document.id, "group": document.group, "start": start, "text": text}
                found.append((json.dumps(record).encode() + b"\n", terms, counts))
        return found

    def collect(self, remembered: Iterator[list[tuple[bytes, np.ndarray, np.ndarray]]], folder: pathlib.Path) -> None:
        """Writes the passages of a task as JSON lines, and their terms with counts."""
        starts, terms, counts, places = [0], [], [], [0]
        with (folder / "passages.jsonl").open("wb") as out:
            for line, found, count in itertools.chain.from_iterable(remembered):
                places.append(places[-1] + out.write(line))
                starts.append(starts[-1] + len(found))
                terms.append(found)
                counts.append(count)
        np.save(folder / "starts.npy", np.array(starts, np.int64))
        np.save(folder / "places.npy", np.array(places, np.int64))
        np.save(folder / "terms.npy", np.concatenate([np.zeros(0, np.uint32), *terms]))
        np.save(folder / "counts.npy", np.concatenate([np.zeros(0, np.uint16), *counts]))

    def reduce(self, collected: Sequence[pathlib.Path], folder: pathlib.Path) -> None:
        """Joins the passages of all tasks and inverts their terms into postings with BM25 weights.

        Memory: about 30 bytes for each term of each passage.
        """
        parts = [
            {name: np.load(task / f"{name}.npy") for name in ("starts", "places", "terms", "counts")}
            for task in collected
        ]
        lengths = np.concatenate([np.zeros(0, np.int64), *(np.diff(part["starts"]) for part in parts)])
        terms = np.concatenate([np.zeros(0, np.uint32), *(part["terms"] for part in parts)])
        counts = np.concatenate([np.zeros(0, np.uint16), *(part["counts"] for part in parts)]).astype(np.float32)
        owners = np.repeat(np.arange(len(lengths), dtype=np.int64), lengths)
        with (folder / "passages.jsonl").open("wb") as out:
            for task in collected:
                out.write((task / "passages.jsonl").read_bytes())
        ends = np.cumsum([0, *(int(part["places"][-1]) for part in parts)])
        places = [part["places"][:-1] + ends[n] for n, part in enumerate(parts)]
        np.save(folder / "places.npy", np.concatenate([np.zeros(0, np.int64), *places, ends[-1:]]))
        total = np.bincount(owners, counts, len(lengths)).astype(np.float32)
        order = np.argsort(terms, kind="stable")
        known, first, frequency = np.unique(terms[order], return_index=True, return_counts=True)
        idf = np.log1p((len(lengths) - frequency + 0.5) / (frequency + 0.5)).astype(np.float32)
        norm = _K1 * (1 - _B + _B * total / max(float(total.mean()) if len(total) else 1.0, 1e-9))
        saturation = counts * (_K1 + 1) / (counts + norm[owners])
        weights = saturation[order] * np.repeat(idf, frequency)
        # A term that is everywhere finds nothing; its postings would be most of the index.
        idf[frequency > max(self.frequent * len(lengths), 2)] = 0
        np.save(folder / "terms.npy", known)
        np.save(folder / "first.npy", np.append(first, len(order)).astype(np.int64))
        np.save(folder / "idf.npy", idf)
        np.save(folder / "owners.npy", owners[order].astype(np.uint32))
        np.save(folder / "weights.npy", weights.astype(np.float32))

    def open(self, reduced: pathlib.Path, task: int) -> Index:
        return _open(reduced)

    def apply(self, document: Document, number: int, opened: Index, reject: Reject) -> Iterator[Document]:
        references = self.find(document, opened)
        document = dataclasses.replace(document, metadata={**document.metadata, "references": references})
        yield document if not references or self.place == "metadata" else self._placed(document, references)

    def find(self, document: Document, index: Index) -> list[dict[str, Any]]:
        """Returns the references of a document, best first: id, start, text and BM25 score."""
        own, counts = _terms(document.text)
        where = np.searchsorted(index.terms, own)
        where = np.minimum(where, max(len(index.terms) - 1, 0))
        is_known = (index.terms[where] == own) if len(index.terms) else np.zeros(len(own), bool)
        where, counts = where[is_known], counts[is_known]
        value = np.log1p(counts) * index.idf[where]
        chosen = where[np.lexsort((where, -value))[: self.terms]]
        chosen = chosen[index.idf[chosen] > 0]
        spans = [slice(index.first[term], index.first[term + 1]) for term in chosen]
        if not spans:
            return []
        owners = np.concatenate([index.owners[span] for span in spans])
        weights = np.concatenate([index.weights[span] for span in spans]).astype(np.float64)
        passages, inverse, shared = np.unique(owners, return_inverse=True, return_counts=True)
        scores = np.bincount(inverse, weights)
        scores[shared < self.shared] = 0
        return self._best(document, index, passages, scores, set(own.tolist()))

    def _best(
        self, document: Document, index: Index, passages: np.ndarray, scores: np.ndarray, own: set[int]
    ) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        taken = {document.id}
        for n in np.lexsort((passages, -scores)):
            if scores[n] <= 0 or len(found) == self.count:
                break
            record = index.passage(int(passages[n]))
            same = record["id"] in taken or (document.group and record["group"] == document.group)
            terms = set(_terms(record["text"])[0].tolist())
            if same or len(terms & own) > _KNOWN * len(terms):
                continue
            taken.add(record["id"])  # one passage of a document; a second adds less than another document's
            found.append(
                {
                    "id": record["id"],
                    "start": record["start"],
                    "text": record["text"],
                    "score": round(float(scores[n]), 4),
                }
            )
        return found

    def _placed(self, document: Document, references: list[dict[str, Any]]) -> Document:
        block = "".join(f"[{n}] {item['id']}\n{item['text']}\n\n" for n, item in enumerate(references, 1))
        if self.place == "after":
            end = len(document.text.rstrip())
            marks = document.questions, document.parts
            text, (questions, parts) = put(document.text, [(end, len(document.text), "")], marks, around=False)
            text = f"{text}\n\nReferences\n\n{block}".rstrip() + "\n"
            return dataclasses.replace(document, text=text, questions=questions, parts=parts)
        before = f"Background\n\n{block}"
        return dataclasses.replace(
            document,
            text=before + document.text,
            questions=tuple((start + len(before), end + len(before)) for start, end in document.questions),
            parts=tuple((name, start + len(before), end + len(before)) for name, start, end in document.parts),
        )


@dataclasses.dataclass(frozen=True)
class Index:
    """Postings of all passages, read from disk as they are needed.

    Attributes:
      terms: uint32 [T], ascending.
      first: int64 [T + 1], where the postings of a term begin.
      idf: float32 [T], 0 for terms that find nothing.
      owners: uint32 [P], passage of a posting, ascending for each term.
      weights: float32 [P], its BM25 weight.
      places: int64 [N + 1], where a passage begins in its file, in bytes.
      file: the passages as JSON lines.
    """

    terms: np.ndarray
    first: np.ndarray
    idf: np.ndarray
    owners: np.ndarray
    weights: np.ndarray
    places: np.ndarray
    file: pathlib.Path

    def passage(self, number: int) -> dict[str, Any]:
        """Returns a passage: id, group, start, text."""
        with self.file.open("rb") as file:
            file.seek(int(self.places[number]))
            return json.loads(file.readline())


def _open(folder: pathlib.Path) -> Index:
    names = ("terms", "first", "idf", "owners", "weights", "places")
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names}
    return Index(**arrays, file=folder / "passages.jsonl")


def _terms(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns (hashes uint32 [T] of the terms of a text, ascending; counts uint16 [T])."""
    hashes = [zlib.crc32(term.encode("utf-8", "surrogatepass")) for term in _TERM.findall(text.lower())]
    terms, counts = np.unique(np.array(hashes, np.uint32), return_counts=True)
    return terms, np.minimum(counts, 65535).astype(np.uint16)
