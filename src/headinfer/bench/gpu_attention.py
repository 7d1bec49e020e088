"""The exact attention kernels at the engine's shapes, against the roofline of this run and a float64 oracle."""

from __future__ import annotations

import dataclasses
import statistics

import torch

from headinfer.attention.backends import BACKENDS, Backend, choose
from headinfer.attention.reference import attend_reference
from headinfer.bench.gpu_link import tile_of
from headinfer.bench.job import Job, Line
from headinfer.engine.streaming import BLOCK_TOKENS
from headinfer.errors import CapacityError

__all__ = ["attention"]

_SMALL_ROWS, _SMALL_KEYS = 256, 1024
_ROUNDS = 5


def attention(job: Job) -> list[Line]:
    """Each kernel that serves a decode tile and a prefill tile: seconds, its share of the roofline, its error."""
    chunk_tokens = job.chunk_tokens()
    lines = []
    for what, query_tokens in (("decode", 1), ("prefill", chunk_tokens)):
        plan, _, problem = tile_of(job, query_tokens)
        heads, rows, keys = plan.heads_per_group, problem.query_rows, plan.tile_tokens
        if query_tokens > 1:  # as the loop calls a kernel that wants equal shapes, and the same for the others
            keys = next((tokens for tokens in BLOCK_TOKENS if tokens <= keys), keys)
        problem = dataclasses.replace(problem, key_tokens=keys, is_full=keys in BLOCK_TOKENS)
        point = f"{what}: {heads} heads x {rows:,} query rows x {keys:,} keys"
        q, k, v = _noise(job, heads, rows, keys)
        preferred = choose(problem)
        for backend in BACKENDS:
            if backend.device_type not in (job.device.type, "any"):
                continue
            if (why := backend.refuses(problem)) is not None:
                lines.append(Line("attention", point, backend.name, note=f"refuses: {why}"))
            elif job.left_s < 1:
                lines.append(Line("attention", point, backend.name, note="not measured: out of time"))
            else:
                lines.append(_one(job, point, backend, q, k, v, is_preferred=backend is preferred))
        del q, k, v
        job.clean()
    return lines


def _one(
    job: Job, point: str, backend: Backend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, is_preferred: bool
) -> Line:
    """q [h, N, D], k and v [h, T, D] of one kernel."""
    scale = q.shape[2] ** -0.5
    try:
        first_s = job.timed(lambda: backend.attend_full(q, [(k, v)], scale, None))
        if _ROUNDS * first_s > job.left_s:
            return Line("attention", point, backend.name, note="not measured: out of time")
        seconds = statistics.median(
            job.timed(lambda: backend.attend_full(q, [(k, v)], scale, None)) for _ in range(_ROUNDS)
        )
        distance = _error(job, backend, min(q.shape[1], _SMALL_ROWS))
    except (torch.OutOfMemoryError, CapacityError) as error:
        return Line("attention", point, backend.name, note=f"ran out of memory: {str(error).splitlines()[0]}")
    except RuntimeError as error:  # a library that has no plan or kernel for the shape: the others are still measured
        return Line("attention", point, backend.name, note=f"failed: {str(error).splitlines()[0]}")
    finally:
        job.clean()
    flops, nbytes = 4 * q.shape[0] * q.shape[1] * k.shape[1] * q.shape[2], 2 * q.nbytes + k.nbytes + v.nbytes
    roofline_s = max(flops / job.rates.flops_per_s, nbytes / job.rates.device_bytes_per_s)
    details = {
        "roofline_s": roofline_s,
        "share_of_roofline": roofline_s / seconds,
        "flops_per_s": flops / seconds,
        "bytes_per_s": nbytes / seconds,
        "error_against_float64": distance,
        "is_preferred": is_preferred,
    }
    note = f"{100 * roofline_s / seconds:.0f} % of the roofline, error {distance:.1e}"
    return Line("attention", point, backend.name, seconds, "s", note=note + (", preferred" if is_preferred else ""),
                details=details)  # fmt: skip


def _error(job: Job, backend: Backend, rows: int) -> float:
    """The relative Frobenius error of two heads against float64."""
    q, k, v = _noise(job, 2, rows, _SMALL_KEYS)
    scale = q.shape[2] ** -0.5
    found = backend.attend_full(q, [(k, v)], scale, None).out.cpu().double()
    wanted = attend_reference(*(x.cpu()[None] for x in (q, k, v)), scale=scale).out[0]
    return float((found - wanted).norm() / wanted.norm())


def _noise(job: Job, heads: int, rows: int, keys: int) -> list[torch.Tensor]:
    """q [heads, rows, D], k and v [heads, keys, D], with the model's D."""
    dim, generator = job.shape.layers[0].key_dim, torch.Generator(job.device).manual_seed(0)
    return [
        torch.randn(heads, tokens, dim, dtype=job.sizes.dtype, device=job.device, generator=generator)
        for tokens in (rows, keys, keys)
    ]
