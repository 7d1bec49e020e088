"""KV of long contexts without their prefill: seeded noise in host memory, and caches that read it.

A `Past` is filled once for each point of a benchmark. All caches that are compared there read the same host memory,
each with its own options, so that all of them fit. If host memory is too small, one layer is filled and all layers
read it. The same bytes move then, and results call this a simulation.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from headinfer.bench.job import GpuJob
from headinfer.hf.cache import HeadCache
from headinfer.kv.layer_kv import TAIL_UNIT_TOKENS
from headinfer.kv.segments import Segment, SegmentSlice
from headinfer.utils.kv_format import KVDtype

__all__ = ["Past", "noise"]

_NOISE_TOKENS = 16_384


def noise(job: GpuJob, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return seeded K and V [1, Hkv, tokens, D] of one layer on the job's device, in its dtype."""
    config = job.model.config
    shape = (1, config.num_key_value_heads, tokens, config.head_dim)
    generator = torch.Generator(job.device).manual_seed(1)
    k, v = (torch.randn(shape, dtype=job.sizes.dtype, device=job.device, generator=generator) for _ in range(2))
    return k, v


class Past:
    """The KV of a context in host memory.

    Args:
        job: the run.
        tokens: tokens of the context: a multiple of 128, more than 256.
        kv_dtype: how the KV is stored in host memory.

    Raises:
        CapacityError: host memory is too small even for one layer.

    Attributes:
        kv_dtype: how the KV is stored in host memory.
        is_simulation: whether all layers read the KV of one layer.
        host_bytes: bytes of KV in host memory.
    """

    def __init__(self, job: GpuJob, tokens: int, kv_dtype: KVDtype = "auto") -> None:
        self.job = job
        self.tokens = tokens
        self.kv_dtype = kv_dtype
        self.is_simulation = job.is_simulated(tokens)
        on_host = tokens - TAIL_UNIT_TOKENS  # so that segments end at the beginning of the tail
        options = job.options(device_kv_budget_bytes=job.sizes.floor_bytes, expected_tokens=on_host, kv_dtype=kv_dtype)
        source = HeadCache(job.model.config, **options)
        layers = source.head_layers[:1] if self.is_simulation else source.head_layers
        k, v = noise(job, min(tokens, _NOISE_TOKENS))
        for start in range(0, tokens, _NOISE_TOKENS):
            size = min(_NOISE_TOKENS, tokens - start)
            for layer in layers:
                if layer.layer_kv is None:
                    layer.lazy_initialization(k, v)
                assert layer.layer_kv is not None
                layer.layer_kv.append(k[:, :, :size], v[:, :, :size])
        source.engine.settle()
        layer_kvs = [layer.layer_kv for layer in layers if layer.layer_kv is not None]
        self.host_bytes = source.engine.counter.host_bytes
        self._pin_refusal = next(iter(source.engine.devices.values())).tier.pin_refusal
        self._tables = [layer_kv.saved_tables() for layer_kv in layer_kvs]
        self._tails = [tuple(tail.clone() for tail in layer_kv.tails()) for layer_kv in layer_kvs]

    def cache(self, *, room_tokens: int = 0, **options: Any) -> HeadCache:
        """Return a cache of this context that has its own options, tails, ring and resident KV.

        Args:
            room_tokens: tokens that can be appended and cropped without new host memory, which takes time to pin.
            **options: options of the HeadCache.
        """
        job = self.job
        cache = HeadCache(
            job.model.config, expected_tokens=self.tokens, **job.options(kv_dtype=self.kv_dtype, **options)
        )
        k, v = noise(job, room_tokens + 2 * TAIL_UNIT_TOKENS)
        copies: dict[int, Segment] = {}  # by the segment they copy; they share its bytes, but not what is resident
        for index, layer in enumerate(cache.head_layers):
            at = 0 if self.is_simulation else index
            layer.lazy_initialization(k, v)
            assert layer.layer_kv is not None
            tables = [[_copied(part, copies) for part in row] for row in self._tables[at]]
            layer.layer_kv.restore(tables, *self._tails[at])
            layer.layer_kv.expected_tokens = 0  # the tokens exist, so no memory is reserved for them again
            if room_tokens:
                layer.layer_kv.append(k, v)
                layer.layer_kv.crop(self.tokens)
        for kv in cache.engine.devices.values():
            kv.tier.pin_refusal = self._pin_refusal  # the memory is the same, so it is pinned or not for this cache too
        return cache


def _copied(part: SegmentSlice, copies: dict[int, Segment]) -> SegmentSlice:
    """Return the same slice of a shallow copy of its segment. `copies` holds the copies that were made."""
    segment = copies.setdefault(id(part.segment), copy.copy(part.segment))
    return SegmentSlice(segment, part.start, part.stop)
