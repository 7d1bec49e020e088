"""The GPU suite `decode`: one token after a long past, against the link and in turns with baselines.

headinfer's own line is that of the link only. From 64K tokens on another line is that of the same with a share of the
host's CPU, which attends to a part of the past meanwhile.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from headinfer.bench.baselines import Baseline, Outcome, baselines_of, compare
from headinfer.bench.gpu_link import link_copy, tile_of
from headinfer.bench.gpu_point import LONG_TOKENS, Point, open_point
from headinfer.bench.job import GpuJob
from headinfer.bench.measurement import OURS, Measurement, context_label
from headinfer.bench.probe_cpu import cpu_rates
from headinfer.bench.runners import HeadRunner
from headinfer.bench.timing import Call, Rounds, in_turns
from headinfer.engine.machine import this_machine
from headinfer.plan.roofline import Schedule, fastest_share
from headinfer.utils.units import format_bytes

__all__ = ["WITH_CPU", "decode", "share_of_cpu"]

WITH_CPU = "with the CPU"
_SHORT_TOKENS = 2**10
_CPU_GOAL_TOKENS = 2**18


def decode(job: GpuJob) -> Iterator[list[Measurement]]:
    """Measure each context against the link and all baselines, and compare the device bytes of all contexts."""
    measurements: list[Measurement] = []
    rates_of_cpu = functools.cache(lambda: _rates_of_cpu(job))  # measured once, if it is needed
    for tokens in job.sizes.decode_tokens:
        found = _at(job, tokens, rates_of_cpu)
        job.clean()
        measurements += found
        yield found
    yield _equal_bytes(measurements)


def _at(job: GpuJob, tokens: int, rates_of_cpu: Callable[[], dict[str, Any]]) -> list[Measurement]:
    """Measure one context."""
    point = open_point(job, "decode", tokens, 1)
    if isinstance(point, Measurement):
        return [point]
    name = context_label(tokens)
    is_long = tokens >= LONG_TOKENS
    rounds, link_bytes, streamed = _against_the_link(job, point)
    own_s = rounds.median_s(OURS)
    share = 100 * streamed / link_bytes * rounds.ratio("copy", OURS)
    facts = point.facts(job, own_s) | {"streamed_bytes": streamed, "streamed_bytes_per_s": streamed / own_s}
    kv_bytes = point.own.kv_bytes()
    budget = job.sizes.floor_bytes
    count = rounds.count
    own = Measurement("decode", name, OURS, own_s, "s/token", 1.0, kv_bytes, count, note=point.note, details=facts)
    of_link = Measurement(
        "decode",
        name,
        f"{OURS}: streamed, of the pinned link",
        share,
        "%",
        rounds=count,
        note=point.note,
        details=facts,
    )
    with_cpu: list[Outcome] = []
    if tokens >= job.sizes.cpu_tokens:
        share = share_of_cpu(job, tokens, rates_of_cpu) if job.sizes.cpu_share is None else job.sizes.cpu_share
        threads = rates_of_cpu()["cpu_threads_beside_link"] if job.is_cuda and share else None
        with_cpu = compare(job, point.own, own_s, [_with_cpu(job, point, share, threads)])
    goals = {"paper's scheme": ">= 0.98" if is_long else "> 1", "offloaded cache": "> 1"}
    if is_long:  # 1.7 and 2.8 times as fast
        goals |= {"int8 KV": "<= 0.588", "int4 KV": "<= 0.357"}
    outcomes = compare(job, point.own, own_s, baselines_of(job, point.past, 1, job.pass_s(tokens, 1), goals))
    return [
        own.with_goal(f"<= {budget}", kv_bytes, text=f"KV <= {format_bytes(budget)}"),
        of_link.with_goal(">= 92 %" if is_long else ""),
        *point.measurements("decode", name, [*with_cpu, *outcomes], "s/token"),
        *_short(name, tokens, outcomes),
    ]


def _with_cpu(job: GpuJob, point: Point, share: float, threads: int | None) -> Baseline:
    """Return headinfer with the floor budget, and a share and a number of threads of the host's CPU."""
    options: dict[str, Any] = {
        "device_kv_budget_bytes": job.sizes.floor_bytes,
        "cpu_share": share,
        "cpu_threads": threads,
    }
    return Baseline(
        WITH_CPU,
        job.sizes.floor_bytes,
        point.own_s,
        lambda: HeadRunner(job, point.past.cache(**options), 1),
        goal="<= 0.526" if point.past.tokens >= _CPU_GOAL_TOKENS else "<= 1",  # 1.9 times as fast
        refusal="" if share else "not measured: a share of the CPU would not pay by the rates of this run",
    )


def _rates_of_cpu(job: GpuJob) -> dict[str, Any]:
    """Measure the CPU's attention beside the link, for a new token: fields of Hardware."""
    layer = job.shape.layers[job.shape.offloaded_layers[0]]
    rows = layer.query_heads // layer.kv_heads
    return cpu_rates(job.device, job.rates.link_bytes_per_s, job.say, (rows,), ())


def share_of_cpu(job: GpuJob, tokens: int, rates_of_cpu: Callable[[], dict[str, Any]]) -> float:
    """Return the share that a plan chooses for the rates that this run measures; 0 without a GPU.

    Args:
        job: the run.
        tokens: the context.
        rates_of_cpu: measures the fields of Hardware that cpu_rates() returns.
    """
    if not job.is_cuda:
        return 0.0
    measured = {"link_bytes_per_s": job.rates.link_bytes_per_s, "link_share": 1.0, **rates_of_cpu()}
    machine = dataclasses.replace(this_machine(job.device), **measured)
    plan = tile_of(job, 1, tokens)[0]
    tile = (plan.heads_per_group, plan.tile_tokens)
    streams = (0,) * len(job.shape.offloaded_layers)
    schedule = Schedule(tokens, streams, tile, tile, merges=True, writes_back=True, prefetches_next_layer=True)
    return fastest_share(job.shape, machine, tokens, schedule, job.facts()["dtype"])


def _against_the_link(job: GpuJob, point: Point) -> tuple[Rounds, int, int]:
    """Time passes in turns with a plain copy from pinned memory.

    Returns:
        The rounds, the bytes of the copy, and the bytes that a pass streams.
    """
    nbytes, copy = link_copy(job)
    job.timed(copy)
    own = point.own
    streamed = 0

    @contextmanager
    def active() -> Iterator[None]:
        nonlocal streamed
        with own.active():
            streamed = -own.cache.stats().link_to_device_bytes
            yield

    def after() -> None:
        nonlocal streamed
        streamed += own.cache.stats().link_to_device_bytes
        own.after()

    count = max(1, min(job.sizes.rounds, int(job.sizes.rounds_s / point.own_s)))
    turns = {"copy": Call(copy), OURS: Call(own.run, active, after)}
    return in_turns(turns, count, job.timed, warm_up=False), nbytes, streamed


def _short(name: str, tokens: int, outcomes: Sequence[Outcome]) -> list[Measurement]:
    """Compare KV that is all resident, as headinfer holds a short context, with transformers' own cache."""
    medians = {outcome.name: outcome.median_s for outcome in outcomes if outcome.median_s is not None}
    if tokens >= LONG_TOKENS or not {"resident store", "DynamicCache"} <= medians.keys():
        return []
    ratio = medians["resident store"] / medians["DynamicCache"]
    found = Measurement("decode", name, "resident store / DynamicCache", ratio, "x")
    return [found.with_goal("<= 1.15 x" if tokens == _SHORT_TOKENS else "")]


def _equal_bytes(measurements: Sequence[Measurement]) -> list[Measurement]:
    """Compare KV on the device at all contexts from 64K tokens up, or at all contexts if none is that long."""
    held = {
        one.details["past_tokens"]: one.device_kv_bytes
        for one in measurements
        if one.who == OURS and one.value and one.device_kv_bytes is not None
    }
    long = {tokens: nbytes for tokens, nbytes in held.items() if tokens >= LONG_TOKENS} or held
    if len(long) < 2:
        return []
    spread = float(max(long.values()) - min(long.values()))
    name = f"{context_label(min(long))} to {context_label(max(long))}"
    found = Measurement("decode", name, f"{OURS}: difference of KV bytes on the device", spread, "bytes")
    return [found.with_goal("== 0")]
