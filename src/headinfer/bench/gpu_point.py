"""A measuring point of the suites `decode` and `prefill`: headinfer after a long past, and the results of baselines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from headinfer.bench.baselines import Outcome, measure_alone
from headinfer.bench.job import GpuJob
from headinfer.bench.measurement import OURS, Measurement, context_label, reason_of
from headinfer.bench.past import Past
from headinfer.bench.runners import HeadRunner
from headinfer.errors import CapacityError
from headinfer.utils.units import format_bytes

__all__ = ["LONG_TOKENS", "Point", "open_point"]

LONG_TOKENS = 64 * 2**10  # from this context on, the goals are about the link
_FILL_BYTES_PER_S = 2e9  # about the rate of pinning host memory and filling it with noise


@dataclass
class Point:
    """headinfer with the floor budget after a past, ready to be compared with baselines.

    Attributes:
        past: the KV of the past.
        own: headinfer.
        own_s: seconds of a pass when nothing else runs.
        peak_device_bytes: the peak of all tensors on the device, weights included, before any baseline is opened.
    """

    past: Past
    own: HeadRunner
    own_s: float
    peak_device_bytes: int

    @property
    def note(self) -> str:
        """A note for readers of this point's figures; empty if there is nothing to note."""
        held = format_bytes(self.past.host_bytes)
        return f"simulation: all layers read one layer's KV ({held})" if self.past.is_simulation else ""

    def facts(self, job: GpuJob, seconds: float) -> dict[str, Any]:
        """Return the details of headinfer's measurement, whose pass takes `seconds`."""
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

    def measurements(self, suite: str, name: str, outcomes: Sequence[Outcome], unit: str) -> list[Measurement]:
        """Return the baselines' measurements: seconds of a pass, and the ratio to headinfer's in the same turns."""
        return [self._measurement(suite, name, outcome, unit) for outcome in outcomes]

    def _measurement(self, suite: str, name: str, outcome: Outcome, unit: str) -> Measurement:
        details = {
            "past_tokens": self.past.tokens,
            "tokens": self.own.tokens,
            "all_seconds": list(outcome.seconds),
            "own_seconds": list(outcome.own_s),
            "simulation": self.past.is_simulation,
            **outcome.facts,
        }
        found = Measurement(
            suite,
            name,
            outcome.name,
            outcome.median_s,
            unit,
            ratio=outcome.ratio,
            device_kv_bytes=outcome.kv_bytes,
            rounds=len(outcome.seconds) or None,
            note=outcome.note or (self.note if outcome.facts.get("simulation", True) else ""),
            details=details,
        )
        return found.with_goal(f"{outcome.goal} x" if outcome.goal else "", outcome.ratio)


def open_point(job: GpuJob, suite: str, past_tokens: int, tokens: int) -> Point | Measurement:
    """Fill a past with noise, and measure headinfer with the floor budget alone.

    Args:
        job: the run.
        suite: the suite, for the measurement.
        past_tokens: tokens of the past.
        tokens: tokens of a pass after it.

    Returns:
        The point, or a measurement whose note says why there is none.
    """
    name = context_label(past_tokens)
    filled = job.kv_bytes(past_tokens) / (len(job.shape.layers) if job.is_simulated(past_tokens) else 1)
    about_s = 3 * job.pass_s(past_tokens, tokens) + filled / _FILL_BYTES_PER_S
    if about_s > job.left_s:
        return Measurement(suite, name, OURS, note="not measured: out of time")
    job.begin(f"{suite}, {name}", about_s)
    try:
        past = Past(job, past_tokens)
        job.clean()
        job.reset_peak()
        cache = past.cache(room_tokens=tokens if tokens > 1 else 0, device_kv_budget_bytes=job.sizes.floor_bytes)
        own = HeadRunner(job, cache, tokens)
        return Point(past, own, measure_alone(job, own), job.peak_device_bytes())
    except (torch.OutOfMemoryError, CapacityError) as error:
        return Measurement(suite, name, OURS, note=f"ran out of memory: {reason_of(error)}")
