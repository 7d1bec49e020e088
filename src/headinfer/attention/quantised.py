"""Keys and values in 8 or 4 bits: the format, and its conversion in torch and, on a GPU, in Triton.

A block has UNIT tokens of one KV head. A key is k[t, c] = low[c] + scale[c] u[t, c], with a scale and an offset for
each element of the head dim, since some elements have large values of one sign (KIVI, arXiv 2402.02750, section 3.2).
A value is v[t, c] = low[t] + scale[t] u[t, c]. u are integers 0 to 2^bits - 1. Offsets are float16, and so are scales,
times 2^bits so that small ones are precise too. Keys are quantised as they are cached, after rotation.

In memory a block is the scales, the offsets, and the integers in the order in which native_quantised.h multiplies
them. Blocks of a head follow each other, so K and V are uint8 tensors [H, T, bytes of a token]. T is a multiple of
UNIT, and slices of such a tensor must begin and end at multiples of UNIT.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

import torch
import torch.nn.functional as F  # noqa: N812

from headinfer.attention import triton_calls
from headinfer.utils.kv_format import UNIT, key_bytes, padded_value_dim, value_bytes
from headinfer.utils.tensors import Piece

__all__ = ["UNIT", "Codec", "decode_k", "decode_v", "encode_k", "encode_v", "key_bytes", "value_bytes"]

_LANES = 16
_ENCODED_TOKENS = 1024  # at once: the intermediate results are several times as large as K and V
_LEAST_HALF = 2.0**-24  # the smallest positive float16


def encode_k(k: torch.Tensor, bits: int) -> torch.Tensor:
    """Quantise keys.

    Args:
        k: [H, T, D]; T is a multiple of UNIT, and D of 16.
        bits: 8 or 4.

    Returns:
        uint8 [H, T, key_bytes(D, bits)].
    """
    heads, tokens, dim = k.shape
    blocks = k.float().view(heads, tokens // UNIT, UNIT, dim)
    scale, low, numbers = _quantise(blocks, bits, dim=2)
    run = _run(bits)
    ordered = numbers.unflatten(3, (dim // run, run)).transpose(2, 3)  # [H, blocks, D / run, UNIT, run]
    return _packed(scale.flatten(2) * 2**bits, low.flatten(2), ordered.flatten(2), bits).view(heads, tokens, -1)


def encode_v(v: torch.Tensor, bits: int) -> torch.Tensor:
    """Quantise values.

    Args:
        v: [H, T, D]; T is a multiple of UNIT.
        bits: 8 or 4.

    Returns:
        uint8 [H, T, value_bytes(D, bits)].
    """
    heads, tokens, dim = v.shape
    blocks = v.float().view(heads, tokens // UNIT, UNIT, dim)
    scale, low, numbers = _quantise(blocks, bits, dim=3)
    run = _run(bits)
    numbers = F.pad(numbers, (0, padded_value_dim(dim) - dim))
    ordered = numbers.unflatten(2, (UNIT // run, run)).transpose(3, 4)  # [H, blocks, UNIT / run, padded D, run]
    return _packed(scale.flatten(2) * 2**bits, low.flatten(2), ordered.flatten(2), bits).view(heads, tokens, -1)


def decode_k(packed: torch.Tensor, dim: int, bits: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the keys [H, T, dim] of uint8 [H, T, key_bytes(dim, bits)]."""
    heads, tokens, _ = packed.shape
    scale, low, numbers = _unpacked(packed, dim, bits)
    run = _run(bits)
    u = numbers.view(heads, -1, dim // run, UNIT, run).transpose(2, 3).reshape(heads, -1, UNIT, dim)
    return (low[:, :, None] + scale[:, :, None] * u).view(heads, tokens, dim).to(dtype)


def decode_v(packed: torch.Tensor, dim: int, bits: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the values [H, T, dim] of uint8 [H, T, value_bytes(dim, bits)]."""
    heads, tokens, _ = packed.shape
    scale, low, numbers = _unpacked(packed, UNIT, bits)
    run = _run(bits)
    u = (
        numbers.view(heads, -1, UNIT // run, padded_value_dim(dim), run)
        .transpose(3, 4)
        .reshape(heads, -1, UNIT, padded_value_dim(dim))
    )
    return (low[..., None] + scale[..., None] * u[..., :dim]).view(heads, tokens, dim).to(dtype)


class _Form(TypedDict):
    is_keys: bool
    wide: int
    unit: int


@dataclass(frozen=True)
class Codec:
    """Quantises the K and V of one layer, and gives them back.

    Attributes:
        bits: 8 or 4.
        key_dim: the head dim of K.
        value_dim: the head dim of V.
        dtype: the dtype of K and V before they are quantised.
    """

    bits: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype

    @property
    def unit(self) -> int:
        """Tokens of a block."""
        return UNIT

    @property
    def stored_dims(self) -> tuple[int, int]:
        """Bytes of the K and of the V of one token and head."""
        return key_bytes(self.key_dim, self.bits), value_bytes(self.value_dim, self.bits)

    def encode(self, k: torch.Tensor, v: torch.Tensor) -> Piece:
        """Quantise k [H, T, Dk] and v [H, T, Dv], where T is a multiple of UNIT, to uint8 tensors [H, T, bytes]."""
        if _has_kernels(k):
            of_keys, of_values = self._forms
            return triton_calls.quantise(k, self.bits, **of_keys), triton_calls.quantise(v, self.bits, **of_values)
        blocks = [slice(start, start + _ENCODED_TOKENS) for start in range(0, k.shape[1], _ENCODED_TOKENS)]
        packed_k = torch.cat([encode_k(k[:, block], self.bits) for block in blocks], dim=1)
        packed_v = torch.cat([encode_v(v[:, block], self.bits) for block in blocks], dim=1)
        return packed_k, packed_v

    def decode(self, k: torch.Tensor, v: torch.Tensor, dtype: torch.dtype | None = None) -> Piece:
        """Return k [H, T, Dk] and v [H, T, Dv] of what encode() returned, in `dtype`, or in the dtype of the layer."""
        wanted = dtype or self.dtype
        if _has_kernels(k):
            of_keys, of_values = self._forms
            return (
                triton_calls.dequantise(k, self.key_dim, self.bits, wanted, **of_keys),
                triton_calls.dequantise(v, self.value_dim, self.bits, wanted, **of_values),
            )
        return decode_k(k, self.key_dim, self.bits, wanted), decode_v(v, self.value_dim, self.bits, wanted)

    @property
    def _forms(self) -> tuple[_Form, _Form]:
        """What the kernels are told about keys, and about values."""
        return (
            {"is_keys": True, "wide": self.key_dim, "unit": UNIT},
            {"is_keys": False, "wide": padded_value_dim(self.value_dim), "unit": UNIT},
        )


def _has_kernels(x: torch.Tensor) -> bool:
    """Return whether Triton's kernels convert x. They give the same bits as torch."""
    return x.is_cuda and not triton_calls.unavailable_reason()


def _run(bits: int) -> int:
    """Return how many integers a lane of a product adds."""
    return 2 if bits == 8 else 4


def _quantise(x: torch.Tensor, bits: int, dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return scale, low (float16 values as float32) and integers (uint8) of x, whose dim `dim` has one scale."""
    most = 2**bits - 1
    low = x.amin(dim, keepdim=True).half().float()
    width = (x.amax(dim, keepdim=True) - low) * (2**bits / most)
    scale = width.clamp_min(_LEAST_HALF).half().float() / 2**bits
    numbers = ((x - low) / scale).round().clamp(0, most).to(torch.uint8)
    return scale, low, numbers


def _packed(scale: torch.Tensor, low: torch.Tensor, numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the bytes of blocks [H, blocks, n]: scales times 2^bits and offsets [H, blocks, m], and integers."""
    if bits == 4:  # vectors of LANES * run integers, two in a vector of bytes
        pairs = numbers.unflatten(2, (-1, 2, _LANES * _run(bits)))
        numbers = (pairs[:, :, :, 0] | pairs[:, :, :, 1] << 4).flatten(2)
    halves = torch.cat([scale, low], dim=2).half().view(torch.uint8)
    return torch.cat([halves, numbers], dim=2)


def _unpacked(packed: torch.Tensor, scales: int, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return scales and offsets [H, blocks, scales] and integers [H, blocks, n] as float32."""
    heads, tokens, _ = packed.shape
    blocks = packed.reshape(heads, tokens // UNIT, -1)
    halves = blocks[:, :, : 4 * scales].contiguous().view(torch.float16).float()
    numbers = blocks[:, :, 4 * scales :]
    if bits == 4:
        vectors = numbers.unflatten(2, (-1, _LANES * _run(bits)))
        numbers = torch.stack([vectors & 15, vectors >> 4], dim=3).flatten(2)
    return halves[:, :, :scales] / 2**bits, halves[:, :, scales:], numbers.float()
