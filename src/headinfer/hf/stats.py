"""What a HeadCache says about itself."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Stats"]


@dataclass(frozen=True)
class Stats:
    """Bytes that a cache holds and has moved, and what was chosen for its last forward pass.

    Device figures are sums over the compute devices of the KV cache alone, without weights and activations.

    Attributes:
        tokens: tokens of each row.
        layers_offloaded: number of full-attention layers, whose KV is in host memory.
        layers_left_to_transformers: number of layers that keep transformers' own cache.
        device_kv_bytes: bytes of KV on the device now: ring, tails, buffers, windows and resident
            tokens.
        device_kv_peak_bytes: the largest device_kv_bytes so far.
        device_ring_bytes: bytes of the ring's slots, through which tiles are streamed.
        device_tail_bytes: bytes of the tails, which hold the newest tokens.
        device_staging_bytes: bytes of the write-back buffers, and of the buffers for queries that the host answers.
        device_resident_bytes: bytes of the tokens that stay on the device.
        device_window_bytes: bytes of the tokens that streaming heads see (Options.sparse_heads).
        host_kv_bytes: bytes of host memory that are allocated for KV now.
        host_kv_peak_bytes: the largest host_kv_bytes so far.
        disk_kv_bytes: bytes of KV in the disk tier now.
        disk_to_host_bytes: bytes that were read from the disk tier.
        link_to_device_bytes: bytes that were copied from the host to the device.
        link_to_host_bytes: bytes that were copied from the device to the host.
        tail_moved_bytes: bytes that were moved within tails on the device.
        copies: number of copies between host and device.
        heads_per_group: KV heads that are streamed together; 0 before the first forward pass.
        tile_tokens: tokens that are streamed together; 0 before the first forward pass.
        tile_reason: why this tile was chosen.
        cpu_share: the share of the streamed tokens that the host's CPU attended to in the last forward pass. Of tokens
            that several rows share, a planned share is smaller (Options.cpu_rows).
        cpu_attended_bytes: bytes of KV that the host's CPU has attended to, so that they did not cross the link.
        attention_backends: names of the attention backends that ran. As the option `backend` they repeat every choice.
        oom_retries: chunks or decode steps that were computed again, because a device ran out of memory.
        oom_given_back_bytes: bytes of resident KV that were dropped from the device for it.
        oom_chunk_tokens: tokens that a chunk has at most since; 0 if chunks were not shortened.
        kv_dtype: how KV is stored outside of the device: auto, in the model's dtype; or int8 or int4, approximately.
        approximation: what is approximate, in a few words, such as "int8"; empty if all is exact.
    """

    tokens: int
    layers_offloaded: int
    layers_left_to_transformers: int
    device_kv_bytes: int
    device_kv_peak_bytes: int
    device_ring_bytes: int
    device_tail_bytes: int
    device_staging_bytes: int
    device_resident_bytes: int
    device_window_bytes: int
    host_kv_bytes: int
    host_kv_peak_bytes: int
    disk_kv_bytes: int
    disk_to_host_bytes: int
    link_to_device_bytes: int
    link_to_host_bytes: int
    tail_moved_bytes: int
    copies: int
    heads_per_group: int
    tile_tokens: int
    tile_reason: str
    cpu_share: float
    cpu_attended_bytes: int
    attention_backends: tuple[str, ...]
    oom_retries: int
    oom_given_back_bytes: int
    oom_chunk_tokens: int
    kv_dtype: str
    approximation: str
