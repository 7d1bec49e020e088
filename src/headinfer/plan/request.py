"""The input of the planner: a model, a machine, a context, and the options that the user sets."""

from __future__ import annotations

from dataclasses import dataclass, replace

from headinfer.errors import UnsupportedError, UsageError
from headinfer.plan.hardware import Hardware
from headinfer.plan.model_shape import LayerShape, ModelShape
from headinfer.utils.head_pattern import HeadPattern
from headinfer.utils.kv_format import KV_DTYPES, kv_bits
from headinfer.utils.values import choice

__all__ = ["Request"]


@dataclass(frozen=True)
class Request:
    """A job to be planned.

    Attributes:
        shape: the model.
        hardware: the device that computes.
        context_tokens: tokens of the context.
        host_bytes: host memory that the job may use.
        device_bytes: device memory that the job may use; None for all of the device.
        disk_bytes: disk space that the job may use for KV.
        host_kv_budget_bytes: upper bound of KV in host memory; None for what is free. The rest is on disk.
        new_tokens: tokens of the answer.
        rows: rows of the batch.
        dtype: the dtype of KV and activations.
        weight_bits: bits of a stored weight; None for those of dtype.
        chunk_tokens: tokens of a prefill chunk; None to choose.
        heads_per_group: KV heads that are streamed together; None to choose.
        tile_tokens: tokens that are streamed together; None to choose.
        device_kv_budget_bytes: upper bound of ring, tails, buffers and resident KV; None for what is free.
        streaming_budget_bytes: the part of it that is not for resident KV; None to choose.
        prefetches_next_layer: whether the first tile of a layer is copied while the layer before computes.
        keeps_resident: whether the first tokens of each layer may stay on the device.
        cpu_share: in decode, the share of the streamed tokens that the host's CPU attends to; None to choose. A share
            above 0 is chosen only if a probe has measured the rates for it.
        decode_tokens: new tokens of each row in a decode step: 1, or more if guesses are verified.
        kv_dtype: how KV is stored outside of the device: auto, the dtype of KV and activations, int8 or int4.
        sparse_heads: which KV heads are streaming. `shape` has it then too. None for none.

    Raises:
        UsageError: a number is not positive, or the head pattern is for another model.
        UnsupportedError: the model has no full-attention layer, or its KV cannot be stored in kv_dtype.
    """

    shape: ModelShape
    hardware: Hardware
    context_tokens: int
    host_bytes: int
    device_bytes: int | None = None
    disk_bytes: int = 0
    host_kv_budget_bytes: int | None = None
    new_tokens: int = 256
    rows: int = 1
    dtype: str = "bfloat16"
    weight_bits: int | None = None
    chunk_tokens: int | None = None
    heads_per_group: int | None = None
    tile_tokens: int | None = None
    device_kv_budget_bytes: int | None = None
    streaming_budget_bytes: int | None = None
    prefetches_next_layer: bool = True
    keeps_resident: bool = True
    cpu_share: float | None = None
    decode_tokens: int = 1
    kv_dtype: str = "auto"
    sparse_heads: HeadPattern | None = None

    def __post_init__(self) -> None:
        if self.sparse_heads is not None:
            object.__setattr__(self, "shape", self.shape.with_pattern(self.sparse_heads))
        budgets = ("device_kv_budget_bytes", "streaming_budget_bytes", "host_kv_budget_bytes")
        optional = ("device_bytes", "weight_bits", "chunk_tokens", *budgets)
        for name in ("context_tokens", "host_bytes", "new_tokens", "rows", "decode_tokens", *optional):
            value = getattr(self, name)
            if (value is not None and value < 1) or (value is None and name not in optional):
                raise UsageError(f"{name} is {value}: it must be a positive number")
        if self.cpu_share is not None and not 0 <= self.cpu_share <= 1:
            raise UsageError(f"cpu_share is {self.cpu_share}: it must be a number from 0 to 1")
        if not self.shape.offloaded_layers:
            raise UnsupportedError(
                "this model has no full-attention layer: its KV does not grow with the context, and there is nothing "
                "to offload"
            )
        self.hardware.attained_flops_per_s(self.dtype)
        choice(self.kv_dtype, "kv_dtype", KV_DTYPES)
        self.shape.check_kv_bits(self.kv_bits)

    @property
    def element_bytes(self) -> int:
        """Bytes of a KV or activation element."""
        return 4 if self.dtype == "float32" else 2

    @property
    def kv_bits(self) -> int:
        """Bits of a stored element of quantised KV; 0 if KV is not quantised."""
        return kv_bits(self.kv_dtype)

    @property
    def room_bytes(self) -> int:
        """Device memory that the job may use; on a CPU, host RAM."""
        if self.hardware.is_host:
            return self.host_bytes
        return min(self.device_bytes or self.hardware.device_memory_bytes, self.hardware.device_memory_bytes)

    @property
    def bits(self) -> int:
        """Bits of a stored weight."""
        return self.weight_bits or 8 * self.element_bytes

    @property
    def is_approximate(self) -> bool:
        """Whether the results of the job are not exactly those of the model."""
        return self.kv_bits > 0 or self.sparse_heads is not None

    @property
    def layers(self) -> list[LayerShape]:
        """The layers whose KV is offloaded, with the heads that see the whole context."""
        return [self.shape.layers[index].full_part for index in self.shape.offloaded_layers]

    def with_sparse_heads(self, pattern: HeadPattern | None) -> Request:
        """Return the same job with other streaming heads, or with none."""
        return replace(self, shape=self.shape.with_pattern(pattern), sparse_heads=pattern)
