"""Measures what decides the share of the host's CPU in decode: its attention alone, and beside the link.

K and V are those of a layer of Llama-3-8B, 8 heads of width 128 in bfloat16, in host memory as the engine allocates it
for the device. They exceed the caches.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from headinfer.attention.backends import Problem, capability_of, choose
from headinfer.bench.timing import median_s, timed
from headinfer.kv.byte_counter import ByteCounter
from headinfer.kv.host_memory import HostTier
from headinfer.kv.numa import node_of
from headinfer.utils.threads import torch_threads

__all__ = ["QUERY_ROWS", "cpu_rates"]

QUERY_ROWS = (4, 16)
"""Query rows per KV head of Llama-3-8B: of a new token, and of four tokens that are verified at once."""

_CPU = torch.device("cpu")
_HEADS = 8
_DIM = 128
_TOKENS = 1 << 17
_ROUNDS = 5
_COPY_BYTES = 1 << 26  # a tile of 16,384 tokens
_MOST_COPIES = 400  # CUDA makes the host wait if more work is queued
_BESIDE_S = 0.25


def cpu_rates(
    device: torch.device,
    link_bytes_per_s: float,
    on_stage: Callable[[str], None],
    query_rows: Sequence[int] = QUERY_ROWS,
    thread_counts: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Measure the CPU's attention by query rows and threads; on a GPU's host, also beside copies to the device.

    Fewer threads than those of a run (torch.get_num_threads()) may be faster beside the link, since the driver's
    threads and the link's own reads need cores and DRAM too. All, three quarters and half of them are tried with the
    first number of query rows. The number with which the CPU and the link bring the most bytes serves the others too.

    Args:
        device: the device that the link leads to; a CPU has no link.
        link_bytes_per_s: the rate of the link alone.
        on_stage: called with a line of progress before each stage.
        query_rows: numbers of query rows per KV head.
        thread_counts: numbers of threads for the CPU alone; None for 1, 2, 4 and so on, up to those that a run uses.

    Returns:
        Fields of Hardware. If the system refuses to pin host memory, nothing is measured beside the link.
    """
    tier = HostTier(ByteCounter())
    if device.type == "cuda":
        tier = HostTier(ByteCounter(), device=device, node=node_of(device))
    k, v = (tier.allocate((_HEADS, _TOKENS, _DIM), torch.bfloat16).fill_(1) for _ in range(2))
    nbytes = k.nbytes + v.nbytes
    alone: dict[str, dict[str, float]] = {}
    cpu_beside: dict[str, float] = {}
    link_beside: dict[str, float] = {}
    beside_threads: int | None = None
    for rows in query_rows:
        on_stage(f"the CPU's attention, {rows} query rows ...")
        attend = _attention(rows, k, v)
        by_threads: dict[str, float] = {}
        for threads in _thread_counts() if thread_counts is None else thread_counts:
            with torch_threads(threads):
                by_threads[str(threads)] = nbytes / median_s(attend, rounds=_ROUNDS)
        alone[str(rows)] = by_threads
        if device.type == "cuda" and not tier.pin_refusal:
            on_stage(f"the CPU's attention beside the link, {rows} query rows ...")
            tried: dict[int, tuple[float, float]] = {}
            for threads in _counts_beside_link() if beside_threads is None else (beside_threads,):
                with torch_threads(threads):
                    seconds, link = _beside_link(attend, device, tier, link_bytes_per_s)
                tried[threads] = (nbytes / seconds, link)
            beside_threads = max(tried, key=lambda threads: sum(tried[threads]))
            cpu_beside[str(rows)], link_beside[str(rows)] = tried[beside_threads]
    return {
        "cpu_kv_bytes_per_s": alone,
        "cpu_threads_beside_link": beside_threads,
        "cpu_beside_link_bytes_per_s": cpu_beside,
        "link_beside_cpu_bytes_per_s": link_beside,
    }


def _attention(rows: int, k: torch.Tensor, v: torch.Tensor) -> Callable[[], object]:
    """Return a call of the kernel that the engine chooses on the host."""
    q = torch.randn(_HEADS, rows, _DIM, generator=torch.Generator().manual_seed(rows)).to(k.dtype)
    problem = Problem(_CPU.type, k.dtype, rows, _DIM, _DIM, capability=capability_of(_CPU))
    backend = choose(problem)
    return lambda: backend.attend_full(q, [(k, v)], _DIM**-0.5, None)


def _thread_counts() -> list[int]:
    """Return 1, 2, 4 and so on, up to the threads that a run uses."""
    most = torch.get_num_threads()
    return [*(1 << power for power in range(most.bit_length()) if 1 << power < most), most]


def _counts_beside_link() -> list[int]:
    """Return the numbers of threads that are tried beside the link: all of a run, three quarters and half of them."""
    most = torch.get_num_threads()
    return list(dict.fromkeys((most, max(3 * most // 4, 1), max(most // 2, 1))))


def _beside_link(
    attend: Callable[[], object], device: torch.device, tier: HostTier, link_bytes_per_s: float
) -> tuple[float, float]:
    """Time attention while copies to the device run in a queue of their own.

    Returns:
        The median of the seconds of a call, and the bytes per second of the copies meanwhile.
    """
    source = tier.allocate((_COPY_BYTES,), torch.uint8).fill_(1)
    target = torch.empty(_COPY_BYTES, dtype=torch.uint8, device=device)
    alone_s = timed(attend)
    rounds = max(1, min(_ROUNDS, int(_BESIDE_S / alone_s)))
    copies = min(int(2 * (rounds + 1) * alone_s * link_bytes_per_s / _COPY_BYTES) + 2, _MOST_COPIES)
    queue = torch.cuda.Stream(device)
    stamps = [torch.cuda.Event(enable_timing=True) for _ in range(copies + 1)]
    torch.cuda.synchronize(device)
    begun = time.perf_counter()
    stamps[0].record(queue)
    for stamp in stamps[1:]:
        with torch.cuda.stream(queue):
            target.copy_(source, non_blocking=True)
        stamp.record(queue)
    first_s = time.perf_counter() - begun
    seconds = statistics.median(timed(attend) for _ in range(rounds))
    last_s = time.perf_counter() - begun
    torch.cuda.synchronize(device)
    ends = [stamps[0].elapsed_time(stamp) / 1000 for stamp in stamps[1:]]
    meanwhile = [end_s for end_s in ends if first_s <= end_s <= last_s]
    if len(meanwhile) < 2 or meanwhile[-1] <= meanwhile[0]:
        return seconds, link_bytes_per_s
    return seconds, (len(meanwhile) - 1) * _COPY_BYTES / (meanwhile[-1] - meanwhile[0])
