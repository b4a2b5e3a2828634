"""Operations in a row, with a funnel that counts what each takes and gives and the rejects it names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

from davinci_jax.curation.documents import Document

Reject = Callable[[Document, str], None]


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
      bind: optional, `bind(folder, task)` returns the operation that works in that task. The folder belongs to the
        operation's name in this source and outlives edits of the recipe: raw generations of a model lie there. Whoever
        uses it keys what it keeps by all that decides it.
    """

    name: str
    level: str

    def parameters(self) -> dict[str, Any]:
        """Returns all that decides its result besides the documents: thresholds, model, prompt; JSON values."""

    def apply(self, documents: Iterator[Document], reject: Reject) -> Iterator[Document]:
        """Yields the documents that leave it, calling `reject(document, reason)` for those that it drops."""


@dataclasses.dataclass
class FunnelStep:
    """What one operation took and gave, in documents and bytes."""

    operation: str
    level: str
    parameters: dict[str, Any]
    documents_in: int = 0
    bytes_in: int = 0
    documents_out: int = 0
    bytes_out: int = 0
    rejected: int = 0


@dataclasses.dataclass
class Pipeline:
    """Operations applied in order to a stream; counts are complete once the stream has been read to its end.

    Attributes:
      operations: in order; the first acquires and takes no documents.
      on_reject: called with operation, document and reason for every document that is dropped.
    """

    operations: Sequence[Operation]
    on_reject: Callable[[str, Document, str], None] = lambda operation, document, reason: None
    funnel: list[FunnelStep] = dataclasses.field(default_factory=list)

    def run(self) -> Iterator[Document]:
        """Yields the documents that leave the last operation."""
        documents: Iterator[Document] = iter(())
        for operation in self.operations:
            step = FunnelStep(operation.name, operation.level, operation.parameters())
            self.funnel.append(step)
            documents = self._through(operation, step, documents)
        return documents

    def _through(self, operation: Operation, step: FunnelStep, documents: Iterator[Document]) -> Iterator[Document]:
        record = {"operation": step.operation, "level": step.level, "parameters": step.parameters}

        def counted() -> Iterator[Document]:
            for document in documents:
                step.documents_in += 1
                step.bytes_in += document.size
                yield document

        def reject(document: Document, reason: str) -> None:
            step.rejected += 1
            self.on_reject(step.operation, document, reason)

        for document in operation.apply(counted(), reject):
            step.documents_out += 1
            step.bytes_out += document.size
            # L0 stamps its own record, with the provenance of the one document.
            lineage = document.lineage if step.level == "L0" else (*document.lineage, record)
            yield dataclasses.replace(document, lineage=lineage, level=max(document.level, step.level))


def show_funnel(funnel: Sequence[FunnelStep]) -> str:
    """Returns the funnel as a table of one line an operation."""
    lines = [f"  {'level':5} {'operation':22} {'documents':>17} {'megabytes':>17} {'rejected':>8}"]
    for step in funnel:
        documents = f"{step.documents_in:>7} -> {step.documents_out:>6}"
        size = f"{step.bytes_in / 1e6:>7.2f} -> {step.bytes_out / 1e6:>6.2f}"
        lines.append(f"  {step.level:5} {step.operation:22} {documents:>17} {size:>17} {step.rejected:>8}")
    return "\n".join(lines)
