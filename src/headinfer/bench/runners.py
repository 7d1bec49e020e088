"""What runs a forward pass after a long past: headinfer with some options, or transformers with its own cache."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from transformers import DynamicCache

from headinfer.bench.job import Job
from headinfer.bench.past import noise
from headinfer.hf.cache import HeadCache
from headinfer.hf.enable import enable

__all__ = ["HeadRunner", "Runner", "TransformersRunner"]


class Runner(Protocol):
    """One way, ready to run: forward passes of the same tokens at the end of the same past."""

    def active(self) -> AbstractContextManager[Any]:
        """Around run(): the model as this way needs it."""

    def run(self) -> None: ...

    def after(self) -> None:
        """Make it as it was before run(); not timed."""

    def kv_bytes(self) -> int:
        """KV on the device, at its peak."""

    def facts(self) -> dict[str, Any]: ...


class HeadRunner:
    """headinfer with some options."""

    def __init__(self, job: Job, cache: HeadCache, tokens: int) -> None:
        self.job, self.cache, self.tokens = job, cache, tokens
        self._ids = torch.full((1, tokens), 7, device=job.device)

    def active(self) -> AbstractContextManager[Any]:
        return enable(self.job.model, chunk_tokens=max(self.tokens, 1))

    def run(self) -> None:
        self.job.model(self._ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)

    def after(self) -> None:
        self.cache.crop(-self.tokens)

    def kv_bytes(self) -> int:
        return self.cache.stats().device_kv_peak_bytes

    def facts(self) -> dict[str, Any]:
        """What was chosen for the last pass."""
        stats = self.cache.stats()
        return {
            "heads_per_group": stats.heads_per_group,
            "tile_tokens": stats.tile_tokens,
            "attention_backends": list(stats.attention_backends),
            "device_resident_bytes": stats.device_resident_bytes,
        }


class TransformersRunner:
    """transformers' own cache; offloaded: every layer goes to the host and comes back in each pass."""

    def __init__(self, job: Job, past_tokens: int, tokens: int, *, offloaded: bool) -> None:
        self.job, self.tokens, self.offloaded = job, tokens, offloaded
        self.cache: Any = DynamicCache(config=job.model.config, offloading=offloaded)
        self._ids = torch.full((1, tokens), 7, device=job.device)
        for layer in self.cache.layers:
            layer.update(*noise(job, past_tokens))
            if offloaded:
                layer.offload()
        job.synchronize()
        self._before = [(layer.keys, layer.values) for layer in self.cache.layers] if offloaded else []
        self._first_comes_ahead()

    def _first_comes_ahead(self) -> None:
        """As after any pass: the first layer's KV is on its way for the next one."""
        if self.offloaded:
            self.cache.prefetch(0)
            self.job.synchronize()

    def active(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def run(self) -> None:
        self.job.model(self._ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)

    def after(self) -> None:
        if not self.offloaded:
            self.cache.crop(-self.tokens)
            return
        # A cropped view of pinned memory is not contiguous, and copies of it would wait: give back what was there.
        for layer, (keys, values) in zip(self.cache.layers, self._before, strict=True):
            layer.keys, layer.values = keys, values
        self._first_comes_ahead()

    def kv_bytes(self) -> int:
        layers = self.cache.layers
        sizes = [layer.keys.nbytes + layer.values.nbytes for layer in layers]
        return 2 * max(sizes) if self.offloaded else sum(sizes)  # offloaded: one is read while the next one comes

    def facts(self) -> dict[str, Any]:
        """Its KV is its own, whatever headinfer reads."""
        return {"simulation": False}
