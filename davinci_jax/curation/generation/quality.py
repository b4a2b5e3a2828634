"""Whether what a model wrote can stand in the place of what it was given."""

from __future__ import annotations

import dataclasses
import re

from davinci_jax.curation.generation.client import Generation
from davinci_jax.experiment import checks

_WORD = re.compile(r"\w+")
_NUMBER = re.compile(r"\d+")
# The longest piece whose repetition at the end of a text is looked for, in characters; how often it must come and how
# much text it must make for the text to count as endless.
_LONGEST, _TIMES, _LEAST = 400, 4, 200
_GRAM = 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quality:
    """Thresholds of an acceptable output.

    Attributes:
      min_ratio, max_ratio: characters of the output for one of the input.
      repeated: share of its runs of 6 words that may have come before, above the share in the input.
      copied_words: words in a row from the prompt, and not in the input, that betray a copy of the prompt.
      new_numbers: numbers of two digits or more that the input does not hold.
      lost_numbers: share of the input's numbers that may be missing.
      language: probability from which on the identified languages of input and output count; they must agree then.
        1 leaves the language unchecked.
    """

    min_ratio: float = 0.3
    max_ratio: float = 1.5
    repeated: float = 0.25
    copied_words: int = 10
    new_numbers: int = 0
    lost_numbers: float = 1.0
    language: float = 0.6

    def __post_init__(self):
        checks.positive("quality", max_ratio=self.max_ratio, copied_words=self.copied_words)
        checks.within("quality", 0, 1, repeated=self.repeated, lost_numbers=self.lost_numbers, language=self.language)
        checks.within("quality", 0, self.max_ratio, min_ratio=self.min_ratio)
        checks.within("quality", 0, 1e9, new_numbers=self.new_numbers)


def extract(generation: Generation, tag: str) -> tuple[str, str | None]:
    """Returns (what stands between the marks of an answer, what is wrong with the answer or `None`)."""
    text = generation.text
    opening, closing = f"<{tag}>", f"</{tag}>"
    start, end = text.find(opening), text.rfind(closing)
    if not text.strip():
        return "", "empty"
    if is_endless(text):
        return "", "endless"
    if generation.finish_reason == "length":
        return "", "truncated"
    if start < 0 or end < start:
        return "", "malformed"
    inside = text[start + len(opening) : end].strip()
    return inside, None if inside else "empty"


def problem(output: str, source: str, prompt: str, quality: Quality) -> str | None:
    """Returns in a word or two why an output cannot take the place of its source, or `None`.

    Args:
      output: what the model wrote, without marks.
      source: the material it was given.
      prompt: the fixed words that it was given before.
      quality: thresholds.
    """
    ratio = len(output) / max(1, len(source))
    if ratio < quality.min_ratio:
        return "too short"
    if is_endless(output) or repeated_share(output) > repeated_share(source) + quality.repeated:
        return "endless"
    if copies(output, prompt, source, quality.copied_words):
        return "copies the prompt"
    if ratio > quality.max_ratio:
        return "too long"
    if quality.language < 1 and not same_language(source, output, quality.language):
        return "other language"
    if len(numbers(output, 2) - numbers_of_source(source)) > quality.new_numbers:
        return "new numbers"
    given = numbers(source, 1)
    if given and len(given - numbers_of_source(output)) > quality.lost_numbers * len(given):
        return "lost numbers"
    return None


def is_endless(text: str) -> bool:
    """Whether a text ends in one piece over and over; a piece without a word, such as a rule, does not count."""
    for period in range(1, _LONGEST + 1):
        tail = text[-max(_TIMES * period, _LEAST) :]
        if len(tail) < _TIMES * period or len(tail) < _LEAST:
            return False
        if tail[period:] == tail[:-period] and _WORD.search(tail, 0, period):
            return True
    return False


def repeated_share(text: str) -> float:
    """Returns the share of the runs of 6 words that have come before in the text; 0 for fewer than 20 runs."""
    words = _WORD.findall(text.lower())
    grams = [tuple(words[n : n + _GRAM]) for n in range(len(words) - _GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if len(grams) >= 20 else 0.0


def copies(output: str, prompt: str, source: str, length: int) -> bool:
    """Whether the output shares `length` words in a row with the prompt that the source does not have."""
    runs = _runs(output, length) & _runs(prompt, length)
    return bool(runs and runs - _runs(source, length))


def numbers(text: str, digits: int) -> set[str]:
    """Returns the numbers of at least so many digits, without leading zeros."""
    return {number.lstrip("0") or "0" for number in _NUMBER.findall(text) if len(number) >= digits}


def same_language(source: str, output: str, probability: float) -> bool:
    """Whether two texts are in one language, as far as both are told with `probability` or more."""
    from davinci_jax.curation.language import identify

    (before, sure_before), (after, sure_after) = identify(source), identify(output)
    return before == after or min(sure_before, sure_after) < probability


def numbers_of_source(text: str) -> set[str]:
    """Returns the numbers of a text, those with separators ("1,024", "1 024") also as one."""
    joined = re.sub(r"(?<=\d)[,.'\u00a0\u202f ](?=\d)", "", text)
    return numbers(text, 1) | numbers(joined, 1)


def _runs(text: str, length: int) -> set[tuple[str, ...]]:
    words = _WORD.findall(text.lower())
    return {tuple(words[n : n + length]) for n in range(len(words) - length + 1)}
