"""What the model is fed: rows of tokens with their targets, documents and sources."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

NO_TARGET = -1
PADDING_SEGMENT = 0


class Batch(NamedTuple):
    """Rows of L tokens; the leading dims are the caller's (rows, or micro-batches x rows).

    Attributes:
      tokens: int32 [..., L].
      labels: int32 [..., L], the next token of the same document, or -1 where there is no target: at the end of
        a document, in padding, and where the next token lies in a masked span.
      segment_ids: int32 [..., L], 0 for padding and 1, 2, ... for the documents of a row in their order.
      positions: int32 [..., L], counted from 0 at the start of each document and of each row.
      sources: int32 [...], the index of the row's source in config order.
    """

    tokens: np.ndarray
    labels: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    sources: np.ndarray

    @classmethod
    def empty(cls, leading: tuple[int, ...], length: int) -> Batch:
        """Returns arrays of the right shapes with undefined content."""
        rows = [np.empty((*leading, length), np.int32) for _ in range(4)]
        return cls(*rows, np.empty(leading, np.int32))
