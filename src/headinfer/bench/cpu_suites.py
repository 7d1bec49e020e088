"""The CPU's suites: headinfer against transformers' DynamicCache, in turns, and the memory that it takes."""

from __future__ import annotations

import gc
import logging.config
import multiprocessing
from typing import Any

import psutil
import torch
from transformers import DynamicCache

from headinfer.bench.cpu_model import (
    DRAM_BUFFER_BYTES,
    dram_reader,
    fill_dynamic,
    fill_head_wise,
    forward_and_crop,
    kv_bytes,
    load_model,
)
from headinfer.bench.job import CpuJob
from headinfer.bench.measurement import OURS, Measurement, context_label
from headinfer.bench.sizes import CpuSizes
from headinfer.bench.timing import Call, Peak
from headinfer.hf.cache import HeadCache
from headinfer.hf.enable import enable

__all__ = ["decode", "device_kv", "memory", "prefill"]

_GROWTH_CHUNK_TOKENS = 256  # two cores read such a chunk at the end of a long context in seconds


def decode(job: CpuJob) -> list[Measurement]:
    """Measure seconds per token after a long and a short past, against DynamicCache and the DRAM's read bandwidth."""
    model = load_model(job.sizes)
    ours_model = load_model(job.sizes)
    enable(ours_model)
    long = _long_decode(job, model, ours_model)
    job.clean()
    short = _short_decode(job, model, ours_model)
    return [*long, *short]


def _decode_calls(model: Any, ours_model: Any, tokens: int) -> dict[str, Call]:
    """Return the decode passes to compare: headinfer, DynamicCache, and DynamicCache with a mask (packed queries)."""
    dynamic = DynamicCache(config=model.config)
    fill_dynamic(dynamic, model.config, tokens)
    ours = HeadCache(model.config, expected_tokens=tokens + 1)
    fill_head_wise(ours, model.config, tokens)
    mask = torch.ones(1, 1, 1, tokens + 1, dtype=torch.bool)
    return {
        "ours": Call(lambda: forward_and_crop(ours_model, ours)),
        "default": Call(lambda: forward_and_crop(model, dynamic)),
        "packed": Call(lambda: forward_and_crop(model, dynamic, mask=mask)),
    }


def _long_decode(job: CpuJob, model: Any, ours_model: Any) -> list[Measurement]:
    tokens = job.sizes.long_tokens
    calls = _decode_calls(model, ours_model, tokens)
    calls["dram"] = Call(dram_reader())
    rounds = job.in_turns(f"a token after {context_label(tokens)}", calls, job.sizes.long_steps)
    kv = kv_bytes(model.config, tokens)
    embedding = model.get_input_embeddings().weight.nbytes  # of which a token reads one row
    weights = sum(parameter.nbytes for parameter in model.parameters()) - embedding
    share = 100 * kv / DRAM_BUFFER_BYTES * rounds.ratio("dram", "ours")
    details = rounds.medians()
    details["dram_read_bytes_per_s"] = DRAM_BUFFER_BYTES / details.pop("dram_s")
    details["kv_bytes"] = kv
    details["weight_bytes"] = weights

    def line(who: str, value: float, unit: str, goal: str) -> Measurement:
        point = context_label(tokens)
        found = Measurement("decode", point, who, value, unit, rounds=rounds.count, details=details)
        return found.with_goal(goal)

    return [
        line(f"DynamicCache's time / {OURS}'s", rounds.ratio("default", "ours"), "x", ">= 10 x"),
        line(f"DynamicCache's time with a mask / {OURS}'s", rounds.ratio("packed", "ours"), "x", ">= 4 x"),
        line(f"{OURS}: KV read, of the DRAM's bandwidth", share, "%", ">= 45 %"),
        line(f"{OURS}: KV and weights read, of the DRAM's bandwidth", share * (kv + weights) / kv, "%", ""),
    ]


def _short_decode(job: CpuJob, model: Any, ours_model: Any) -> list[Measurement]:
    tokens = job.sizes.short_tokens
    calls = _decode_calls(model, ours_model, tokens)
    rounds = job.in_turns(f"a token after {context_label(tokens)}", calls, job.sizes.short_steps)
    found = Measurement(
        "decode",
        context_label(tokens),
        f"{OURS}'s time / DynamicCache's",
        rounds.ratio("ours", "default"),
        "x",
        rounds=rounds.count,
        details=rounds.medians(),
    )
    return [found.with_goal("<= 1.15 x")]


def prefill(job: CpuJob) -> list[Measurement]:
    """Measure one chunk after a past, against DynamicCache."""
    sizes = job.sizes
    model = load_model(sizes)
    dynamic = DynamicCache(config=model.config)
    fill_dynamic(dynamic, model.config, sizes.chunk_offset)
    ours = HeadCache(model.config, expected_tokens=sizes.chunk_offset + sizes.chunk_tokens)
    fill_head_wise(ours, model.config, sizes.chunk_offset)

    def head_wise() -> None:
        with enable(model):
            forward_and_crop(model, ours, sizes.chunk_tokens)

    calls = {
        "ours": Call(head_wise),
        "default": Call(lambda: forward_and_crop(model, dynamic, sizes.chunk_tokens)),
    }
    point = f"{sizes.chunk_tokens:,} tokens after {context_label(sizes.chunk_offset)}"
    rounds = job.in_turns(point, calls, sizes.chunks)
    found = Measurement(
        "prefill",
        point,
        f"{OURS}'s time / DynamicCache's",
        rounds.ratio("ours", "default"),
        "x",
        rounds=rounds.count,
        details=rounds.medians(),
    )
    return [found.with_goal("<= 0.95 x")]


def device_kv(job: CpuJob) -> list[Measurement]:
    """Measure the bytes of KV on the device in one pass through a ring, after a short and after a long past."""
    model = load_model(job.sizes)
    measurements: list[Measurement] = []
    for tokens in job.sizes.ring_tokens:
        cache = HeadCache(model.config, transport="eager", expected_tokens=tokens + 1)
        fill_head_wise(cache, model.config, tokens)
        with enable(model):
            forward_and_crop(model, cache)
        stats = cache.stats()
        details = {
            "ring_bytes": stats.device_ring_bytes,
            "tail_bytes": stats.device_tail_bytes,
            "staging_bytes": stats.device_staging_bytes,
            "link_bytes_of_the_pass": stats.link_to_device_bytes,
            "host_kv_bytes": stats.host_kv_bytes,
        }
        held = stats.device_kv_peak_bytes
        found = Measurement(
            "device-kv", context_label(tokens), f"{OURS}: KV on the device", held, "bytes", details=details
        )
        first = measurements[0].value if measurements else held
        measurements.append(found.with_goal(f"== {first}", text="equal at both lengths"))
        cache.reset()
        job.clean()
    return measurements


def memory(job: CpuJob) -> list[Measurement]:
    """Measure how much resident memory grows while a cache grows, in a process of its own."""
    loggers = logging.root.manager.loggerDict
    levels = {name: {"level": log.level} for name, log in loggers.items() if isinstance(log, logging.Logger)}
    quiet = {"version": 1, "incremental": True, "loggers": levels}  # libraries are as quiet there as here
    context = multiprocessing.get_context("spawn")
    with context.Pool(1, logging.config.dictConfig, (quiet,)) as pool:
        growth, activations, kv = pool.apply(_memory_growth, (job.sizes,))
    found = Measurement(
        "memory",
        f"cache grown to {context_label(job.sizes.long_tokens)}",
        "peak growth of resident memory / (KV + activations of a chunk)",
        growth / (kv + activations),
        "x",
        details={"growth_bytes": growth, "kv_bytes": kv, "chunk_activation_bytes": activations},
    )
    return [found.with_goal("<= 1.10 x")]


@torch.inference_mode()
def _memory_growth(sizes: CpuSizes) -> tuple[int, int, int]:
    """Return peaks of memory above that of the loaded model. The final length is not given to the cache.

    Returns:
        Bytes of the peak while a cache grows and a chunk is read at its end, bytes of the peak while a chunk is read
        alone, and bytes of the cache's KV.
    """
    model = load_model(sizes)
    chunk = _GROWTH_CHUNK_TOKENS
    process = psutil.Process()
    activations = 0
    with enable(model):
        for _ in range(2):  # the first pass also loads libraries and grows the allocator's pools
            cache = HeadCache(model.config)
            gc.collect()
            before = process.memory_info().rss
            with Peak(process) as peak:
                forward_and_crop(model, cache, chunk)
            activations = max(peak.rss_bytes - before, 0)
            del cache
        gc.collect()
        cache = HeadCache(model.config)
        before = process.memory_info().rss
        with Peak(process) as peak:
            fill_head_wise(cache, model.config, sizes.long_tokens - chunk)
            forward_and_crop(model, cache, chunk)
        return peak.rss_bytes - before, activations, kv_bytes(model.config, sizes.long_tokens)
