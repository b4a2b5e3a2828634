"""L3: labels by a language model, on the beginnings of documents; what a small classifier is trained from."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from davinci_jax.curation.documents import Document
from davinci_jax.curation.generation.client import Generation
from davinci_jax.curation.generation.operation import Ask, Generative
from davinci_jax.curation.generation.quality import extract
from davinci_jax.errors import ConfigError
from davinci_jax.experiment import checks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Annotate(Generative):
    """Notes a label that a model gives under `metadata[field]`; a document without a known label is rejected.

    `labels.read_labels(folder, field)` reads the documents that it leaves.

    Attributes:
      labels: the labels that count; the prompt explains them.
      field: name of the label in the metadata.
      characters: the model sees so much of the beginning of a document.
    """

    prompt: str = "educational_value_v1"
    max_tokens: int = 64
    labels: tuple[str, ...] = ("0", "1", "2", "3", "4", "5")
    field: str = "label"
    characters: int = 4096
    name, level = "annotate", "L3"

    def __post_init__(self):
        super().__post_init__()
        checks.positive(self.name, characters=self.characters)
        if len(set(self.labels)) < 2 or not self.field:
            raise ConfigError(f"{self.name}.labels", self.labels, "tells nothing apart", "name two labels or more")

    async def rollout(self, document: Document, ask: Ask) -> tuple[str | None, str]:
        def read(generation: Generation) -> tuple[str, str | None]:
            said, trouble = extract(generation, "LABEL")
            return said, trouble or (None if said in self.labels else "unknown label")

        return await self.first_good(ask, [("TEXT", document.text[: self.characters].strip())], document.id, read)

    def finish(self, document: Document, result: tuple[str | None, str]) -> Sequence[Document] | str:
        label, trouble = result
        if label is None:
            return f"no label ({trouble})"
        return [dataclasses.replace(document, metadata={**document.metadata, self.field: label})]
