"""L4: pieces of a document restored by a language model; where it fails, the piece stays as it was."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

from davinci_jax.curation.documents import Document
from davinci_jax.curation.generation import chunks
from davinci_jax.curation.generation.client import Generation
from davinci_jax.curation.generation.operation import Ask, Generative, Read
from davinci_jax.curation.generation.quality import Quality, extract, problem
from davinci_jax.experiment import checks


@dataclasses.dataclass(frozen=True)
class Piece:
    """What became of a piece of a document.

    Attributes:
      start, end: characters [start, end) of the source.
      text: what stands in its place, the original where the model failed.
      trouble: why the original stayed; empty where it did not have to.
    """

    start: int
    end: int
    text: str
    trouble: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rewrite(Generative):
    """Rewrites a document piece by piece; the common part of L4 and L5.

    A document succeeds if `required` of its pieces do, as the companion report asks; the others stay as they were.
    A document below that is put again, its failed pieces only, up to `rounds` times in all, and then rejected.

    Attributes:
      required: share of the pieces that must succeed.
      rounds: how often a document is put before it is rejected.
      quality: thresholds of an acceptable piece.
    """

    required: float = 0.95
    rounds: int = 2
    quality: Quality = Quality()
    tag = ""

    def __post_init__(self):
        super().__post_init__()
        checks.within(self.name, 0, 1, required=self.required)
        checks.positive(self.name, rounds=self.rounds)

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Returns [start, end) of the pieces of a text."""
        raise NotImplementedError

    def sections(self, core: str) -> list[tuple[str, str]]:
        """Returns (title, text) of the material of a request, the piece last."""
        return [("TEXT", core)]

    async def rollout(self, document: Document, ask: Ask) -> list[Piece]:
        if document.questions:
            return []
        pieces: dict[tuple[int, int], Piece] = {}
        spans = self.spans(document.text)
        for turn in range(self.rounds):
            open_spans = [span for span in spans if span not in pieces or pieces[span].trouble]
            asked = [self._piece(document, span, ask, turn) for span in open_spans]
            pieces.update(zip(open_spans, await asyncio.gather(*asked), strict=True))
            if sum(not piece.trouble for piece in pieces.values()) >= self.required * len(spans):
                break
        return [pieces[span] for span in spans]

    async def _piece(self, document: Document, span: tuple[int, int], ask: Ask, turn: int) -> Piece:
        start, end = span
        text = document.text[start:end]
        before, core, after = chunks.around(text)
        if not core:
            return Piece(start, end, text, "")
        read = self._reader(core)
        label = f"{document.id}[{start}:{end}]"
        said, trouble = await self.first_good(ask, self.sections(core), label, read, turn)
        return Piece(start, end, before + said + after, "") if said is not None else Piece(start, end, text, trouble)

    def _reader(self, core: str) -> Read:
        def read(generation: Generation) -> tuple[str, str | None]:
            said, trouble = extract(generation, self.tag)
            return said, trouble or problem(said, core, self.words().text, self.quality)

        return read

    def finish(self, document: Document, result: list[Piece]) -> Sequence[Document] | str:
        if document.questions:
            return "marks questions by their place, which a rewrite moves"
        failed = collections.Counter(piece.trouble for piece in result if piece.trouble)
        if len(result) - failed.total() < self.required * len(result):
            troubles = ", ".join(f"{count} {trouble}" for trouble, count in sorted(failed.items()))
            return f"{failed.total()} of {len(result)} pieces failed in {self.rounds} rounds ({troubles})"
        report = {"pieces": _places(result), "kept": dict(sorted(failed.items()))}
        metadata = {**document.metadata, self.name: report}
        return [document.with_text("".join(piece.text for piece in result), metadata=metadata)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refine(Rewrite):
    """Removes noise from pieces of a document and repairs them, adding nothing.

    Attributes:
      characters: the most characters of a piece; 1,024 in the companion report.
    """

    prompt: str = "refine_v1"
    characters: int = 1024
    name, level, tag = "refine", "L4", "CLEANED_TEXT"

    def __post_init__(self):
        super().__post_init__()
        checks.positive(self.name, characters=self.characters)

    def spans(self, text: str) -> list[tuple[int, int]]:
        return chunks.cut(text, self.characters)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ApplyStrategy(Refine):
    """Rewrites pieces of a document by a strategy, such as one that `davinci_jax.curation.evolve` has found.

    Attributes:
      strategy: instructions in words.
    """

    strategy: str
    prompt: str = "rewrite_v1"
    name, tag = "apply-strategy", "REWRITTEN_TEXT"

    def sections(self, core: str) -> list[tuple[str, str]]:
        return [("STRATEGY", self.strategy), *super().sections(core)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompletionQuality(Quality):
    """Thresholds of a completion: not shorter than its window, whose numbers it keeps; it may calculate with them."""

    min_ratio: float = 1.0
    max_ratio: float = 8.0
    new_numbers: int = 1000
    lost_numbers: float = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Complete(Rewrite):
    """Spells out reasoning, terms and bridges in windows of a document; facts stay.

    Attributes:
      tokens: the most tokens of a window; 1,024 in the companion report.
      tokenizer: path of the tokenizer.json that counts them; left out, 4 characters are a token.
    """

    prompt: str = "complete_v1"
    max_tokens: int = 8192
    tokens: int = 1024
    tokenizer: str | None = None
    quality: CompletionQuality = CompletionQuality()
    name, level, tag = "complete", "L5", "COMPLETED_TEXT"

    def __post_init__(self):
        super().__post_init__()
        checks.positive(self.name, tokens=self.tokens)
        chunks.windows("", self.tokens, self.tokenizer)  # a tokenizer that is none is told before any work

    def spans(self, text: str) -> list[tuple[int, int]]:
        return chunks.windows(text, self.tokens, self.tokenizer)


def _places(pieces: Sequence[Piece]) -> list[list[Any]]:
    """Returns [start, end in the source, start, end in the result, trouble] of each piece, which `trace` follows."""
    places, at = [], 0
    for piece in pieces:
        places.append([piece.start, piece.end, at, at + len(piece.text), piece.trouble])
        at += len(piece.text)
    return places
