"""What the benchmarks share: a model of Llama-3-8B's attention, and noise for its stores.

Two cores cannot prefill 128K tokens in reasonable time, so stores are filled with seeded noise and single passes
are measured at an offset. The MLP and the vocabulary are small, so that attention is what is measured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from headinfer.hf.cache import HeadCache
from headinfer.hf.models import resolve

__all__ = [
    "BENCH_MODEL",
    "DRAM_BUFFER_BYTES",
    "append_noise",
    "dram_reader",
    "fill_dynamic",
    "fill_head_wise",
    "kv_bytes",
    "load_model",
]

BENCH_MODEL = "random:llama-3-8b?layers=2&intermediate=256&vocab=256&context=1048576"
_NOISE_TOKENS = 2048
DRAM_BUFFER_BYTES = 1 << 30


def load_model() -> Any:
    """The benchmark model, bfloat16 on the CPU, seeded."""
    return resolve(BENCH_MODEL).load(dtype=torch.bfloat16, device="cpu", seed=0)


def kv_bytes(config: Any, tokens: int) -> int:
    """Bytes of K and V of `tokens` tokens of the benchmark model, bfloat16."""
    return int(2 * 2 * tokens * config.num_hidden_layers * config.num_key_value_heads * config.head_dim)


def _noise(config: Any, tokens: int, dtype: torch.dtype = torch.bfloat16) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Seeded K and V [1, Hkv, T, D] chunks that add up to `tokens` tokens; the same chunk again and again."""
    torch.manual_seed(1)
    shape = (1, config.num_key_value_heads, min(tokens, _NOISE_TOKENS), config.head_dim)
    k, v = (torch.randn(shape, dtype=dtype) for _ in range(2))
    chunks = [(k, v)] * (tokens // shape[2])
    rest = tokens % shape[2]
    return [*chunks, (k[:, :, :rest], v[:, :, :rest])] if rest else chunks


def fill_head_wise(cache: HeadCache, config: Any, tokens: int, dtype: torch.dtype = torch.bfloat16) -> None:
    """Put noise into every layer of an empty HeadCache."""
    for k, v in _noise(config, tokens, dtype):
        _append(cache, k, v)


def append_noise(cache: HeadCache, config: Any, tokens: int) -> None:
    """The same in one piece, as a chunk of so many tokens would."""
    _append(cache, *(torch.cat(sides, dim=2) for sides in zip(*_noise(config, tokens), strict=True)))


def _append(cache: HeadCache, k: torch.Tensor, v: torch.Tensor) -> None:
    for layer in cache.head_layers:
        if layer.layer_kv is None:
            layer.lazy_initialization(k, v)
        assert layer.layer_kv is not None
        layer.layer_kv.append(k, v)


def fill_dynamic(cache: Any, config: Any, tokens: int) -> None:
    """Put the same noise into every layer of an empty DynamicCache."""
    chunks = _noise(config, tokens)
    k, v = (torch.cat(sides, dim=2) for sides in zip(*chunks, strict=True))
    for layer in cache.layers:
        layer.update(k, v)


def dram_reader() -> Callable[[], None]:
    """A call that reads DRAM_BUFFER_BYTES of host memory with all cores, far more than the caches hold."""
    buffer = torch.ones(DRAM_BUFFER_BYTES // 8, dtype=torch.int64)

    def read() -> None:
        buffer.sum()

    return read
