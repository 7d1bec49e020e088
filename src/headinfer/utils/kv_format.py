"""The stored forms of K and V: in the model's dtype, or approximately in 8 or 4 bits, and what they take."""

from __future__ import annotations

from typing import Literal

__all__ = [
    "DECODED_ELEMENTS",
    "KV_DTYPES",
    "UNIT",
    "KVDtype",
    "dims_refusal",
    "key_bytes",
    "kv_bits",
    "pair_bytes",
    "rounded_down",
    "rounded_up",
    "value_bytes",
]

KVDtype = Literal["auto", "int8", "int4"]
KV_DTYPES: tuple[KVDtype, ...] = ("auto", "int8", "int4")
"""The values of the option kv_dtype. auto is the model's dtype, which is exact."""

UNIT = 64
"""Tokens of a block of quantised K and V. Blocks are stored, moved and read as a whole."""

DECODED_ELEMENTS = 2**22
"""Elements of K, or of V, that are dequantised at once, at most, for a kernel that takes exact KV."""

_KEY_DIMS = 16
_VALUE_DIMS = 8
_VALUE_PADDING = 32


def kv_bits(kv_dtype: str) -> int:
    """Return the bits of a stored element for a value of kv_dtype; 0 for auto, the model's dtype."""
    return {"auto": 0, "int8": 8, "int4": 4}[kv_dtype]


def padded_value_dim(dim: int) -> int:
    """Return the elements that a quantised value has in memory: pairs of vectors of 16."""
    return -(-dim // _VALUE_PADDING) * _VALUE_PADDING


def key_bytes(dim: int, bits: int) -> int:
    """Return the bytes of K of one token and head, with its part of the scales and offsets of a block."""
    return dim * bits // 8 + dim // 16


def value_bytes(dim: int, bits: int) -> int:
    """Return the bytes of V of one token and head, with its scale and offset."""
    return padded_value_dim(dim) * bits // 8 + 4


def pair_bytes(key_dim: int, value_dim: int, element_bytes: int, bits: int) -> int:
    """Return the bytes that K and V of one token and head take where they are stored.

    Args:
        key_dim: the head dim of K.
        value_dim: the head dim of V.
        element_bytes: bytes of an element in the model's dtype.
        bits: 8 or 4 for quantised K and V; 0 for the model's dtype.
    """
    if not bits:
        return (key_dim + value_dim) * element_bytes
    return key_bytes(key_dim, bits) + value_bytes(value_dim, bits)


def dims_refusal(key_dim: int, value_dim: int) -> str:
    """Return why K and V of these head dims cannot be quantised; empty if they can."""
    if key_dim % _KEY_DIMS == 0 and value_dim % _VALUE_DIMS == 0:
        return ""
    return (
        f"KV cannot be stored in int8 or int4 for this model, whose head dims are {key_dim} for K and {value_dim} for "
        f"V: they must be multiples of {_KEY_DIMS} and {_VALUE_DIMS}; leave kv_dtype at auto"
    )


def rounded_down(tokens: int, unit: int) -> int:
    """Return the largest multiple of `unit` up to `tokens`."""
    return tokens // unit * unit


def rounded_up(tokens: int, unit: int) -> int:
    """Return the smallest multiple of `unit` from `tokens` on."""
    return -(-tokens // unit) * unit
