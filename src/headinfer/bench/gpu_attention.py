"""The GPU suite `attention`: exact kernels at the engine's shapes, against this run's roofline and a float64 oracle."""

from __future__ import annotations

import dataclasses

import torch

from headinfer.attention.backends import BACKENDS, Backend, choose
from headinfer.attention.reference import attend_reference
from headinfer.bench.gpu_link import tile_of
from headinfer.bench.job import GpuJob
from headinfer.bench.measurement import Measurement, reason_of
from headinfer.bench.timing import median_s
from headinfer.engine.layer_pass import BLOCK_TOKENS
from headinfer.errors import CapacityError

__all__ = ["attention"]

_ERROR_HEADS = 2
_ERROR_ROWS = 256
_ERROR_KEYS = 1024
_ROUNDS = 5


def attention(job: GpuJob) -> list[Measurement]:
    """Measure each kernel that can do a decode tile and a prefill tile: seconds, share of the roofline, and error."""
    measurements: list[Measurement] = []
    for what, query_tokens in (("decode", 1), ("prefill", job.chunk_tokens())):
        plan, _, problem = tile_of(job, query_tokens)
        heads = plan.heads_per_group
        rows = problem.query_rows
        keys = plan.tile_tokens
        if query_tokens > 1:  # the loop gives equal shapes to a kernel that needs them; here all kernels get that shape
            keys = next((tokens for tokens in BLOCK_TOKENS if tokens <= keys), keys)
        problem = dataclasses.replace(problem, key_tokens=keys, is_full=keys in BLOCK_TOKENS)
        point = f"{what}: {heads} heads x {rows:,} query rows x {keys:,} keys"
        q, k, v = _noise(job, heads, rows, keys)
        preferred = choose(problem)
        for backend in BACKENDS:
            if backend.device_type not in (job.device.type, "any"):
                continue
            reason = backend.refuses(problem)
            if reason is not None:
                found = Measurement("attention", point, backend.name, note=f"refuses: {reason}")
            elif job.left_s < 1:
                found = Measurement("attention", point, backend.name, note="not measured: out of time")
            else:
                found = _measured(job, point, backend, q, k, v, is_preferred=backend is preferred)
            measurements.append(found)
        del q, k, v
        job.clean()
    return measurements


def _measured(
    job: GpuJob, point: str, backend: Backend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, is_preferred: bool
) -> Measurement:
    """Measure one kernel on q [h, N, D] and k, v [h, T, D]."""
    scale = q.shape[2] ** -0.5

    def attend() -> object:
        return backend.attend_full(q, [(k, v)], scale, None)

    try:
        first_s = job.timed(attend)
        if _ROUNDS * first_s > job.left_s:
            return Measurement("attention", point, backend.name, note="not measured: out of time")
        seconds = median_s(attend, job.timed, rounds=_ROUNDS)
        error_found = _error(job, backend, min(q.shape[1], _ERROR_ROWS))
    except (torch.OutOfMemoryError, CapacityError) as error:
        note = f"ran out of memory: {reason_of(error)}"
        return Measurement("attention", point, backend.name, note=note)
    except RuntimeError as error:  # a library without a plan or kernel for this shape: go on with the others
        return Measurement("attention", point, backend.name, note=f"failed: {reason_of(error)}")
    finally:
        job.clean()
    flops = 4 * q.shape[0] * q.shape[1] * k.shape[1] * q.shape[2]
    nbytes = 2 * q.nbytes + k.nbytes + v.nbytes
    roofline_s = max(flops / job.rates.flops_per_s, nbytes / job.rates.device_bytes_per_s)
    details = {
        "roofline_s": roofline_s,
        "share_of_roofline": roofline_s / seconds,
        "flops_per_s": flops / seconds,
        "bytes_per_s": nbytes / seconds,
        "error_against_float64": error_found,
        "is_preferred": is_preferred,
    }
    note = f"{100 * roofline_s / seconds:.0f} % of the roofline, error {error_found:.1e}"
    if is_preferred:
        note += ", preferred"
    return Measurement("attention", point, backend.name, seconds, "s", rounds=_ROUNDS, note=note, details=details)


def _error(job: GpuJob, backend: Backend, rows: int) -> float:
    """Return the relative Frobenius error of two heads against float64."""
    q, k, v = _noise(job, _ERROR_HEADS, rows, _ERROR_KEYS)
    scale = q.shape[2] ** -0.5
    found = backend.attend_full(q, [(k, v)], scale, None).out.cpu().double()
    wanted = attend_reference(*(x.cpu()[None] for x in (q, k, v)), scale=scale).out[0]
    return float((found - wanted).norm() / wanted.norm())


def _noise(job: GpuJob, heads: int, rows: int, keys: int) -> list[torch.Tensor]:
    """Return q [heads, rows, D] and k, v [heads, keys, D], seeded, with the model's D."""
    dim = job.shape.layers[0].key_dim
    generator = torch.Generator(job.device).manual_seed(0)
    return [
        torch.randn(heads, tokens, dim, dtype=job.sizes.dtype, device=job.device, generator=generator)
        for tokens in (rows, keys, keys)
    ]
