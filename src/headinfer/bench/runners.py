"""Runners of forward passes after a long past: headinfer with some options, or transformers with its own cache."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from transformers import DynamicCache

from headinfer.bench.job import GpuJob
from headinfer.bench.past import noise
from headinfer.bench.timing import Turn
from headinfer.hf.cache import HeadCache
from headinfer.hf.enable import enable

__all__ = ["HeadRunner", "Runner", "TransformersRunner"]


class Runner(Turn, Protocol):
    """A model with a past in a cache. Each turn is a forward pass of the same tokens at the end of the past."""

    def kv_bytes(self) -> int:
        """Return the peak bytes of KV on the device."""

    def facts(self) -> dict[str, Any]:
        """Return details of the last pass, for JSON."""


class HeadRunner:
    """headinfer.

    Args:
        job: the run.
        cache: the past, with the options that are measured.
        tokens: tokens of a pass.
    """

    def __init__(self, job: GpuJob, cache: HeadCache, tokens: int) -> None:
        self.job = job
        self.cache = cache
        self.tokens = tokens
        self._ids = torch.full((1, tokens), 7, device=job.device)

    def active(self) -> AbstractContextManager[Any]:
        """Enable the model, with a whole pass as its chunk."""
        return enable(self.job.model, chunk_tokens=max(self.tokens, 1))

    def run(self) -> None:
        """Run one forward pass."""
        self.job.model(self._ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)

    def after(self) -> None:
        """Remove the tokens of the pass from the cache."""
        self.cache.crop(-self.tokens)

    def kv_bytes(self) -> int:
        """Return the peak bytes of KV on the device."""
        return self.cache.stats().device_kv_peak_bytes

    def facts(self) -> dict[str, Any]:
        """Return the choices for the last pass."""
        stats = self.cache.stats()
        return {
            "heads_per_group": stats.heads_per_group,
            "tile_tokens": stats.tile_tokens,
            "attention_backends": list(stats.attention_backends),
            "device_resident_bytes": stats.device_resident_bytes,
            "kv_dtype": stats.kv_dtype,
            "cpu_share": stats.cpu_share,
            "cpu_attended_bytes": stats.cpu_attended_bytes,
        }


class TransformersRunner:
    """transformers with its own cache, which is filled with noise.

    Args:
        job: the run.
        past_tokens: tokens of the past.
        tokens: tokens of a pass.
        offloaded: each layer's KV goes to the host and comes back in each pass.
    """

    def __init__(self, job: GpuJob, past_tokens: int, tokens: int, *, offloaded: bool) -> None:
        self.job = job
        self.tokens = tokens
        self.offloaded = offloaded
        self.cache: Any = DynamicCache(config=job.model.config, offloading=offloaded)
        self._ids = torch.full((1, tokens), 7, device=job.device)
        for layer in self.cache.layers:
            layer.update(*noise(job, past_tokens))
            if offloaded:
                layer.offload()
        job.synchronize()
        self._before = [(layer.keys, layer.values) for layer in self.cache.layers] if offloaded else []
        self._prefetch_first_layer()

    def _prefetch_first_layer(self) -> None:
        """Fetch the first layer's KV, as transformers does at the end of any pass."""
        if self.offloaded:
            self.cache.prefetch(0)
            self.job.synchronize()

    def active(self) -> AbstractContextManager[Any]:
        """Leave the model as it is."""
        return nullcontext()

    def run(self) -> None:
        """Run one forward pass."""
        self.job.model(self._ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)

    def after(self) -> None:
        """Restore the past."""
        if not self.offloaded:
            self.cache.crop(-self.tokens)
            return
        # A cropped view of pinned memory is not contiguous, and its copies would block: put the old tensors back.
        for layer, (keys, values) in zip(self.cache.layers, self._before, strict=True):
            layer.keys = keys
            layer.values = values
        self._prefetch_first_layer()

    def kv_bytes(self) -> int:
        """Return the bytes of KV on the device. An offloaded cache has two layers there: it prefetches one."""
        layers = self.cache.layers
        sizes = [layer.keys.nbytes + layer.values.nbytes for layer in layers]
        return 2 * max(sizes) if self.offloaded else sum(sizes)

    def facts(self) -> dict[str, Any]:
        """Return the facts for JSON: each layer has KV of its own."""
        return {"simulation": False}
