"""Baselines: ways of holding a long context that are measured in turns with headinfer's own.

| option | name in results | what it is |
|---|---|---|
| paper | paper's scheme | one KV head at a time, its whole past in a slot (arXiv 2502.12574) |
| resident | resident store | headinfer with all KV on the device, as if the link took no time |
| offloaded | offloaded cache | `DynamicCache(offloading=True)` of transformers: layer by layer, written back whole |
| dynamic | DynamicCache | transformers' cache, all of it on the device |
| layer-wise | layer-wise | all KV heads of a layer, their whole past in a slot; pinned, only new KV is written back |
| free | what is free | headinfer with all free device memory: the first tokens are resident, the rest is streamed |
| int8, int4 | int8 KV, int4 KV | headinfer with KV in 8 or 4 bits, which is approximate |

All but those of transformers are headinfer's engine with other options, over the same host memory. KV in fewer bits has
host memory of its own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from headinfer.bench.job import GpuJob
from headinfer.bench.measurement import OURS, reason_of
from headinfer.bench.past import Past
from headinfer.bench.runners import HeadRunner, Runner, TransformersRunner
from headinfer.bench.timing import Rounds, in_turns, run_turn
from headinfer.errors import CapacityError
from headinfer.kv.resident import RESIDENT_UNIT_TOKENS
from headinfer.plan.footprint import tail_bytes, write_back_bytes
from headinfer.plan.memory import available_host_bytes
from headinfer.plan.tiles import DEFAULT_BUDGET_BYTES, RING_SLOTS
from headinfer.utils.kv_format import KVDtype, kv_bits
from headinfer.utils.units import format_bytes

__all__ = ["Baseline", "Outcome", "baselines_of", "compare", "measure_alone", "ring_budget_bytes"]

_BASELINE = "baseline"  # the baseline's name in its rounds
_SLOT_ALIGN = 256
_ACTIVATION_SHARE = 8  # "what is free" leaves an eighth of the free device memory for a chunk's activations


@dataclass(frozen=True)
class Baseline:
    """A baseline that can be opened.

    Attributes:
        name: its name in results.
        device_bytes: bytes of device memory that it needs.
        pass_s: about the seconds of a pass.
        open: returns its runner.
        host_bytes: bytes of host memory that it needs.
        goal: a goal for its time over headinfer's, such as "> 1".
        refusal: why it cannot be opened; empty if it can.
        is_foreign: it contains none of this project's code, so that its errors are a result.
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
    """The result of comparing a baseline with headinfer.

    Attributes:
        name: the baseline's name.
        rounds: its times and headinfer's in the same turns; None if it was not measured.
        kv_bytes: peak bytes of its KV on the device.
        goal: a goal for its time over headinfer's.
        note: why it was not measured.
        facts: details, for JSON.
    """

    name: str
    rounds: Rounds | None = None
    kv_bytes: int | None = None
    goal: str = ""
    note: str = ""
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> Sequence[float]:
        """The baseline's seconds, one a round."""
        return self.rounds.seconds[_BASELINE] if self.rounds is not None else ()

    @property
    def own_s(self) -> Sequence[float]:
        """headinfer's seconds, one a round."""
        return self.rounds.seconds[OURS] if self.rounds is not None else ()

    @property
    def median_s(self) -> float | None:
        """The median of the baseline's seconds."""
        return self.rounds.median_s(_BASELINE) if self.rounds is not None else None

    @property
    def ratio(self) -> float | None:
        """The median over the rounds of the baseline's time over headinfer's."""
        return self.rounds.ratio(_BASELINE, OURS) if self.rounds is not None else None


def baselines_of(job: GpuJob, past: Past, tokens: int, pass_s: float, goals: dict[str, str]) -> list[Baseline]:
    """Return the baselines of a job for passes after a past, in the job's order.

    Args:
        job: the run.
        past: the past.
        tokens: tokens of a pass.
        pass_s: about the seconds of headinfer's pass.
        goals: goals by the names of baselines.
    """
    made = _Baselines(job, past, tokens, pass_s)
    layer = job.shape.layers[job.shape.offloaded_layers[0]]
    makers: dict[str, Callable[[], Baseline]] = {
        "paper": lambda: made.whole_past("paper's scheme", 1),
        "resident": made.resident,
        "offloaded": made.offloaded_cache,
        "dynamic": made.dynamic_cache,
        "layer-wise": lambda: made.whole_past("layer-wise", layer.kv_heads),
        "free": made.what_is_free,
        "int8": lambda: made.in_fewer_bits("int8"),
        "int4": lambda: made.in_fewer_bits("int4"),
    }
    baselines = [makers[name]() for name in job.sizes.baselines]
    return [dataclasses.replace(baseline, goal=goals.get(baseline.name, "")) for baseline in baselines]


class _Baselines:
    """Makes the baselines of one past; see baselines_of()."""

    def __init__(self, job: GpuJob, past: Past, tokens: int, pass_s: float) -> None:
        self._job = job
        self._past = past
        self._tokens = tokens
        self._pass_s = pass_s
        self._kv = job.kv_bytes(past.tokens)
        self._layers = len(job.shape.offloaded_layers)
        self._layer_bytes = self._kv // self._layers
        self._kv_near_s = self._kv / job.rates.device_bytes_per_s
        self._near_s = max(pass_s - self._kv / job.rates.link_bytes_per_s, 0.0) if tokens == 1 else pass_s

    def whole_past(self, name: str, group: int) -> Baseline:
        """Return the whole past of `group` KV heads in each slot of the ring."""
        heads = self._job.shape.layers[self._job.shape.offloaded_layers[0]].kv_heads
        budget = ring_budget_bytes(self._job, group * self._layer_bytes // heads)
        options = {"device_kv_budget_bytes": budget, "streaming_budget_bytes": budget, "heads_per_group": group}
        return self._head_wise(name, budget, self._pass_s, tile_tokens=self._past.tokens, **options)

    def resident(self) -> Baseline:
        """Return headinfer with all KV on the device."""
        floor = self._job.sizes.floor_bytes
        # Every layer's part of the budget holds all of its KV and a unit more, even if layers share one layer's KV.
        each = self._layer_bytes + self._layer_bytes // self._past.tokens * RESIDENT_UNIT_TOKENS
        held_layers = 1 if self._past.is_simulation else self._layers
        options = {"device_kv_budget_bytes": floor + self._layers * each, "streaming_budget_bytes": floor}
        return self._head_wise("resident store", floor + held_layers * each, self._near_s + self._kv_near_s, **options)

    def what_is_free(self) -> Baseline:
        """Return headinfer with as much KV on the device as its free memory holds."""
        free = self._job.free_device_bytes()
        budget = free - free // _ACTIVATION_SHARE
        if self._past.is_simulation or self.resident().device_bytes <= budget:
            reason = (
                "one layer's KV stands for all" if self._past.is_simulation else "all of it fits, see resident store"
            )
            return Baseline("what is free", 0, 0.0, _refused, refusal=f"not measured: {reason}")
        options = {"device_kv_budget_bytes": budget, "streaming_budget_bytes": self._job.sizes.floor_bytes}
        return self._head_wise("what is free", budget, self._pass_s, **options)

    def in_fewer_bits(self, kv_dtype: KVDtype) -> Baseline:
        """Return headinfer with quantised KV, within the same budget."""
        shape = self._job.shape
        element_bytes = self._job.sizes.dtype.itemsize
        stored = shape.stored_bytes_per_token(element_bytes, kv_bits(kv_dtype))
        share = stored / shape.stored_bytes_per_token(element_bytes, 0)
        budget = self._job.sizes.floor_bytes

        def opened() -> Runner:
            past = Past(self._job, self._past.tokens, kv_dtype)
            room_tokens = self._tokens if self._tokens > 1 else 0
            cache = past.cache(room_tokens=room_tokens, device_kv_budget_bytes=budget)
            return HeadRunner(self._job, cache, self._tokens)

        host_bytes = int(share * self._past.host_bytes)
        return Baseline(f"{kv_dtype} KV", budget, self._pass_s, opened, host_bytes=host_bytes)

    def dynamic_cache(self) -> Baseline:
        """Return transformers' cache on the device. It copies its KV in each pass."""
        return Baseline(
            "DynamicCache",
            self._kv + 2 * self._layer_bytes,
            self._near_s + 3 * self._kv_near_s,
            lambda: TransformersRunner(self._job, self._past.tokens, self._tokens, offloaded=False),
            is_foreign=True,
        )

    def offloaded_cache(self) -> Baseline:
        """Return transformers' offloaded cache. It moves its KV over the link in both directions."""
        rates = self._job.rates
        over_link_s = self._kv / min(rates.link_bytes_per_s, rates.back_bytes_per_s)
        copies = 3 if self._tokens > 1 else 2
        return Baseline(
            "offloaded cache",
            4 * self._layer_bytes,
            self._near_s + 2 * over_link_s,
            lambda: TransformersRunner(self._job, self._past.tokens, self._tokens, offloaded=True),
            host_bytes=copies * 2 * self._kv,  # torch rounds pinned sizes up to powers of two
            refusal="" if self._job.is_cuda else "does not run without a GPU",
            is_foreign=True,
        )

    def _head_wise(self, name: str, device_bytes: int, seconds: float, **options: Any) -> Baseline:
        """Return headinfer's engine with other options."""
        room_tokens = self._tokens if self._tokens > 1 else 0

        def opened() -> Runner:
            return HeadRunner(self._job, self._past.cache(room_tokens=room_tokens, **options), self._tokens)

        return Baseline(name, device_bytes, seconds, opened)


def ring_budget_bytes(job: GpuJob, slot_bytes: int) -> int:
    """Return the device KV budget, in bytes, whose ring has slots of `slot_bytes`."""
    tails = sum(tail_bytes(job.shape, job.sizes.dtype.itemsize))
    slots = RING_SLOTS * math.ceil(slot_bytes / _SLOT_ALIGN) * _SLOT_ALIGN
    return slots + tails + 2 * write_back_bytes(DEFAULT_BUDGET_BYTES)


def measure_alone(job: GpuJob, runner: Runner) -> float:
    """Return the seconds of a pass after one that warms up, or of that one if it takes long."""
    seconds = run_turn(runner, job.timed)
    return run_turn(runner, job.timed) if seconds < job.sizes.rounds_s else seconds


def compare(job: GpuJob, own: Runner, own_s: float, baselines: Sequence[Baseline]) -> list[Outcome]:
    """Time each baseline in turns with headinfer.

    Args:
        job: the run.
        own: headinfer's runner.
        own_s: about the seconds of its pass.
        baselines: the baselines.

    Returns:
        An outcome for each baseline. If it was not measured, its note says why.
    """
    return [_against(job, own, own_s, baseline) for baseline in baselines]


def _against(job: GpuJob, own: Runner, own_s: float, baseline: Baseline) -> Outcome:
    """Time one baseline."""
    reason = _refusal(job, own_s, baseline)
    if reason:
        return Outcome(baseline.name, goal=baseline.goal, note=reason)
    rounds_s = min(job.sizes.rounds_s, job.sizes.rounds * (own_s + baseline.pass_s))
    job.begin(f"  {baseline.name}", baseline.pass_s + rounds_s)
    runner: Runner | None = None
    try:
        runner = baseline.open()
        first_s = run_turn(runner, job.timed)
        count = max(1, min(job.sizes.rounds, int(job.sizes.rounds_s / (own_s + first_s))))
        rounds = in_turns({OURS: own, _BASELINE: runner}, count, job.timed, warm_up=False)
        return Outcome(baseline.name, rounds, runner.kv_bytes(), baseline.goal, facts=runner.facts())
    except (torch.OutOfMemoryError, CapacityError) as error:
        return Outcome(baseline.name, goal=baseline.goal, note=f"ran out of memory: {reason_of(error)}")
    except RuntimeError as error:
        if not baseline.is_foreign:
            raise
        return Outcome(baseline.name, goal=baseline.goal, note=f"failed: {reason_of(error)}")
    finally:
        runner = None  # so that clean() can free its memory
        job.clean()


def _refusal(job: GpuJob, own_s: float, baseline: Baseline) -> str:
    """Return why a baseline is not measured; empty if it is."""
    if baseline.refusal:
        return baseline.refusal
    free_device = job.free_device_bytes()
    free_host = available_host_bytes()
    if baseline.device_bytes > free_device:
        needed = format_bytes(baseline.device_bytes)
        return f"does not fit: {needed} of KV, {format_bytes(free_device)} of device memory are free"
    if baseline.host_bytes > free_host:
        needed = format_bytes(baseline.host_bytes)
        return f"does not fit: {needed} of host memory, {format_bytes(free_host)} are free"
    if baseline.pass_s > job.sizes.longest_pass_s:
        return f"not measured: a pass would take about {baseline.pass_s:.0f} s"
    if 2 * baseline.pass_s + own_s + 1.0 > job.left_s:
        return "not measured: out of time"
    return ""


def _refused() -> Runner:
    raise AssertionError("a baseline with a refusal is not opened")
