"""What a point of decode or prefill begins with, and the lines that it gives."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from headinfer.bench.baselines import Outcome, measure_alone
from headinfer.bench.job import Job, Line, goal_reached
from headinfer.bench.past import Past
from headinfer.bench.runners import HeadRunner
from headinfer.errors import CapacityError
from headinfer.utils.units import format_bytes

__all__ = ["LONG_TOKENS", "OURS", "Point", "open_point"]

OURS = "headinfer"
LONG_TOKENS = 64 * 2**10  # from here on the goals are about the link
_FILL_BYTES_PER_S = 2e9  # pinning host memory and filling it with noise, about


@dataclass
class Point:
    """The KV of a past, headinfer over it with the floor budget, and what a pass of that takes alone.

    peak_device_bytes: of all tensors, the weights included, while nothing else is open.
    """

    past: Past
    own: HeadRunner
    own_s: float
    peak_device_bytes: int

    @property
    def note(self) -> str:
        """What people must know of its figures."""
        held = format_bytes(self.past.host_bytes)
        return f"simulation: all layers read one layer's KV ({held})" if self.past.is_simulation else ""

    def facts(self, job: Job, seconds: float) -> dict[str, Any]:
        """What JSON keeps of headinfer's own line; seconds: of a pass."""
        return {
            "past_tokens": self.past.tokens,
            "tokens": self.own.tokens,
            "seconds": seconds,
            "simulation": self.past.is_simulation,
            "kv_bytes": job.kv_bytes(self.past.tokens),
            "host_kv_bytes": self.past.host_bytes,
            "peak_device_bytes": self.peak_device_bytes,
            **self.own.facts(),
        }

    def lines(self, suite: str, name: str, found: Sequence[Outcome], unit: str) -> list[Line]:
        """The other ways' lines: seconds of a pass, and as a ratio to headinfer's in the same turns."""
        return [
            Line(
                suite,
                name,
                one.name,
                statistics.median(one.seconds) if one.seconds else None,
                unit,
                ratio=one.ratio,
                device_kv_bytes=one.kv_bytes,
                goal=f"{one.goal} x" if one.goal else "",
                reached=goal_reached(one.goal, one.ratio) if one.ratio is not None else None,
                note=one.note or (self.note if one.facts.get("simulation", True) else ""),
                details={
                    "past_tokens": self.past.tokens,
                    "tokens": self.own.tokens,
                    "all_seconds": list(one.seconds),
                    "own_seconds": list(one.own_s),
                    "simulation": self.past.is_simulation,
                    **one.facts,
                },
            )
            for one in found
        ]


def open_point(job: Job, suite: str, past_tokens: int, tokens: int) -> Point | Line:
    """headinfer with the floor budget after a past of noise, measured alone; or a line that says why not."""
    name, pass_s = job.point(past_tokens), job.pass_s(past_tokens, tokens)
    filled = job.kv_bytes(past_tokens) / (len(job.shape.layers) if job.is_simulated(past_tokens) else 1)
    if 3 * pass_s + filled / _FILL_BYTES_PER_S > job.left_s:
        return Line(suite, name, OURS, note="not measured: out of time")
    job.say(f"{suite} at {name} ...")
    try:
        past = Past(job, past_tokens)
        job.clean()
        job.forget_peak()
        cache = past.cache(room_tokens=tokens if tokens > 1 else 0, device_kv_budget_bytes=job.sizes.floor_bytes)
        own = HeadRunner(job, cache, tokens)
        return Point(past, own, measure_alone(job, own), job.peak_device_bytes())
    except (torch.OutOfMemoryError, CapacityError) as error:
        return Line(suite, name, OURS, note=f"ran out of memory: {str(error).splitlines()[0]}")
