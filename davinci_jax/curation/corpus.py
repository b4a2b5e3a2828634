"""Operations that must see a whole source before they can decide on one document: duplicates, statistics, indexes."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

from davinci_jax.curation.documents import Document
from davinci_jax.curation.pipeline import Reject


@runtime_checkable
class CorpusOperation(Protocol):
    """One step of curation in three passes: collect in every task, reduce once, apply in every task.

    Tasks are fixed by the input: task n of `collect` and task n of `apply` see the same documents in the same order,
    and `reduce` gets the folders in the order of tasks, so a result cannot depend on how many ran at a time. Folders
    are empty when they are given and appear under their name only when the pass has ended: a pass that was killed
    begins again.

    Attributes:
      name: what it does, as lineage and funnel show it.
      level: its Darwin level, "L0" to "L9".
    """

    name: str
    level: str

    def parameters(self) -> dict[str, Any]:
        """Returns all that decides its result besides the documents; JSON values."""

    def collect(self, documents: Iterator[Document], folder: pathlib.Path) -> None:
        """Reads the documents of one task to the end and writes what it must remember of them into the folder."""

    def reduce(self, collected: Sequence[pathlib.Path], folder: pathlib.Path) -> None:
        """Turns what the tasks have collected, in their order, into what `apply` needs."""

    def apply(
        self, documents: Iterator[Document], reduced: pathlib.Path, task: int, reject: Reject
    ) -> Iterator[Document]:
        """Yields the documents of one task that leave the operation, calling `reject` for those that it drops."""
