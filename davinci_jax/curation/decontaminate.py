"""L2: documents that hold text of a benchmark, by exact n-grams of words.

Data Darwinism's report joins problem and solution and drops a document that shares 20 words in a row with one; the
second, shorter length finds more and only reports. Both texts of a hit are kept, so that a person can judge it.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import functools
import gzip
import hashlib
import heapq
import itertools
import json
import pathlib
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from davinci_jax.curation.documents import Document
from davinci_jax.curation.normalise import ngram_hashes, word_hashes
from davinci_jax.curation.pipeline import Findings, Reject
from davinci_jax.errors import ConfigError, DataError
from davinci_jax.files import version

ACTIONS = ("drop", "report")
_FIELD = "decontaminate.benchmarks"
MAX_HITS = 5  # hits of one length of n-grams that are listed of one document
_SHOWN = 200  # characters of a text in a reason
_HITS, _COUNTS = "contamination", "contamination_counts"  # of a document's metadata
_CHUNKS = re.compile(r"\S+")
_NONE = np.zeros(0, np.uint64)
_PLACE = np.uint32  # room for 4 billion words of benchmarks


class Hit(NamedTuple):
    """Words in a row that a document shares with a benchmark's record.

    Attributes:
      benchmark: name of the file, with the folders above it that tell it from another of that name.
      record: its id in the file, or "line N".
      words: how many words in a row.
      document_text, benchmark_text: the passage as either spells it.
    """

    benchmark: str
    record: str
    words: int
    document_text: str
    benchmark_text: str


class Stretch(NamedTuple):
    """Words of a text that stand in a row in one record, too: from `start` to `end`, and from `place` in the records.

    Words of all records are counted through.
    """

    start: int
    end: int
    place: int


class Found(NamedTuple):
    """What a text shares with benchmarks.

    Attributes:
      hits: the first of all, at most `MAX_HITS`.
      stretches: all hits of each benchmark that has any, in the order of the text.
    """

    hits: list[Hit]
    stretches: dict[str, list[Stretch]]

    @property
    def counts(self) -> dict[str, int]:
        """How many hits each benchmark has that has any."""
        return {name: len(own) for name, own in self.stretches.items()}


@dataclasses.dataclass(frozen=True)
class Decontaminate:
    """Finds benchmark text in documents; words are compared without case, punctuation and accents.

    The first hits of a document are in `metadata["contamination"]`, also where it is dropped: those of `ngram` words,
    then those of `report_ngram` that are no part of one of these. How many there are of each benchmark and length is
    in `metadata["contamination_counts"]`.

    Attributes:
      benchmarks: JSONL files, or folders of them; each line is a record.
      fields: keys of a record that are joined, such as question and answer; none: every text in it, in order.
      ngram: words in a row that a document must share to be hit. Shorter records are not looked for.
      action: "drop" or "report", what a hit does.
      report_ngram: words in a row that are reported besides; 0 for none.
      normalise_numbers: whether numbers are all the same; then problems of one template hit each other.
    """

    benchmarks: tuple[str, ...]
    fields: tuple[str, ...] = ()
    ngram: int = 20
    action: str = "drop"
    report_ngram: int = 13
    normalise_numbers: bool = False
    name = "decontaminate"
    level = "L2"

    def __post_init__(self):
        if self.action not in ACTIONS:
            raise ConfigError("decontaminate.action", self.action, "is unknown", f"use one of {', '.join(ACTIONS)}")
        if self.ngram < 1 or self.report_ngram < 0:
            raise ConfigError("decontaminate.ngram", self.ngram, "is no length", "give a number of words")
        if not self.benchmarks:
            raise ConfigError("decontaminate.benchmarks", (), "is empty", "name the JSONL files of the benchmarks")

    def parameters(self) -> dict[str, Any]:
        self._check_lengths()  # what is wrong with a file is told now, not when all before it has run
        files = self._files()
        digests = [hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in files]
        return {
            **dataclasses.asdict(self),
            "benchmarks": sorted(map(list, zip(told_apart(files), digests, strict=True))),
        }

    def begin(self) -> None:
        list(map(self._index, self._lengths))

    def apply(self, documents: Iterator[Document], reject: Reject) -> Iterator[Document]:
        for document in documents:
            found = self._find(document.text)
            hits = found[self.ngram].hits if self.ngram in found else []
            document = self._noted(document, found, self._listed(document.text, found))
            if hits and self.action == "drop":
                reject(document, _reason(hits[0]))
            else:
                yield document

    def counts(self) -> dict[str, dict[str, int]]:
        """Returns an empty table: contaminated documents and hits of each benchmark, by the length of n-grams."""
        columns = [column for n in self._lengths for column in _columns(n)]
        return {name: dict.fromkeys(columns, 0) for name in sorted(self._names)}

    def findings(self, document: Document) -> Findings | None:
        counts = {}
        for name, hits in _earlier(document)[1].items():
            if name in self._names:  # others are those of an earlier step
                filled = (zip(_columns(n), (1, found), strict=True) for n, found in hits.items())
                counts[name] = dict(itertools.chain.from_iterable(filled))
        listed = [hit for hit in _earlier(document)[0] if hit["benchmark"] in self._names]
        return Findings(counts, tuple(map(_shown, listed))) if counts else None

    @property
    def _lengths(self) -> list[int]:
        return sorted({n for n in (self.ngram, self.report_ngram) if n})

    def _find(self, text: str) -> dict[int, Found]:
        """Returns what is found in a text for each length of n-grams that has any hit."""
        found = {}
        for n in self._lengths:
            shared = self._index(n).find(text)
            if not shared.hits:  # nor has it any longer ones
                break
            found[n] = shared
        return found

    def _listed(self, text: str, found: dict[int, Found]) -> list[Hit]:
        """Returns the hits that are listed; shorter ones of a benchmark that lie in a longer one of it would say no
        more."""
        longer, shorter = found.get(self.ngram), found.get(self.report_ngram)
        if longer is None or shorter is None:
            return [hit for each in (longer, shorter) if each for hit in each.hits]
        more = [
            stretch
            for name, own in shorter.stretches.items()
            for stretch in own
            # One that is as long is the longer hit itself.
            if stretch.end - stretch.start < self.ngram and not _within(stretch, longer.stretches.get(name, []))
        ]
        return [*longer.hits, *self._index(self.report_ngram).hits(text, more)]

    def _noted(self, document: Document, found: dict[int, Found], listed: list[Hit]) -> Document:
        """Returns the document with its hits; those that it came with stay where they are of other benchmarks."""
        counts: dict[str, dict[str, int]] = {}
        for n, shared in found.items():
            for name, hits in shared.counts.items():
                counts.setdefault(name, {})[str(n)] = hits
        old, rows = _earlier(document)
        if not counts and not rows:
            return document  # also with what a stranger has noted under our names
        kept = [hit for hit in old if hit["benchmark"] not in self._names]
        counts |= {name: row for name, row in rows.items() if name not in self._names}
        metadata = {name: value for name, value in document.metadata.items() if name not in (_HITS, _COUNTS)}
        noted = {_HITS: [*(hit._asdict() for hit in listed), *kept], _COUNTS: counts}
        return dataclasses.replace(document, metadata=metadata | (noted if counts else {}))

    def _check_lengths(self) -> None:
        """Raises `DataError` where all records of a file are too short to be looked for."""
        least, hashes, longest = min(self._lengths), word_hashes(self.normalise_numbers), collections.Counter()
        for name, _, text in _read(self._stamps, self.fields):
            if longest[name] < least:
                longest[name] = max(longest[name], len(hashes.of(text)))
        for file, name in zip(files := self._files(), told_apart(files), strict=True):
            if longest[name] < least:
                problem = f"can never be found: its longest record has {longest[name]} words, fewer than {least}"
                remedy = "leave it out, name more fields, or give a smaller ngram or report_ngram"
                raise DataError(_FIELD, str(file), problem, remedy)

    def _files(self) -> list[pathlib.Path]:
        # A folder and a file in it may both be named; it is one file still, called as it is here, not where links lead.
        files = (file.absolute() for path in self.benchmarks for file in benchmark_files(path))
        return list({file.resolve(): file for file in files}.values())

    @functools.cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(told_apart(self._files()))

    @functools.cached_property
    def _stamps(self) -> tuple[tuple[str, int, int], ...]:
        return tuple(version(file) for file in self._files())

    def _index(self, n: int) -> NgramIndex:
        return _shared_index(self._stamps, self.fields, n, self.normalise_numbers)


class NgramIndex:
    """The n-grams of benchmark records, sorted by hash; for each the first place in every benchmark that has it.

    12 bytes for an n-gram, 4 for each place of it, and 8 for each word of the records.

    Args:
      records: (benchmark, record, text).
      n: words in a row.
      normalise_numbers: whether numbers are all the same.
    """

    def __init__(self, records: list[tuple[str, str, str]], n: int, normalise_numbers: bool):
        self._records, self._n, self._known = records, n, word_hashes(normalise_numbers)
        words = [self._known.of(text) for _, _, text in records]
        # A word of no text ends each record, so that no run goes on into the next.
        self._words = np.concatenate([part for own in words for part in (own, np.zeros(1, np.uint64))] or [_NONE])
        self._ends = np.cumsum([len(own) + 1 for own in words]) - 1
        self._benchmarks = list(dict.fromkeys(name for name, _, _ in records))
        numbers = {name: number for number, name in enumerate(self._benchmarks)}
        self._owners = np.array([numbers[name] for name, _, _ in records], np.int64)  # of records
        hashes, self._places = self._first_places(words)
        self._hashes, first = np.unique(hashes, return_index=True)
        self._entries = np.append(first, len(hashes)).astype(_PLACE)

    def __len__(self) -> int:
        return len(self._hashes)

    def find(self, text: str) -> Found:
        """Returns what a text shares with the records; takes time in proportion to its length, however it repeats."""
        words = self._known.of(text)
        hashes = ngram_hashes(words, self._n)
        if not len(hashes) or not len(self._hashes):
            return Found([], {})
        at = np.minimum(np.searchsorted(self._hashes, hashes), len(self._hashes) - 1)
        found = np.flatnonzero(self._hashes[at] == hashes)
        if not len(found):
            return Found([], {})
        stretches = {
            self._benchmarks[owner]: list(self._joined(words, ours, theirs))
            for owner, ours, theirs in self._shared(words, found, at[found])
        }
        return Found(self.hits(text, itertools.chain.from_iterable(stretches.values())), stretches)

    def hits(self, text: str, stretches: Iterable[Stretch]) -> list[Hit]:
        """Returns the first of the stretches, at most `MAX_HITS`, as both texts spell them."""
        return self._hits(text, heapq.nsmallest(MAX_HITS, stretches))

    def _first_places(self, words: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Returns hashes and places of the n-grams, by hash and benchmark, without what a benchmark repeats."""
        grams = [ngram_hashes(own, self._n) for own in words]
        starts = self._ends - [len(own) for own in words]
        hashes = np.concatenate([*grams, _NONE])
        places = np.concatenate([start + np.arange(len(own)) for start, own in zip(starts, grams, strict=True)] or [[]])
        owners = np.repeat(self._owners, [len(own) for own in grams])
        order = np.lexsort((owners, hashes))  # stable, so that the first place stays the first
        hashes, owners = hashes[order], owners[order]
        new = np.ones(len(hashes), bool)
        new[1:] = (np.diff(hashes) != 0) | (np.diff(owners) != 0)
        return hashes[new], places[order[new]].astype(_PLACE)

    def _shared(
        self, words: np.ndarray, found: np.ndarray, grams: np.ndarray
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yields benchmark, places in a text and places in the records of the n-grams that they share.

        Args:
          words: hashes of the text's words.
          found: int64 [n], places in it.
          grams: int64 [n], which n-grams of the index have their hashes.
        """
        firsts = self._entries[grams].astype(np.int64)
        times = self._entries[grams + 1] - firsts
        ours = np.repeat(found, times)
        entries = np.repeat(firsts - np.cumsum(times) + times, times) + np.arange(len(ours))
        theirs = self._places[entries].astype(np.int64)
        owners = self._owners[np.searchsorted(self._ends, theirs)]
        same = np.ones(len(ours), bool)
        for k in range(self._n):  # not only the hashes of n-grams
            same &= words[ours + k] == self._words[theirs + k]
        for owner in np.unique(owners[same]).tolist():
            of = same & (owners == owner)
            yield owner, ours[of], theirs[of]

    def _joined(self, words: np.ndarray, ours: np.ndarray, theirs: np.ndarray) -> Iterator[Stretch]:
        """Yields stretches that hold all the n-grams, each as long as it can be."""
        starts = np.append(True, (np.diff(ours) != 1) | (np.diff(theirs) != 1))
        ends = ours[np.append(starts[1:], True)] + self._n
        covered = 0
        for start, end, place in zip(ours[starts].tolist(), ends.tolist(), theirs[starts].tolist(), strict=True):
            if end <= covered:
                continue
            # The n-grams before are of the last stretch, which went further than the run that it began with.
            skipped = max(covered - self._n + 1 - start, 0)
            rest = self._words[place + end - start : self._ends[np.searchsorted(self._ends, place)]]
            covered = end + _agreeing(words[end:], rest)
            yield Stretch(start + skipped, covered, place + skipped)

    def _hits(self, text: str, stretches: list[Stretch]) -> list[Hit]:
        ours = self._passages(text, [(start, end) for start, end, _ in stretches])
        hits = []
        for (start, end, place), passage in zip(stretches, ours, strict=True):
            row = int(np.searchsorted(self._ends, place))
            benchmark, record, source = self._records[row]
            first = place - (int(self._ends[row - 1]) + 1 if row else 0)
            [theirs] = self._passages(source, [(first, first + end - start)])
            hits.append(Hit(benchmark, record, end - start, passage, theirs))
        return hits

    def _passages(self, text: str, stretches: list[tuple[int, int]]) -> list[str]:
        """Returns the text from one word to another, with all that stands in one stretch between blanks with either."""
        ends = np.cumsum(np.fromiter((len(self._known[chunk]) for chunk in text.split()), np.int64))
        chunks = [np.searchsorted(ends, (start, end - 1), side="right").tolist() for start, end in stretches]
        wanted = set(itertools.chain.from_iterable(chunks))
        spans = {n: chunk.span() for n, chunk in enumerate(_CHUNKS.finditer(text)) if n in wanted}
        return [text[spans[first][0] : spans[last][1]] for first, last in chunks]


def _within(stretch: Stretch, others: list[Stretch]) -> bool:
    """Whether a stretch is a part of one of others, whose starts and ends both rise."""
    before = bisect.bisect_right(others, stretch.start, key=lambda other: other.start)
    return before > 0 and stretch.end <= others[before - 1].end


def _agreeing(ours: np.ndarray, theirs: np.ndarray) -> int:
    """Returns with how many equal words both begin, looking no further than twice as far."""
    done, size = 0, 16
    while length := min(len(ours) - done, len(theirs) - done, size):
        differing = np.flatnonzero(ours[done : done + length] != theirs[done : done + length])
        if len(differing):
            return done + int(differing[0])
        done, size = done + length, 2 * size
    return done


def benchmark_files(path: str) -> list[pathlib.Path]:
    """Returns the JSONL files of a path; raises `DataError` if there is none."""
    place = pathlib.Path(path)
    files = sorted(place.glob("*.jsonl*")) if place.is_dir() else [place]
    files = [file for file in files if file.name.endswith((".jsonl", ".jsonl.gz")) and file.is_file()]
    if not files:
        problem = "holds no .jsonl or .jsonl.gz file" if place.exists() else "does not exist"
        raise DataError(_FIELD, path, problem, "give the JSONL files of the benchmarks")
    return files


def told_apart(files: Sequence[pathlib.Path]) -> list[str]:
    """Returns the names of files, each with as many folders above it as tell it from the others: math/test.jsonl."""

    def end(file: pathlib.Path, depth: int) -> str:
        return "/".join(file.parts[-depth:])

    alike: dict[str, list[pathlib.Path]] = {}
    for file in files:
        alike.setdefault(file.name, []).append(file)
    names = []
    for file in files:
        others = [other for other in alike[file.name] if other != file]
        depths = range(1, len(file.parts))
        depth = next((n for n in depths if all(end(other, n) != end(file, n) for other in others)), len(file.parts))
        names.append(end(file, depth))
    return names


def read_records(file: pathlib.Path, fields: tuple[str, ...], name: str = "") -> list[tuple[str, str, str]]:
    """Returns (name, record, text) of a benchmark file.

    Raises:
      DataError: it cannot be read, a line is no record, or there is no text in it.

    Args:
      file: JSONL, compressed or not.
      fields: keys of a record that are joined; none: every text in it.
      name: what the file is called; "" for its own name.
    """
    path = str(file)
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as lines:
            records = [
                (name or file.name, *_record(file, number, line, fields))
                for number, line in enumerate(lines, 1)
                if line.strip()
            ]
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            _FIELD, path, f"cannot be read ({error})", "let this user read it, or fetch it again"
        ) from error
    if not any(text.strip() for _, _, text in records):
        what = f"text in {' or '.join(fields)}" if records and fields else "text" if records else "record"
        raise DataError(_FIELD, path, f"holds no {what}", "leave it out, name other fields, or fetch it again")
    return records


def _record(file: pathlib.Path, number: int, line: bytes, fields: tuple[str, ...]) -> tuple[str, str]:
    place = f"{file}, line {number}"
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(_FIELD, place, f"is no JSON ({error})", "mend it, or fetch the file again") from error
    if not isinstance(record, dict):
        raise DataError(_FIELD, place, "is no JSON object", "write a record as an object")
    for field in fields:
        if field not in record:
            raise DataError("decontaminate.fields", field, f"is no field of {place}", f"it has {', '.join(record)}")
    chosen = [record[field] for field in fields] if fields else list(record.values())
    name = record.get("id", record.get("task_id"))
    return (f"line {number}" if name is None else str(name)), "\n".join(_texts(chosen))


def _texts(value: Any) -> Iterator[str]:
    waiting = [value]  # no recursion: a record may be nested as deeply as JSON is read
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, (dict, list)):
            waiting += reversed(list(item.values()) if isinstance(item, dict) else item)


def _earlier(document: Document) -> tuple[list[dict[str, Any]], dict[str, dict[str, int]]]:
    """Returns the hits and counts that an earlier step has noted, none where either is not as this one writes it."""
    hits, counts = document.metadata.get(_HITS), document.metadata.get(_COUNTS)
    return (hits, counts) if _are_hits(hits) and _are_counts(counts) else ([], {})


def _are_hits(value: Any) -> bool:
    hits = value if isinstance(value, list) else [None]
    return all(isinstance(hit, dict) and isinstance(hit.get("benchmark"), str) for hit in hits)


def _are_counts(value: Any) -> bool:
    rows = list(value.values()) if isinstance(value, dict) else [None]
    return all(isinstance(row, dict) and all(type(count) is int for count in row.values()) for row in rows)


def _columns(n: int | str) -> tuple[str, str]:
    """Returns the columns of the funnel's table for one length of n-grams."""
    return f"documents, {n} words", f"hits, {n} words"


def _shown(hit: dict[str, Any]) -> tuple[str, str, str]:
    title = f"{hit['words']} words in a row of {hit['benchmark']}, {hit['record']}"
    return title, hit["document_text"], hit["benchmark_text"]


def _reason(hit: Hit) -> str:
    theirs, ours = (" ".join(text.split())[:_SHOWN] for text in (hit.benchmark_text, hit.document_text))
    return f"{hit.words} words in a row of {hit.benchmark}, {hit.record}: {theirs!r}, here {ours!r}"


@functools.lru_cache(4)
def _shared_index(
    stamps: tuple[tuple[str, int, int], ...], fields: tuple[str, ...], n: int, normalise_numbers: bool
) -> NgramIndex:
    """Returns the index of files that are known by name, time and size, built once for a process."""
    return NgramIndex(_read(stamps, fields), n, normalise_numbers)


@functools.lru_cache(2)
def _read(stamps: tuple[tuple[str, int, int], ...], fields: tuple[str, ...]) -> list[tuple[str, str, str]]:
    """Returns the records of files that are known by name, time and size, read once for a process."""
    files = [pathlib.Path(file) for file, _, _ in stamps]
    named = zip(files, told_apart(files), strict=True)
    return [record for file, name in named for record in read_records(file, fields, name)]
