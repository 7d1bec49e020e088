"""The GPU suite `prefill`: one chunk after a long past, and whole prompts.

A chunk at an offset measures the end of a long prefill without its beginning.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from headinfer.bench.baselines import Baseline, Outcome, baselines_of, compare
from headinfer.bench.gpu_point import LONG_TOKENS, Point, open_point
from headinfer.bench.job import GpuJob
from headinfer.bench.measurement import OURS, Measurement, context_label, reason_of
from headinfer.bench.runners import HeadRunner
from headinfer.bench.timing import run_turn
from headinfer.errors import CapacityError
from headinfer.hf.cache import HeadCache
from headinfer.hf.enable import enable
from headinfer.plan.memory import available_host_bytes
from headinfer.utils.units import format_bytes

__all__ = ["prefill"]

_PIN_BYTES_PER_S = 4e9
_RESIDENT_GOAL = ">= 0.97"  # the time with all KV on the device over headinfer's: headinfer is within 3 %
_SAME_KERNELS = "resident store, its kernels in both"


def prefill(job: GpuJob) -> Iterator[list[Measurement]]:
    """Measure a chunk at each offset in turns with all baselines, then whole prompts, in the order of the job."""
    tokens = job.chunk_tokens()
    for offset in job.sizes.chunk_offsets:
        yield _chunk_at(job, offset, tokens)
        job.clean()
    for whole in job.sizes.whole_tokens:
        yield _whole(job, whole, tokens)
        job.clean()


def _chunk_at(job: GpuJob, offset: int, tokens: int) -> list[Measurement]:
    """Measure a chunk at one offset."""
    point = open_point(job, "prefill", offset, tokens)
    if isinstance(point, Measurement):
        return [point]
    name = f"{tokens:,} tokens after {context_label(offset)}"
    own = point.own
    is_long = offset >= LONG_TOKENS
    goals = {
        "resident store": _RESIDENT_GOAL if is_long else "",
        "offloaded cache": "> 1",
        "paper's scheme": ">= 0.98" if is_long else "",
    }
    baselines = baselines_of(job, point.past, tokens, job.pass_s(offset, tokens), goals)
    outcomes = [
        _with_its_kernels(job, point, outcome, baselines) for outcome in compare(job, own, point.own_s, baselines)
    ]
    own_seconds = [seconds for outcome in outcomes for seconds in outcome.own_s] or [point.own_s]
    facts = point.facts(job, statistics.median(own_seconds))
    facts["flops_per_s"] = job.flops(offset, tokens) / facts["seconds"]
    ours = Measurement(
        "prefill",
        name,
        OURS,
        facts["seconds"],
        "s/chunk",
        1.0,
        own.kv_bytes(),
        rounds=len(own_seconds),
        note=point.note,
        details=facts,
    )
    return [ours, *point.measurements("prefill", name, outcomes, "s/chunk")]


def _with_its_kernels(job: GpuJob, point: Point, outcome: Outcome, baselines: Sequence[Baseline]) -> Outcome:
    """Compare the resident store again with headinfer on the same kernels, if the two chose different ones."""
    theirs = outcome.facts.get("attention_backends")
    is_same = theirs == point.own.facts()["attention_backends"]
    if outcome.name != "resident store" or not outcome.seconds or is_same:
        return outcome
    options: dict[str, Any] = {"device_kv_budget_bytes": job.sizes.floor_bytes, "backend": ",".join(theirs or ())}
    same = HeadRunner(job, point.past.cache(room_tokens=point.own.tokens, **options), point.own.tokens)
    baseline = next(one for one in baselines if one.name == outcome.name)
    (again,) = compare(job, same, run_turn(same, job.timed), [baseline])
    if not again.seconds:
        return dataclasses.replace(
            outcome, goal="", note=f"with other kernels than headinfer; with its own {again.note}"
        )
    facts = {**again.facts, "with_the_table's_kernels": outcome.ratio}
    return dataclasses.replace(again, name=_SAME_KERNELS, facts=facts)


def _whole(job: GpuJob, whole: int, chunk_tokens: int) -> list[Measurement]:
    """Read a whole prompt in chunks, with headinfer and with all KV on the device, if that fits.

    The time contains that of pinning new host memory, which has a line of its own.
    """
    name = f"all of {context_label(whole)}"
    kv = job.kv_bytes(whole)
    floor = job.sizes.floor_bytes
    about_s = job.pass_s(0, whole) + kv / _PIN_BYTES_PER_S
    measurements: list[Measurement] = []
    ways = [(OURS, floor)]
    if "resident" in job.sizes.baselines:
        ways.append(("resident store", 2 * kv + 2 * floor))
    for who, budget in ways:
        needed = floor + (0 if who == OURS else kv)
        if about_s > job.left_s:
            measurements.append(Measurement("prefill", name, who, note="not measured: out of time"))
        elif kv > available_host_bytes() or needed > job.free_device_bytes():
            measurements.append(Measurement("prefill", name, who, note=f"does not fit: {format_bytes(kv)} of KV"))
        else:
            job.begin(f"prefill, {name}, {who}", about_s)
            measurements.append(_read_all(job, name, who, whole, min(chunk_tokens, whole), budget))
            job.clean()
    pinning = [_pinning(measurement) for measurement in measurements[:1] if "pinning" in measurement.details]
    if len(measurements) == 1:
        return measurements + pinning
    ours, resident = measurements
    if ours.value is not None and resident.value is not None:
        ratio = resident.value / ours.value
        goal = f"{_RESIDENT_GOAL} x" if whole >= LONG_TOKENS else ""
        resident = dataclasses.replace(resident, ratio=ratio).with_goal(goal, ratio)
    return [ours, *pinning, resident]


def _pinning(whole: Measurement) -> Measurement:
    """Return the line of a whole prompt that says how long it waited for new host memory."""
    facts = whole.details["pinning"]
    share = 100 * facts["waited_s"] / whole.details["seconds"]
    rates = [
        f"{what} at {nbytes / seconds / 1e9:,.1f} GB/s"
        for what, nbytes, seconds in (
            ("touched", facts["touched_bytes"], facts["touch_s"]),
            ("registered", facts["registered_bytes"], facts["register_s"]),
        )
        if seconds
    ]
    note = f"{share:.1f} % of the time; {', '.join(rates)}"
    line = Measurement(whole.suite, whole.point, "pinning", facts["waited_s"], "s", note=note, details=facts)
    return line.with_goal("<= 3 %", share, text="<= 3 % of it")


def _read_all(job: GpuJob, name: str, who: str, whole: int, chunk_tokens: int, budget: int) -> Measurement:
    """Read a prompt of `whole` tokens once."""
    options = job.options(device_kv_budget_bytes=budget, streaming_budget_bytes=job.sizes.floor_bytes)
    ids = torch.full((1, whole), 7, device=job.device)
    cache = HeadCache(job.model.config, expected_tokens=whole, **options)

    def read() -> None:
        with enable(job.model, chunk_tokens=chunk_tokens):
            for chunk in ids.split(chunk_tokens, dim=1):
                job.model(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)

    job.reset_peak()
    try:
        seconds = job.timed(read)
    except (torch.OutOfMemoryError, CapacityError) as error:
        return Measurement("prefill", name, who, note=f"ran out of memory: {reason_of(error)}")
    stats = cache.stats()
    details: dict[str, Any] = {
        "is_whole": True,
        "tokens": whole,
        "chunk_tokens": chunk_tokens,
        "seconds": seconds,
        "flops_per_s": job.flops(0, whole) / seconds,
        "kv_bytes": job.kv_bytes(whole),
        "link_to_host_bytes": stats.link_to_host_bytes,
        "device_resident_bytes": stats.device_resident_bytes,
        "peak_device_bytes": job.peak_device_bytes(),
    }
    preparer = next(iter(cache.engine.devices.values())).tier.preparer
    if preparer is not None:
        details["pinning"] = dataclasses.asdict(preparer.times)
    ratio = 1.0 if who == OURS else None
    return Measurement("prefill", name, who, seconds, "s", ratio, stats.device_kv_peak_bytes, 1, details=details)
