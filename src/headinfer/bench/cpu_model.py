"""What the CPU's suites share: their model, and noise in place of the KV of a long prompt.

Two cores cannot read 128K tokens in reasonable time. So caches are filled with seeded noise, and single passes are
measured at an offset.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from headinfer.bench.sizes import CpuSizes
from headinfer.hf.cache import HeadCache
from headinfer.hf.models import resolve

__all__ = [
    "DRAM_BUFFER_BYTES",
    "append_noise",
    "dram_reader",
    "fill_dynamic",
    "fill_head_wise",
    "forward_and_crop",
    "kv_bytes",
    "load_model",
]

DRAM_BUFFER_BYTES = 1 << 30
_NOISE_TOKENS = 2048


def load_model(sizes: CpuSizes) -> Any:
    """Return the model of the CPU's suites, with seeded random weights."""
    return resolve(sizes.model).load(dtype=sizes.dtype, device="cpu", seed=0)


def kv_bytes(config: Any, tokens: int) -> int:
    """Return the bytes of K and V of `tokens` tokens in all layers of that model, in bfloat16."""
    return int(2 * 2 * tokens * config.num_hidden_layers * config.num_key_value_heads * config.head_dim)


def forward_and_crop(model: Any, cache: Any, tokens: int = 1, mask: torch.Tensor | None = None, rows: int = 1) -> None:
    """Run one forward pass of `tokens` tokens at the end of a cache, then crop the cache to its old length."""
    ids = torch.full((rows, tokens), 7)
    model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1, attention_mask=mask)
    cache.crop(-tokens)


def _noise(config: Any, tokens: int, dtype: torch.dtype = torch.bfloat16) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return seeded K and V [1, Hkv, T, D] of `tokens` tokens, in chunks. All whole chunks are the same tensors."""
    torch.manual_seed(1)
    shape = (1, config.num_key_value_heads, min(tokens, _NOISE_TOKENS), config.head_dim)
    k, v = (torch.randn(shape, dtype=dtype) for _ in range(2))
    chunks = [(k, v)] * (tokens // shape[2])
    rest = tokens % shape[2]
    return [*chunks, (k[:, :, :rest], v[:, :, :rest])] if rest else chunks


def fill_head_wise(cache: HeadCache, config: Any, tokens: int, dtype: torch.dtype = torch.bfloat16) -> None:
    """Append noise of `tokens` tokens to every layer of an empty HeadCache."""
    for k, v in _noise(config, tokens, dtype):
        _append(cache, k, v)


def append_noise(cache: HeadCache, config: Any, tokens: int) -> None:
    """Append the same noise in one piece, as a chunk of `tokens` tokens does."""
    _append(cache, *(torch.cat(sides, dim=2) for sides in zip(*_noise(config, tokens), strict=True)))


def _append(cache: HeadCache, k: torch.Tensor, v: torch.Tensor) -> None:
    for layer in cache.head_layers:
        if layer.layer_kv is None:
            layer.lazy_initialization(k, v)
        assert layer.layer_kv is not None
        layer.layer_kv.append(k, v)


def fill_dynamic(cache: Any, config: Any, tokens: int, dtype: torch.dtype = torch.bfloat16) -> None:
    """Put the same noise into every layer of an empty DynamicCache."""
    chunks = _noise(config, tokens, dtype)
    k, v = (torch.cat(sides, dim=2) for sides in zip(*chunks, strict=True))
    for layer in cache.layers:
        layer.update(k, v)


def dram_reader() -> Callable[[], None]:
    """Return a function that reads DRAM_BUFFER_BYTES of host memory, far more than caches hold, with all cores."""
    buffer = torch.ones(DRAM_BUFFER_BYTES // 8, dtype=torch.int64)

    def read() -> None:
        buffer.sum()

    return read
