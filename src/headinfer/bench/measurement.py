"""What a benchmark gives, how large it runs, and its clocks and gauges."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from headinfer.utils.files import read_json_object
from headinfer.utils.units import format_bytes

__all__ = ["Measure", "Peak", "Sizes", "in_turns", "is_result_json", "ratio", "step", "timed"]


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
    checkpoint_tokens: int = 16_384
    disk_rounds: int = 5


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


def is_result_json(path: Path) -> bool:
    """Whether a file is the JSON of an earlier `headinfer bench`: an object with its command and its figures."""
    found = read_json_object(path)
    return str(found.get("command", "")).startswith("headinfer") and ("measures" in found or "lines" in found)


def step(model: Any, cache: Any, tokens: int = 1, mask: torch.Tensor | None = None) -> None:
    """One forward pass of `tokens` tokens at the end of a cache, then the cache as it was."""
    ids = torch.full((1, tokens), 7)
    model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1, attention_mask=mask)
    cache.crop(-tokens)


def timed(call: Callable[[], object]) -> float:
    """Wall seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def in_turns(calls: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, one after the other, `rounds` times after one round of warm-up."""
    for call in calls.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            seconds[name].append(timed(call))
    return seconds


def ratio(slow: list[float], fast: list[float]) -> float:
    """The median over the rounds of slow / fast."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


class Peak:
    """Samples the resident memory of a process every few milliseconds."""

    def __init__(self, process: psutil.Process) -> None:
        self._process, self._stop = process, threading.Event()
        self.rss_bytes = process.memory_info().rss
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._stop.is_set():
            self.rss_bytes = max(self.rss_bytes, self._process.memory_info().rss)
            time.sleep(0.002)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.rss_bytes = max(self.rss_bytes, self._process.memory_info().rss)
