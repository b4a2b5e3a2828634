"""L2: the rules that FineWeb added (Penedo et al. 2024, section 3.6), as datatrove applies them."""

from __future__ import annotations

import dataclasses
import functools

from davinci_jax.curation.documents import Document
from davinci_jax.curation.gopher import WordRule, repeated
from davinci_jax.curation.words import word_tokeniser


@dataclasses.dataclass(frozen=True)
class FineWebQuality(WordRule):
    """Drops documents whose lines are unlike prose; lines of blanks alone are not counted.

    Attributes:
      min_final_marks: smallest share of lines that end with a final mark.
      short_line: characters of a short line.
      max_short_lines: largest share of those.
      max_repeated_characters: largest share of characters in lines that came before.
      max_newlines: largest number of newlines a word.
      tokeniser: word tokeniser (`words.TOKENISERS`).
    """

    min_final_marks: float = 0.12
    short_line: int = 30
    max_short_lines: float = 0.67
    max_repeated_characters: float = 0.01
    max_newlines: float = 0.3
    tokeniser: str = "spacy-chunks"
    name = "fineweb-quality"

    def reason(self, document: Document) -> str | None:
        text = document.text
        lines = [line for line in text.split("\n") if line and not line.isspace()]
        if not lines:
            return "empty"
        marks = _final_marks()
        if sum(line[-1] in marks for line in lines) / len(lines) < self.min_final_marks:
            return "line_punct_ratio"
        if sum(len(line) <= self.short_line for line in lines) / len(lines) > self.max_short_lines:
            return "short_line_ratio"
        newlines = text.count("\n")
        if repeated(lines)[1] / (len(text) - newlines) > self.max_repeated_characters:
            return "char_dup_ratio"
        if newlines / len(word_tokeniser(self.tokeniser).ids(text)) > self.max_newlines:
            return "list_ratio"
        return None


@functools.cache
def _final_marks() -> frozenset[str]:
    from datatrove.utils.text import TERMINAL_PUNCTUATION

    return frozenset(TERMINAL_PUNCTUATION)
