"""Decode: one token after a long past, by bare forward passes, against the link and against other ways."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from headinfer.bench.baselines import Outcome, baselines_of, compare
from headinfer.bench.gpu_link import link_copy
from headinfer.bench.gpu_point import LONG_TOKENS, OURS, Point, open_point
from headinfer.bench.job import Job, Line, goal_reached
from headinfer.utils.units import format_bytes

__all__ = ["decode"]

_SHORT_TOKENS = 2**10


def decode(job: Job) -> list[Line]:
    """All contexts, each against the link and all other ways; and the device bytes of the shortest and longest."""
    lines: list[Line] = []
    for tokens in job.sizes.decode_tokens:
        lines += _at(job, tokens)
        job.clean()
    return [*lines, *_equal_bytes(job, lines)]


def _at(job: Job, tokens: int) -> list[Line]:
    point = open_point(job, "decode", tokens, 1)
    if isinstance(point, Line):
        return [point]
    name, is_long = job.point(tokens), tokens >= LONG_TOKENS
    goals = {
        "paper's scheme": ">= 0.98" if is_long else "> 1",
        "offloaded cache": "> 1",
    }
    seconds, shares, streamed = _against_the_link(job, point)
    share = statistics.median(shares)
    own_s = statistics.median(seconds)
    facts = point.facts(job, own_s) | {"streamed_bytes": streamed, "streamed_bytes_per_s": streamed / own_s}
    kv_bytes, budget = point.own.kv_bytes(), job.sizes.floor_bytes
    share_goal = ">= 92" if is_long else ""
    lines = [
        Line("decode", name, OURS, own_s, "s/token", 1.0, kv_bytes, f"KV <= {format_bytes(budget)}",
             goal_reached(f"<= {budget}", kv_bytes), point.note, facts),
        Line("decode", name, f"{OURS}: streamed, of the pinned link", 100 * share, "%",
             goal=f"{share_goal} %" if share_goal else "", reached=goal_reached(share_goal, 100 * share),
             note=point.note, details=facts),
    ]  # fmt: skip
    baselines = baselines_of(job, point.past, 1, job.pass_s(tokens, 1), goals)
    found = compare(job, point.own, own_s, baselines)
    lines += point.lines("decode", name, found, "s/token")
    return [*lines, *_short(name, tokens, found)]


def _against_the_link(job: Job, point: Point) -> tuple[list[float], list[float], int]:
    """Seconds of passes, their streamed bytes per second over a plain pinned copy's, in turns; and those bytes."""
    nbytes, copy = link_copy(job)
    job.timed(copy)
    rounds = max(1, min(job.sizes.rounds, int(job.sizes.rounds_s / point.own_s)))
    seconds, shares, streamed = [], [], 0
    with point.own.active():
        for _ in range(rounds):
            rate = nbytes / job.timed(copy)
            before = point.own.cache.stats().link_to_device_bytes
            seconds.append(job.timed(point.own.run))
            streamed = point.own.cache.stats().link_to_device_bytes - before
            point.own.after()
            shares.append(streamed / seconds[-1] / rate)
    return seconds, shares, streamed


def _short(name: str, tokens: int, found: Sequence[Outcome]) -> list[Line]:
    """Where all fits the device, headinfer keeps it there: that against transformers' own cache."""
    medians = {one.name: statistics.median(one.seconds) for one in found if one.seconds}
    if tokens >= LONG_TOKENS or not {"resident store", "DynamicCache"} <= medians.keys():
        return []
    ratio = medians["resident store"] / medians["DynamicCache"]
    goal = "<= 1.15" if tokens == _SHORT_TOKENS else ""
    return [Line("decode", name, "resident store / DynamicCache", ratio, "x", goal=f"{goal} x" if goal else "",
                 reached=goal_reached(goal, ratio))]  # fmt: skip


def _equal_bytes(job: Job, lines: Sequence[Line]) -> list[Line]:
    """KV on the device at all contexts from 64K tokens up (all there are, where none is so long): equal."""
    held = {line.details["past_tokens"]: line.device_kv_bytes for line in lines if line.who == OURS and line.value}
    long = {tokens: nbytes for tokens, nbytes in held.items() if tokens >= LONG_TOKENS} or held
    if len(long) < 2:
        return []
    sizes = [nbytes for nbytes in long.values() if nbytes is not None]
    spread, goal = float(max(sizes) - min(sizes)), "== 0"
    name = f"{job.point(min(long))} to {job.point(max(long))}"
    return [Line("decode", name, f"{OURS}: difference of KV bytes on the device", spread, "bytes", goal=goal,
                 reached=goal_reached(goal, spread))]  # fmt: skip
