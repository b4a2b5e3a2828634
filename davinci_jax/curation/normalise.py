"""Words in the form in which near-duplicates and contamination are looked for, as 64-bit hashes.

Text is lowered, punctuation becomes a blank, accents go, and if wished every number becomes 0; then words are what
stands between blanks. All of this acts on one stretch between blanks at a time, which is why each different
stretch is worked out once.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import re
import unicodedata

import numpy as np

from davinci_jax.curation.words import REMEMBERED, symbol_characters

# Digits of any script with one decimal part, as datatrove has it.
_NUMBER = re.compile(r"\d+(?:[.,،٫⎖⎗⎘]\d+)?")


class WordHashes(dict):
    """Stretch of text between blanks -> hashes of its words.

    Args:
      normalise_numbers: whether numbers are all the same.
    """

    def __init__(self, normalise_numbers: bool):
        super().__init__()
        self._normalise_numbers = normalise_numbers

    def of(self, text: str) -> np.ndarray:
        """Returns uint64 [n], the hashes of the words of a text."""
        if len(self) > REMEMBERED:
            self.clear()
        return np.fromiter(itertools.chain.from_iterable(map(self.__getitem__, text.split())), np.uint64)

    def __missing__(self, chunk: str) -> tuple[int, ...]:
        hashes = self[chunk] = tuple(map(_hash64, normalise(chunk, self._normalise_numbers).split()))
        return hashes


@functools.cache
def word_hashes(normalise_numbers: bool) -> WordHashes:
    """Returns the hashes that this process has worked out so far."""
    return WordHashes(normalise_numbers)


def normalise(text: str, normalise_numbers: bool) -> str:
    """Returns a text in small letters without punctuation and accents, and with "0" for every number if wished."""
    text = text.lower()
    if text.isascii() and text.isalpha():
        return text
    if normalise_numbers:
        text = _NUMBER.sub("0", text)
    text = text.translate(_to_blanks())
    if not text.isascii():
        decomposed = unicodedata.normalize("NFD", text)
        text = "".join(character for character in decomposed if unicodedata.category(character) != "Mn")
    return text


def ngram_hashes(words: np.ndarray, n: int) -> np.ndarray:
    """Returns uint64 [max(words - n + 1, 0), ...], a hash of each run of n words along the first axis.

    The polynomial tells order, the mixing (splitmix64, Steele et al. 2014) spreads it over all bits.
    """
    count = max(len(words) - n + 1, 0)
    hashes = np.zeros((count, *words.shape[1:]), np.uint64)
    for k in range(n):
        hashes = hashes * np.uint64(0xD1342543DE82EF95) + words[k : k + count]
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return hashes ^ (hashes >> np.uint64(31))


def _hash64(word: str) -> int:
    digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


@functools.cache
def _to_blanks() -> dict[int, str]:
    return {ord(character): " " for character in symbol_characters()}
