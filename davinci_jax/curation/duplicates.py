"""L2: duplicates found by keys over a whole source; of each cluster the first document stays.

A document has one or more keys; two documents are duplicates if they share one, and duplicates of duplicates are of
one cluster. Tasks write their keys, one pass sorts them, and each task then reads which of its documents go.
"""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from davinci_jax.curation.documents import Document
from davinci_jax.curation.pipeline import Reject

_KEYS, _IDS = "keys.u64", "ids.jsonl"


class KeyedDuplicates(abc.ABC):
    """A corpus operation that drops all but the first document of a cluster.

    A document that stays carries `metadata["duplicates"]`, how many documents went for it, where there were any.

    Attributes:
      columns: keys of a document.
      width: 64-bit words of a key.
    """

    level = "L2"
    columns: int
    width = 1

    @abc.abstractmethod
    def keys(self, document: Document) -> np.ndarray | None:
        """Returns uint64 [columns, width], or `None` for a document that is compared with no other."""

    @property
    @abc.abstractmethod
    def relation(self) -> str:
        """How a document that goes is related to the one that stays, for the reason."""

    def parameters(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def remember(self, document: Document) -> tuple[str, np.ndarray | None]:
        """Returns (id, keys) of a document."""
        return document.id, self.keys(document)

    def collect(self, remembered: Iterator[tuple[str, np.ndarray | None]], folder: pathlib.Path) -> None:
        """Writes keys and ids; a document without keys is skipped by its number."""
        with (folder / _KEYS).open("wb") as keys, (folder / _IDS).open("w", encoding="utf-8") as ids:
            for number, (name, found) in enumerate(remembered):
                if found is not None:
                    keys.write(np.uint64(number).tobytes() + np.ascontiguousarray(found, np.uint64).tobytes())
                ids.write(json.dumps(name) + "\n")

    def reduce(self, collected: Sequence[pathlib.Path], folder: pathlib.Path) -> None:
        """Writes for each task which documents go, and for which document, as a JSON object."""
        records = [self._records(task) for task in collected]
        first = np.cumsum([0, *map(len, records)])
        labels = _clusters(records, self.columns, self.width)
        sizes = np.bincount(labels, minlength=len(labels))
        tasks = np.searchsorted(first, np.arange(len(labels)), side="right") - 1
        numbers = np.concatenate([record[:, 0] for record in records]).astype(np.int64)
        kept = np.flatnonzero((labels == np.arange(len(labels))) & (sizes > 1))
        names = {}
        for task, path in enumerate(collected):
            mine = kept[tasks[kept] == task]
            names |= dict(zip(mine.tolist(), _ids(path, numbers[mine]), strict=True))
        for task in range(len(collected)):
            rows = np.arange(first[task], first[task + 1])
            gone = rows[labels[rows] != rows]
            stay = rows[(labels[rows] == rows) & (sizes[rows] > 1)]
            found = {
                "gone": {str(numbers[row]): names[int(labels[row])] for row in gone},
                "stay": {str(numbers[row]): int(sizes[row]) - 1 for row in stay},
            }
            (folder / f"{task:06d}.json").write_text(json.dumps(found), encoding="utf-8")

    def open(self, reduced: pathlib.Path, task: int) -> dict[str, dict[str, Any]]:
        return json.loads((reduced / f"{task:06d}.json").read_text(encoding="utf-8"))

    def apply(
        self, document: Document, number: int, opened: dict[str, dict[str, Any]], reject: Reject
    ) -> Iterator[Document]:
        keeper, count = opened["gone"].get(str(number)), opened["stay"].get(str(number))
        if keeper is not None:
            reject(document, f"{self.relation} {keeper}")
        elif count is not None:
            yield dataclasses.replace(document, metadata={**document.metadata, "duplicates": count})
        else:
            yield document

    def _records(self, task: pathlib.Path) -> np.ndarray:
        """Returns uint64 [m, 1 + columns * width]: number of a document in its task, and its keys."""
        row = 1 + self.columns * self.width
        if not (task / _KEYS).stat().st_size:
            return np.zeros((0, row), np.uint64)
        return np.memmap(task / _KEYS, np.uint64, mode="r").reshape(-1, row)


@dataclasses.dataclass(frozen=True)
class ExactDuplicates(KeyedDuplicates):
    """Drops a document whose text, blanks at the ends not counted, an earlier one of the source had."""

    name = "exact-duplicates"
    columns = 1
    width = 2

    @property
    def relation(self) -> str:
        return "same text as"

    def keys(self, document: Document) -> np.ndarray:
        digest = hashlib.blake2b(document.key.strip().encode("utf-8", "surrogatepass"), digest_size=16).digest()
        return np.frombuffer(digest, np.uint64).reshape(1, 2)


def _clusters(records: Sequence[np.ndarray], columns: int, width: int) -> np.ndarray:
    """Returns int64 [n], for each document the first one of its cluster.

    A column is sorted at a time, so memory is a few numbers for each document, whatever the columns.
    """
    count = sum(map(len, records))
    heads, members = [], []
    for column in range(columns):
        at = 1 + column * width
        keys = [np.concatenate([record[:, at + k] for record in records]) for k in range(width)]
        order = np.lexsort(keys[::-1])
        same = np.ones(max(count - 1, 0), bool)
        for key in keys:
            same &= key[order[1:]] == key[order[:-1]]
        # The sort is stable: the document before in a run is an earlier one.
        heads.append(order[:-1][same])
        members.append(order[1:][same])
    return _connect(count, np.concatenate(heads), np.concatenate(members))


def _connect(count: int, heads: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Returns int64 [count], the smallest node that each node is connected to, by spreading and pointer jumping."""
    labels = np.arange(count)
    while True:
        smallest = np.minimum(labels[heads], labels[members])
        spread = labels.copy()
        np.minimum.at(spread, heads, smallest)
        np.minimum.at(spread, members, smallest)
        spread = spread[spread]
        if np.array_equal(spread, labels):
            return labels
        labels = spread


def _ids(task: pathlib.Path, numbers: np.ndarray) -> list[str]:
    """Returns the ids of documents by their increasing numbers in a task."""
    wanted, found = iter(numbers.tolist()), []
    number = next(wanted, None)
    if number is None:
        return found
    with (task / _IDS).open(encoding="utf-8") as lines:
        for place, line in enumerate(lines):
            if place == number:
                found.append(json.loads(line))
                number = next(wanted, None)
    return found
