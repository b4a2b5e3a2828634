"""L5: conversations of a student with a teacher about passages of a document."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import re
from collections.abc import Sequence

from davinci_jax.curation.documents import Document
from davinci_jax.curation.generation import chunks
from davinci_jax.curation.generation.client import Generation
from davinci_jax.curation.generation.operation import Ask, Generative, Read
from davinci_jax.curation.generation.quality import Quality, extract, problem
from davinci_jax.experiment import checks

_TURN = re.compile(r"^(Student|Teacher): ", re.MULTILINE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DialogueQuality(Quality):
    """Thresholds of a conversation, which may be longer than its passage."""

    min_ratio: float = 0.5
    max_ratio: float = 6.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class WriteDialogues(Generative):
    """Turns each passage of a document into a conversation, a document of its own.

    Attributes:
      tokens: the most tokens of a passage.
      tokenizer: path of the tokenizer.json that counts them; left out, 4 characters are a token.
      turns: the fewest turns of a conversation.
      quality: thresholds of an acceptable conversation, the passage taken for its source.
    """

    prompt: str = "dialogue_v1"
    max_tokens: int = 4096
    tokens: int = 1024
    tokenizer: str | None = None
    turns: int = 4
    quality: DialogueQuality = DialogueQuality()
    name, level = "write-dialogues", "L5"

    def __post_init__(self):
        super().__post_init__()
        checks.positive(self.name, tokens=self.tokens, turns=self.turns)
        chunks.windows("", self.tokens, self.tokenizer)  # a tokenizer that is none is told before any work

    async def rollout(self, document: Document, ask: Ask) -> list[tuple[int, int, str | None, str]]:
        """Returns (start, end, conversation or `None`, what was wrong) of each passage."""
        spans = chunks.windows(document.text, self.tokens, self.tokenizer)
        return list(await asyncio.gather(*(self._passage(document, span, ask) for span in spans)))

    async def _passage(self, document: Document, span: tuple[int, int], ask: Ask) -> tuple[int, int, str | None, str]:
        start, end = span
        passage = document.text[start:end].strip()
        if not passage:
            return start, end, None, "blank"
        said, trouble = await self.first_good(
            ask, [("TEXT", passage)], f"{document.id}[{start}:{end}]", self._reader(passage)
        )
        return start, end, said, trouble

    def _reader(self, passage: str) -> Read:
        def read(generation: Generation) -> tuple[str, str | None]:
            said, trouble = extract(generation, "DIALOGUE")
            trouble = trouble or problem(said, passage, self.words().text, self.quality)
            return said, trouble or ("no conversation" if not self._is_conversation(said) else None)

        return read

    def _is_conversation(self, text: str) -> bool:
        speakers = _TURN.findall(text)
        wanted = [("Student", "Teacher")[n % 2] for n in range(len(speakers))]
        pieces = [piece.strip() for piece in _TURN.split(text)]
        return not pieces[0] and speakers == wanted and len(speakers) >= self.turns and all(pieces[1:])

    def finish(self, document: Document, result: list[tuple[int, int, str | None, str]]) -> Sequence[Document] | str:
        made = [
            document.with_text(
                f"{said}\n",
                id=f"{document.id}#d{start}",
                group=document.group or document.id,
                metadata={**document.metadata, "passage": [start, end]},
            )
            for start, end, said, _ in result
            if said is not None
        ]
        dropped = collections.Counter(trouble for _, _, said, trouble in result if said is None)
        told = ", ".join(f"{count} {trouble}" for trouble, count in sorted(dropped.items()))
        return made or f"no passage gave a conversation ({told or 'no passage'})"
