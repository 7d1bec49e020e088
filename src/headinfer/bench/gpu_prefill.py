"""Prefill: one chunk after a long past, so that the end of a long prefill is measured without its beginning; and whole
prefills of lengths that fit the time.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

import torch

from headinfer.bench.baselines import Baseline, Outcome, baselines_of, compare
from headinfer.bench.gpu_point import LONG_TOKENS, OURS, Point, open_point
from headinfer.bench.job import Job, Line, goal_reached
from headinfer.bench.runners import HeadRunner
from headinfer.errors import CapacityError
from headinfer.hf.cache import HeadCache
from headinfer.hf.enable import enable
from headinfer.plan.memory import available_host_bytes
from headinfer.utils.units import format_bytes

__all__ = ["prefill"]

_PIN_BYTES_PER_S = 4e9
_RESIDENT_GOAL = ">= 0.97"  # its time over ours: ours within 3 %
_SAME_KERNELS = "resident store, its kernels in both"


def prefill(job: Job) -> list[Line]:
    """A chunk at each offset against all other ways, then whole prefills, the shortest first."""
    tokens = job.chunk_tokens()
    lines: list[Line] = []
    for offset in job.sizes.chunk_offsets:
        lines += _chunk_at(job, offset, tokens)
        job.clean()
    for whole in job.sizes.whole_tokens:
        lines += _whole(job, whole, tokens)
        job.clean()
    return lines


def _chunk_at(job: Job, offset: int, tokens: int) -> list[Line]:
    point = open_point(job, "prefill", offset, tokens)
    if isinstance(point, Line):
        return [point]
    name, own = f"{tokens:,} tokens after {job.point(offset)}", point.own
    is_long = offset >= LONG_TOKENS
    goals = {"resident store": _RESIDENT_GOAL if is_long else "", "offloaded cache": "> 1",
             "paper's scheme": ">= 0.98" if is_long else ""}  # fmt: skip
    baselines = baselines_of(job, point.past, tokens, job.pass_s(offset, tokens), goals)
    found = [_with_its_kernels(job, point, one, baselines) for one in compare(job, own, point.own_s, baselines)]
    seconds = [s for one in found for s in one.own_s] or [point.own_s]
    facts = point.facts(job, statistics.median(seconds))
    facts["flops_per_s"] = job.flops(offset, tokens) / facts["seconds"]
    return [
        Line("prefill", name, OURS, facts["seconds"], "s/chunk", 1.0, own.kv_bytes(), note=point.note,
             details=facts),
        *point.lines("prefill", name, found, "s/chunk"),
    ]  # fmt: skip


def _with_its_kernels(job: Job, point: Point, found: Outcome, baselines: Sequence[Baseline]) -> Outcome:
    """The resident store against headinfer with the same kernels, where the table chose others for tiles."""
    theirs = found.facts.get("attention_backends")
    if found.name != "resident store" or not found.seconds or theirs == point.own.facts()["attention_backends"]:
        return found
    options: dict[str, Any] = {"device_kv_budget_bytes": job.sizes.floor_bytes, "backend": ",".join(theirs or ())}
    same = HeadRunner(job, point.past.cache(room_tokens=point.own.tokens, **options), point.own.tokens)
    baseline = next(one for one in baselines if one.name == found.name)
    with same.active():
        own_s = job.timed(same.run)
        same.after()
    (again,) = compare(job, same, own_s, [baseline])
    if not again.seconds:
        return dataclasses.replace(found, goal="", note=f"with other kernels than headinfer; with its own {again.note}")
    facts = {**again.facts, "with_the_table's_kernels": found.ratio}
    return Outcome(_SAME_KERNELS, again.seconds, again.own_s, again.kv_bytes, again.goal, again.note, facts)


def _whole(job: Job, whole: int, chunk_tokens: int) -> list[Line]:
    """A whole prompt in chunks, pinning of host memory included; and with all KV on the device, where that fits."""
    name, kv, floor = f"all of {job.point(whole)}", job.kv_bytes(whole), job.sizes.floor_bytes
    about_s = job.pass_s(0, whole) + kv / _PIN_BYTES_PER_S
    lines: list[Line] = []
    for who, budget in ((OURS, floor), ("resident store", 2 * kv + 2 * floor)):
        needed = floor + (0 if who == OURS else kv)
        if about_s > job.left_s:
            lines.append(Line("prefill", name, who, note="not measured: out of time"))
        elif kv > available_host_bytes() or needed > job.free_device_bytes():
            lines.append(Line("prefill", name, who, note=f"does not fit: {format_bytes(kv)} of KV"))
        else:
            job.say(f"prefill of {name}, {who} ...")
            lines.append(_read_all(job, name, who, whole, min(chunk_tokens, whole), budget))
            job.clean()
    own_s, other_s = (line.value for line in lines)
    if own_s is not None and other_s is not None:
        ratio, goal = other_s / own_s, _RESIDENT_GOAL if whole >= LONG_TOKENS else ""
        reached = goal_reached(goal, ratio)
        lines[1] = dataclasses.replace(lines[1], ratio=ratio, goal=f"{goal} x" if goal else "", reached=reached)
    return lines


def _read_all(job: Job, name: str, who: str, whole: int, chunk_tokens: int, budget: int) -> Line:
    """A prompt of `whole` tokens, read once."""
    options = job.options(device_kv_budget_bytes=budget, streaming_budget_bytes=job.sizes.floor_bytes)
    ids = torch.full((1, whole), 7, device=job.device)
    cache = HeadCache(job.model.config, expected_tokens=whole, **options)

    def read() -> None:
        with enable(job.model, chunk_tokens=chunk_tokens):
            for chunk in ids.split(chunk_tokens, dim=1):
                job.model(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)

    job.forget_peak()
    try:
        seconds = job.timed(read)
    except (torch.OutOfMemoryError, CapacityError) as error:
        return Line("prefill", name, who, note=f"ran out of memory: {str(error).splitlines()[0]}")
    stats = cache.stats()
    details = {
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
    ratio = 1.0 if who == OURS else None
    return Line("prefill", name, who, seconds, "s", ratio, stats.device_kv_peak_bytes, details=details)
