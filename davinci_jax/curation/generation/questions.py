"""L5: questions with answers from passages of a document, kept only where the passage bears the answer out."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from davinci_jax.curation.documents import Document
from davinci_jax.curation.generation import chunks, prompts, quality
from davinci_jax.curation.generation.client import Generation, RequestFailed
from davinci_jax.curation.generation.operation import Ask, Generative
from davinci_jax.curation.generation.pairs import pair
from davinci_jax.experiment import checks

_BLOCK = re.compile(
    r"<QA>\s*<QUESTION>(.*?)</QUESTION>\s*<ANSWER>(.*?)</ANSWER>\s*<EVIDENCE>(.*?)</EVIDENCE>\s*</QA>", re.DOTALL
)
# Words by which a question leans on a passage that its reader does not have.
_LEANS = re.compile(
    r"\b(?:the|this|that|given|following|provided)\s+(?:passage|text|author|authors|excerpt|paragraph|section|document)\b"
    r"|\b(?:mentioned|described|stated|shown|as)\s+above\b",
    re.IGNORECASE,
)
_WORD = re.compile(r"\w{4,}")
_TOKEN = re.compile(r"\w+")
_LEAST_EVIDENCE = 20
# Words with the same beginning count as the same: plurals, tenses.
_STEM = 5
_UNANSWERABLE = "UNANSWERABLE"


@dataclasses.dataclass(frozen=True)
class Item:
    """A question as a model wrote it, and what a second reading of the passage answered."""

    start: int
    end: int
    question: str
    answer: str
    evidence: str
    second: str | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class AskQuestions(Generative):
    """Turns passages into questions and answers that can be verified against them.

    A pair stays if its question stands on its own, its evidence lies in the passage letter for letter, its answer
    brings in no number and few words from elsewhere, and, unless `verify` is off, the question put to the model again
    with the passage alone gets an answer that agrees.

    Attributes:
      tokens: the most tokens of a passage.
      tokenizer: path of the tokenizer.json that counts them; left out, 4 characters are a token.
      count: questions asked for at most for each passage.
      grounded: share of the words of 4 letters or more of an answer that the passage must have.
      verify: ask again.
      agreement: share of words that the two answers must have in common (F1), unless one holds the other.
      copied_words: see `Quality`.
    """

    prompt: str = "questions_v1"
    tokens: int = 1024
    tokenizer: str | None = None
    count: int = 3
    grounded: float = 0.7
    verify: bool = True
    agreement: float = 0.5
    copied_words: int = 10
    name, level = "ask-questions", "L5"

    def __post_init__(self):
        super().__post_init__()
        checks.positive(self.name, tokens=self.tokens, count=self.count, copied_words=self.copied_words)
        checks.within(self.name, 0, 1, grounded=self.grounded, agreement=self.agreement)
        chunks.windows("", self.tokens, self.tokenizer)  # a tokenizer that is none is told before any work

    def parameters(self) -> dict[str, Any]:
        return super().parameters() | ({"answer_prompt": prompts.load("answer_v1").record} if self.verify else {})

    async def rollout(self, document: Document, ask: Ask) -> tuple[list[Item], list[str]]:
        """Returns (questions, what was wrong with the passages that gave none)."""
        spans = chunks.windows(document.text, self.tokens, self.tokenizer)
        asked = [self._passage(document, span, ask) for span in spans]
        results = await asyncio.gather(*asked)
        return [item for items, _ in results for item in items], [trouble for _, trouble in results if trouble]

    async def _passage(self, document: Document, span: tuple[int, int], ask: Ask) -> tuple[list[Item], str]:
        start, end = span
        passage = document.text[start:end].strip()
        if not passage:
            return [], ""
        label = f"{document.id}[{start}:{end}]"
        sections = [("TEXT", passage), ("WANTED", f"at most {self.count} questions")]
        found, trouble = await self.first_good(ask, sections, label, _blocks)
        if found is None:
            return [], trouble
        found = found[: self.count]
        seconds = await asyncio.gather(
            *(self._second(passage, question, f"{label}?{n}", ask) for n, (question, _, _) in enumerate(found))
        )
        return [Item(start, end, *block, second) for block, second in zip(found, seconds, strict=True)], ""

    async def _second(self, passage: str, question: str, label: str, ask: Ask) -> str | None:
        """Returns what the passage alone answers to a question; empty where there was no answer, `None` unasked."""
        if not self.verify:
            return None
        sections = [("TEXT", passage), ("QUESTION", question)]
        try:
            said = await self.put(ask, sections, label, words=prompts.load("answer_v1"))
        except RequestFailed:
            return ""
        return quality.extract(said, "ANSWER")[0]

    def finish(self, document: Document, result: tuple[list[Item], list[str]]) -> Sequence[Document] | str:
        items, troubles = result
        dropped = collections.Counter(troubles)
        kept: dict[str, Item] = {}
        for item in items:
            why = self.unverified(item, document.text[item.start : item.end])
            if why is None and _folded(item.question) in kept:
                why = "same question"
            if why is None:
                kept[_folded(item.question)] = item
            else:
                dropped[why] += 1
        if not kept:
            told = ", ".join(f"{count} {why}" for why, count in sorted(dropped.items()))
            return f"no question stands up ({told or 'none was found'})"
        return [
            pair(
                document, f"q{n}", item.question, item.answer,
                passage=[item.start, item.end], evidence=item.evidence,
                verified=["evidence", "numbers", "words", *(["second answer"] if self.verify else [])],
            )
            for n, item in enumerate(kept.values())
        ]  # fmt: skip

    def unverified(self, item: Item, passage: str) -> str | None:
        """Returns why a question or its answer cannot be verified against the passage, or `None`."""
        if not item.question or not item.answer:
            return "empty"
        if _LEANS.search(item.question):
            return "leans on the passage"
        whole = _folded(passage)
        pieces = [_folded(piece) for piece in re.split(r"\n|\[?\.\.\.\]?|…", item.evidence) if piece.strip()]
        if not pieces or any(piece not in whole or len(piece) < _LEAST_EVIDENCE for piece in pieces):
            return "evidence not in the passage"
        if quality.numbers(item.answer, 1) - quality.numbers_of_source(f"{passage} {item.question}"):
            return "number not in the passage"
        if _grounded_share(item.answer, f"{passage} {item.question}") < self.grounded:
            return "words not in the passage"
        if quality.copies(f"{item.question} {item.answer}", self.words().text, passage, self.copied_words):
            return "copies the prompt"
        if item.second is not None and not agree(item.answer, item.second, self.agreement):
            return "second answer differs"
        return None


def _blocks(generation: Generation) -> tuple[list[tuple[str, str, str]], str | None]:
    text = generation.text
    if not text.strip():
        return [], "empty"
    if quality.is_endless(text):
        return [], "endless"
    if generation.finish_reason == "length":
        return [], "truncated"
    found = [tuple(part.strip() for part in block) for block in _BLOCK.findall(text)]
    return found, None if found or text.strip() == "NONE" else "malformed"


def agree(first: str, second: str, least: float) -> bool:
    """Whether two answers say the same: one holds the other, or they share enough words (F1) and all numbers."""
    a, b = (_TOKEN.findall(text.lower()) for text in (first, second))
    if not a or not b or second.strip() == _UNANSWERABLE:
        return False
    short, long = sorted((f" {' '.join(a)} ", f" {' '.join(b)} "), key=len)
    if short in long:
        return True
    common = (collections.Counter(a) & collections.Counter(b)).total()
    shared = 2 * common / (len(a) + len(b))
    first_numbers, second_numbers = quality.numbers(first, 1), quality.numbers(second, 1)
    return shared >= least and (first_numbers <= second_numbers or second_numbers <= first_numbers)


def _grounded_share(answer: str, passage: str) -> float:
    words = {word.lower()[:_STEM] for word in _WORD.findall(answer)}
    known = {word.lower()[:_STEM] for word in _WORD.findall(passage)}
    return len(words & known) / len(words) if words else 1.0


def _folded(text: str) -> str:
    return " ".join(text.split())
