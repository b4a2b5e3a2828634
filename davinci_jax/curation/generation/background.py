"""L6: a background to a document, written by a model from references that were found for it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from davinci_jax.curation.documents import Document
from davinci_jax.curation.generation.client import Generation
from davinci_jax.curation.generation.operation import Ask, Generative
from davinci_jax.curation.generation.quality import Quality, extract, problem
from davinci_jax.experiment import checks

_CITED = re.compile(r"\[(\d+)\]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackgroundQuality(Quality):
    """Thresholds of a background, its references taken for the source: much shorter, with no number of its own."""

    min_ratio: float = 0.02
    max_ratio: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class WriteBackground(Generative):
    """Writes before a document what its references, `metadata["references"]`, say that it takes for granted.

    A document without references, or one for which the model has nothing of use to say, stays as it is. Every number
    in square brackets must be that of a reference, and there must be one.

    Attributes:
      characters: the model sees so much of the beginning of a document.
      quality: thresholds of an acceptable background.
    """

    prompt: str = "context_v1"
    max_tokens: int = 1024
    characters: int = 4096
    quality: BackgroundQuality = BackgroundQuality()
    name, level = "write-background", "L6"

    def __post_init__(self):
        super().__post_init__()
        checks.positive(self.name, characters=self.characters)

    async def rollout(self, document: Document, ask: Ask) -> tuple[str | None, str]:
        references = document.metadata.get("references") or []
        if not references:
            return None, "no references"
        texts = [str(item["text"]) for item in references]
        sections = [("TEXT", document.text[: self.characters].strip())]
        sections += [(f"REFERENCE {n}", text) for n, text in enumerate(texts, 1)]

        def read(generation: Generation) -> tuple[str, str | None]:
            said, trouble = extract(generation, "BACKGROUND")
            if said == "NONE" or trouble:
                return said, trouble
            cited = {int(number) for number in _CITED.findall(said)}
            if not cited or not cited <= set(range(1, len(texts) + 1)):
                return said, "cites no reference"
            plain = _CITED.sub("", said)
            return said, problem(plain, "\n\n".join(texts), self.words().text, self.quality)

        return await self.first_good(ask, sections, document.id, read)

    def finish(self, document: Document, result: tuple[str | None, str]) -> Sequence[Document] | str:
        said, trouble = result
        noted = {**document.metadata, "background": trouble or ("none" if said == "NONE" else "written")}
        document = dataclasses.replace(document, metadata=noted)
        if said is None or said == "NONE":
            return [document]
        before = f"Background\n\n{said}\n\n"
        return [
            dataclasses.replace(
                document,
                text=before + document.text,
                questions=tuple((start + len(before), end + len(before)) for start, end in document.questions),
                parts=tuple((name, start + len(before), end + len(before)) for name, start, end in document.parts),
            )
        ]
