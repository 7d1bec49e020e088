"""The passages that an answer came from, as lines of text."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headinfer.jobs.generate import Summary

__all__ = ["passage_lines"]

_MOST_CHARACTERS = 160  # of a passage


def passage_lines(summary: Summary, number: str = "") -> list[str]:
    """Return a heading, and a line for each passage that an answer came from; nothing if that was not asked for.

    Args:
        summary: what is known of the answer.
        number: the number of the answer; empty if there is only one.
    """
    answer = f"answer {number}" if number else "the answer"
    if summary.where_off_reason:
        return ["", f"where {answer} came from cannot be told: {summary.where_off_reason}"]
    if summary.where is None:
        return []
    if not summary.where:
        return ["", f"no head looks at one passage for {answer}"]
    lines = ["", f"where {answer} came from (shares of the attention that looks far):"]
    for passage in summary.where:
        text = " ".join(passage.text.split())
        shown = text if len(text) <= _MOST_CHARACTERS else text[:_MOST_CHARACTERS].rstrip() + " ..."
        end = passage.file_start + passage.stop - passage.start
        name = f"{passage.file}, " if passage.file else ""
        lines.append(f"  {passage.share:4.0%}  {name}characters {passage.file_start:,} to {end:,}: {shown}")
    return lines
