"""Free host memory and disk, and the check that a job fits host memory."""

from __future__ import annotations

import shutil
from pathlib import Path

import psutil

from headinfer.errors import CapacityError
from headinfer.utils.units import format_bytes

__all__ = ["address_space_limit", "available_host_bytes", "check_host_memory", "free_disk_bytes"]

_CGROUP = Path("/sys/fs/cgroup")


def available_host_bytes(cgroup: Path = _CGROUP) -> int:
    """Return the bytes of host memory that can be allocated without swapping, within the limits of this process.

    Args:
        cgroup: the folder of the cgroup; tests pass another one.
    """
    available = int(psutil.virtual_memory().available)
    for limit_name, used_name in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            limit = (cgroup / limit_name).read_text().strip()
            used = (cgroup / used_name).read_text().strip()
        except OSError:  # there is no cgroup of this version
            continue
        if limit != "max":
            available = min(available, max(int(limit) - int(used), 0))
    address_space = address_space_limit()
    if address_space is not None:
        available = min(available, max(address_space - psutil.Process().memory_info().vms, 0))
    return available


def address_space_limit() -> int | None:
    """Return the bytes of address space that this process may have (ulimit -v); None if there is no limit."""
    try:
        import resource
    except ImportError:  # this system has no such limits
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if soft == resource.RLIM_INFINITY else soft


def free_disk_bytes(folder: Path) -> int:
    """Return the free bytes on the disk of a folder, which need not exist yet."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(nearest).free


def check_host_memory(
    tokens: int,
    token_bytes: int,
    other_bytes: int,
    *,
    available: int | None = None,
    other_name: str = "weights",
    kv_budget: int | None = None,
) -> None:
    """Check that the KV of a job and other data fit host memory.

    Args:
        tokens: tokens of each row.
        token_bytes: KV bytes of one token, over all offloaded layers and rows.
        other_bytes: bytes of the other data.
        available: bytes of host memory that are available; None to measure them.
        other_name: what the other data are, for the message.
        kv_budget: bytes of KV that host memory may hold while a disk holds the rest; None without a disk tier.

    Raises:
        CapacityError: the data do not fit. The message says how many tokens would fit.
    """
    free_bytes = available_host_bytes() if available is None else available
    beside = f" and {format_bytes(other_bytes)} for {other_name}" if other_bytes else ""
    if kv_budget is not None and min(kv_budget, tokens * token_bytes) + other_bytes > free_bytes:
        raise CapacityError(
            f"a host KV budget of {format_bytes(kv_budget)}{beside} exceeds the {format_bytes(free_bytes)} of host "
            "memory that are available: lower it"
        )
    if kv_budget is not None or tokens * token_bytes + other_bytes <= free_bytes:
        return
    fits = max(free_bytes - other_bytes, 0) // max(token_bytes, 1)
    advice = f"at most {fits:,} tokens fit" if fits else "free some memory, or use a machine with more"
    advice += "; --host-kv-budget with --disk-tier keeps the rest on a disk"
    raise CapacityError(
        f"{tokens:,} tokens need {format_bytes(tokens * token_bytes)} of host memory for their KV cache{beside}, "
        f"and {format_bytes(free_bytes)} are available: {advice}"
    )
