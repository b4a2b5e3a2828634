"""L2: the rules that FineWeb added (Penedo et al. 2024, section 3.6), as datatrove applies them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator

from davinci_jax.curation.documents import Document
from davinci_jax.curation.gopher import WordRule, above, below, repeated
from davinci_jax.curation.words import word_tokeniser

_LAST = operator.itemgetter(-1)


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
        lines = list(itertools.filterfalse(str.isspace, filter(None, text.split("\n"))))
        if not lines:
            return "empty"
        ended = sum(map(_final_marks().__contains__, map(_LAST, lines))) / len(lines)
        if found := below("line_punct_ratio", ended, self.min_final_marks):
            return found
        short = sum(map(self.short_line.__ge__, map(len, lines))) / len(lines)
        if found := above("short_line_ratio", short, self.max_short_lines):
            return found
        newlines = text.count("\n")
        repeated_share = repeated(lines)[1] / (len(text) - newlines)
        if found := above("char_dup_ratio", repeated_share, self.max_repeated_characters):
            return found
        tokeniser = word_tokeniser(self.tokeniser)
        # Most texts have words enough even if every stretch between blanks is no more than one.
        least = tokeniser.least_words(text)
        if least and newlines / least <= self.max_newlines:
            return None
        return above("list_ratio", newlines / len(tokeniser.ids(text)), self.max_newlines)


@functools.cache
def _final_marks() -> frozenset[str]:
    from datatrove.utils.text import TERMINAL_PUNCTUATION

    return frozenset(TERMINAL_PUNCTUATION)
