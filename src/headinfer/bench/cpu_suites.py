"""The benchmark suites. Each compares in one run, in turns, since these figures drift with the machine's load."""

from __future__ import annotations

import gc
import multiprocessing
import statistics
from collections.abc import Callable

import psutil
import torch
from transformers import DynamicCache

from headinfer.bench.cpu_model import (
    DRAM_BUFFER_BYTES,
    dram_reader,
    fill_dynamic,
    fill_head_wise,
    kv_bytes,
    load_model,
)
from headinfer.bench.measurement import Measure, Peak, Sizes, in_turns, ratio, step
from headinfer.hf.cache import HeadCache
from headinfer.hf.enable import enable

__all__ = ["SUITES"]


@torch.inference_mode()
def decode(sizes: Sizes) -> list[Measure]:
    """Seconds per token at a long and at a short context, against DynamicCache and the DRAM's read bandwidth."""
    model, ours_model, measures = load_model(), load_model(), []
    enable(ours_model)
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) - model.get_input_embeddings().weight.nbytes
    for tokens, rounds in ((sizes.long_tokens, sizes.long_steps), (sizes.short_tokens, sizes.short_steps)):
        dynamic, ours = DynamicCache(config=model.config), HeadCache(model.config, expected_tokens=tokens + 1)
        fill_dynamic(dynamic, model.config, tokens)
        fill_head_wise(ours, model.config, tokens)
        mask = torch.ones(1, 1, 1, tokens + 1, dtype=torch.bool)

        calls: dict[str, Callable[[], None]] = {
            "ours": lambda cache=ours: step(ours_model, cache),  # type: ignore[misc]
            "default": lambda cache=dynamic: step(model, cache),  # type: ignore[misc]
            "packed": lambda cache=dynamic, mask=mask: step(model, cache, mask=mask),  # type: ignore[misc]
        }
        if tokens == sizes.long_tokens:
            calls["dram"] = dram_reader()
        seconds = in_turns(calls, rounds)
        context = f"decode at {tokens:,} tokens"
        details = {f"{name}_s": statistics.median(values) for name, values in seconds.items()}
        if tokens == sizes.long_tokens:
            kv = kv_bytes(model.config, tokens)
            share = 100 * kv / DRAM_BUFFER_BYTES * ratio(seconds["dram"], seconds["ours"])
            details["dram_read_bytes_per_s"] = DRAM_BUFFER_BYTES / details.pop("dram_s")
            details["kv_bytes"], details["weight_bytes"] = kv, weights
            measures += [
                Measure("decode", f"{context}: DynamicCache's time / ours", ratio(seconds["default"], seconds["ours"]),
                        "x", ">= 10", details),
                Measure("decode", f"{context}: DynamicCache's time with a mask / ours",
                        ratio(seconds["packed"], seconds["ours"]), "x", ">= 4", details),
                Measure("decode", f"{context}: KV bytes read per second of a token / DRAM read bandwidth",
                        share, "%", ">= 45", details),
                Measure("decode", f"{context}: the same, weights included", share * (kv + weights) / kv, "%"),
            ]  # fmt: skip
        else:
            share = ratio(seconds["ours"], seconds["default"])
            measures.append(Measure("decode", f"{context}: our time / DynamicCache's", share, "x", "<= 1.15", details))
        del dynamic, ours, calls
        gc.collect()
    return measures


@torch.inference_mode()
def prefill(sizes: Sizes) -> list[Measure]:
    """One chunk at an offset, against DynamicCache."""
    model, ours_model = load_model(), load_model()
    enable(ours_model)
    dynamic = DynamicCache(config=model.config)
    ours = HeadCache(model.config, expected_tokens=sizes.chunk_offset + sizes.chunk_tokens)
    fill_dynamic(dynamic, model.config, sizes.chunk_offset)
    fill_head_wise(ours, model.config, sizes.chunk_offset)

    def head_wise() -> None:
        with enable(model):
            step(model, ours, sizes.chunk_tokens)

    seconds = in_turns({"ours": head_wise, "default": lambda: step(model, dynamic, sizes.chunk_tokens)}, sizes.chunks)
    what = f"chunk of {sizes.chunk_tokens:,} tokens at offset {sizes.chunk_offset:,}: our time / DynamicCache's"
    details = {f"{name}_s": statistics.median(values) for name, values in seconds.items()}
    return [Measure("prefill", what, ratio(seconds["ours"], seconds["default"]), "x", "<= 0.95", details)]


@torch.inference_mode()
def device_kv(sizes: Sizes) -> list[Measure]:
    """KV bytes on the device under forced staging, one forward pass over a short and a long store."""
    model, measures = load_model(), []
    for tokens in sizes.staged_tokens:
        cache = HeadCache(model.config, transport="eager", expected_tokens=tokens + 1)
        fill_head_wise(cache, model.config, tokens)
        with enable(model):
            step(model, cache)
        stats = cache.stats()
        parts = {
            "ring_bytes": stats.device_ring_bytes,
            "tail_bytes": stats.device_tail_bytes,
            "staging_bytes": stats.device_staging_bytes,
            "link_bytes_of_the_pass": stats.link_to_device_bytes,
            "host_kv_bytes": stats.host_kv_bytes,
        }
        measures.append(
            Measure("device-kv", f"KV on the device at {tokens:,} tokens", stats.device_kv_peak_bytes, "bytes",
                    "equal at both lengths", parts)
        )  # fmt: skip
        cache.reset()
        gc.collect()
    return measures


def memory(sizes: Sizes) -> list[Measure]:
    """Growth of resident memory while a store grows, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        growth, activations, kv = pool.apply(_memory_growth, (sizes,))
    allowed = kv + activations
    what = (
        f"peak growth of resident memory, store grown to {sizes.long_tokens:,} tokens / (KV + one chunk's activations)"
    )
    details = {"growth_bytes": growth, "kv_bytes": kv, "chunk_activation_bytes": activations}
    return [Measure("memory", what, growth / allowed, "x", "<= 1.10", details)]


@torch.inference_mode()
def _memory_growth(sizes: Sizes) -> tuple[int, int, int]:
    """Peak bytes over the loaded model: while a store grows and a chunk is read at its end; and of a chunk alone.

    Chunks of 256 tokens, so that two cores read the last one in seconds. The store is not told its final length.
    """
    model, chunk = load_model(), 256
    process = psutil.Process()
    with enable(model):
        for _ in range(2):  # the first pass also loads libraries and grows the allocator's pools
            cache = HeadCache(model.config)
            gc.collect()
            before = process.memory_info().rss
            with Peak(process) as peak:
                step(model, cache, chunk)
            activations = max(peak.rss_bytes - before, 0)
            del cache
        gc.collect()
        cache = HeadCache(model.config)
        before = process.memory_info().rss
        with Peak(process) as peak:
            fill_head_wise(cache, model.config, sizes.long_tokens - chunk)
            step(model, cache, chunk)
        return peak.rss_bytes - before, activations, kv_bytes(model.config, sizes.long_tokens)


SUITES: dict[str, Callable[[Sizes], list[Measure]]] = {
    "decode": decode,
    "prefill": prefill,
    "memory": memory,
    "device-kv": device_kv,
}
