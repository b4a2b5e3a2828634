"""L2: near-duplicates by MinHash (Broder 1997) with banding, as Data Darwinism's report has it: 14 bands of 8 hashes.

Two documents whose shingles have the Jaccard similarity s share a band with probability 1 - (1 - s^8)^14: 0.92 at
s = 0.8, 0.5 at s = 0.68. With 5-word shingles, a share p of changed words leaves s = q / (2 - q), q = (1 - p)^5.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from davinci_jax.curation.documents import Document
from davinci_jax.curation.duplicates import KeyedDuplicates
from davinci_jax.curation.normalise import ngram_hashes, word_hashes
from davinci_jax.errors import ConfigError

_MOST_HASHES = 4096  # of a signature; the scratch room for a block of shingles is 64 MB then
_BLOCK = 4096  # shingles at a time, so that the products stay in a core's cache


@dataclasses.dataclass(frozen=True)
class NearDuplicates(KeyedDuplicates):
    """Drops documents that share a band of hashes with an earlier document of their cluster.

    Words are what stands between blanks once case, punctuation and accents are gone.

    Attributes:
      bands: bands of a signature.
      rows: hashes of a band.
      shingle: words of a shingle; documents with fewer are kept and compared with no other.
      normalise_numbers: whether documents that differ in numbers only are the same: fit for web pages, and wrong
        for mathematics, tables and code.
      max_characters: how much of the beginning of a document is looked at; huge documents would meet everything.
      seed: of the hash functions.
    """

    bands: int = 14
    rows: int = 8
    shingle: int = 5
    normalise_numbers: bool = False
    max_characters: int = 500_000
    seed: int = 1
    name = "near-duplicates"

    def __post_init__(self):
        for field in ("bands", "rows", "shingle", "max_characters"):
            if getattr(self, field) < 1:
                raise ConfigError(f"near-duplicates.{field}", getattr(self, field), "is below 1", "give a count")
        if self.bands * self.rows > _MOST_HASHES:
            value, problem = self.bands, f"makes {self.bands * self.rows} hashes with rows = {self.rows}"
            raise ConfigError("near-duplicates.bands", value, problem, f"give at most {_MOST_HASHES}, bands times rows")

    @property
    def columns(self) -> int:
        return self.bands

    @property
    def relation(self) -> str:
        return "near-duplicate of"

    def signature(self, text: str) -> np.ndarray | None:
        """Returns uint32 [bands, rows], the smallest hash of the shingles under each hash function."""
        words = word_hashes(self.normalise_numbers).of(text[: self.max_characters])
        shingles = ngram_hashes(words, self.shingle).astype(np.uint32)
        if not len(shingles):
            return None
        scale, shift = _functions(self.seed, self.bands * self.rows)
        smallest = np.full(len(scale), np.iinfo(np.uint32).max, np.uint32)
        products = _scratch(len(scale))
        for start in range(0, len(shingles), _BLOCK):
            block = shingles[start : start + _BLOCK]
            hashes = np.multiply(scale, block, out=products[:, : len(block)])
            np.add(hashes, shift, out=hashes)
            np.minimum(smallest, hashes.min(axis=1), out=smallest)
        return smallest.reshape(self.bands, self.rows)

    def keys(self, document: Document) -> np.ndarray | None:
        signature = self.signature(document.key)
        if signature is None:
            return None
        return ngram_hashes(signature.T.astype(np.uint64), self.rows).T  # one key for the hashes of a band


@functools.cache
def _functions(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns odd factors and shifts, uint32 [count, 1]: x -> a x + b modulo 2^32 is one to one."""
    generator = np.random.Generator(np.random.PCG64(seed))
    scale, shift = generator.integers(0, 2**32, (2, count, 1), dtype=np.uint32)
    return scale | np.uint32(1), shift


@functools.cache
def _scratch(count: int) -> np.ndarray:
    """Returns room for the products of a block, uint32 [count, block], the same every time."""
    return np.empty((count, _BLOCK), np.uint32)
