"""Marks on a text, such as the characters [start, end) of a question or of a part, while the text is cut."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from typing import Any

Spans = tuple[tuple[Any, ...], ...]  # each ends in start and end; a name may come before


def put(
    text: str, cuts: Sequence[tuple[int, int, str]], marks: tuple[Spans, ...], around: bool = True
) -> tuple[str, tuple[Spans, ...]]:
    """Returns the text with a word in place of each cut, and marks moved to where they are then.

    Args:
      text: what is cut.
      cuts: (start, end, word), in order, none over another.
      marks: lists of spans of the text.
      around: whether a mark that begins or ends inside a cut reaches around the word; if not it stops short of it, and
        a mark of which nothing is left goes.
    """
    starts, pieces, end = [start for start, _, _ in cuts], [], 0
    for start, stop, word in cuts:
        pieces += [text[end:start], word]
        end = stop
    # What the text has grown by once so many cuts are made.
    grown = [0, *itertools.accumulate(len(word) - (stop - start) for start, stop, word in cuts)]

    def move(place: int, is_end: bool) -> int:
        before = bisect.bisect_left(starts, place)  # cuts that begin before the place
        if before and place < cuts[before - 1][1]:  # inside the last of them
            start, _, word = cuts[before - 1]
            return start + grown[before - 1] + (len(word) if is_end == around else 0)
        return place + grown[before]

    moved = [[(*name, move(start, False), move(stop, True)) for *name, start, stop in spans] for spans in marks]
    kept = tuple(tuple(span for span in spans if around or span[-2] < span[-1]) for spans in moved)
    return "".join([*pieces, text[end:]]), kept
