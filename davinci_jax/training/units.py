"""Numbers and texts as people read them."""

from __future__ import annotations

import math


def count(value: float) -> str:
    """Returns a count with three significant digits: 512, 78.6M, 4.00T."""
    return "".join(_scaled(value, ("", "k", "M", "B", "T", "P")))


def flops(value: float) -> str:
    """Returns floating-point operations with three significant digits: 20.3 GFLOP."""
    digits, prefix = _scaled(value, ("", "k", "M", "G", "T", "P", "E", "Z", "Y"))
    return f"{digits} {prefix}FLOP"


def _scaled(value: float, prefixes: tuple[str, ...]) -> tuple[str, str]:
    if not math.isfinite(value):
        return str(value), ""
    for prefix in prefixes:
        if abs(value) < 999.5 or prefix == prefixes[-1]:
            break
        value /= 1000
    if not prefix and value == int(value):
        return str(int(value)), prefix
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f}", prefix


def duration(seconds: float) -> str:
    """Returns a length of time in its two largest units: 42 s, 3 min 12 s, 4 h 05 min, 12 d 03 h."""
    if not math.isfinite(seconds):
        return "unknown"
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    if seconds < 86400:
        return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
    return f"{seconds // 86400:,} d {seconds % 86400 // 3600:02d} h"


def memory(value: float) -> str:
    """Returns bytes in binary units: 812 MiB, 1.25 GiB."""
    for suffix in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1000 or suffix == "TiB":
            break
        value /= 1024
    digits = 0 if suffix == "B" or abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:.{digits}f} {suffix}"


def power(value: float) -> str:
    """Returns a learning rate as it is spoken of: 3e-4, 2.5e-5, 0."""
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}" if value else "0"


def number(value: float | None, digits: int = 4) -> str:
    """Returns a measured value with fixed decimals; a dash for `None`, and NaN and infinities by name."""
    if value is None:
        return "-"
    return f"{value:.{digits}f}" if math.isfinite(value) else str(value)


def percent(value: float, digits: int = 1) -> str:
    """Returns a share of one as a percentage."""
    return f"{100 * value:.{digits}f}%" if math.isfinite(value) else str(value)


def printable(text: str) -> str:
    """Returns text with the control characters made visible: no document may steer a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
