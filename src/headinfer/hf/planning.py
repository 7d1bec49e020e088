"""Plans the runs of an enabled model: the options of its caches, and its prefill chunks."""

from __future__ import annotations

import dataclasses

import torch

from headinfer.engine.options import Options
from headinfer.engine.run_plan import RunPlan, RunRequest, plan_run, tightest
from headinfer.errors import CapacityError
from headinfer.hf.cache import HeadCache
from headinfer.hf.compat import PreTrainedModel, cuda_devices
from headinfer.kv.byte_counter import ByteCounter
from headinfer.plan.model_shape import ModelShape
from headinfer.plan.planner import Plan

__all__ = ["Planning"]

_UNPLANNED_CHUNK_TOKENS = 2048  # if no plan fits the free memory: the engine still tries
_LEAST_BATCH_CHUNK_TOKENS = 256  # of each row of a batch of questions: each chunk reads the past once


class Planning:
    """The plans of one model.

    Args:
        model: the model.
        shape: its shape, or that of this rank's shard.
        options: the user's options. What they leave open is planned.
        chunk_tokens: tokens of a prefill chunk; None is planned.

    Attributes:
        plan: the last plan; None before the first one, or if no plan fits the free memory.
    """

    def __init__(self, model: PreTrainedModel, shape: ModelShape, options: Options, chunk_tokens: int | None) -> None:
        self.plan: Plan | None = None
        self._model = model
        self._shape = shape
        self._options = options
        self._chunk_tokens = chunk_tokens

    def new_cache(self, expected_tokens: int, rows: int) -> HeadCache:
        """Create an empty cache.

        Args:
            expected_tokens: the final length of the context; 0 if it is unknown.
            rows: rows of the batch.
        """
        planned = self.plan_now(expected_tokens, rows)
        options = planned.options if planned is not None else self._options
        options = dataclasses.replace(options, expected_tokens=expected_tokens)
        if not expected_tokens:  # a plan would give the cache no more memory than its first token needs
            budgets = ("device_kv_budget_bytes", "streaming_budget_bytes")
            options = dataclasses.replace(options, **{name: getattr(self._options, name) for name in budgets})
        cache = HeadCache(self._model.config, **vars(options))
        cache.run_plan = planned
        cache.no_plan_for = (expected_tokens, rows) if planned is None else None
        return cache

    def plan_now(self, tokens: int, rows: int, cache: HeadCache | None = None) -> RunPlan | None:
        """Plan a context with the memory that is free now or that its cache holds.

        Returns:
            The plan; None if no plan fits. Lengths are often only upper bounds here, so the run goes on, and what
            does not fit fails when it is reached.
        """
        try:
            planned = self.checked(tokens, rows, cache)
        except CapacityError:
            planned = None
        self.plan = planned.plan if planned is not None else None
        return planned

    def checked(self, tokens: int, rows: int, cache: HeadCache | None = None) -> RunPlan:
        """Plan a context as plan_now() does.

        Raises:
            CapacityError: no plan fits.
        """
        counters = cache.engine.counters if cache is not None else [ByteCounter()]
        request = RunRequest(
            shape=self._shape,
            device=tightest(cuda_devices(self._model)) or torch.device("cpu"),
            dtype=self._model.dtype,
            context_tokens=max(tokens, 1),
            options=self._options,
            chunk_tokens=self._chunk_tokens,
            rows=rows,
            is_loaded=True,
            held_device_bytes=min(sum(counter.device_bytes.values()) for counter in counters),
            held_host_bytes=counters[0].host_bytes - counters[0].host_untouched_bytes,
        )
        return plan_run(request)

    def plan_of(self, cache: HeadCache, tokens: int, rows: int) -> RunPlan | None:
        """Return the plan of a cache that will hold `tokens` tokens in each row; None if none fits.

        A plan is made once for each generate(), and again only if the context outgrows it. If no plan fits, none is
        made for longer contexts.
        """
        planned = cache.run_plan
        is_covered = planned is not None and _covers(planned.plan, tokens, rows)
        if not is_covered and not _exceeds(cache.no_plan_for, tokens, rows):
            planned = self.plan_now(tokens, rows, cache)
            cache.run_plan = planned
            cache.no_plan_for = (tokens, rows) if planned is None else None
        return planned

    def chunk_of(self, cache: HeadCache, tokens: int, rows: int) -> int:
        """Return the tokens of a prefill chunk of a cache that will hold `tokens` tokens in each row."""
        chosen_tokens = cache.chunk_tokens or self._chunk_tokens
        if cache.shares_rows and cache.get_seq_length():
            planned_tokens = cache.run_plan.chunk_tokens if cache.run_plan is not None else _UNPLANNED_CHUNK_TOKENS
            chunk = chosen_tokens or planned_tokens
            return max(chunk // rows, min(chunk, _LEAST_BATCH_CHUNK_TOKENS))
        if chosen_tokens is not None:
            return chosen_tokens
        planned = self.plan_of(cache, tokens, rows)
        return planned.chunk_tokens if planned is not None else _UNPLANNED_CHUNK_TOKENS


def _covers(plan: Plan, tokens: int, rows: int) -> bool:
    """Return whether a plan is for at least this number of tokens and rows."""
    return tokens <= plan.request.context_tokens and rows <= plan.request.rows


def _exceeds(limit: tuple[int, int] | None, tokens: int, rows: int) -> bool:
    """Return whether a context has at least the tokens and rows of a limit."""
    return limit is not None and tokens >= limit[0] and rows >= limit[1]
