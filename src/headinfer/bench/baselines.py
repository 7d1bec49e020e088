"""Ways of holding a long context that are measured against headinfer's own, each in turns with it.

| name | what it is |
|---|---|
| resident store | headinfer's loop over KV that all lies on the device: as if the link were free |
| what is free | headinfer with all device memory that is free: the first tokens stay there, the rest streams |
| paper's scheme | one KV head at a time, its whole past in a slot (arXiv 2502.12574) |
| layer-wise | all KV heads of a layer at a time, its whole past in a slot: pinned, only new KV written back |
| DynamicCache | transformers' cache, all of it on the device |
| offloaded cache | transformers' `DynamicCache(offloading=True)`: a layer at a time, written back whole |

The first four are headinfer's engine with other options, over the same host memory.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from headinfer.bench.job import Job
from headinfer.bench.past import Past
from headinfer.bench.runners import HeadRunner, Runner, TransformersRunner
from headinfer.errors import CapacityError
from headinfer.kv.resident import RESIDENT_UNIT_TOKENS
from headinfer.plan.footprint import tail_bytes, write_back_bytes
from headinfer.plan.memory import available_host_bytes
from headinfer.plan.tiles import DEFAULT_BUDGET_BYTES, RING_SLOTS
from headinfer.utils.units import format_bytes

__all__ = ["Baseline", "Outcome", "baselines_of", "compare", "measure_alone", "ring_budget_bytes"]

_SLOT_ALIGN = 256
_ACTIVATION_SHARE = 8  # of the device memory that is free: for a chunk, where KV takes what is free


@dataclass(frozen=True)
class Baseline:
    """A way that may be opened. device_bytes, host_bytes: what it needs; pass_s: about what a pass takes.

    goal: of its time over headinfer's. refusal: why it cannot be opened at all. is_foreign: none of this project's
    code, so that its errors are a result.
    """

    name: str
    device_bytes: int
    pass_s: float
    open: Callable[[], Runner]
    host_bytes: int = 0
    goal: str = ""
    refusal: str = ""
    is_foreign: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of a way. seconds: of passes in turns with headinfer's own in own_s; note: why there are none."""

    name: str
    seconds: Sequence[float] = ()
    own_s: Sequence[float] = ()
    kv_bytes: int | None = None
    goal: str = ""
    note: str = ""
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        """The median over the rounds of its time over headinfer's."""
        pairs = zip(self.seconds, self.own_s, strict=True)
        return statistics.median(a / b for a, b in pairs) if self.seconds else None


def baselines_of(job: Job, past: Past, tokens: int, pass_s: float, goals: dict[str, str]) -> list[Baseline]:
    """The ways for passes of `tokens` tokens after a past, the most telling first.

    pass_s: what headinfer takes, about. goals: by name.
    """
    kv, rates, layers = job.kv_bytes(past.tokens), job.rates, len(job.shape.offloaded_layers)
    floor_bytes = job.sizes.floor_bytes
    held = 1 if past.is_simulation else layers  # whose KV is really there
    layer = job.shape.layers[job.shape.offloaded_layers[0]]
    layer_bytes, heads = kv // layers, layer.kv_heads
    kv_near_s, kv_far_s = kv / rates.device_bytes_per_s, kv / min(rates.link_bytes_per_s, rates.back_bytes_per_s)
    near_s = max(pass_s - kv / rates.link_bytes_per_s, 0.0) if tokens == 1 else pass_s

    def whole_past(name: str, group: int) -> Baseline:
        budget = ring_budget_bytes(job, group * layer_bytes // heads)
        options = {"device_kv_budget_bytes": budget, "streaming_budget_bytes": budget, "heads_per_group": group}
        return baseline(name, budget, pass_s, tile_tokens=past.tokens, **options)

    def baseline(name: str, device_bytes: int, seconds: float, **options: Any) -> Baseline:
        def opened() -> Runner:
            return HeadRunner(job, past.cache(room_tokens=tokens if tokens > 1 else 0, **options), tokens)

        return Baseline(name, device_bytes, seconds, opened)

    def resident() -> Baseline:
        # As if nothing were shared: each layer's part of the budget holds all of its own, and a unit more.
        each = layer_bytes + layer_bytes // past.tokens * RESIDENT_UNIT_TOKENS
        options = {"device_kv_budget_bytes": floor_bytes + layers * each, "streaming_budget_bytes": floor_bytes}
        return baseline("resident store", floor_bytes + held * each, near_s + kv_near_s, **options)

    def what_is_free() -> Baseline:
        free = job.free_device_bytes()
        if past.is_simulation or resident().device_bytes <= free - free // _ACTIVATION_SHARE:
            why = "one layer's KV stands for all" if past.is_simulation else "all of it fits, see resident store"
            return Baseline("what is free", 0, 0.0, _refused, refusal=f"not measured: {why}")
        budget = free - free // _ACTIVATION_SHARE
        return baseline(
            "what is free", budget, pass_s, device_kv_budget_bytes=budget, streaming_budget_bytes=floor_bytes
        )

    def dynamic(name: str, *, offloaded: bool) -> Baseline:
        seconds = near_s + (2 * kv_far_s if offloaded else 3 * kv_near_s)
        host = (3 if tokens > 1 else 2) * 2 * kv if offloaded else 0  # torch rounds pinned sizes to powers of two
        refusal = "does not run without a GPU" if offloaded and not job.is_cuda else ""
        return Baseline(
            name,
            4 * layer_bytes if offloaded else kv + 2 * layer_bytes,
            seconds,
            lambda: TransformersRunner(job, past.tokens, tokens, offloaded=offloaded),
            host_bytes=host,
            refusal=refusal,
            is_foreign=True,
        )

    made = [
        whole_past("paper's scheme", 1),
        resident(),
        dynamic("offloaded cache", offloaded=True),
        dynamic("DynamicCache", offloaded=False),
        whole_past("layer-wise", heads),
        what_is_free(),
    ]
    return [dataclasses.replace(one, goal=goals.get(one.name, "")) for one in made]


def ring_budget_bytes(job: Job, slot_bytes: int) -> int:
    """The device KV budget whose ring has slots of so many bytes."""
    tails = sum(tail_bytes(job.shape, job.sizes.dtype.itemsize))
    slots = RING_SLOTS * math.ceil(slot_bytes / _SLOT_ALIGN) * _SLOT_ALIGN
    return slots + tails + 2 * write_back_bytes(DEFAULT_BUDGET_BYTES)


def measure_alone(job: Job, runner: Runner) -> float:
    """Seconds of a pass, after one that warms up; where that one takes long, its own."""
    with runner.active():
        seconds = job.timed(runner.run)
        runner.after()
        if seconds < job.sizes.rounds_s:
            seconds = job.timed(runner.run)
            runner.after()
    return seconds


def compare(job: Job, own: Runner, own_s: float, baselines: Sequence[Baseline]) -> list[Outcome]:
    """Each way in turns with headinfer's own, which takes own_s a pass; or why it was not measured."""
    return [_against(job, own, own_s, baseline) for baseline in baselines]


def _against(job: Job, own: Runner, own_s: float, baseline: Baseline) -> Outcome:
    if why := _refusal(job, own_s, baseline):
        return Outcome(baseline.name, goal=baseline.goal, note=why)
    seconds: list[float] = []
    own_seconds: list[float] = []
    try:
        runner = baseline.open()
        with runner.active():
            first_s = job.timed(runner.run)
            runner.after()
        rounds = max(1, min(job.sizes.rounds, int(job.sizes.rounds_s / (own_s + first_s))))
        for _ in range(rounds):
            for one, found in ((own, own_seconds), (runner, seconds)):
                with one.active():
                    found.append(job.timed(one.run))
                    one.after()
        return Outcome(baseline.name, seconds, own_seconds, runner.kv_bytes(), baseline.goal, facts=runner.facts())
    except (torch.OutOfMemoryError, CapacityError) as error:
        return Outcome(baseline.name, goal=baseline.goal, note=f"ran out of memory: {str(error).splitlines()[0]}")
    except RuntimeError as error:
        if not baseline.is_foreign:
            raise
        return Outcome(baseline.name, goal=baseline.goal, note=f"failed: {str(error).splitlines()[0]}")
    finally:
        runner = None  # type: ignore[assignment]  # let go of it before memory is given back
        job.clean()


def _refusal(job: Job, own_s: float, baseline: Baseline) -> str:
    """Why a way is not tried; empty where it is."""
    if baseline.refusal:
        return baseline.refusal
    free, host = job.free_device_bytes(), available_host_bytes()
    if baseline.device_bytes > free:
        return (
            f"does not fit: {format_bytes(baseline.device_bytes)} of KV, {format_bytes(free)} of device memory are free"
        )
    if baseline.host_bytes > host:
        return f"does not fit: {format_bytes(baseline.host_bytes)} of host memory, {format_bytes(host)} are free"
    if baseline.pass_s > job.sizes.longest_pass_s:
        return f"not measured: a pass would take about {baseline.pass_s:.0f} s"
    if 2 * baseline.pass_s + own_s + 1.0 > job.left_s:
        return "not measured: out of time"
    return ""


def _refused() -> Runner:
    raise AssertionError("what is refused is not opened")
