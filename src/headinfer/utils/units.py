"""Parse and format sizes, token counts and times for people.

1K tokens are 1,024 tokens, 1 GB is 10^9 bytes and 1 GiB is 2^30 bytes.
"""

from __future__ import annotations

import reprlib

from headinfer.errors import UsageError

__all__ = ["format_bytes", "format_seconds", "format_tokens", "parse_bytes", "parse_tokens"]

_BYTES = {"": 1, "B": 1} | {
    f"{letter}{middle}B": base**power
    for power, letter in enumerate("KMGT", start=1)
    for middle, base in (("", 1000), ("I", 1024))
}
_TOKENS = {"": 1, "K": 2**10, "M": 2**20}


def parse_bytes(text: str) -> int:
    """Parse a size in bytes.

    Args:
        text: a size such as 256MiB, 1.5GB or 1000000.

    Raises:
        UsageError: the text is not a size, or is out of range.
    """
    value = _parse(text, _BYTES)
    if value is None:
        raise UsageError(f"{reprlib.repr(text)} is not a size: write for example 256MiB, 1.5GB or 1000000")
    if not 1 <= value < 2**63:
        raise UsageError(f"a size of {reprlib.repr(text)} is out of range: write for example 256MiB")
    return int(value)


def parse_tokens(text: str) -> int:
    """Parse a number of tokens.

    Args:
        text: a number such as 128K, 1M or 50000; K stands for 1,024.

    Raises:
        UsageError: the text is not a number of tokens, or is out of range.
    """
    value = _parse(text, _TOKENS)
    if value is None:
        raise UsageError(f"{reprlib.repr(text)} is not a number of tokens: write for example 128K, 1M or 50000")
    if not 1 <= value < 2**40:
        raise UsageError(f"{reprlib.repr(text)} tokens are out of range: write for example 128K, 1M or 50000")
    return int(value)


def format_bytes(nbytes: float) -> str:
    """Format a size for people, as in 512 B, 3.5 MiB or 128 GiB."""
    for unit in ("B", "KiB", "MiB"):
        if abs(nbytes) < 1024:
            return f"{nbytes:.4g} {unit}"
        nbytes /= 1024
    return f"{nbytes:.4g} GiB"


def format_tokens(tokens: int) -> str:
    """Format a number of tokens for people, as in 4.5M, 128K or 1,000."""
    for unit, size in (("M", 2**20), ("K", 2**10)):
        if tokens >= size and tokens * 100 % size == 0:
            return f"{tokens / size:.12g}{unit}"
    return f"{tokens:,}"


def format_seconds(seconds: float) -> str:
    """Format a time for people, as in 12 ms, 6.41 s, 34 min or 7.5 h."""
    if seconds < 0.1:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:,.3g} h"


def _parse(text: str, units: dict[str, int]) -> float | None:
    stripped = text.strip()
    number = stripped.rstrip("BbKkMmGgTtIi ")
    try:
        return float(number) * units[stripped[len(number) :].strip().upper()]
    except (ValueError, KeyError):
        return None
