"""From a row back to the documents that its tokens come from."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from davinci_jax.data.rows import Rows


class TracedDocument(NamedTuple):
    """A document, or the part of one, that a row holds.

    Attributes:
      first_column: place of its first token in the row.
      num_tokens: how many of its tokens the row holds.
      first_token: position of the first of them in the document.
      document_tokens: tokens of the whole document, end of text included.
      id, level, lineage, licence: as the document table tells them; `None` for a licence that is not known.
    """

    first_column: int
    num_tokens: int
    first_token: int
    document_tokens: int
    id: str
    level: str
    lineage: list[Any]
    licence: str | None


def trace(rows: Rows, row: int) -> list[TracedDocument]:
    """Returns the documents of a row in their order.

    Raises:
      DataError: a damaged document table.
    """
    shards, found = rows.shards, []
    column = 0
    ranges = rows.ranges(np.array([row]))
    for start, stop in zip(ranges.start.tolist(), ranges.stop.tolist(), strict=True):
        first = int(np.searchsorted(shards.document_offsets, np.int64(start), side="right")) - 1
        last = int(np.searchsorted(shards.document_offsets, np.int64(stop), side="left"))
        for record in shards.document_records(range(first, last)):
            begin = max(start, record["first_token"])
            end = min(stop, record["first_token"] + record["num_tokens"])
            found.append(
                TracedDocument(
                    first_column=column + begin - start,
                    num_tokens=end - begin,
                    first_token=begin - record["first_token"],
                    document_tokens=record["num_tokens"],
                    id=record["id"],
                    level=record["level"],
                    lineage=record["lineage"],
                    licence=record.get("licence"),
                )
            )
        column += stop - start
    return found
