"""The planner's predictions against measurements on this machine: bytes must be equal, seconds about.

Layers of Llama-3-8B's full size on the CPU. In place, as a run on a CPU is, bytes and seconds are compared; through
the ring's twin, which is no link, bytes only.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from headinfer.bench.cpu_model import fill_head_wise
from headinfer.bench.measurement import timed
from headinfer.hf.cache import HeadCache
from headinfer.hf.enable import enable
from headinfer.hf.models import resolve
from headinfer.plan.footprint import streaming_footprint
from headinfer.plan.hardware import Hardware
from headinfer.plan.model_shape import ModelShape
from headinfer.plan.roofline import Schedule, decode_seconds, prefill_seconds

__all__ = ["Comparison", "check_plan", "rows_of"]

_MODEL = "random:llama-3-8b?heads=32"
_ROUNDS = 5


@dataclass(frozen=True)
class Case:
    """Layers of Llama-3-8B's shape, and what is done with them: a prefill in chunks, or one token after a past."""

    what: str
    dtype: torch.dtype
    tokens: int
    chunk_tokens: int = 0
    layers: int = 2


@dataclass(frozen=True)
class Comparison:
    """One quantity, predicted and measured, in `unit` (bytes or s)."""

    case: str
    what: str
    predicted: float
    measured: float
    unit: str

    @property
    def is_right(self) -> bool:
        """Bytes are equal; seconds differ by at most a quarter of what was measured, on an idle machine."""
        if self.unit == "bytes":
            return self.predicted == self.measured
        return abs(self.predicted - self.measured) <= 0.25 * self.measured

    @property
    def row(self) -> tuple[str, ...]:
        """For a table: what, predicted, measured, verdict."""
        if self.unit == "bytes":
            shown = [f"{value:,.0f} B" for value in (self.predicted, self.measured)]
            return (self.what, *shown, "equal" if self.is_right else "NOT EQUAL")
        shown = [f"{value:.3g} s" for value in (self.predicted, self.measured)]
        return (self.what, *shown, f"{self.predicted / self.measured:.2f} of measured")


CASES = (
    Case("decode after 32,768 tokens, bfloat16", torch.bfloat16, 32_768),
    Case("decode after 1,024 tokens, bfloat16", torch.bfloat16, 1024),
    Case("decode after 16,384 tokens, float32", torch.float32, 16_384),
    Case("prefill of 8,192 tokens, chunks of 2,048, bfloat16", torch.bfloat16, 8192, 2048),
    Case("prefill of 4,096 tokens, chunks of 1,024, float32", torch.float32, 4096, 1024),
)
QUICK_CASES = (
    Case("decode after 1,024 tokens, bfloat16", torch.bfloat16, 1024, layers=1),
    Case("prefill of 256 tokens, chunks of 128, bfloat16", torch.bfloat16, 256, 128, layers=1),
)


def check_plan(machine: Hardware, *, quick: bool, on_stage: Callable[[str], None]) -> list[Comparison]:
    """Predicted and measured bytes and seconds of small cases; `machine` is what a probe measured."""
    found: list[Comparison] = []
    for case in QUICK_CASES if quick else CASES:
        on_stage(f"{case.what} ...")
        model = _model(case)
        found += [_seconds(case, model, machine), *_bytes(case, model, staged=False), *_bytes(case, model, staged=True)]
        del model
    return found


def _model(case: Case) -> Any:
    spec = f"{_MODEL}&layers={case.layers}&vocab=259&context=1048576"
    return resolve(spec).load(dtype=case.dtype, device="cpu", seed=0)


def _shape_of(model: Any) -> ModelShape:
    return ModelShape.from_config(model.config)


@torch.inference_mode()
def _seconds(case: Case, model: Any, machine: Hardware) -> Comparison:
    shape, dtype = _shape_of(model), str(case.dtype).removeprefix("torch.")
    schedule = Schedule(chunk_tokens=max(case.chunk_tokens, 1))
    more = (schedule, dtype, 8 * case.dtype.itemsize)
    ids = torch.full((1, max(case.tokens, 1)), 7)
    with enable(model):
        if case.chunk_tokens:
            predicted = prefill_seconds(shape, machine, case.tokens, *more).total_s

            def work() -> None:
                cache = HeadCache(model.config, expected_tokens=case.tokens)
                for chunk in ids.split(case.chunk_tokens, dim=1):
                    model(chunk, past_key_values=cache, logits_to_keep=1)

            rounds = 2
        else:
            predicted = decode_seconds(shape, machine, case.tokens, *more).total_s
            cache = HeadCache(model.config, expected_tokens=case.tokens + 1)
            fill_head_wise(cache, model.config, case.tokens, case.dtype)

            def work() -> None:
                model(ids[:, :1], past_key_values=cache, logits_to_keep=1)
                cache.crop(-1)

            rounds = _ROUNDS
        work()
        measured = statistics.median(timed(work) for _ in range(rounds))
    return Comparison(case.what, "seconds", predicted, measured, "s")


@torch.inference_mode()
def _bytes(case: Case, model: Any, *, staged: bool) -> list[Comparison]:
    budget = 64 * 2**20
    options: dict[str, Any] = {"transport": "eager", "device_kv_budget_bytes": budget} if staged else {}
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
        streaming_bytes=budget if staged else None,
        resident_tokens=(0,) * len(shape.offloaded_layers) if staged else None,
        element_bytes=case.dtype.itemsize,
    )
    pairs = {
        "KV on the host": (wanted.host_kv_bytes, stats.host_kv_bytes),
        "tails": (wanted.tail_bytes, stats.device_tail_bytes),
        "ring": (wanted.ring_bytes, stats.device_ring_bytes),
        "write-back": (wanted.staging_bytes, stats.device_staging_bytes),
    }
    where = "through a ring" if staged else "in place"
    return [
        Comparison(case.what, f"{name}, {where}", *pair, "bytes")
        for name, pair in pairs.items()
        if staged or name in ("KV on the host", "tails")
    ]


def rows_of(found: Sequence[Comparison]) -> list[tuple[str, ...]]:
    """A table's rows: each case's name, then its quantities."""
    rows: list[tuple[str, ...]] = []
    for case in dict.fromkeys(one.case for one in found):
        rows += [(case, "", "", ""), *(one.row for one in found if one.case == case)]
    return rows
