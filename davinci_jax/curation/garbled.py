"""L2: text that came out garbled: wrong encodings, broken fonts of PDF files, noise of character recognition."""

from __future__ import annotations

import dataclasses
import re

from davinci_jax.curation.documents import Document
from davinci_jax.curation.rules import Rule

# What no text holds: controls, surrogates, private use, U+FFFD, noncharacters.
_NO_TEXT = re.compile(
    "[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f\ud800-\udfff\ue000-\uf8ff\ufdd0-\ufdef\ufffd-\uffff\U000f0000-\U0010ffff]"
)
# UTF-8 that was read as Windows-1252: the first byte of a pair or triple, then bytes of the upper half.
_MISREAD = re.compile(
    "[ÂÃÄÅÎÏÐÑØÙ][\u0080-\u00bfŒœŠšŸŽžƒˆ˜–—‘’‚“”„†‡•…‰‹›€™]|[âãåæçè][\u0080-\u00bf€‚„…†‡‰‹›œž“”™š]{2}"
)
# A stretch between blanks in which no two letters or digits stand side by side; each mark is read in one way only,
# or a long ruler would be tried in exponentially many.
_NOISE = re.compile(r"(?<!\S)\w?[^\w\s](?:\w?[^\w\s])+\w?(?!\S)")
_CID = re.compile(r"\(cid:\d+\)")


@dataclasses.dataclass(frozen=True)
class DropGarbledText(Rule):
    """Drops documents in which more than `share` of the characters are garbled; half of them, as published.

    Garbled are characters that no text holds, UTF-8 read as Windows-1252, glyph numbers of a PDF's font, and stretches
    between blanks that are six or more different marks with hardly a letter. A ruler, one mark repeated, is none.

    Attributes:
      share: of the characters, at most.
    """

    share: float = 0.5
    name = "drop-garbled-text"

    def reason(self, document: Document) -> str | None:
        count = garbled_characters(document.text)
        if count > self.share * len(document.text):
            return f"{count} of {len(document.text)} characters are garbled"
        return None


def garbled_characters(text: str) -> int:
    """Returns how many characters of a text are garbled, each counted once."""
    spans = [found.span() for pattern in (_NO_TEXT, _MISREAD, _CID) for found in pattern.finditer(text)]
    for found in _NOISE.finditer(text):
        stretch = found.group()
        if len(stretch) >= 6 and len(set(stretch)) >= 4 and 4 * sum(map(str.isalnum, stretch)) <= len(stretch):
            spans.append(found.span())
    count = end = 0
    for first, last in sorted(spans):
        count += max(last - max(first, end), 0)
        end = max(end, last)
    return count
