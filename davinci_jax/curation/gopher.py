"""L2: the repetition and quality rules of Gopher (Rae et al. 2021, arXiv 2112.11446, table A1 and section A.1.1).

Decisions and reasons (up to the colon) are those of datatrove's filters with the same word tokeniser; n-grams are
counted as 64-bit hashes in NumPy, so two different n-grams of one document are taken for the same with probability
below 2^-40.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from davinci_jax.curation.documents import Document
from davinci_jax.curation.rules import Rule
from davinci_jax.curation.words import Vocabulary, tokeniser_version, word_tokeniser

# Odd and other than the base of the words' own hash.
_SPACING = np.uint64(0xD6E8FEB86659FD93)
STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")


class WordRule(Rule):
    """A rule with a word tokeniser, whose version belongs to the recipe."""

    tokeniser: str

    def __post_init__(self):
        word_tokeniser(self.tokeniser)

    def parameters(self) -> dict[str, Any]:
        return {**super().parameters(), "tokeniser": tokeniser_version(self.tokeniser)}


@dataclasses.dataclass(frozen=True)
class GopherRepetition(WordRule):
    """Drops documents that repeat themselves.

    Attributes:
      duplicate_lines, duplicate_paragraphs: largest share of lines or paragraphs that came before.
      duplicate_line_characters, duplicate_paragraph_characters: largest share of characters in those.
      top_ngrams: largest share of characters in the most frequent n-gram, for n = 2, 3, ...
      duplicate_ngrams: largest share of characters in n-grams that came before, for n = 5, 6, ...
      tokeniser: word tokeniser (`words.TOKENISERS`).
    """

    duplicate_lines: float = 0.3
    duplicate_paragraphs: float = 0.3
    duplicate_line_characters: float = 0.2
    duplicate_paragraph_characters: float = 0.2
    top_ngrams: tuple[float, ...] = (0.2, 0.18, 0.16)
    duplicate_ngrams: tuple[float, ...] = (0.15, 0.14, 0.13, 0.12, 0.11, 0.10)
    tokeniser: str = "spacy-chunks"
    name = "gopher-repetition"

    def reason(self, document: Document) -> str | None:
        text = document.text
        if not text:
            return "empty"
        paragraphs = split_paragraphs(text.strip())
        count, characters = repeated(paragraphs)
        found = above("dup_para_frac", count / len(paragraphs), self.duplicate_paragraphs)
        if found := found or above("dup_para_char_frac", characters / len(text), self.duplicate_paragraph_characters):
            return found
        lines = split_lines(text)
        count, characters = repeated(lines)
        return (
            above("dup_line_frac", count / len(lines), self.duplicate_lines)
            or above("dup_line_char_frac", characters / len(text), self.duplicate_line_characters)
            or self._ngrams(text)
        )

    def _ngrams(self, text: str) -> str | None:
        tokeniser = word_tokeniser(self.tokeniser)
        ngrams = NGrams(tokeniser.ids(text), tokeniser.vocabulary)
        for n, share in enumerate(self.top_ngrams, 2):
            if found := above(f"top_{n}_gram", ngrams.top_characters(n, share * len(text)) / len(text), share):
                return found
        for n, share in enumerate(self.duplicate_ngrams, 5):
            characters = ngrams.repeated_characters(n, share * len(text))
            if found := above(f"duplicated_{n}_n_grams", characters / len(text), share):
                return found
        return None


@dataclasses.dataclass(frozen=True)
class GopherQuality(WordRule):
    """Drops documents whose words and lines are unlike prose.

    Attributes:
      min_words, max_words: bounds on the words that are not punctuation alone.
      min_word_length, max_word_length: bounds on their mean length in characters.
      max_symbols: largest number of hashes, and of ellipses, a word.
      max_bullets, max_ellipses: largest share of lines that begin with a bullet, or end with an ellipsis.
      min_alphabetic: smallest share of words with a letter.
      min_stop_words: smallest number of different stop words.
      tokeniser: word tokeniser (`words.TOKENISERS`).
    """

    min_words: int = 50
    max_words: int = 100_000
    min_word_length: float = 3.0
    max_word_length: float = 10.0
    max_symbols: float = 0.1
    max_bullets: float = 0.9
    max_ellipses: float = 0.3
    min_alphabetic: float = 0.8
    min_stop_words: int = 2
    tokeniser: str = "spacy-chunks"
    name = "gopher-quality"

    def reason(self, document: Document) -> str | None:
        text = document.text
        tokeniser = word_tokeniser(self.tokeniser)
        ids, vocabulary = tokeniser.ids(text), tokeniser.vocabulary
        lengths = vocabulary.length[ids[~vocabulary.is_symbol[ids]]]
        if found := below("gopher_short_doc", len(lengths), max(self.min_words, 1)):
            return found
        ellipses = text.count("...") + text.count("…")
        return (
            above("gopher_long_doc", len(lengths), self.max_words)
            or below("gopher_below_avg_threshold", lengths.mean(), self.min_word_length)
            or above("gopher_above_avg_threshold", lengths.mean(), self.max_word_length)
            or above("gopher_too_many_hashes", text.count("#") / len(ids), self.max_symbols)
            or above("gopher_too_many_ellipsis", ellipses / len(ids), self.max_symbols)
            or self._lines(text)
            or self._words(ids, vocabulary)
        )

    def _lines(self, text: str) -> str | None:
        lines = text.splitlines()
        bullets = sum(line.lstrip().startswith(("•", "-")) for line in lines)
        ellipses = sum(line.rstrip().endswith(("...", "…")) for line in lines)
        return above("gopher_too_many_bullets", bullets / len(lines), self.max_bullets) or above(
            "gopher_too_many_end_ellipsis", ellipses / len(lines), self.max_ellipses
        )

    def _words(self, ids: np.ndarray, vocabulary: Vocabulary) -> str | None:
        alphabetic = np.count_nonzero(vocabulary.has_letter[ids]) / len(ids)
        if found := below("gopher_below_alpha_threshold", alphabetic, self.min_alphabetic):
            return found
        stop_words = [row for word in STOP_WORDS if (row := vocabulary.find(word)) is not None]
        different = sum(bool((ids == row).any()) for row in stop_words)
        return below("gopher_enough_stop_words", different, self.min_stop_words)


class NGrams:
    """Counts the n-grams of a document.

    Args:
      ids: int64 [n], its words as rows of the vocabulary.
      vocabulary: the words.
    """

    def __init__(self, ids: np.ndarray, vocabulary: Vocabulary):
        self._lengths = vocabulary.length[ids]
        self._codes, self._powers = vocabulary.code[ids], vocabulary.power[ids]
        self._ends = np.concatenate([[0], np.cumsum(self._lengths)])
        self._joined = {1: self._codes}

    def top_characters(self, n: int, enough: float) -> float:
        """Returns characters in all occurrences of the most frequent n-gram, blanks between its words counted.

        Of several the first counts. A bound that is not above `enough` may come in place of the number.
        """
        codes = self._spaced_codes(n)
        if not len(codes):
            return 0
        characters = self._ends[n:] - self._ends[:-n] + (n - 1)
        counts = _run_lengths(np.sort(codes))
        bound = counts.max() * characters.max()
        if bound <= enough:
            return bound
        _, first, counts = np.unique(codes, return_index=True, return_counts=True)
        top = first[counts == counts.max()].min()
        return int(counts.max() * characters[top])

    def repeated_characters(self, n: int, enough: float) -> float:
        """Returns characters in n-grams that came before, read from left to right without overlap.

        A bound that is not above `enough` may come in place of the number.
        """
        codes = self._joined_codes(n)
        if not len(codes):
            return 0
        characters = self._ends[n:] - self._ends[:-n]
        counts = _run_lengths(np.sort(codes))
        bound = (len(codes) - len(counts)) * characters.max()
        if bound <= enough:
            return bound
        _, first, kinds = np.unique(codes, return_index=True, return_inverse=True)
        repeats = np.flatnonzero(first[kinds] != np.arange(len(codes)))
        bound = self._covered_characters(repeats, n)
        if bound <= enough:
            return bound
        return _greedy(repeats.tolist(), kinds[repeats].tolist(), first[kinds[repeats]].tolist(), characters, n)

    def _covered_characters(self, starts: np.ndarray, n: int) -> int:
        """Returns the characters of the words that lie in an n-gram which begins at one of the places."""
        edges = np.zeros(len(self._lengths) + 1, np.int64)
        np.add.at(edges, starts, 1)
        np.add.at(edges, starts + n, -1)
        return int(self._lengths[np.cumsum(edges[:-1]) > 0].sum())

    def _spaced_codes(self, n: int) -> np.ndarray:
        """Returns uint64 [words - n + 1], a hash of the words of each n-gram, which knows where each begins."""
        count = max(len(self._codes) - n + 1, 0)
        codes = np.zeros(count, np.uint64)
        for k in range(n):
            codes = codes * _SPACING + self._codes[k : k + count]
        return codes

    def _joined_codes(self, n: int) -> np.ndarray:
        """Returns uint64 [words - n + 1], the hash of the characters of each n-gram without blanks."""
        if n not in self._joined:
            shorter = self._joined_codes(n - 1)[: max(len(self._codes) - n + 1, 0)]
            self._joined[n] = shorter * self._powers[n - 1 :] + self._codes[n - 1 :]
        return self._joined[n]


def above(name: str, value: float, bound: float) -> str | None:
    """Returns the reason of a document with a value above a bound, `None` where it is not."""
    return f"{name}: {_number(value)}, above {_number(bound)}" if value > bound else None


def below(name: str, value: float, bound: float) -> str | None:
    """Returns the reason of a document with a value below a bound, `None` where it is not."""
    return f"{name}: {_number(value)}, below {_number(bound)}" if value < bound else None


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def split_paragraphs(text: str) -> list[str]:
    """Returns what stands between two or more newlines, of a text that neither begins nor ends with one."""
    return [piece.lstrip("\n") for piece in text.split("\n\n") if piece] or [""]


def split_lines(text: str) -> list[str]:
    """Returns what stands between newlines, several in a row being one; an outer newline leaves an empty line."""
    lines = [line for line in text.split("\n") if line]
    return [""] * text.startswith("\n") + lines + [""] * text.endswith("\n")


def repeated(items: list[str]) -> tuple[int, int]:
    """Returns how many items came before in the list, and their characters."""
    distinct = set(items)
    if len(distinct) == len(items):
        return 0, 0
    return len(items) - len(distinct), sum(map(len, items)) - sum(map(len, distinct))


def _run_lengths(values: np.ndarray) -> np.ndarray:
    """Returns the lengths of the runs of equal values of a sorted array."""
    starts = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]]))
    return np.diff(np.append(starts, len(values)))


def _greedy(repeats: list[int], kinds: list[int], first: list[int], characters: np.ndarray, n: int) -> int:
    """Returns the characters of the n-grams that came before, where reading goes on behind each one that did.

    What is skipped so has not been read: an n-gram that stood only there comes for the first time.

    Args:
      repeats: places of n-grams that stand at an earlier place too, in order.
      kinds: which n-gram each of them is.
      first: its first place.
      characters: int64 [places], of the n-gram at each place.
      n: its words.
    """
    skipped, read_again = bytearray(len(characters) + n), set()
    total = end = 0
    for place, kind, earliest in zip(repeats, kinds, first, strict=True):
        if place < end:
            continue
        if skipped[earliest] and kind not in read_again:
            read_again.add(kind)
            continue
        total += int(characters[place])
        end = place + n
        skipped[place + 1 : end] = b"\1" * (n - 1)
    return total
