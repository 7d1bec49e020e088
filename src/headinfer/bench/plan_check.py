"""Compares the planner's predictions with measurements on this machine: bytes must be equal, seconds about equal.

The cases are layers of the full size of Llama-3-8B on the CPU. If KV is read in place, as in a real run on a CPU, bytes
and seconds are compared. If KV goes through a ring on the CPU, which has no link, only bytes are compared.
"""

from __future__ import annotations

from typing import Any

import torch

from headinfer.bench.cpu_model import fill_head_wise
from headinfer.bench.job import CpuJob
from headinfer.bench.measurement import Measurement
from headinfer.bench.sizes import PlanCase
from headinfer.bench.timing import median_s
from headinfer.hf.cache import HeadCache
from headinfer.hf.enable import enable
from headinfer.hf.models import resolve
from headinfer.plan.footprint import streaming_footprint
from headinfer.plan.hardware import Hardware
from headinfer.plan.model_shape import ModelShape
from headinfer.plan.roofline import Schedule, decode_seconds, prefill_seconds

__all__ = ["check_plan", "compared"]

_MODEL = "random:llama-3-8b?heads=32"
_DECODE_ROUNDS = 5
_PREFILL_ROUNDS = 2
_RING_BUDGET_BYTES = 64 * 2**20


def check_plan(job: CpuJob, machine: Hardware) -> list[Measurement]:
    """Measure bytes and seconds of the job's cases, and compare them with the planner's.

    Args:
        job: the run.
        machine: the rates of this machine, which a probe measured.
    """
    found: list[Measurement] = []
    for case in job.sizes.plan_cases:
        model = _model(case)
        found += [
            _seconds(job, case, model, machine),
            *_bytes(case, model, in_place=True),
            *_bytes(case, model, in_place=False),
        ]
        del model
    return found


def compared(case: str, what: str, *, predicted: float, measured: float, unit: str) -> Measurement:
    """Return a measurement that is compared with its prediction. Bytes have a goal: to be equal.

    Args:
        case: the case that was predicted and measured.
        what: the quantity.
        predicted: its prediction.
        measured: its measurement.
        unit: "bytes" or "s".
    """
    details = {"predicted": predicted}
    if unit != "bytes":
        note = f"predicted {predicted:.3g} s: {predicted / measured:.2f} of measured"
        return Measurement("check-plan", case, what, measured, unit, note=note, details=details)
    note = "equal" if predicted == measured else f"{measured:,.0f} B: NOT EQUAL"
    found = Measurement("check-plan", case, what, measured, unit, note=note, details=details)
    return found.with_goal(f"== {predicted:.0f}", text=f"== {predicted:,.0f} B")


def _model(case: PlanCase) -> Any:
    spec = f"{_MODEL}&layers={case.layers}&vocab=259&context=1048576"
    return resolve(spec).load(dtype=case.dtype, device="cpu", seed=0)


def _shape_of(model: Any) -> ModelShape:
    return ModelShape.from_config(model.config)


@torch.inference_mode()
def _seconds(job: CpuJob, case: PlanCase, model: Any, machine: Hardware) -> Measurement:
    """Return the seconds of a case whose KV is read in place."""
    shape = _shape_of(model)
    schedule = Schedule(chunk_tokens=max(case.chunk_tokens, 1))
    more = (schedule, str(case.dtype).removeprefix("torch."), 8 * case.dtype.itemsize)
    ids = torch.full((1, max(case.tokens, 1)), 7)
    with enable(model):
        if case.chunk_tokens:
            predicted = prefill_seconds(shape, machine, case.tokens, *more).total_s
            rounds = _PREFILL_ROUNDS

            def work() -> None:
                cache = HeadCache(model.config, expected_tokens=case.tokens)
                for chunk in ids.split(case.chunk_tokens, dim=1):
                    model(chunk, past_key_values=cache, logits_to_keep=1)
        else:
            predicted = decode_seconds(shape, machine, case.tokens, *more).total_s
            rounds = _DECODE_ROUNDS
            cache = HeadCache(model.config, expected_tokens=case.tokens + 1)
            fill_head_wise(cache, model.config, case.tokens, case.dtype)

            def work() -> None:
                model(ids[:, :1], past_key_values=cache, logits_to_keep=1)
                cache.crop(-1)

        job.begin(case.what, (rounds + 1) * predicted)
        measured = median_s(work, rounds=rounds)
    return compared(case.what, "seconds", predicted=predicted, measured=measured, unit="s")


@torch.inference_mode()
def _bytes(case: PlanCase, model: Any, *, in_place: bool) -> list[Measurement]:
    """Return the bytes that are held after the last token of a case."""
    options: dict[str, Any] = {}
    if not in_place:
        options = {"transport": "eager", "device_kv_budget_bytes": _RING_BUDGET_BYTES}
    tokens = case.tokens + (0 if case.chunk_tokens else 1)
    cache = HeadCache(model.config, expected_tokens=tokens, **options)
    fill_head_wise(cache, model.config, tokens - 1, case.dtype)
    with enable(model):
        model(torch.full((1, 1), 7), past_key_values=cache, logits_to_keep=1)
    stats = cache.stats()
    shape = _shape_of(model)
    wanted = streaming_footprint(
        shape,
        tokens,
        chunk_tokens=1,
        streaming_bytes=None if in_place else _RING_BUDGET_BYTES,
        resident_tokens=None if in_place else (0,) * len(shape.offloaded_layers),
        element_bytes=case.dtype.itemsize,
    )
    pairs = {
        "KV on the host": (wanted.host_kv_bytes, stats.host_kv_bytes),
        "tails": (wanted.tail_bytes, stats.device_tail_bytes),
    }
    if not in_place:
        pairs["ring"] = (wanted.ring_bytes, stats.device_ring_bytes)
        pairs["write-back"] = (wanted.staging_bytes, stats.device_staging_bytes)
    where = "in place" if in_place else "through a ring"
    return [
        compared(case.what, f"{name}, {where}", predicted=predicted, measured=measured, unit="bytes")
        for name, (predicted, measured) in pairs.items()
    ]
