"""How much the bytes of a stranger may unpack to: a few kilobytes may stand for terabytes."""

from __future__ import annotations

import io
from typing import BinaryIO

from davinci_jax.curation.places import decompressed

RATIO = 200  # bytes that one byte of a file may stand for; text compresses 3 to 30 times
ALLOWANCE = 64 * 2**20  # a small file may hold this much whatever its ratio


class Bomb(Exception):
    """A file that unpacks to more than it may."""


def budget(size: int) -> int:
    """Returns the bytes that a file of some size may unpack to."""
    return max(ALLOWANCE, RATIO * size)


def check(taken: int, size: int) -> None:
    """Raises `Bomb` where so many bytes have come out of a file of some size, or will, and that is more than may."""
    if taken > budget(size):
        raise Bomb(f"a file of {size} bytes unpacks to more than {RATIO} times as much")


def unpacked(stream: BinaryIO, name: str, size: int) -> BinaryIO:
    """Returns a stream of what a file holds, compressed or not, that raises `Bomb` for too much.

    Args:
      stream: the file.
      name: its ending tells how it is compressed.
      size: bytes of the file; 0 where that is not known.
    """
    plain, _ = decompressed(stream, name)
    return stream if plain is stream else io.BufferedReader(_Unpacked(plain, stream, size), 2**16)


class _Unpacked(io.RawIOBase):
    """Unpacked bytes that are counted."""

    def __init__(self, plain: BinaryIO, packed: BinaryIO, size: int):
        super().__init__()
        self._plain, self._packed, self._size, self._taken = plain, packed, size, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        found = self._plain.read1(len(buffer))  # `read` would lose what comes before a damage
        self._taken += len(found)
        # Some addresses do not tell a size; then counts what was read of the file.
        check(self._taken, self._size or self._packed.tell())
        buffer[: len(found)] = found
        return len(found)
