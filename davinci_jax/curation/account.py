"""What a task leaves besides its documents: counts, the documents that it dropped, and samples to read."""

from __future__ import annotations

import collections
import hashlib
import heapq
import pathlib
import time
from collections.abc import Sequence
from typing import Any

from davinci_jax.curation.documents import Document, GzipText, json_line
from davinci_jax.curation.pipeline import FunnelStep
from davinci_jax.curation.tokens import TokenCounter

# Of an operation and a way out of it: of each task as many as of a source, since one task may hold them all.
SAMPLES = 8
_SAMPLE_CHARACTERS = 2_000
_REJECT_CHARACTERS = 100_000  # a longer text of a dropped document is cut
_PROGRESS_SECONDS = 1.0


class Account:
    """Keeps the books of one task; files lie in a folder that the task moves in place at its end.

    Args:
      folder: an empty folder.
      steps: the operations of the stage, in order.
      first: how many operations of the recipe come before them.
      counter: counts tokens.
      progress: a file that says now and then how far the task is.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        steps: Sequence[FunnelStep],
        first: int,
        counter: TokenCounter,
        progress: pathlib.Path,
    ):
        self.folder, self.steps = folder, list(steps)
        self._counter, self._progress, self._told = counter, progress, 0.0
        self._labels = {id(step): reject_folder(first + n, step.operation) for n, step in enumerate(self.steps)}
        self._rejects: dict[str, GzipText] = {}
        self._removed = {id(step): _Sample() for step in self.steps}
        self._changed = {id(step): _Sample() for step in self.steps}
        self._found = {id(step): _Sample() for step in self.steps}
        self._kept = _Sample()
        self._pairs, self._licences, self._levels = 0, collections.Counter(), collections.Counter()
        self._bytes_read = 0

    def took(self, step: FunnelStep, document: Document) -> None:
        step.documents_in += 1
        step.bytes_in += document.size
        step.tokens_in += self._counter.count(document)

    def gave(self, step: FunnelStep, document: Document, before: Document | None) -> None:
        step.documents_out += 1
        step.bytes_out += document.size
        step.tokens_out += self._counter.count(document)
        if before is not None and before.text and before.text != document.text:
            self._changed[id(step)].add(document, before=before.text)

    def rejected(self, step: FunnelStep, document: Document, reason: str) -> None:
        step.rejected += 1
        reason = reason.encode("utf-8", "replace").decode()  # it may quote text that UTF-8 cannot hold
        self._removed[id(step)].add(document, reason=reason)
        label = self._labels[id(step)]
        if label not in self._rejects:
            (self.folder / label).mkdir()
            self._rejects[label] = GzipText(self.folder / label / "rejects.jsonl.gz")
        record: dict[str, Any] = {"id": document.id, "operation": step.operation, "reason": reason}
        if document.text:
            record["text"] = document.text[:_REJECT_CHARACTERS]
        if len(document.text) > _REJECT_CHARACTERS:
            record["characters"] = len(document.text)
        if document.metadata:  # what was found of it may be why it goes, such as its hits in benchmarks
            record["metadata"] = dict(document.metadata)
        self._rejects[label].write(_reject_line(record) + "\n")

    def found(self, step: FunnelStep, document: Document, texts: Sequence[tuple[str, str, str]]) -> None:
        shown = [[text.encode("utf-8", "replace").decode()[:_SAMPLE_CHARACTERS] for text in item] for item in texts]
        self._found[id(step)].add(document, found=shown)

    def kept(self, document: Document) -> None:
        """A document leaves the stage."""
        self._kept.add(document)
        self._pairs += len(document.questions)
        self._licences[document.licence or "unknown"] += 1
        self._levels[document.level] += 1

    def read(self, size: int) -> None:
        """The task has read so many bytes of its input files."""
        self._bytes_read += size
        now = time.monotonic()
        if now - self._told > _PROGRESS_SECONDS:
            self._told = now
            documents = self.steps[-1].documents_out if self.steps else 0
            self._progress.write_text(json_line({"bytes": self._bytes_read, "documents": documents}))

    def close(self) -> dict[str, Any]:
        """Closes the files; returns the counts and samples of the task."""
        for file in self._rejects.values():
            file.close()
        self._progress.unlink(missing_ok=True)
        return {
            "steps": [vars(step) for step in self.steps],
            "removed": [self._removed[id(step)].records() for step in self.steps],
            "changed": [self._changed[id(step)].records() for step in self.steps],
            "found": [self._found[id(step)].records() for step in self.steps],
            "kept": self._kept.records(),
            "pairs": self._pairs,
            "licences": dict(self._licences),
            "levels": dict(self._levels),
        }

    def abandon(self) -> None:
        """Closes what is open after a failure; what was written is lost with the folder."""
        for file in self._rejects.values():
            try:
                file.close()
            except OSError:  # a full disk, which the failure has told of
                continue
        self._progress.unlink(missing_ok=True)


def reject_folder(position: int, operation: str) -> str:
    """Returns the folder name of the documents that the operation at a position of the recipe has dropped."""
    return f"{position:02d}-{operation}"


def _reject_line(record: dict[str, Any]) -> str:
    """Returns a record as JSON; what is no JSON in its metadata may be why the document goes."""
    try:
        return json_line(record, default=repr)
    except (TypeError, ValueError, RecursionError):  # a key that is no name, a loop, too deep
        return json_line({**record, "metadata": "cannot be written"})


def merge_samples(samples: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Returns the samples of all tasks with the smallest hashes, whichever tasks they come from."""
    return heapq.nsmallest(SAMPLES, (record for task in samples for record in task), key=lambda record: record["hash"])


class _Sample:
    """The few documents whose ids have the smallest hashes: a sample that the number of tasks cannot change."""

    def __init__(self):
        self._heap: list[tuple[str, int, dict[str, Any]]] = []
        self._count = 0

    def add(self, document: Document, **more: Any) -> None:
        # Complemented, since the heap gives away its smallest.
        digest = hashlib.blake2b(document.id.encode("utf-8", "replace"), digest_size=8).digest()
        key = bytes(255 - byte for byte in digest).hex()
        self._count += 1
        if len(self._heap) == SAMPLES and key <= self._heap[0][0]:
            return
        record = {"hash": digest.hex(), "id": document.id, "text": document.text[:_SAMPLE_CHARACTERS]}
        record |= {
            name: value[:_SAMPLE_CHARACTERS] if isinstance(value, str) else value for name, value in more.items()
        }
        item = key, -self._count, record
        if len(self._heap) < SAMPLES:
            heapq.heappush(self._heap, item)
        elif key > self._heap[0][0]:
            heapq.heapreplace(self._heap, item)

    def records(self) -> list[dict[str, Any]]:
        return [record for _, _, record in sorted(self._heap, key=lambda item: item[2]["hash"])]
