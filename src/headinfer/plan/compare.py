"""Compare headinfer with the paper's baselines: memory, longest context and seconds.

These are the figures of tables 3, 5 to 7, 10, 11 and 14 of arXiv 2502.12574.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from headinfer.errors import CapacityError, UnsupportedError, UsageError
from headinfer.plan.fit import HOST_OVERHEAD_BYTES, longest_context
from headinfer.plan.footprint import (
    BASELINES,
    OFFLOADED,
    ActivationRule,
    Footprint,
    activation_bytes,
    baseline_footprint,
)
from headinfer.plan.planner import Plan, make_plan, sparse_as_dict
from headinfer.plan.request import Request
from headinfer.plan.roofline import Schedule, decode_seconds, prefill_seconds
from headinfer.plan.seconds import Seconds
from headinfer.utils.kv_format import KV_DTYPES

__all__ = [
    "METHODS",
    "OURS",
    "Baseline",
    "kv_forms",
    "longest_by_method",
    "memory_by_method",
    "seconds_by_method",
    "sparse_forms",
]

OURS = "headinfer"
METHODS = (*BASELINES, OURS)
_LONGEST_TOKENS = 2**36
_SPARSE_SHARE = 0.5  # of the heads, for what sparse heads would save, if the request has none


@dataclass(frozen=True)
class Baseline:
    """One of BASELINES on a machine. The write-back of new KV is not counted, as in the paper's timings.

    Attributes:
        request: the model and the machine; the context is given to each method.
        method: one of BASELINES.
        chunk_tokens: tokens of a chunk, for the methods that read in chunks.
        heads_per_group: KV heads of a group of the head-wise method; None for the most that fit, as the paper adapts
            them.
        activations: the rule for the bytes of activations.
        overhead_bytes: device memory for the driver, libraries and the allocator; None for the hardware's.
        host_overhead_bytes: host RAM for the process and the system.
    """

    request: Request
    method: str
    chunk_tokens: int
    heads_per_group: int | None = None
    activations: ActivationRule = activation_bytes
    overhead_bytes: int | None = None
    host_overhead_bytes: int = HOST_OVERHEAD_BYTES

    def footprint(self, tokens: int) -> Footprint:
        """Return what the method needs at a context."""
        if self.heads_per_group is None and self.method == "head-wise (paper)":
            heads = self._most_heads
            groups = [heads // part for part in (1, 2, 4, 8, 16, 32) if heads % part == 0]
            found = [self._footprint(tokens, group) for group in groups]
            fitting = [one for one in found if one.device_bytes <= self.request.room_bytes]
            return fitting[0] if fitting else self._footprint(tokens, 1)
        return self._footprint(tokens, self.heads_per_group or 1)

    def fits(self, tokens: int) -> bool:
        """Return whether the method fits the device and host RAM at a context."""
        found = self.footprint(tokens)
        if self.request.hardware.is_host:
            return found.device_bytes + found.host_bytes <= self.request.host_bytes
        return found.device_bytes <= self.request.room_bytes and found.host_bytes <= self.request.host_bytes

    def longest_tokens(self) -> int:
        """Return the longest context that fits, exact to one part in 16,384."""
        low = 0
        high = _LONGEST_TOKENS
        while high - low > max(low // 2**14, 1):
            middle = (low + high) // 2
            if self.fits(middle):
                low = middle
            else:
                high = middle
        return low

    def prefill(self, tokens: int) -> Seconds:
        """Predict the seconds to read a context."""
        request = self.request
        return prefill_seconds(
            request.shape, request.hardware, tokens, self._schedule(tokens), request.dtype, request.bits, request.rows
        )

    def decode(self, tokens: int) -> Seconds:
        """Predict the seconds of one token after a context."""
        request = self.request
        return decode_seconds(
            request.shape, request.hardware, tokens, self._schedule(tokens), request.dtype, request.bits, request.rows
        )

    @property
    def _most_heads(self) -> int:
        return max(layer.kv_heads for layer in self.request.layers)

    def _footprint(self, tokens: int, heads: int) -> Footprint:
        request = self.request
        overhead = request.hardware.overhead_bytes if self.overhead_bytes is None else self.overhead_bytes
        return baseline_footprint(
            request.shape,
            self.method,
            tokens,
            chunk_tokens=self.chunk_tokens,
            element_bytes=request.element_bytes,
            weight_bits=request.bits,
            heads_per_group=heads,
            overhead_bytes=overhead,
            rows=request.rows,
            host_overhead_bytes=0 if request.hardware.is_host else self.host_overhead_bytes,
            activations=self.activations,
        )

    def _schedule(self, tokens: int) -> Schedule:
        chunked = self.method in ("chunked prefill", "head-wise (paper)")
        chunk_tokens = min(self.chunk_tokens, tokens) if chunked else tokens
        if self.method == "4-bit KV":  # unpacking is not counted
            return Schedule(chunk_tokens, kv_scale=1 / (2 * self.request.element_bytes))
        if self.method in ("standard", "chunked prefill") or self.request.hardware.is_host:
            return Schedule(chunk_tokens)
        heads = self._most_heads
        if self.method == "head-wise (paper)":
            group_bytes = self.footprint(tokens).ring_bytes // 2
            head_bytes = max(self._footprint(tokens, 1).ring_bytes // 2, 1)
            heads = max(group_bytes // head_bytes, 1)
        return Schedule(chunk_tokens, (0,) * len(self.request.layers), (heads, tokens), (heads, tokens))


def _baselines(request: Request, chunk_tokens: int) -> list[Baseline]:
    """Return the baselines that the machine allows; a CPU has nothing to offload to. All of their heads are full."""
    methods = [name for name in BASELINES if not (request.hardware.is_host and name in OFFLOADED)]
    return [Baseline(request.with_sparse_heads(None), method, chunk_tokens) for method in methods]


def memory_by_method(plan: Plan) -> dict[str, Footprint]:
    """Return the footprint of each method at the plan's context and chunk."""
    tokens = plan.request.context_tokens
    found = {one.method: one.footprint(tokens) for one in _baselines(plan.request, plan.chunk_tokens)}
    return {**found, OURS: plan.footprint}


def longest_by_method(plan: Plan) -> dict[str, int]:
    """Return the longest context of each method on the plan's machine.

    The baselines have the plan's chunk; headinfer chooses its chunk for each context.
    """
    found = {one.method: one.longest_tokens() for one in _baselines(plan.request, plan.chunk_tokens)}
    return {**found, OURS: longest_context(plan.request)}


def plans_at(plan: Plan, contexts: Sequence[int]) -> list[Plan | None]:
    """Plan the job anew for each context. None stands for a context that does not fit."""
    found: list[Plan | None] = []
    for tokens in contexts:
        try:
            found.append(make_plan(dataclasses.replace(plan.request, context_tokens=tokens)))
        except CapacityError:
            found.append(None)
    return found


def seconds_by_method(
    plan: Plan, contexts: Sequence[int], ours: Sequence[Plan | None] | None = None
) -> dict[str, list[tuple[Seconds, Seconds] | None]]:
    """Predict the seconds of each method.

    Args:
        plan: the plan, for its machine and its chunk; headinfer is planned anew for each context.
        contexts: the numbers of tokens.
        ours: what plans_at() returns for them, if it is at hand.

    Returns:
        For each method and each context the seconds of prefill and of one decoded token, None if it does not fit.
    """
    table: dict[str, list[tuple[Seconds, Seconds] | None]] = {}
    for one in _baselines(plan.request, plan.chunk_tokens):
        table[one.method] = [(one.prefill(n), one.decode(n)) if one.fits(n) else None for n in contexts]
    planned = plans_at(plan, contexts) if ours is None else ours
    table[OURS] = [None if one is None else (one.prefill_cost, one.decode_cost) for one in planned]
    return table


def kv_forms(plan: Plan) -> list[dict[str, Any]]:
    """Return what KV takes in each of KV_DTYPES at the context of a plan, for JSON. All heads are full.

    Forms that the head dims of the model do not allow are left out.
    """
    return _kv_forms(plan.request.with_sparse_heads(None))


def sparse_forms(plan: Plan) -> list[dict[str, Any]]:
    """Return what KV takes with sparse heads in each of KV_DTYPES at the context of a plan, for JSON.

    The sparse heads are those of the plan, or half of the heads of each layer. There are none for families whose heads
    cannot be sparse, and for a model with a single KV head.
    """
    request = plan.request
    try:
        pattern = request.sparse_heads or request.shape.even_pattern(_SPARSE_SHARE)
    except (UnsupportedError, UsageError):
        return []
    return _kv_forms(request.with_sparse_heads(pattern))


def _kv_forms(request: Request) -> list[dict[str, Any]]:
    forms = []
    for kv_dtype in KV_DTYPES:
        try:
            forms.append(_kv_form(dataclasses.replace(request, kv_dtype=kv_dtype)))
        except UnsupportedError:  # KV of these head dims is not quantised
            continue
    return forms


def _kv_form(request: Request) -> dict[str, Any]:
    """Return what KV takes in the form of a request."""
    token_bytes = request.shape.stored_bytes_per_token(request.element_bytes, request.kv_bits) * request.rows
    try:
        plan = make_plan(request)
    except CapacityError:
        plan = None
    return {
        "kv_dtype": request.kv_dtype,
        "sparse_heads": sparse_as_dict(request.sparse_heads),
        "approximate": request.is_approximate,
        "token_bytes": token_bytes,
        "kv_bytes": token_bytes * request.context_tokens,
        "fits": plan is not None,
        "prefill_s": plan.prefill_cost.total_s if plan is not None else None,
        "decode_s_per_token": plan.decode_cost.total_s if plan is not None else None,
        "longest_tokens": longest_context(request),
    }
