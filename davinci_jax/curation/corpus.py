"""Operations that must see a whole source before they can decide on one document: duplicates, statistics, indexes."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from davinci_jax.curation.documents import Document
from davinci_jax.curation.pipeline import EarlierFailure, Failures, Reject, is_fatal, why_failed
from davinci_jax.errors import DataError


@runtime_checkable
class CorpusOperation(Protocol):
    """One step of curation in three passes: collect in every task, reduce once, apply in every task.

    Tasks are fixed by the input: task n of `collect` and task n of `apply` see the same documents in the same order,
    and `reduce` gets the folders in the order of tasks, so a result cannot depend on how many ran at a time. Folders
    are empty when they are given and appear under their name only when the pass has ended: a pass that was killed
    begins again.

    What looks at a document gets this document alone, in `remember` and in `apply`. Should it raise, the document is
    rejected. Where `remember` raises it takes part in no pass: the others are numbered as if it had never been there.
    Where `apply` raises, `collect` and `reduce` have counted it already.

    Attributes:
      name: what it does, as lineage and funnel show it.
      level: its Darwin level, "L0" to "L9".
      begin: optional, called before `remember` and `apply` as that of an `Operation`.
    """

    name: str
    level: str

    def parameters(self) -> dict[str, Any]:
        """Returns all that decides its result besides the documents; JSON values."""

    def remember(self, document: Document) -> Any:
        """Returns what must be known of a document before any can be decided on."""

    def collect(self, remembered: Iterator[Any], folder: pathlib.Path) -> None:
        """Reads what is remembered of the documents of one task to the end and writes it into the folder."""

    def reduce(self, collected: Sequence[pathlib.Path], folder: pathlib.Path) -> None:
        """Turns what the tasks have collected, in their order, into what `apply` needs."""

    def open(self, reduced: pathlib.Path, task: int) -> Any:
        """Returns what `apply` asks when it decides on the documents of a task."""

    def apply(self, document: Document, number: int, opened: Any, reject: Reject) -> Iterator[Document]:
        """Yields the documents that one document leaves, or calls `reject` for it.

        Args:
          document: the document.
          number: its place among those of its task, from 0, as `collect` got them.
          opened: of its task.
          reject: called with the document and why it goes.
        """


def remembered(operation: CorpusOperation, documents: Iterator[Document], failed: dict[int, str]) -> Iterator[Any]:
    """Yields what an operation remembers of the documents of a task.

    Args:
      operation: the operation.
      documents: of the task.
      failed: gets the numbers of the documents with which it raises, among all of the task, and why.

    Raises:
      UserError, ImportError: the operation cannot work at all, or has failed with every document so far.
      OSError: trouble of the machine; a document has no files.
    """
    failures = Failures(operation)
    for number, document in enumerate(documents):
        try:
            found = operation.remember(document)
        except Exception as error:
            if is_fatal(error) or isinstance(error, OSError):
                raise
            failed[number] = why_failed(operation, error)
            failures.met(1, [failed[number]])
        else:
            failures.met(1, [])
            yield found
    failures.end()


class LastPass:
    """The last pass of a corpus operation over one task, as an operation on one document at a time.

    Args:
      operation: the operation.
      opened: of the task.
      failed: see `remembered`.
    """

    def __init__(self, operation: CorpusOperation, opened: Any, failed: Mapping[int, str]):
        self.name, self.level, self.parameters = operation.name, operation.level, operation.parameters
        self._operation, self._opened, self._failed = operation, opened, failed
        self._met = self._numbered = 0

    def apply(self, documents: Iterator[Document], reject: Reject) -> Iterator[Document]:
        for document in documents:
            why = self._failed.get(self._met)
            self._met += 1
            if why is not None:
                raise EarlierFailure(why)
            self._numbered += 1
            try:
                yield from self._operation.apply(document, self._numbered - 1, self._opened, reject)
            except OSError as error:  # the files are the operation's: the next document would meet it too
                problem = f"cannot read what its first passes have left ({type(error).__name__}: {error})"
                raise DataError(self.name, None, problem, "start the same command again when it can") from error
