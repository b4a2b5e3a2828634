"""Texts as hashed n-grams of words: sparse rows of unit length, the same on every machine."""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Sequence

import numpy as np

from davinci_jax.experiment import checks

# A word, or one character that is neither word nor blank: brackets and operators tell code from prose.
_TOKEN = re.compile(r"\w+|[^\w\s]")
# Odd constants near 2**64 / golden ratio and its square: multiplying by them and taking the highest bits is
# Fibonacci hashing (Knuth, The Art of Computer Programming 6.4).
_MIX, _STEP = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NGrams:
    """How a text becomes features.

    Attributes:
      orders: n-grams of 1 to this many words.
      bits: features are hashed to 2**bits places.
      words: only this many words of the beginning are read.
    """

    orders: int = 2
    bits: int = 18
    words: int = 1000

    def __post_init__(self):
        checks.within("ngrams", 1, 5, orders=self.orders)
        checks.within("ngrams", 8, 28, bits=self.bits)
        checks.positive("ngrams", words=self.words)

    def row(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns (places int32 [F], ascending; weights float32 [F] of unit length) of a text.

        The weight of a feature is log(1 + count), divided by the length of the row.
        """
        # No token is longer than the text; 40 characters a token keep a text without blanks from being read whole.
        words = _TOKEN.findall(text[: 40 * self.words].lower())[: self.words]
        hashes = np.fromiter((zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in words), np.uint64)
        rows, gram = [], np.zeros(len(hashes), np.uint64)
        for order in range(min(self.orders, len(hashes))):
            gram = gram[: len(hashes) - order] * _STEP + hashes[order:] + np.uint64(1)
            rows.append((gram * _MIX) >> np.uint64(64 - self.bits))
        if not rows:
            return np.zeros(0, np.int32), np.zeros(0, np.float32)
        places, counts = np.unique(np.concatenate(rows), return_counts=True)
        weights = np.log1p(counts)
        return places.astype(np.int32), (weights / np.linalg.norm(weights)).astype(np.float32)

    def rows(self, texts: Sequence[str]) -> Rows:
        """Returns the rows of texts."""
        rows = [self.row(text) for text in texts]
        starts = np.cumsum([0, *(len(places) for places, _ in rows)])
        empty = np.zeros(0, np.int32), np.zeros(0, np.float32)
        places, weights = zip(*rows, strict=True) if rows else ([empty[0]], [empty[1]])
        return Rows(starts, np.concatenate(places), np.concatenate(weights))


@dataclasses.dataclass(frozen=True)
class Rows:
    """Sparse rows, one after the other.

    Attributes:
      starts: int64 [N + 1], where each begins.
      places: int32 [F].
      weights: float32 [F].
    """

    starts: np.ndarray
    places: np.ndarray
    weights: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def gather(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns (places int32 [F], weights float32 [F], owners int32 [F]) of some rows, one after the other.

        F is the power of 2 that holds them; what is over has weight 0. `owners` tells which of `rows` a feature is of.
        """
        counts = self.starts[rows + 1] - self.starts[rows]
        total = int(counts.sum())
        size = 1 << max(10, (total - 1).bit_length())
        places, weights, owners = np.zeros(size, np.int32), np.zeros(size, np.float32), np.zeros(size, np.int32)
        owners[:total] = np.repeat(np.arange(len(rows)), counts)
        where = np.concatenate([np.arange(self.starts[row], self.starts[row + 1]) for row in rows])
        places[:total], weights[:total] = self.places[where], self.weights[where]
        return places, weights, owners
