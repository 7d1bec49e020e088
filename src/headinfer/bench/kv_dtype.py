"""The suite `kv-dtype`: a token with KV in 8 and 4 bits against exact KV, in place and in bytes of the link."""

from __future__ import annotations

import torch

from headinfer.bench.cpu_model import fill_head_wise, forward_and_crop, kv_bytes, load_model
from headinfer.bench.job import CpuJob
from headinfer.bench.measurement import OURS, Measurement, context_label
from headinfer.bench.timing import Call
from headinfer.hf.cache import HeadCache
from headinfer.hf.enable import enable
from headinfer.utils.kv_format import KV_DTYPES, KVDtype

__all__ = ["kv_dtype"]

_LINK_TOKENS = 4
_GOALS = {"int8": 1.7, "int4": 2.8}


@torch.inference_mode()
def kv_dtype(job: CpuJob) -> list[Measurement]:
    """Measure a token after a long past, with the same noise as exact, int8 and int4 KV, in turns.

    In place, each token reads all of it. What the past adds to a token is measured as its time less that of a token
    without a past. The bytes of the link are those of a pass through a ring at a shorter past.
    """
    model = load_model(job.sizes)
    tokens = job.sizes.long_tokens
    with enable(model):
        caches = {name: _filled(model, name, tokens) for name in KV_DTYPES}
        calls: dict[str, Call] = {
            name: Call(lambda cache=cache: forward_and_crop(model, cache))  # type: ignore[misc]
            for name, cache in caches.items()
        }
        first = HeadCache(model.config)
        calls["no_past"] = Call(lambda: forward_and_crop(model, first))
        rounds = job.in_turns(f"a token after {context_label(tokens)}", calls, job.sizes.long_steps)
    details = rounds.medians() | {"kv_bytes": kv_bytes(model.config, tokens)}
    details |= {f"{name}_host_bytes": cache.stats().host_kv_bytes for name, cache in caches.items()}
    for cache in caches.values():
        cache.reset()
    job.clean()
    ring_tokens = job.sizes.ring_tokens[0]
    with enable(model):
        link: dict[str, int] = {name: _link_bytes(model, name, ring_tokens) for name in KV_DTYPES}
    lines = []
    of_past: dict[str, float] = {name: details[f"{name}_s"] - details["no_past_s"] for name in KV_DTYPES}
    for name, goal in _GOALS.items():
        found = Measurement(
            "kv-dtype",
            context_label(tokens),
            f"{OURS}: exact KV's time / {name}'s",
            rounds.ratio("auto", name),
            "x",
            rounds=rounds.count,
            details=details,
        )
        lines.append(found.with_goal(f">= {goal} x"))
        past = Measurement(
            "kv-dtype",
            context_label(tokens),
            f"{OURS}: what the past takes, exact KV / {name}",
            of_past["auto"] / of_past[name],
            "x",
            rounds=rounds.count,
        )
        lines.append(past.with_goal(f">= {goal} x"))
        over_link = Measurement(
            "kv-dtype",
            context_label(ring_tokens),
            f"{OURS}: exact KV's bytes over the link / {name}'s",
            link["auto"] / link[name],
            "x",
            details={"exact_bytes": link["auto"], f"{name}_bytes": link[name]},
        )
        lines.append(over_link.with_goal(f">= {goal} x"))
    return lines


def _filled(model: torch.nn.Module, kv_dtype: KVDtype, tokens: int, transport: str = "auto") -> HeadCache:
    cache = HeadCache(model.config, kv_dtype=kv_dtype, expected_tokens=tokens + 1, transport=transport)  # type: ignore[arg-type]
    fill_head_wise(cache, model.config, tokens)
    return cache


def _link_bytes(model: torch.nn.Module, kv_dtype: KVDtype, tokens: int) -> int:
    """Return the bytes that one token brings over the link, with all KV in host memory: the mean of some tokens."""
    cache = _filled(model, kv_dtype, tokens, "eager")
    moved = []
    for _ in range(_LINK_TOKENS + 1):  # each also brings the first tile of the next token
        model(torch.full((1, 1), 7), past_key_values=cache, use_cache=True, logits_to_keep=1)
        moved.append(cache.stats().link_to_device_bytes)
    cache.reset()
    return (moved[-1] - moved[0]) // _LINK_TOKENS
