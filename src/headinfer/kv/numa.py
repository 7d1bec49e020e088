"""NUMA placement: on a host with several nodes, transfers are fastest from the node that the device is attached to.

Placement is only a preference. If the system does not support it or does not allow it, memory is allocated as usual.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from pathlib import Path
from typing import Any

import torch

__all__ = ["node_of", "prefer"]

_MBIND = {"x86_64": 237, "aarch64": 235}  # system call numbers, because glibc has no function for mbind
_MPOL_PREFERRED = 1
_MAX_NODES = 1024


def node_of(device: torch.device, pci: Path = Path("/sys/bus/pci/devices")) -> int | None:
    """Return the NUMA node that a CUDA device is attached to, or None if the system does not report it.

    Args:
        device: the CUDA device.
        pci: the folder of PCI devices; tests pass another one.
    """
    properties: Any = torch.cuda.get_device_properties(device)
    if not all(hasattr(properties, f"pci_{part}_id") for part in ("domain", "bus", "device")):  # older torch
        return None
    name = f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
    try:
        node = int((pci / name / "numa_node").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


def prefer(address: int, nbytes: int, node: int) -> bool:
    """Ask the system to take the pages of a memory range from a NUMA node when they are first touched.

    Args:
        address: the first byte, at the beginning of a page.
        nbytes: the size of the range.
        node: the preferred node.

    Returns:
        Whether the system accepted the preference.
    """
    number = _MBIND.get(platform.machine()) if sys.platform == "linux" else None
    if number is None or not 0 <= node < _MAX_NODES:
        return False
    mask = (ctypes.c_ulong * (_MAX_NODES // 64))()
    mask[node // 64] = 1 << (node % 64)
    arguments = (address, nbytes, _MPOL_PREFERRED, ctypes.addressof(mask), _MAX_NODES, 0)
    return bool(ctypes.CDLL(None).syscall(number, *(ctypes.c_ulong(argument) for argument in arguments)) == 0)
