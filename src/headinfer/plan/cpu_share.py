"""The share of the past that the host's CPU attends to in decode, while the link brings the rest.

A layer streams B bytes of K and V. Without the CPU it takes max(B / L, q) seconds, where L is the rate of the link
alone, and q is the time in which the host queues all tiles. If the CPU attends to the share s, two chains run at the
same time:

    link     copies the rest:                                       (1 - s) B / l
    host     queues the tiles, attends, and what else it waits for: (1 - s) q + s B / c + t0

l is the rate of the link while the CPU attends, and c that of the CPU's kernel while the link copies. t0 is what the
host's chain takes for each layer beside that: the queries go to the host, the results come back, and the linear layers
run, since the queries of the next layer follow the merge. The link copies the first tiles of the next layer meanwhile.
The layer takes as long as the longer chain:

    T(s) = max((1 - s) B / l, (1 - s) q + s B / c + t0)

The first term falls with s. If q > B / c, the second one falls too, and s = 1 is best. Otherwise it grows, and T is
smallest where they are equal:

    B / l - s B / l = q - s q + s B / c + t0
    s = (B / l - q - t0) / (B / c + B / l - q)

This is at most 1 because q + t0 >= 0. The share is 0 if s is not positive, or if T(s) is not clearly (5 %) below the
time without the CPU. It is rounded down to a multiple of 1/128, so that it is a short number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from headinfer.plan.hardware import Hardware

__all__ = [
    "CLEARLY",
    "CPU_UNIT_TOKENS",
    "HostWay",
    "SharedRates",
    "best_share",
    "cpu_slowdown",
    "host_tokens",
    "layer_seconds",
    "share_at_rows",
    "shared_rates",
    "unused_share_warnings",
]

CPU_UNIT_TOKENS = 1024
"""The host's CPU attends to a multiple of so many tokens of a row, unless it attends to all."""

CLEARLY = 0.95
"""A share above 0 must save 5 %, since the model is not more exact than that."""

_PARTS = 128
_LEAST_AT_MORE_ROWS = 1 / 8


@dataclass(frozen=True)
class SharedRates:
    """The rates at which the CPU attends and the link copies, in bytes of K and V per second.

    Attributes:
        cpu_bytes_per_s: the CPU's kernel while the link copies: c.
        link_bytes_per_s: the link while the CPU attends: l.
        alone_bytes_per_s: the link alone: L.
        is_measured: whether a probe has measured them. Otherwise they are those of a model of DRAM.
    """

    cpu_bytes_per_s: float
    link_bytes_per_s: float
    alone_bytes_per_s: float
    is_measured: bool


@dataclass(frozen=True)
class HostWay:
    """What the host's chain takes for each layer beside the kernel.

    Attributes:
        fixed_s: t0.
        queue_s: seconds to queue all tiles of a layer, if all of it streams: q.
    """

    fixed_s: float
    queue_s: float = 0.0


def shared_rates(hardware: Hardware, query_rows: int) -> SharedRates:
    """Return the rates of a machine while its CPU attends and its link copies.

    If a probe has measured them, the seconds per byte of the CPU are linear in the query rows between two measured
    numbers of rows, and proportional to them above the most, since arithmetic then takes the time. Otherwise DRAM is
    what both share: the link takes its rate, and the CPU gets what is left.

    Args:
        hardware: the machine.
        query_rows: query rows per KV head of one call of the CPU's kernel: query heads per KV head times new tokens.
    """
    alone = hardware.attained_link_bytes_per_s
    if hardware.cpu_beside_link_bytes_per_s:
        cpu = _at_rows(hardware.cpu_beside_link_bytes_per_s, query_rows)
        link = 1 / _seconds_per_byte(hardware.link_beside_cpu_bytes_per_s, query_rows)
        return SharedRates(cpu, link, alone, is_measured=True)
    dram = hardware.dram_bytes_per_s * hardware.dram_share
    return SharedRates(max(dram - alone, 0.0), min(alone, dram), alone, is_measured=False)


def cpu_slowdown(hardware: Hardware, few_rows: int, query_rows: int) -> float:
    """Return how many times as long the CPU alone attends for more query rows per KV head.

    It is 1 if no probe has measured the CPU. What arithmetic takes is then all that more rows cost.

    Args:
        hardware: the machine.
        few_rows: the query rows that count as 1.
        query_rows: the query rows.
    """
    rates = {rows: max(by_threads.values()) for rows, by_threads in hardware.cpu_kv_bytes_per_s.items()}
    return _at_rows(rates, few_rows) / _at_rows(rates, query_rows) if rates else 1.0


def _at_rows(rates: Mapping[str, float], query_rows: int) -> float:
    """Return the rate of the CPU at a number of query rows, from the rates at other numbers."""
    most = max(map(int, rates))
    return most / query_rows * rates[str(most)] if query_rows > most else 1 / _seconds_per_byte(rates, query_rows)


def _seconds_per_byte(rates: Mapping[str, float], query_rows: int) -> float:
    """Return seconds per byte at a number of query rows, linear between the numbers that have a rate."""
    known = sorted((int(rows), 1 / rate) for rows, rate in rates.items())
    below = [pair for pair in known if pair[0] <= query_rows]
    above = [pair for pair in known if pair[0] >= query_rows]
    if not below or not above:
        return (above or [known[-1]])[0][1]
    (low, low_s), (high, high_s) = below[-1], above[0]
    part = (query_rows - low) / (high - low) if high > low else 0.0
    return low_s + part * (high_s - low_s)


def layer_seconds(share: float, layer_bytes: float, rates: SharedRates, way: HostWay) -> float:
    """Return the seconds of a layer if the CPU attends to a share of what it streams.

    This is T(s), or max(B / L, q) without a share.

    Args:
        share: the share of the CPU.
        layer_bytes: bytes of K and V of all rows that the layer streams without the CPU: B.
        rates: the rates of the machine.
        way: what the host's chain takes beside the kernel.
    """
    if not share:
        return max(layer_bytes / rates.alone_bytes_per_s, way.queue_s)
    if not rates.cpu_bytes_per_s:
        return math.inf
    host_s = (1 - share) * way.queue_s + share * layer_bytes / rates.cpu_bytes_per_s + way.fixed_s
    return max((1 - share) * layer_bytes / rates.link_bytes_per_s, host_s)


def best_share(layer_bytes: float, rates: SharedRates, way: HostWay) -> float:
    """Return the share of the CPU with which a layer takes the shortest time; 0 if none is clearly faster.

    Args:
        layer_bytes: bytes of K and V of all rows that the layer streams without the CPU: B.
        rates: the rates of the machine.
        way: what the host's chain takes beside the kernel.

    Returns:
        A multiple of 1/128.
    """
    if not layer_bytes or not rates.cpu_bytes_per_s:
        return 0.0
    link_s = layer_bytes / rates.link_bytes_per_s
    cpu_s = layer_bytes / rates.cpu_bytes_per_s
    gain_s = link_s - way.queue_s - way.fixed_s
    share = 1.0
    if way.queue_s <= cpu_s:
        share = math.floor(_PARTS * max(gain_s / (cpu_s + link_s - way.queue_s), 0.0)) / _PARTS
    alone_s = layer_seconds(0.0, layer_bytes, rates, way)
    return share if layer_seconds(share, layer_bytes, rates, way) < CLEARLY * alone_s else 0.0


def unused_share_warnings(share: float | None, *, is_in_place: bool) -> list[str]:
    """Return a line if a share that the user gives has no effect, and nothing otherwise.

    Args:
        share: the share that the user gives; None if the plan chooses.
        is_in_place: whether the host is the compute device and reads KV in place.
    """
    if not share or not is_in_place:
        return []
    return ["--cpu-share has no effect: the CPU computes here, and attends to all KV in host RAM where it is"]


def share_at_rows(share: float, planned_rows: int | None, query_rows: int) -> float:
    """Return the share for a pass with other query rows than those that a share was planned for.

    Without what the host's chain takes beside the kernel, the best share is c / (c + l). If the kernel takes n times as
    long, it is c / (c + n l), which is s / (s + n (1 - s)). A share below an eighth gains too little.

    Args:
        share: the planned share.
        planned_rows: the query rows per KV head that it was planned for; None: it is for any number.
        query_rows: the query rows per KV head of the pass.
    """
    if planned_rows is None or query_rows <= planned_rows or not share:
        return share
    found = share / (share + query_rows / planned_rows * (1 - share))
    return found if found >= _LEAST_AT_MORE_ROWS else 0.0


def host_tokens(share: float, streamed_tokens: int) -> int:
    """Return how many of the streamed tokens of a row the CPU attends to: whole units, or all with a share of 1."""
    return streamed_tokens if share >= 1 else int(share * streamed_tokens) // CPU_UNIT_TOKENS * CPU_UNIT_TOKENS
