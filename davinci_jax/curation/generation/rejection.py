"""L5: many answers to a question with a known result; the wrong ones are thrown away."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
from collections.abc import Sequence

from davinci_jax.curation.documents import Document
from davinci_jax.curation.generation import checkers, quality
from davinci_jax.curation.generation.checkers import Checker
from davinci_jax.curation.generation.client import Generation, RequestFailed
from davinci_jax.curation.generation.operation import Ask, Generative
from davinci_jax.curation.generation.pairs import pair, unpair
from davinci_jax.curation.sandbox import Limits
from davinci_jax.errors import ConfigError
from davinci_jax.experiment import checks


@dataclasses.dataclass(frozen=True, kw_only=True)
class RejectionSampling(Generative):
    """Keeps answers that a checker finds right.

    The question and the known answer are those of `pairs.unpair`; for code, `metadata["tests"]` stands for the answer.

    Attributes:
      samples: answers asked for, each with a seed of its own.
      checker: "math" compares values, "choice" letters, "code" runs tests in the sandbox.
      keep: the most right answers kept for a question; the shortest come first.
      copied_words: see `Quality`.
      language: probability from which on the identified languages of question and answer count; they must agree then.
        Above the 0.6 of `Quality`, since formulas look like any language. 1 leaves the language unchecked; programs
        are in none.
      wall_seconds, memory_bytes: what a program may use.
      isolation: see `sandbox.run`.
    """

    prompt: str = "solve_v1"
    temperature: float = 0.8
    max_tokens: int = 4096
    samples: int = 4
    checker: str = "math"
    keep: int = 1
    copied_words: int = 10
    language: float = 0.8
    wall_seconds: float = 20.0
    memory_bytes: int = 2 << 30
    isolation: str = "namespaces"
    name, level = "rejection-sampling", "L5"

    def __post_init__(self):
        super().__post_init__()
        checkers.check_kind(f"{self.name}.checker", self.checker)
        checks.positive(self.name, samples=self.samples, keep=self.keep, copied_words=self.copied_words)
        checks.within(self.name, 0, 1, language=self.language)
        if self.samples > 1 and self.temperature == 0:
            raise ConfigError(
                f"{self.name}.temperature", self.temperature, f"makes {self.samples} samples one and the same answer",
                "give 0.8, or samples=1",
            )  # fmt: skip

    async def rollout(self, document: Document, ask: Ask) -> list[Generation | str]:
        """Returns the samples in order; in the place of one that failed, why."""
        question, _ = unpair(document)
        if not question:
            return []
        return list(await asyncio.gather(*(self._sample(document, question, n, ask) for n in range(self.samples))))

    async def _sample(self, document: Document, question: str, n: int, ask: Ask) -> Generation | str:
        try:
            return await self.put(ask, [("QUESTION", question)], f"{document.id}#{n}", attempt=n)
        except RequestFailed as error:
            return f"no answer: {error}"

    def finish(self, document: Document, result: list[Generation | str]) -> Sequence[Document] | str:
        question, answer = unpair(document)
        if not question:
            return "has no single question"
        checker = Checker(
            self.checker, Limits(wall_seconds=self.wall_seconds, memory_bytes=self.memory_bytes), self.isolation
        )
        truth, why = checker.truth(document, answer)
        if why is not None:
            return why
        verdicts = [self._verdict(sample, question, checker, truth) for sample in result]
        right = {
            sample.text.strip(): n for n, (sample, why) in enumerate(zip(result, verdicts, strict=True)) if not why
        }
        if not right:
            told = ", ".join(f"{count} {why}" for why, count in sorted(collections.Counter(verdicts).items()))
            return f"none of {len(result)} answers is right ({told})"
        rate = [sum(not why for why in verdicts), len(verdicts)]
        kept = sorted(right.items(), key=lambda item: (len(item[0]), item[1]))[: self.keep]
        return [pair(document, f"s{n}", question, text, right=rate, checker=self.checker) for text, n in kept]

    def _verdict(self, sample: Generation | str, question: str, checker: Checker, truth: str) -> str:
        """Returns why a sample is not kept, empty if it is right."""
        if isinstance(sample, str):
            return sample
        if not sample.text.strip():
            return "empty"
        if quality.is_endless(sample.text):
            return "endless"
        if sample.finish_reason == "length":
            return "truncated"
        if quality.copies(sample.text, self.words().text, question, self.copied_words):
            return "copies the prompt"
        if not checker.is_right(sample.text, truth):
            return "wrong"
        is_told = self.checker != "code" and self.language < 1
        return "other language" if is_told and not quality.same_language(question, sample.text, self.language) else ""
