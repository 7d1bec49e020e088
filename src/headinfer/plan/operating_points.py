"""The roofline of one layer's attention: what it attains with KV in device memory, and with KV over the link."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from headinfer.plan.hardware import Hardware
from headinfer.plan.model_shape import LayerShape

__all__ = ["OperatingPoint", "hiding_chunk_tokens", "operating_points"]


@dataclass(frozen=True)
class OperatingPoint:
    """One layer's attention as a point under the roofline.

    Attributes:
        phase: "prefill" or "decode".
        tokens: the context.
        memory: "device", or "link" for KV in host memory.
        flops: floating-point operations of a pass.
        bytes_moved: bytes that a pass moves in device memory or over the link.
        flops_per_s: the attained rate.
        bound: what bounds the rate: "compute", "device memory" or "link".
    """

    phase: str
    tokens: int
    memory: str
    flops: float
    bytes_moved: float
    flops_per_s: float
    bound: str

    @property
    def intensity(self) -> float:
        """FLOP per byte."""
        return self.flops / self.bytes_moved


def operating_points(
    layer: LayerShape,
    flops_per_s: float,
    device_bytes_per_s: float,
    link_bytes_per_s: float,
    contexts: Sequence[int],
    element_bytes: int = 2,
    *,
    heads: int | None = None,
) -> list[OperatingPoint]:
    """Return the operating points of one layer's attention, from device memory and over the link.

    Operations and bytes are counted as in table 12 of arXiv 2502.12574: every query sees every key, without the causal
    mask; Q, K, V and the output are moved in device memory, and K and V over the link. The attained rate is
    min(flops_per_s, intensity * bytes_per_s).

    Args:
        layer: the layer.
        flops_per_s: the rate of the device.
        device_bytes_per_s: the rate of device memory.
        link_bytes_per_s: the rate of the link.
        contexts: the numbers of tokens.
        element_bytes: bytes of an element of Q, K, V and the output.
        heads: count only that many of the KV heads; None for all.

    Returns:
        For prefill and then decode, and for each context, a point for the device and a point for the link.
    """
    part = (heads or layer.kv_heads) / layer.kv_heads
    points = []
    for phase in ("prefill", "decode"):
        for tokens in contexts:
            queries = tokens if phase == "prefill" else 1
            flops = layer.flops_per_pair * queries * tokens * part
            kv = layer.kv_bytes_per_token(element_bytes) * tokens * part
            io = layer.query_heads * (layer.key_dim + layer.value_dim) * queries * element_bytes * part
            for memory, moved, rate in (("device", kv + io, device_bytes_per_s), ("link", kv, link_bytes_per_s)):
                attained = min(flops_per_s, flops / moved * rate)
                bound = "compute" if attained == flops_per_s else ("device memory" if memory == "device" else "link")
                points.append(OperatingPoint(phase, tokens, memory, flops, moved, attained, bound))
    return points


def hiding_chunk_tokens(layer: LayerShape, hardware: Hardware, dtype: str, kv_bits: int = 0) -> int:
    """Return the smallest chunk whose attention on streamed KV takes at least as long as the transfer of that KV.

    For a chunk of Tq tokens, a token of the past costs flops_per_pair * Tq / F seconds of attention and kv_bytes / W
    seconds of transfer, where F is the attained FLOP/s and W the attained bytes/s of the link. With G query heads per
    KV head and e bytes an element, the transfer is hidden for Tq >= F * e / (2 * G * W). This is the ridge of the
    offloaded roofline in table 12 of arXiv 2502.12574.

    Args:
        layer: an offloaded layer.
        hardware: the machine.
        dtype: the dtype of K and V.
        kv_bits: bits of an element of K and V that are stored quantised; 0 if they are not.

    Returns:
        The tokens of the chunk.
    """
    element_bytes = 4 if dtype == "float32" else 2
    pair_s = layer.flops_per_pair / hardware.attained_attention_flops_per_s(dtype)
    token_bytes = layer.stored_bytes_per_token(element_bytes, kv_bits)
    return math.ceil(token_bytes / hardware.attained_link_bytes_per_s / pair_s)
