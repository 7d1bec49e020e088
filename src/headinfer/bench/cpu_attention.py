"""The CPU suite `attention`: the decode kernel for every target that this CPU can run, against a plain read.

K and V far exceed the caches. The plain read is a loop of vector loads over the same bytes, with the same threads and
in turns with the kernels. So a share is what a kernel reaches of the memory bandwidth of that minute. With one thread
the seconds are those of the processor, so that other programs on the machine disturb them less.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator

import torch

from headinfer.attention import native
from headinfer.attention.native_build import Target, built, target_of, targets_here
from headinfer.attention.reference import attend_reference
from headinfer.bench.job import CpuJob
from headinfer.bench.measurement import Measurement
from headinfer.bench.timing import Call, Rounds, in_turns, timed
from headinfer.errors import UsageError
from headinfer.utils.units import format_bytes

__all__ = ["attention"]

_ROWS = (1, 4, 16, 64)
_HEADS = 8
_DIM = 128
_ERROR_KEYS = 1024
_READ = "read"
# The share of the plain read to reach with all threads, by query rows and target.
_GOALS = {
    **{(4, name): ">= 85 %" for name in ("amx", "avx512-bf16", "avx512")},
    (4, "avx2"): ">= 70 %",
    (16, "amx"): ">= 80 %",
    (16, "avx512-bf16"): ">= 60 %",
}


def attention(job: CpuJob) -> Iterator[list[Measurement]]:
    """Measure each target with one thread and with all: share of a plain read of the same bytes, and error.

    Raises:
        UsageError: the kernel cannot be built.
    """
    dtype = job.sizes.dtype
    targets = targets_here(dtype)
    for target in targets:
        reason = built(target, dtype)[1]
        if reason:
            raise UsageError(reason)
    fastest = target_of(dtype)
    reader = fastest if isinstance(fastest, Target) else targets[0]
    kv = torch.randn(2, _HEADS, job.sizes.attention_tokens, _DIM, generator=torch.Generator().manual_seed(0)).to(dtype)
    for threads in sorted({1, torch.get_num_threads()}):
        for rows in _ROWS:
            yield _point(job, targets, reader, kv, rows, threads)


def _point(
    job: CpuJob, targets: list[Target], reader: Target, kv: torch.Tensor, rows: int, threads: int
) -> list[Measurement]:
    """Measure all targets at one number of query rows and of threads. kv is [2, H, T, D]."""
    k, v = kv
    q = torch.randn(_HEADS, rows, _DIM, generator=torch.Generator().manual_seed(rows)).to(kv.dtype)
    attend = functools.partial(native.attend_native, q, [(k, v)], scale=_DIM**-0.5, threads=threads)
    calls = {target.name: Call(functools.partial(attend, target=target)) for target in targets}
    calls[_READ] = Call(functools.partial(native.plain_read, kv, threads=threads, target=reader))
    rounds = in_turns(calls, job.sizes.attention_rounds, timed if threads > 1 else _cpu_timed)
    point = f"{rows} query row{'s' if rows > 1 else ''}, {threads} thread{'s' if threads > 1 else ''}"
    rate = kv.nbytes / rounds.median_s(_READ)
    note = f"{format_bytes(kv.nbytes)} of K and V, a loop of vector loads"
    read = Measurement("attention", point, "plain read", rate / 1e9, "GB/s", rounds=rounds.count, note=note)
    lines = [read]
    for target in targets:
        goal = _GOALS.get((rows, target.name), "") if threads == torch.get_num_threads() else ""
        lines.append(_line(point, target, rounds, kv.nbytes, rows).with_goal(goal))
    return lines


def _cpu_timed(call: Callable[[], object]) -> float:
    """Return the seconds for which this thread ran on a processor during a call."""
    start = time.thread_time()
    call()
    return time.thread_time() - start


def _line(point: str, target: Target, rounds: Rounds, nbytes: int, rows: int) -> Measurement:
    rate = nbytes / rounds.median_s(target.name)
    error, theirs = _errors(target, rows)
    details = {"bytes_per_s": rate, "error_against_float64": error, "error_of_sdpa": theirs}
    note = f"{rate / 1e9:.3g} GB/s, error {error / theirs:.2f} x sdpa's"
    share = 100 * rounds.ratio(_READ, target.name)
    return Measurement("attention", point, target.name, share, "%", rounds=rounds.count, note=note, details=details)


@functools.cache
def _errors(target: Target, rows: int) -> tuple[float, float]:
    """Return the relative Frobenius errors of a target and of torch's sdpa against float64, in bfloat16."""
    generator = torch.Generator().manual_seed(rows)
    q, k, v = (
        torch.randn(_HEADS, tokens, _DIM, generator=generator).to(torch.bfloat16)
        for tokens in (rows, _ERROR_KEYS, _ERROR_KEYS)
    )
    scale = _DIM**-0.5
    wanted = attend_reference(q[None], k[None], v[None], scale=scale).out[0]
    theirs = torch.nn.functional.scaled_dot_product_attention(q[None], k[None], v[None], scale=scale)[0]
    ours = native.attend_native(q, [(k, v)], scale=scale, target=target).out.to(torch.bfloat16)
    error, error_of_sdpa = (float((found.double() - wanted).norm() / wanted.norm()) for found in (ours, theirs))
    return error, error_of_sdpa
