"""Sizes and lengths as people write them. 1K tokens are 1,024; 1 GB is 10^9 bytes and 1 GiB 2^30."""

from __future__ import annotations

from headinfer.errors import UsageError

__all__ = ["format_bytes", "format_seconds", "format_tokens", "parse_bytes", "parse_tokens"]

_BYTES = {"": 1, "B": 1} | {
    f"{letter}{middle}B": base**power
    for power, letter in enumerate("KMGT", start=1)
    for middle, base in (("", 1000), ("I", 1024))
}
_TOKENS = {"": 1, "K": 2**10, "M": 2**20}


def parse_bytes(text: str) -> int:
    """Bytes of a size such as 256MiB, 1.5GB or 1000000. Raises UsageError for anything else."""
    value = _parse(text, _BYTES)
    if value is None:
        raise UsageError(f"{text!r} is no size: write for example 256MiB, 1.5GB or 1000000")
    if not 1 <= value < 2**63:
        raise UsageError(f"a size of {text!r} is out of range: write for example 256MiB")
    return int(value)


def parse_tokens(text: str) -> int:
    """Tokens of a length such as 128K, 1M or 50000; K is 1,024. Raises UsageError for anything else."""
    value = _parse(text, _TOKENS)
    if value is None:
        raise UsageError(f"{text!r} is no number of tokens: write for example 128K, 1M or 50000")
    if not 1 <= value < 2**40:
        raise UsageError(f"{text!r} tokens are out of range: write for example 128K, 1M or 50000")
    return int(value)


def format_bytes(nbytes: float) -> str:
    """Format a size for people, as in 512 B, 3.5 MiB or 128 GiB."""
    for unit in ("B", "KiB", "MiB"):
        if abs(nbytes) < 1024:
            return f"{nbytes:.4g} {unit}"
        nbytes /= 1024
    return f"{nbytes:.4g} GiB"


def format_tokens(tokens: int) -> str:
    """A number of tokens for people: 1M, 4.5M, 128K, 1,000."""
    for unit, size in (("M", 2**20), ("K", 2**10)):
        if tokens >= size and tokens * 100 % size == 0:
            return f"{tokens / size:.4g}{unit}"
    return f"{tokens:,}"


def format_seconds(seconds: float) -> str:
    """A time for people: 12 ms, 6.41 s, 34 min, 7.5 h."""
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
