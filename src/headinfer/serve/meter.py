"""Figures about the work of a service: tokens, seconds, and bytes of KV, in all and in the last seconds."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Any
from weakref import WeakKeyDictionary

from headinfer.engine.engine import Engine
from headinfer.hf.cache import HeadCache

__all__ = ["Meter", "Pace"]

_WINDOW_S = 10.0
_MEMORY = 0.9  # the weight of a sample falls by this factor with each later one


class Pace:
    """Estimates how long reading takes: the seconds of a token grow linearly with the tokens before it."""

    def __init__(self) -> None:
        self._weight = 0.0
        self._at = 0.0
        self._seconds = 0.0
        self._at_at = 0.0
        self._at_seconds = 0.0

    def note(self, start: int, stop: int, seconds: float) -> None:
        """Note that reading the tokens from `start` to `stop` took some seconds."""
        at = (start + stop) / 2
        each = seconds / max(stop - start, 1)
        self._weight = self._weight * _MEMORY + 1
        self._at = self._at * _MEMORY + at
        self._seconds = self._seconds * _MEMORY + each
        self._at_at = self._at_at * _MEMORY + at * at
        self._at_seconds = self._at_seconds * _MEMORY + at * each

    def eta_s(self, start: int, stop: int) -> float | None:
        """Return the estimated seconds of reading the tokens from `start` to `stop`; None without any sample."""
        if not self._weight:
            return None
        mean_at = self._at / self._weight
        mean_s = self._seconds / self._weight
        spread = self._at_at / self._weight - mean_at**2
        slope = (self._at_seconds / self._weight - mean_at * mean_s) / spread if spread > 1 else 0.0
        middle = (start + stop) / 2
        each = mean_s + max(slope, 0.0) * (middle - mean_at)
        return max(each, 0.0) * (stop - start)


class Meter:
    """Counts what one worker thread does. Other threads may read the figures at any time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: WeakKeyDictionary[Engine, tuple[int, int]] = WeakKeyDictionary()
        self._samples: deque[tuple[float, float, int, int, int]] = deque()
        self._since = time.monotonic()
        self._prefill_since = 0.0
        self._totals = dict.fromkeys(
            ("prompt_tokens", "completion_tokens", "cached_tokens", "link_bytes", "cpu_bytes"), 0
        )
        self._prefill_s = 0.0
        self._decode_s = 0.0

    def begin(self) -> None:
        """Note that work begins now."""
        self._since = time.monotonic()

    def after_forward(self, cache: HeadCache) -> None:
        """Note the bytes that a forward pass has moved. enable() calls it after each."""
        counters = cache.engine.counters
        link = sum(counter.host_to_device_bytes + counter.device_to_host_bytes for counter in counters)
        cpu = sum(counter.cpu_attended_bytes for counter in counters)
        with self._lock:
            link_before, cpu_before = self._seen.get(cache.engine, (0, 0))
            self._seen[cache.engine] = (link, cpu)
            self._totals["link_bytes"] += link - link_before
            attended = cpu - cpu_before + _bytes_in_place(cache)
            self._totals["cpu_bytes"] += attended
            now = time.monotonic()
            self._samples.append((now, now - self._since, 0, link - link_before, attended))
            self._since = now

    def note_read(self, tokens: int, seconds: float) -> None:
        """Note tokens of a prompt or document that were read."""
        with self._lock:
            self._prefill_s += seconds
            self._samples.append((time.monotonic(), 0.0, tokens, 0, 0))

    def note_generated(self, tokens: int) -> None:
        """Note tokens that were generated."""
        with self._lock:
            self._totals["completion_tokens"] += tokens
            self._samples.append((time.monotonic(), 0.0, tokens, 0, 0))

    def note_decode(self, seconds: float) -> None:
        """Note seconds of generating answers."""
        with self._lock:
            self._decode_s += seconds

    def note_prompt(self, tokens: int, cached: int) -> None:
        """Note the prompt of a request, and how many of its tokens were not read again."""
        with self._lock:
            self._totals["prompt_tokens"] += tokens
            self._totals["cached_tokens"] += cached

    def figures(self) -> dict[str, Any]:
        """Return the fields of ServerState that this object knows."""
        with self._lock:
            oldest = time.monotonic() - _WINDOW_S
            while self._samples and self._samples[0][0] < oldest:
                self._samples.popleft()
            seconds, tokens, link, cpu = (sum(one[field] for one in self._samples) for field in range(1, 5))
            engines = list(self._seen)
            counters = [counter for engine in engines for counter in engine.counters]
            budgets = [
                sum(kv.device_kv_budget_bytes for kv in list(engine.devices.values()) if kv.streams is not None)
                for engine in engines
            ]
            return {
                **{f"{name}_total": value for name, value in self._totals.items()},
                "seconds_prefill_total": self._prefill_s,
                "seconds_decode_total": self._decode_s,
                "tokens_per_s": tokens / seconds if seconds else 0.0,
                "link_bytes_per_s": link / seconds if seconds else 0.0,
                "cpu_bytes_per_s": cpu / seconds if seconds else 0.0,
                "device_kv_bytes": sum(sum(counter.device_bytes.values()) for counter in counters),
                "device_kv_budget_bytes": max(budgets, default=0),
                "host_kv_bytes": sum(counter.host_bytes for counter in counters),
                "disk_kv_bytes": sum(counter.disk_bytes for counter in counters),
            }


def _bytes_in_place(cache: HeadCache) -> int:
    """Return the bytes of KV in host memory that a pass reads in place, if the host is the compute device."""
    return sum(
        part.tokens * kv.heads * (kv.key_dim + kv.value_dim) * kv.dtype.itemsize
        for kv in cache.layer_kvs().values()
        if kv.device.type == "cpu" and cache.engine.devices[kv.device].streams is None
        for shared in kv.shared_prefixes()
        for part in shared.slices
    )
