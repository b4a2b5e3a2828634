"""A block: the tokens of one record, with what is needed to cut rows from it without reading its neighbours.

Layout of a record, little-endian: the header, document starts uint32 [d], masked spans uint32 [m, 2], then the
block's n tokens and one look-ahead token, uint16 or uint32 [n + 1]. The look-ahead is the first token of the next
block, the label of this block's last token. The stream's end counts as a document start, so its last block needs no
special case: its look-ahead is never a label.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np

MAGIC = b"dvb2"
# magic, bytes per token, padding, tokens, starts, spans, padding, block
_HEADER = struct.Struct("<4sB3xIII4xQ")
_DTYPES = {2: np.dtype("<u2"), 4: np.dtype("<u4")}


class Block(NamedTuple):
    """One block of a token stream.

    Attributes:
      index: position of the block in the stream.
      tokens: uint16 or uint32 [n + 1], the look-ahead token last.
      starts: uint32 [d], ascending, positions 0..n in the block where a document starts; n is the look-ahead's.
      spans: uint32 [m, 2], positions [start, end) in 0..n+1 of tokens that are masked as targets.
    """

    index: int
    tokens: np.ndarray
    starts: np.ndarray
    spans: np.ndarray

    @property
    def num_tokens(self) -> int:
        """Tokens of the block, look-ahead not counted."""
        return len(self.tokens) - 1


def encode(block: Block) -> bytes:
    """Returns the record of a block."""
    header = _HEADER.pack(
        MAGIC,
        block.tokens.itemsize,
        block.num_tokens,
        len(block.starts),
        len(block.spans),
        block.index,
    )
    parts = (block.starts.astype("<u4"), block.spans.astype("<u4"), block.tokens.astype(_DTYPES[block.tokens.itemsize]))
    return header + b"".join(part.tobytes() for part in parts)


def decode(record: bytes) -> Block:
    """Returns the block of a record; its arrays are read-only views.

    Raises:
      ValueError: the record is no block of this format; says what is wrong with it.
    """
    if len(record) < _HEADER.size:
        raise ValueError(f"has {len(record)} bytes, fewer than a header")
    magic, itemsize, n, num_starts, num_spans, index = _HEADER.unpack_from(record)
    if magic != MAGIC:
        raise ValueError(f"begins with {magic!r}, not with {MAGIC!r}")
    if itemsize not in _DTYPES or n == 0:
        raise ValueError(f"has a header that makes no sense: {n} tokens of {itemsize} bytes")
    tokens_at = _HEADER.size + 4 * num_starts + 8 * num_spans
    expected = tokens_at + itemsize * (n + 1)
    if len(record) != expected:
        raise ValueError(f"has {len(record)} bytes where its header tells of {expected}")
    starts = np.frombuffer(record, "<u4", num_starts, _HEADER.size)
    spans = np.frombuffer(record, "<u4", 2 * num_spans, _HEADER.size + 4 * num_starts).reshape(-1, 2)
    if num_starts and (starts[-1] > n or (starts[1:] <= starts[:-1]).any()):
        raise ValueError("has document starts outside the block or out of order")
    if num_spans and (spans[-1, 1] > n + 1 or (spans.ravel()[1:] < spans.ravel()[:-1]).any()):
        raise ValueError("has masked spans outside the block or out of order")
    tokens = np.frombuffer(record, _DTYPES[itemsize], n + 1, tokens_at)
    return Block(index, tokens, starts, spans)
