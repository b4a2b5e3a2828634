"""Texts in pieces that a model can take, cut where a reader would pause, and put together again without a loss."""

from __future__ import annotations

import functools
import re

from davinci_jax.errors import ConfigError

# Characters of a token in English text: 1,024 characters are about 256 tokens (the report's figure for its chunks).
CHARACTERS_PER_TOKEN = 4
# From the best place to cut to the worst: after a blank line, a line, a sentence, a word.
_BORDERS = tuple(re.compile(pattern) for pattern in (r"\n[ \t]*\n\s*", r"\n\s*", r"(?<=[.!?;:。！？])\s+", r"\s+"))


def cut(text: str, characters: int) -> list[tuple[int, int]]:
    """Returns [start, end) of consecutive pieces of at most `characters` characters that cover the text.

    A piece ends after a blank line, else a line, a sentence or a word, if there is one in its second half; else it is
    cut hard.
    """
    pieces, start = [], 0
    while len(text) - start > characters:
        end = _border(text, start + characters // 2, start + characters)
        pieces.append((start, end))
        start = end
    if start < len(text):
        pieces.append((start, len(text)))
    return pieces


def _border(text: str, low: int, high: int) -> int:
    """Returns the best place in (low, high] to cut at."""
    for border in _BORDERS:
        ends = [match.end() for match in border.finditer(text, low, high)]
        if ends and ends[-1] > low:
            return ends[-1]
    return high


def windows(text: str, tokens: int, tokenizer: str | None) -> list[tuple[int, int]]:
    """Returns [start, end) of consecutive pieces of at most `tokens` tokens, cut as by `cut`.

    Args:
      text: the text.
      tokens: the most tokens of a piece.
      tokenizer: path of a tokenizer.json; `None` takes `CHARACTERS_PER_TOKEN` characters for a token.
    """
    if tokenizer is None:
        return cut(text, tokens * CHARACTERS_PER_TOKEN)
    ends = [end for _, end in _tokenizer(tokenizer).encode(text, add_special_tokens=False).offsets]
    pieces, start, first = [], 0, 0
    while len(ends) - first > tokens:
        end = _border(text, (start + ends[first + tokens - 1]) // 2, max(ends[first + tokens - 1], start + 1))
        pieces.append((start, end))
        while first < len(ends) and ends[first] <= end:
            first += 1
        start = end
    if start < len(text):
        pieces.append((start, len(text)))
    return pieces


@functools.cache
def _tokenizer(path: str):
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(path)
    except Exception as error:  # what the library raises has no type of its own
        raise ConfigError("tokenizer", path, f"is no tokenizer.json ({error})", "name one, or leave it out") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def around(text: str) -> tuple[str, str, str]:
    """Returns a text as (blanks before, what is between, blanks after)."""
    core = text.strip()
    start = text.find(core) if core else len(text)
    return text[:start], core, text[start + len(core) :]
