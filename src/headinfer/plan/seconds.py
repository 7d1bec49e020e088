"""Predicted seconds, their components, and the resource that bounds them."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Seconds", "SecondsSum"]


@dataclass(frozen=True)
class Seconds:
    """Predicted seconds of a prefill or of one decoded token.

    The first five fields add up to `total_s`. The next four are the busy times of the resources, which overlap.

    Attributes:
        linear_s: linear layers, on the compute stream.
        attention_s: attention, on the compute stream.
        merge_s: merging tiles, on the compute stream.
        exposed_transfer_s: the part of the copies, or of the host's chain of cpu_share.py, that the device does not
            hide.
        exposed_launch_s: the part of the host's queueing that neither computation nor copies hide.
        compute_s: kernels that are bound by arithmetic.
        device_memory_s: kernels that are bound by device memory.
        transfer_s: copies, in the direction that takes longer.
        launch_s: queueing on the host.
        transfer_name: what bounds the copies: "link", "DRAM" or "disk".
    """

    linear_s: float
    attention_s: float
    merge_s: float
    exposed_transfer_s: float
    exposed_launch_s: float
    compute_s: float
    device_memory_s: float
    transfer_s: float
    launch_s: float
    transfer_name: str

    @property
    def total_s(self) -> float:
        """The sum of the parts."""
        return self.linear_s + self.attention_s + self.merge_s + self.exposed_transfer_s + self.exposed_launch_s

    @property
    def bound(self) -> str:
        """The resource that is busy longest: compute, device memory, link, DRAM, disk or launches."""
        busy = {
            "compute": self.compute_s,
            "device memory": self.device_memory_s,
            self.transfer_name: self.transfer_s,
            "launches": self.launch_s,
        }
        return max(busy, key=lambda name: busy[name])


@dataclass
class SecondsSum:
    """The sums of the fields of `Seconds` over the layers of a model, which are added one after the other."""

    linear_s: float = 0.0
    attention_s: float = 0.0
    merge_s: float = 0.0
    exposed_transfer_s: float = 0.0
    exposed_launch_s: float = 0.0
    compute_s: float = 0.0
    device_memory_s: float = 0.0
    transfer_s: float = 0.0
    launch_s: float = 0.0

    def seconds(self, transfer_name: str) -> Seconds:
        """Return the fields as `Seconds`."""
        return Seconds(**vars(self), transfer_name=transfer_name)
