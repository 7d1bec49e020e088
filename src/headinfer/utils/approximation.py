"""What is approximate about KV, in words for people: fewer bits, and heads that see a part of the context only."""

from __future__ import annotations

from headinfer.utils.head_pattern import HeadPattern

__all__ = ["approximation", "short_form"]


def approximation(kv_dtype: str, sparse_heads: HeadPattern | None = None) -> str:
    """Return a sentence for people that says that KV is approximate; empty if it is exact.

    Args:
        kv_dtype: how KV is stored: auto, int8 or int4.
        sparse_heads: the heads that do not see the whole context; None if all heads do.
    """
    parts = [] if kv_dtype == "auto" else [f"KV is stored in {kv_dtype}"]
    if sparse_heads is not None:
        seen = f"the first {sparse_heads.sink_tokens:,} and the newest {sparse_heads.recent_tokens:,} tokens"
        parts.append(f"{_streaming(sparse_heads):,} of {sparse_heads.heads:,} KV heads see only {seen}")
    if not parts:
        return ""
    return (
        f"{', and '.join(parts)}, which is approximate: answers are not exactly those of the model "
        "(docs/approximations.md)"
    )


def short_form(kv_dtype: str, sparse_heads: HeadPattern | None = None) -> str:
    """Return a few words for what approximation() says in a sentence, such as "int8"; empty if KV is exact."""
    parts = [] if kv_dtype == "auto" else [kv_dtype]
    if sparse_heads is not None:
        streaming = f"{_streaming(sparse_heads):,} of {sparse_heads.heads:,}"
        parts.append(f"{streaming} heads sparse, pattern {sparse_heads.digest}")
    return ", ".join(parts)


def _streaming(pattern: HeadPattern) -> int:
    """Return the number of streaming heads."""
    return sum(len(pattern.streaming_heads(layer)) for layer in range(len(pattern.values)))
