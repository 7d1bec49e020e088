"""The suite `batch`: several questions about one document, answered together, against one question."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from headinfer.bench.cpu_model import fill_head_wise, forward_and_crop, kv_bytes
from headinfer.bench.job import CpuJob
from headinfer.bench.measurement import OURS, Measurement, context_label
from headinfer.bench.timing import Call
from headinfer.hf.batch import BatchQuestion, answer_batch
from headinfer.hf.cache import HeadCache
from headinfer.hf.enable import enable
from headinfer.hf.models import resolve

__all__ = ["batch"]

_QUESTIONS = 8
_QUESTION_TOKENS = 24
_GOAL = "<= 1.3 x"
_TRANSPORTS: Mapping[str, Mapping[str, Any]] = {"in place": {}, "through the ring": {"transport": "eager"}}


def batch(job: CpuJob) -> Iterator[list[Measurement]]:
    """Measure eight questions against one, in place and through a ring, by query heads that share a KV head.

    A pass over the past reads the same bytes for both. So what eight questions take longer is arithmetic: that of
    attention, which grows with the query rows of each KV head, and that of the model's other layers.
    """
    for name in (job.sizes.model, job.sizes.batch_model):
        model = resolve(name).load(dtype=job.sizes.dtype, device="cpu", seed=0)
        group = model.config.num_attention_heads // model.config.num_key_value_heads
        for where, options in _TRANSPORTS.items():
            yield _measure(job, model, f"{group} query heads per KV head, {where}", options)
            job.clean()


def _measure(job: CpuJob, model: Any, point: str, options: Mapping[str, Any]) -> list[Measurement]:
    tokens = job.sizes.batch_tokens
    cache = HeadCache(model.config, expected_tokens=tokens, **options)
    fill_head_wise(cache, model.config, tokens)
    document = torch.full((1, tokens), 7)
    point = f"{context_label(tokens)}, {point}"

    def forked(rows: int) -> HeadCache:
        return cache.fork_rows(torch.zeros(rows, dtype=torch.long))

    def answers(rows: int) -> None:
        question = BatchQuestion([7] * _QUESTION_TOKENS, job.sizes.batch_new_tokens)
        limits: dict[str, Any] = {"min_new_tokens": job.sizes.batch_new_tokens, "pad_token_id": 0}
        answer_batch(model, cache, document, [question] * rows, **limits)

    with enable(model, **options):
        forks = {rows: forked(rows) for rows in (1, _QUESTIONS)}
        calls = {
            f"token_{rows}": Call(lambda rows=rows: forward_and_crop(model, forks[rows], rows=rows))  # type: ignore[misc]
            for rows in forks
        }
        token = job.in_turns(f"a token, {point}", calls, job.sizes.batch_rounds)
        for fork in forks.values():
            fork.reset()
        calls = {f"answers_{rows}": Call(lambda rows=rows: answers(rows)) for rows in forks}  # type: ignore[misc]
        whole = job.in_turns(f"answers, {point}", calls, job.sizes.batch_rounds)
    cache.reset()
    lines = {
        "a token": (token, "token"),
        f"questions of {_QUESTION_TOKENS} tokens, answers of {job.sizes.batch_new_tokens}": (whole, "answers"),
    }
    return [
        Measurement(
            "batch",
            point,
            f"{OURS}, {what}: {_QUESTIONS} together / one",
            rounds.ratio(f"{key}_{_QUESTIONS}", f"{key}_1"),
            "x",
            rounds=rounds.count,
            details=rounds.medians() | {"kv_bytes": kv_bytes(model.config, tokens)},
        ).with_goal(_GOAL)
        for what, (rounds, key) in lines.items()
    ]
