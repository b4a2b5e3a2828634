"""Operations on a stream of documents, with a funnel that counts what each takes and gives and the rejects it names."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from davinci_jax.curation.documents import Document
from davinci_jax.errors import DataError, UserError

Reject = Callable[[Document, str], None]
# Trouble of the machine: another document would meet it too, and a task that goes on would lose all of them.
_MACHINE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG),  # a full disk, or the limit of a process
    *(errno.EMFILE, errno.ENFILE),
    *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT),  # a disk or a file system of the network that fails now
)
# An operation is taken for broken that has failed in the same way with all of a task's documents so far.
_ALL_OF_AT_LEAST, _FIRST = 20, 100


@runtime_checkable
class Operation(Protocol):
    """One step of curation: an extraction, a rule, a classifier or a language model.

    An operation is a frozen dataclass: its fields are the parameters that a recipe may give. It keeps nothing
    from one call of `apply` to the next.

    Attributes:
      name: what it does, as lineage and funnel show it.
      level: its Darwin level, "L0" to "L9".
      batch: optional, 1 where it is left out: how many documents one call of `apply` is given. Should the call
        raise, the engine gives it the documents one by one and rejects the one that raises.
      bind: optional, called once a task: `bind(folder)` returns the operation that works in it. The folder belongs to
        the operation's name in this source and outlives edits of the recipe: raw generations of a model lie there. All
        tasks share it, several at a time. Whoever uses it keys what it keeps by all that decides it, and never by the
        task, to which other documents may belong in the next run.
      begin: optional, called once a task before its documents: loads what all of them need, an index or a model. What
        it raises stops the run; what `apply` raises rejects a document.
      counts: optional, with `findings`: `counts()` returns an empty table, row -> column -> 0, which the funnel keeps
        for the operation beside its own numbers.
      findings: optional: `findings(document)` returns the `Findings` of a document that left it or that it dropped.
    """

    name: str
    level: str

    def parameters(self) -> dict[str, Any]:
        """Returns all that decides its result besides the documents: thresholds, model, prompt; JSON values."""

    def apply(self, documents: Iterator[Document], reject: Reject) -> Iterator[Document]:
        """Yields the documents that leave it, calling `reject(document, reason)` for those that it drops."""


class Findings(NamedTuple):
    """What an operation has found in one document.

    Attributes:
      counts: row -> column -> what is added to the operation's table.
      texts: (what it is, passage of the document, text that it is like), a few to read.
    """

    counts: dict[str, dict[str, int]]
    texts: tuple[tuple[str, str, str], ...]


@dataclasses.dataclass
class FunnelStep:
    """What one operation took and gave; seconds are its own, without those of what comes before it.

    `failed` is how many of the rejected went because the operation raised. `counts` is the table of what the
    operation has found, row -> column -> number; most operations have none.
    """

    operation: str
    level: str
    parameters: dict[str, Any]
    documents_in: int = 0
    bytes_in: int = 0
    tokens_in: float = 0
    documents_out: int = 0
    bytes_out: int = 0
    tokens_out: float = 0
    rejected: int = 0
    failed: int = 0
    seconds: float = 0
    counts: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)


def add_counts(table: dict[str, dict[str, int]], more: dict[str, dict[str, int]]) -> None:
    """Adds one table of counts to another."""
    for name, columns in more.items():
        row = table.setdefault(name, {})
        for column, count in columns.items():
            row[column] = row.get(column, 0) + count


class Witness(Protocol):
    """Sees what happens to the documents of a task: keeps counts, rejects and samples."""

    def took(self, step: FunnelStep, document: Document) -> None:
        """A document goes into an operation."""

    def gave(self, step: FunnelStep, document: Document, before: Document | None) -> None:
        """A document leaves an operation; `before` is what it was, where the operation got one of that id."""

    def rejected(self, step: FunnelStep, document: Document, reason: str) -> None:
        """An operation drops a document."""

    def found(self, step: FunnelStep, document: Document, texts: Sequence[tuple[str, str, str]]) -> None:
        """An operation has found something in a document that left it or that it dropped."""


def begin(operation: Any) -> None:
    """Has an operation load what it needs for all documents of a task.

    Raises:
      DataError: it cannot, whatever the exception: each document would be rejected with it.
    """
    try:
        getattr(operation, "begin", lambda: None)()
    except (UserError, ImportError, MemoryError):
        raise
    except Exception as error:
        problem = f"cannot load what it needs ({type(error).__name__}: {error})"[:1000]
        raise DataError(operation.name, None, problem, "mend the files that its parameters name") from error


def through(
    operation: Operation, step: FunnelStep, documents: Iterator[Document], witness: Witness
) -> Iterator[Document]:
    """Yields the documents that leave an operation, with its record in their lineage.

    A document with which the operation raises is rejected with the exception as its reason.

    Raises:
      UserError, ImportError: the operation cannot work at all, or has failed with every document so far.
      OSError: the disk is full, read-only or fails.
    """
    size, failures = getattr(operation, "batch", 1), Failures(operation)
    while batch := list(itertools.islice(documents, size)):
        for document in batch:
            witness.took(step, document)
        started = time.perf_counter()
        results, rejects, found, failed = _attempt(operation, batch)
        step.seconds += time.perf_counter() - started
        step.failed += len(failed)
        failures.met(len(batch), failed)
        for document, reason in rejects:
            witness.rejected(step, document, reason)
        for document, findings in found:
            add_counts(step.counts, findings.counts)
            witness.found(step, document, findings.texts)
        before = {document.id: document for document in batch}
        for document in results:
            result = _stamped(document, step, batch if document.id not in before else ())
            witness.gave(step, result, before.get(document.id))
            yield result
    failures.end()


class Failures:
    """Watches for an operation that fails in the same way with each document of a task: then it is none of theirs.

    Args:
      operation: the operation.
    """

    def __init__(self, operation: Any):
        self._name, self._documents, self._why, self._same = operation.name, 0, "", True

    def met(self, documents: int, failed: Sequence[str]) -> None:
        """Takes note of documents and of why the operation has failed with some of them.

        Raises:
          DataError: these and all before were many, and had the same reason.
        """
        self._documents += documents
        self._why = self._why or next(iter(failed), "")
        self._same &= len(failed) == documents and set(failed) <= {self._why}
        if self._documents >= _FIRST:
            self.end()

    def end(self) -> None:
        """There are no more documents; raises as `met` does, where the task has some number of them."""
        if self._same and self._documents >= _ALL_OF_AT_LEAST:
            problem = f"has failed in the same way with each of {self._documents} documents: {self._why}"
            raise DataError(self._name, None, problem, "mend it or its parameters, or leave it out")


class Timed:
    """Documents of an iterator; `seconds` is the time that it took to give them."""

    def __init__(self, documents: Iterator[Document]):
        self._documents, self.seconds = documents, 0.0

    def __iter__(self) -> Timed:
        return self

    def __next__(self) -> Document:
        started = time.perf_counter()
        try:
            return next(self._documents)
        finally:
            self.seconds += time.perf_counter() - started


def is_fatal(error: Exception) -> bool:
    """Whether an exception is trouble of the config or the machine, not of the document at hand."""
    if isinstance(error, OSError):
        return error.errno in _MACHINE
    return isinstance(error, (UserError, ImportError))


class EarlierFailure(Exception):
    """Raised for a document with which an earlier pass of the operation has failed; its text is the reason."""


def why_failed(operation: Any, error: Exception) -> str:
    """Returns the reason of a document with which an operation has raised."""
    if isinstance(error, EarlierFailure):
        return str(error)
    return f"{operation.name} failed ({type(error).__name__}: {error})"[:1000]


def check_writable(document: Document) -> None:
    """Raises for what could not be written: half of a surrogate pair, metadata that is no JSON."""
    document.text.encode(), document.id.encode()
    json.dumps(dict(document.metadata))


class _Attempt(NamedTuple):
    results: list[Document]
    rejects: list[tuple[Document, str]]
    found: list[tuple[Document, Findings]]
    failed: list[str]


def _attempt(operation: Operation, batch: Sequence[Document]) -> _Attempt:
    rejects: list[tuple[Document, str]] = []
    try:
        results = list(operation.apply(iter(batch), lambda document, reason: rejects.append((document, reason))))
        known = set(map(id, batch))
        for document in results:
            if id(document) not in known:
                check_writable(document)
        found = _findings(operation, [*(document for document, _ in rejects), *results])
        return _Attempt(results, rejects, found, [])
    except Exception as error:
        if is_fatal(error):
            raise
        if len(batch) == 1:
            why = why_failed(operation, error)
            return _Attempt([], [(batch[0], why)], [], [why])
    parts = [_attempt(operation, [document]) for document in batch]
    return _Attempt(*(list(itertools.chain(*lists)) for lists in zip(*parts, strict=True)))


def _findings(operation: Operation, documents: Sequence[Document]) -> list[tuple[Document, Findings]]:
    if not hasattr(operation, "findings"):
        return []
    found = ((document, operation.findings(document)) for document in documents)
    return [(document, findings) for document, findings in found if findings is not None]


def _stamped(document: Document, step: FunnelStep, parents: Sequence[Document]) -> Document:
    """Returns the document with the operation's record; one cut out of another names the one that it came from."""
    record: dict[str, Any] = {"operation": step.operation, "level": step.level, "parameters": step.parameters}
    named = [parent.id for parent in parents if document.id.startswith(parent.id)]
    if named:
        record["from"] = max(named, key=len)
    return dataclasses.replace(document, lineage=(*document.lineage, record), level=max(document.level, step.level))
