"""Counts and sizes as people read them."""

from __future__ import annotations


def show_tokens(tokens: float | None) -> str:
    """Returns a count as table 2 prints it: 4.28 T, 187 B, 5.20 M."""
    if tokens is None:
        return ""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if tokens >= size:
            return f"{tokens / size:.3g} {unit}"
    return f"{tokens:,.0f}"


def show_bytes(size: float) -> str:
    """Returns a size with the unit that it has a digit before the point of: 12 B, 3.4 kB, 1.3 GB."""
    for unit_size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit_size:
            return f"{size / unit_size:.1f} {unit}"
    return f"{size:,.0f} B"


def show_count(count: int, what: str) -> str:
    """Returns a count with its noun: 1 document, 2,310 documents."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"
