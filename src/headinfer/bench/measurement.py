"""The result of every benchmark: a list of measurements."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from headinfer.utils.units import format_bytes, format_seconds, format_tokens

__all__ = ["OURS", "Measurement", "context_label", "goal_reached", "reason_of", "shown"]

OURS = "headinfer"
_COMPARE = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt, "==": operator.eq}


@dataclass(frozen=True)
class Measurement:
    """One line of a result: one figure, at one point of a suite, for one way of doing the work.

    Attributes:
        suite: the name of the suite.
        point: what the work is, such as a context length.
        who: the way: headinfer, a baseline, or a comparison of two ways.
        value: the figure. None: it was not measured, and the note says why.
        unit: the unit of the figure, such as "s/token", "GB/s", "bytes", "%" or "x".
        ratio: the median over rounds in turns of this way's time over headinfer's time; 1 for headinfer itself.
        device_kv_bytes: the peak of KV on the device, in bytes.
        rounds: how many rounds or passes the figure is the median of; None if it is not a median.
        goal: the figure to reach, such as ">= 92 %"; empty if there is none.
        reached: whether the goal is reached; None if there is no goal or no figure.
        note: what a reader must know to understand the figure.
        details: further figures and facts, for JSON.
    """

    suite: str
    point: str
    who: str
    value: float | None = None
    unit: str = ""
    ratio: float | None = None
    device_kv_bytes: int | None = None
    rounds: int | None = None
    goal: str = ""
    reached: bool | None = None
    note: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)

    def with_goal(self, goal: str, value: float | None = None, *, text: str = "") -> Measurement:
        """Return a copy that has a goal.

        Args:
            goal: a comparison, a bound and optionally a unit, such as ">= 92 %". Empty: the copy has no goal.
            value: the figure that is compared; None: the measurement's value.
            text: what people read in place of the goal.
        """
        compared = self.value if value is None else value
        reached = None if compared is None else goal_reached(goal, compared)
        return dataclasses.replace(self, goal=text or goal, reached=reached)


def goal_reached(goal: str, value: float) -> bool | None:
    """Return whether a value reaches a goal such as ">= 92 %" or "<= 1.03 x"; None if the goal is empty."""
    if not goal:
        return None
    comparison, bound = goal.split()[:2]
    return bool(_COMPARE[comparison](value, float(bound)))


def shown(value: float | None, unit: str) -> str:
    """Return a figure for people: 12 ms/token, 25.3 GB/s, 256 MiB, 1.03 x; a dash if there is none."""
    if value is None:
        return "-"
    if unit == "bytes":
        return format_bytes(value)
    if unit.partition("/")[0] == "s":
        return format_seconds(value) + unit[1:]
    return f"{value:,.4g} {unit}"


def context_label(tokens: int) -> str:
    """Return the point of a context length, such as "64K tokens"."""
    return f"{format_tokens(tokens)} tokens"


def reason_of(error: Exception) -> str:
    """Return the message of an error for a note: its first line, and of torch's "out of memory" two sentences."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    if not isinstance(error, torch.OutOfMemoryError):
        return lines[0]
    return ". ".join(lines[0].split(". ")[:2]).rstrip(".") + "."
