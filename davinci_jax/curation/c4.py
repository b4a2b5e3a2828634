"""L2: the rules of C4 (Raffel et al. 2020, section 2.2) in the form of datatrove's filter.

The list of bad words is left out, as in datatrove and in FineWeb.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from davinci_jax.curation.documents import Document
from davinci_jax.curation.pipeline import Reject
from davinci_jax.curation.spans import Spans, put
from davinci_jax.curation.words import tokeniser_version, word_tokeniser

_CITATION = re.compile(r"\[\d*]|\[edit]|\[citation needed]")
_ENDS = (".", "?", "!", '"', "'")
_POLICY = re.compile("terms of use|privacy policy|cookie policy|uses cookies|use of cookies|use cookies")


@dataclasses.dataclass(frozen=True)
class C4Quality:
    """Keeps the lines that end like a sentence, and drops documents that have too few sentences in them.

    Lines with a word of more than `max_word_length` characters, without a final mark, with fewer than
    `min_words` words between blanks, or that speak of JavaScript, cookies or terms of use go; citation marks are cut
    out of the others. A document with "lorem ipsum" or a curly bracket in a line that would stay is dropped.

    Attributes:
      min_sentences: sentences that the lines which stay must hold.
      min_words: words of a line.
      max_word_length: characters of a word.
      final_marks: whether lines without a final mark go, which takes headings, lists and code too.
      curly_brackets: whether a curly bracket drops the document; off for text about programs.
      tokeniser: word tokeniser by which sentences are found (`words.TOKENISERS`).
    """

    min_sentences: int = 5
    min_words: int = 3
    max_word_length: int = 1000
    final_marks: bool = True
    curly_brackets: bool = True
    tokeniser: str = "spacy-chunks"
    name = "c4-quality"
    level = "L2"

    def __post_init__(self):
        word_tokeniser(self.tokeniser)

    def parameters(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "tokeniser": tokeniser_version(self.tokeniser)}

    def apply(self, documents: Iterator[Document], reject: Reject) -> Iterator[Document]:
        for document in documents:
            lines, reason = self._lines(document.text)
            if reason:
                reject(document, reason)
                continue
            text, (questions, parts) = _joined(document.text, lines, (document.questions, document.parts))
            if text == document.text:
                yield document
            else:
                # The page's bytes are still those of the document: a careful pass may come.
                yield document.with_text(text, raw=document.raw, questions=questions, parts=parts)

    def _lines(self, text: str) -> tuple[list[tuple[int, int, str]], str]:
        """Returns (start, end, what is left) of each line that stays, and why the document is dropped, "" if it is not.

        Start and end are those of the line in the text, without the blanks around it.
        """
        count_sentences = word_tokeniser(self.tokeniser).count_sentences
        sentences, kept, after = 0, [], 0
        for whole in text.splitlines(keepends=True):
            after += len(whole)
            words = whole.split()
            stripped = whole.strip()
            line = self._line(stripped, words)
            if line is None:
                continue
            small = line.lower()
            if "lorem ipsum" in small:
                return [], "lorem_ipsum"
            if "javascript" in small:
                continue
            if self.curly_brackets and "{" in line:
                return [], "curly_bracket"
            if _POLICY.search(small):
                continue
            sentences += count_sentences(line)
            start = after - len(whole.lstrip())
            kept.append((start, start + len(stripped), line))
        if sentences < self.min_sentences:
            return [], f"too_few_sentences: {sentences}, below {self.min_sentences}"
        return kept, ""

    def _line(self, line: str, words: list[str]) -> str | None:
        """Returns a line without citation marks, `None` if its form is not that of a sentence."""
        if len(line) > self.max_word_length and max(map(len, words)) > self.max_word_length:
            return None
        if "[" in line:
            line = _CITATION.sub("", line)
        if self.final_marks and (not line.endswith(_ENDS) or line.endswith("...")):
            return None
        return line if len(words) >= self.min_words else None


def _joined(text: str, lines: list[tuple[int, int, str]], marks: tuple[Spans, ...]) -> tuple[str, tuple[Spans, ...]]:
    """Returns the text of the lines that stay, and marks on the text moved to where they are then."""
    if not any(marks):
        return "\n".join(line for _, _, line in lines).strip(), marks
    cuts, end = [], 0
    for start, stop, line in lines:
        cuts.append((end, start, "\n" if end else ""))
        if len(line) < stop - start:
            found = _CITATION.finditer(text[start:stop])
            cuts += [(start + citation.start(), start + citation.end(), "") for citation in found]
        end = stop
    whole, marks = put(text, [*cuts, (end, len(text), "")], marks, around=False)
    first, last = len(whole) - len(whole.lstrip()), max(len(whole.rstrip()), len(whole) - len(whole.lstrip()))
    return put(whole, [(0, first, ""), (last, len(whole), "")], marks, around=False)
