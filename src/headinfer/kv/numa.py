"""NUMA placement on a host with several nodes.

Transfers are fastest from the node that a GPU is attached to. If the CPU computes, pages are interleaved among the
nodes, so that its threads read with the bandwidth of all of them.

Placement is only a preference. If the system does not support it or does not allow it, memory is allocated as usual.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

__all__ = ["interleave", "memory_nodes", "node_of", "placement", "prefer"]

_MBIND = {"x86_64": 237, "aarch64": 235}  # system call numbers, because glibc has no function for mbind
_MPOL_PREFERRED = 1
_MPOL_INTERLEAVE = 3
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
    return _bind(address, nbytes, _MPOL_PREFERRED, [node])


def interleave(address: int, nbytes: int, nodes: Sequence[int]) -> bool:
    """Ask the system to take the pages of a memory range from several NUMA nodes in turn; see prefer()."""
    return _bind(address, nbytes, _MPOL_INTERLEAVE, nodes)


def memory_nodes(folder: Path = Path("/sys/devices/system/node")) -> list[int]:
    """Return the NUMA nodes that have memory, or an empty list if the system does not report them.

    Args:
        folder: the system's folder of nodes; tests pass another one.
    """
    try:
        text = (folder / "has_memory").read_text(encoding="ascii").strip()
        ends = [[int(end) for end in part.split("-")] for part in text.split(",") if part]  # such as "0-1,4"
    except (OSError, ValueError):
        return []
    return [node for part in ends for node in range(part[0], part[-1] + 1)]


def placement(nodes: Sequence[int], *, has_gpu: bool) -> str:
    """Say in a few words on which NUMA nodes KV in host memory is placed."""
    if len(nodes) < 2:
        return "1"
    where = "KV is placed on the node of the GPU" if has_gpu else "the pages of KV are interleaved among them"
    return f"{len(nodes)}: {where}"


def _bind(address: int, nbytes: int, mode: int, nodes: Sequence[int]) -> bool:
    """Call mbind() for a memory range. Returns whether the system accepted it."""
    number = _MBIND.get(platform.machine()) if sys.platform == "linux" else None
    if number is None or not all(0 <= node < _MAX_NODES for node in nodes):
        return False
    mask = (ctypes.c_ulong * (_MAX_NODES // 64))()
    for node in nodes:
        mask[node // 64] |= 1 << (node % 64)
    arguments = (address, nbytes, mode, ctypes.addressof(mask), _MAX_NODES, 0)
    return bool(ctypes.CDLL(None).syscall(number, *(ctypes.c_ulong(argument) for argument in arguments)) == 0)
