"""Keyed pseudo-random permutations of [0, n) for any n, by arithmetic alone: no table, no state.

A generalised Feistel network (Black & Rogaway 2002, "Ciphers with Arbitrary Finite Domains"): an index is written
as (left, right) in the mixed radix a x b, with a = ceil(sqrt n) and b = ceil(n / a), and each round adds a keyed hash
of one half to the other, modulo that half's radix. Every round can be undone, so the network permutes [0, a b). An
image outside [0, n) is sent through again until it falls inside ("cycle walking"), which makes it a permutation of
[0, n); fewer than a of the a b values lie outside, so a second pass is rare.
"""

from __future__ import annotations

import hashlib

import numpy as np

# Four rounds make a Feistel network of large halves a strong pseudo-random permutation (Luby & Rackoff 1988). More are
# for domains of a few rows, where a round moves little: with 12 every row of 2 to 7 lands everywhere equally often, to
# within one percent.
_ROUNDS = 12
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio, the step between round keys
MAX_SIZE = 1 << 52  # square roots in float64 are exact enough below


def text_key(*parts: object) -> int:
    """Returns a 64-bit key of the parts, the same on every machine and in every release."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def mix(x: np.ndarray) -> np.ndarray:
    """Returns SplitMix64's finaliser of uint64 [...], a bijection with full avalanche (Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(index: np.ndarray, size: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Returns the image of each index under the permutation of [0, size) that its key names.

    Args:
      index: uint64 [k], below `size`.
      size: uint64 [k], from 1 to 2^52.
      key: uint64 [k], well mixed (see `text_key` and `mix`).

    Returns:
      uint64 [k], below `size`; for one size and key, distinct indices have distinct images.
    """
    a = np.ceil(np.sqrt(size.astype(np.float64))).astype(np.uint64)
    b = (size + a - np.uint64(1)) // a
    image = _network(index, a, b, key)
    outside = np.flatnonzero(image >= size)
    while outside.size:
        image[outside] = _network(image[outside], a[outside], b[outside], key[outside])
        outside = outside[image[outside] >= size[outside]]
    return image


def _network(index: np.ndarray, a: np.ndarray, b: np.ndarray, key: np.ndarray) -> np.ndarray:
    left, right = np.divmod(index, b)
    for number in range(_ROUNDS):
        round_key = key + np.uint64(number * _GOLDEN % 2**64)
        if number % 2 == 0:
            left = _add(left, right, round_key, a)
        else:
            right = _add(right, left, round_key, b)
    return left * b + right


def _add(target: np.ndarray, other: np.ndarray, key: np.ndarray, radix: np.ndarray) -> np.ndarray:
    """Returns target + hash(other, key) modulo radix; both radices are below 2^32, so products fit 64 bits."""
    # The upper 32 bits of the hash times the radix, shifted down, is uniform on [0, radix) to within radix / 2^32.
    total = target + (((mix(other + key) >> np.uint64(32)) * radix) >> np.uint64(32))
    return np.where(total >= radix, total - radix, total)
