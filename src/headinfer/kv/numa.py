"""Memory near a device: on hosts with several NUMA nodes a link is fastest from the node that it is attached to.

A preference only: where the system has no such thing, or does not allow it, memory lies where it would have been.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from pathlib import Path
from typing import Any

import torch

__all__ = ["node_of", "prefer"]

_MBIND = {"x86_64": 237, "aarch64": 235}  # glibc has no function for this system call
_PREFERRED = 1
_MOST_NODES = 1024


def node_of(device: torch.device, pci: Path = Path("/sys/bus/pci/devices")) -> int | None:
    """The NUMA node that a CUDA device is attached to; None where the system does not say."""
    found: Any = torch.cuda.get_device_properties(device)
    if not all(hasattr(found, f"pci_{part}_id") for part in ("domain", "bus", "device")):  # older versions of torch
        return None
    name = f"{found.pci_domain_id:04x}:{found.pci_bus_id:02x}:{found.pci_device_id:02x}.0"
    try:
        node = int((pci / name / "numa_node").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


def prefer(address: int, nbytes: int, node: int) -> bool:
    """Ask for fresh pages, from a page's address on, to be taken from a node; whether the system agreed."""
    number = _MBIND.get(platform.machine()) if sys.platform == "linux" else None
    if number is None or not 0 <= node < _MOST_NODES:
        return False
    mask = (ctypes.c_ulong * (_MOST_NODES // 64))()
    mask[node // 64] = 1 << (node % 64)
    arguments = (address, nbytes, _PREFERRED, ctypes.addressof(mask), _MOST_NODES, 0)
    return bool(ctypes.CDLL(None).syscall(number, *(ctypes.c_ulong(argument) for argument in arguments)) == 0)
