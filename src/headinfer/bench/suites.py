"""The benchmark suites. Each compares in one run, in turns, since these figures drift with the machine's load."""

from __future__ import annotations

import gc
import multiprocessing
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from transformers import DynamicCache

from headinfer.bench.model import (
    DRAM_BUFFER_BYTES,
    dram_reader,
    fill_dynamic,
    fill_head_wise,
    kv_bytes,
    load_model,
    timed,
)
from headinfer.hf.cache import HeadCache
from headinfer.hf.enable import enable
from headinfer.plan.memory import format_bytes

__all__ = ["SUITES", "Measure", "Sizes"]


@dataclass(frozen=True)
class Sizes:
    """How large the suites run; the defaults are those of the README's table."""

    short_tokens: int = 1024
    long_tokens: int = 131_072
    chunk_tokens: int = 2048
    chunk_offset: int = 30_720
    staged_tokens: tuple[int, int] = (8192, 262_144)
    long_steps: int = 7
    short_steps: int = 200
    chunks: int = 3


@dataclass(frozen=True)
class Measure:
    """One line of the result: what was measured, its value, and the figure that it is meant to reach."""

    suite: str
    what: str
    value: float
    unit: str
    goal: str = ""
    details: Mapping[str, float] = field(default_factory=dict)

    @property
    def shown(self) -> str:
        """The value with its unit, for people."""
        if self.unit == "bytes":
            return format_bytes(self.value)
        return f"{self.value:.3g}{'' if self.unit == 'x' else ' '}{self.unit}"


def _step(model: Any, cache: Any, tokens: int = 1, mask: torch.Tensor | None = None) -> None:
    """One forward pass of `tokens` tokens at the end of a cache, then the cache as it was."""
    ids = torch.full((1, tokens), 7)
    model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1, attention_mask=mask)
    cache.crop(-tokens)


def _in_turns(calls: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, one after the other, `rounds` times after one round of warm-up."""
    for call in calls.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            seconds[name].append(timed(call))
    return seconds


def _ratio(slow: list[float], fast: list[float]) -> float:
    """The median over the rounds of slow / fast."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


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
            "ours": lambda cache=ours: _step(ours_model, cache),  # type: ignore[misc]
            "default": lambda cache=dynamic: _step(model, cache),  # type: ignore[misc]
            "packed": lambda cache=dynamic, mask=mask: _step(model, cache, mask=mask),  # type: ignore[misc]
        }
        if tokens == sizes.long_tokens:
            calls["dram"] = dram_reader()
        seconds = _in_turns(calls, rounds)
        context = f"decode at {tokens:,} tokens"
        details = {f"{name}_s": statistics.median(values) for name, values in seconds.items()}
        if tokens == sizes.long_tokens:
            kv = kv_bytes(model.config, tokens)
            share = 100 * kv / DRAM_BUFFER_BYTES * _ratio(seconds["dram"], seconds["ours"])
            details["dram_read_bytes_per_s"] = DRAM_BUFFER_BYTES / details.pop("dram_s")
            details["kv_bytes"], details["weight_bytes"] = kv, weights
            measures += [
                Measure("decode", f"{context}: DynamicCache's time / ours", _ratio(seconds["default"], seconds["ours"]),
                        "x", ">= 10", details),
                Measure("decode", f"{context}: DynamicCache's time with a mask / ours",
                        _ratio(seconds["packed"], seconds["ours"]), "x", ">= 4", details),
                Measure("decode", f"{context}: KV bytes read per second of a token / DRAM read bandwidth",
                        share, "%", ">= 45", details),
                Measure("decode", f"{context}: the same, weights included", share * (kv + weights) / kv, "%"),
            ]  # fmt: skip
        else:
            ratio = _ratio(seconds["ours"], seconds["default"])
            measures.append(Measure("decode", f"{context}: our time / DynamicCache's", ratio, "x", "<= 1.15", details))
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
            _step(model, ours, sizes.chunk_tokens)

    seconds = _in_turns({"ours": head_wise, "default": lambda: _step(model, dynamic, sizes.chunk_tokens)}, sizes.chunks)
    what = f"chunk of {sizes.chunk_tokens:,} tokens at offset {sizes.chunk_offset:,}: our time / DynamicCache's"
    details = {f"{name}_s": statistics.median(values) for name, values in seconds.items()}
    return [Measure("prefill", what, _ratio(seconds["ours"], seconds["default"]), "x", "<= 0.95", details)]


@torch.inference_mode()
def device_kv(sizes: Sizes) -> list[Measure]:
    """KV bytes on the device under forced staging, one forward pass over a short and a long store."""
    model, measures = load_model(), []
    for tokens in sizes.staged_tokens:
        cache = HeadCache(model.config, staging="early", expected_tokens=tokens + 1)
        fill_head_wise(cache, model.config, tokens)
        with enable(model):
            _step(model, cache)
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
            with _Peak(process) as peak:
                _step(model, cache, chunk)
            activations = max(peak.rss_bytes - before, 0)
            del cache
        gc.collect()
        cache = HeadCache(model.config)
        before = process.memory_info().rss
        with _Peak(process) as peak:
            fill_head_wise(cache, model.config, sizes.long_tokens - chunk)
            _step(model, cache, chunk)
        return peak.rss_bytes - before, activations, kv_bytes(model.config, sizes.long_tokens)


class _Peak:
    """Samples the resident memory of a process every few milliseconds."""

    def __init__(self, process: psutil.Process) -> None:
        self._process, self._stop = process, threading.Event()
        self.rss_bytes = process.memory_info().rss
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._stop.is_set():
            self.rss_bytes = max(self.rss_bytes, self._process.memory_info().rss)
            time.sleep(0.002)

    def __enter__(self) -> _Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.rss_bytes = max(self.rss_bytes, self._process.memory_info().rss)


SUITES: dict[str, Callable[[Sizes], list[Measure]]] = {
    "decode": decode,
    "prefill": prefill,
    "memory": memory,
    "device-kv": device_kv,
}
