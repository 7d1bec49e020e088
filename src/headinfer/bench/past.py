"""KV of long contexts without their prefill: seeded noise in host memory, and caches that read it.

One `Past` is filled for a point of a benchmark. Every cache that is compared there reads the same host memory, with
options of its own: so all of them fit beside each other. Where host memory is short, one layer is filled and all
layers read it. The bytes that move are the same; that is a simulation, and is called so.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from headinfer.bench.job import Job
from headinfer.hf.cache import HeadCache
from headinfer.kv.layer_kv import TAIL_UNIT_TOKENS
from headinfer.kv.segments import Segment, SegmentSlice

__all__ = ["Past", "noise"]

_NOISE_TOKENS = 16_384


def noise(job: Job, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Seeded K and V [1, Hkv, tokens, D] of one layer on the job's device, in its dtype."""
    config = job.model.config
    shape = (1, config.num_key_value_heads, tokens, config.head_dim)
    generator = torch.Generator(job.device).manual_seed(1)
    k, v = (torch.randn(shape, dtype=job.sizes.dtype, device=job.device, generator=generator) for _ in range(2))
    return k, v


class Past:
    """The KV of `tokens` tokens of all layers in host memory.

    tokens: a multiple of 128, more than 256. is_simulation: all layers read one layer's.
    """

    def __init__(self, job: Job, tokens: int) -> None:
        """Raises CapacityError where host memory is short even of one layer's."""
        self.job, self.tokens, self.is_simulation = job, tokens, job.is_simulated(tokens)
        on_host = tokens - TAIL_UNIT_TOKENS  # so that segments end where the tail begins
        options = job.options(device_kv_budget_bytes=job.sizes.floor_bytes, expected_tokens=on_host)
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
        """A cache of these tokens with its own options, tails, ring and resident KV.

        room_tokens: that can be added and cropped again without new host memory, which would take time to pin.
        """
        job = self.job
        cache = HeadCache(job.model.config, expected_tokens=self.tokens, **job.options(**options))
        k, v = noise(job, room_tokens + 2 * TAIL_UNIT_TOKENS)
        own: dict[int, Segment] = {}  # by what they are copies of: the bytes are shared, what is resident is not
        for index, layer in enumerate(cache.head_layers):
            at = 0 if self.is_simulation else index
            layer.lazy_initialization(k, v)
            assert layer.layer_kv is not None
            tables = [
                [
                    SegmentSlice(
                        own.setdefault(id(part.segment), copy.copy(part.segment)),
                        part.start,
                        part.stop,
                    )
                    for part in row
                ]
                for row in self._tables[at]
            ]
            layer.layer_kv.restore(tables, *self._tails[at])
            layer.layer_kv.expected_tokens = 0  # they are here: memory for them is not to be reserved again
            if room_tokens:
                layer.layer_kv.append(k, v)
                layer.layer_kv.crop(self.tokens)
        for kv in cache.engine.devices.values():
            kv.tier.pin_refusal = self._pin_refusal  # what the shared memory is, it is for this cache too
        return cache
