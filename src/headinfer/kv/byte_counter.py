"""Counts the bytes of KV where they are allocated or moved."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["ByteCounter"]

_PURPOSES = ("ring", "tail", "staging", "exchange", "resident", "window")


@dataclass
class ByteCounter:
    """The bytes that one cache holds and moves. All figures are exact.

    Attributes:
        device_bytes: bytes of KV on the compute device, by purpose: "ring" (the slots that tiles stream through),
            "tail" (the newest tokens), "staging" (write-back buffers), "exchange" (queries for the host and its
            results), "resident" (KV that also stays there) and "window" (the tokens that streaming heads see). If the
            host is the compute device, segments are read in place, and only tails and windows are counted.
        device_peak_bytes: the largest sum of device_bytes so far.
        host_bytes: bytes of host memory that are allocated for KV.
        host_peak_bytes: the largest host_bytes so far.
        host_untouched_bytes: those of host_bytes that are reserved for later, and not taken from the system yet.
        disk_bytes: bytes of KV on disk.
        disk_to_host_bytes: bytes that were read from the disk.
        host_to_device_bytes: bytes that were fetched to the device.
        device_to_host_bytes: bytes that were written back to the host.
        tail_moved_bytes: bytes that were moved within tails on the device.
        copies: the number of copies between host and device.
        cpu_attended_bytes: bytes of KV that the host attended to in its own memory instead of copying them.
    """

    device_bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_PURPOSES, 0))
    device_peak_bytes: int = 0
    host_bytes: int = 0
    host_peak_bytes: int = 0
    host_untouched_bytes: int = 0
    disk_bytes: int = 0
    disk_to_host_bytes: int = 0
    host_to_device_bytes: int = 0
    device_to_host_bytes: int = 0
    tail_moved_bytes: int = 0
    copies: int = 0
    cpu_attended_bytes: int = 0

    def hold_device(self, purpose: str, nbytes: int) -> None:
        """Count bytes that were allocated on the device for a purpose; negative if they were freed."""
        self.device_bytes[purpose] += nbytes
        self.device_peak_bytes = max(self.device_peak_bytes, sum(self.device_bytes.values()))

    def hold_host(self, nbytes: int) -> None:
        """Count bytes that were allocated in host memory; negative if they were freed."""
        self.host_bytes += nbytes
        self.host_peak_bytes = max(self.host_peak_bytes, self.host_bytes)

    def hold_disk(self, nbytes: int) -> None:
        """Count bytes that were moved to the disk; negative if they were freed."""
        self.disk_bytes += nbytes
