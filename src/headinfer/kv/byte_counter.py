"""Every byte of KV, counted where it is allocated or moved."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["ByteCounter"]


@dataclass
class ByteCounter:
    """Bytes held and moved by one cache; all figures are exact.

    device_bytes holds what the KV cache occupies on the compute device, by purpose: "ring" (the slots that tiles
    stream through), "tail" (the newest tokens), "staging" (write-back) and "resident" (what stays there as well). Where
    the host is the compute device and segments are read in place there is none but tails, and no link.
    """

    device_bytes: dict[str, int] = field(default_factory=lambda: {"ring": 0, "tail": 0, "staging": 0, "resident": 0})
    device_peak_bytes: int = 0
    host_bytes: int = 0
    host_peak_bytes: int = 0
    disk_bytes: int = 0
    disk_to_host_bytes: int = 0
    host_to_device_bytes: int = 0
    device_to_host_bytes: int = 0
    tail_moved_bytes: int = 0
    copies: int = 0

    def hold_device(self, purpose: str, nbytes: int) -> None:
        """Count bytes allocated (negative: freed) on the device for a purpose."""
        self.device_bytes[purpose] += nbytes
        self.device_peak_bytes = max(self.device_peak_bytes, sum(self.device_bytes.values()))

    def hold_host(self, nbytes: int) -> None:
        """Count bytes allocated (negative: freed) in host memory."""
        self.host_bytes += nbytes
        self.host_peak_bytes = max(self.host_peak_bytes, self.host_bytes)

    def hold_disk(self, nbytes: int) -> None:
        """Count bytes moved to the disk (negative: freed)."""
        self.disk_bytes += nbytes
