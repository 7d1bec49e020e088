"""Free host memory and disk, and the check that a job fits host memory."""

from __future__ import annotations

import shutil
from pathlib import Path

import psutil

from headinfer.errors import CapacityError
from headinfer.utils.units import format_bytes

__all__ = ["address_space_limit", "available_host_bytes", "check_host_memory", "free_disk_bytes"]

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")


def available_host_bytes(root: Path = _CGROUPS, own: Path = _OWN_CGROUPS) -> int:
    """Return the bytes of host memory that can be allocated without swapping, within the limits of this process.

    A limit may be set on the process's cgroup or on any above it. The one that leaves the least counts.

    Args:
        root: the folder where the cgroups are mounted; tests pass another one.
        own: the file that names the cgroups of this process.
    """
    available = int(psutil.virtual_memory().available)
    for folder, limit_name, used_name in _memory_cgroups(root, own):
        try:
            limit = (folder / limit_name).read_text().strip()
            used = (folder / used_name).read_text().strip()
        except OSError:  # there is no such cgroup, or it has no memory controller
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


def _memory_cgroups(root: Path, own: Path) -> list[tuple[Path, str, str]]:
    """Return the folders of the cgroups that may limit this process's memory, with the names of two files in each.

    A line of `own` is `0::PATH` for cgroups of version 2, and `NUMBER:CONTROLLERS:PATH` for version 1. A container may
    see only the root, under which its own cgroup is mounted.

    Returns:
        For each cgroup its folder, the name of the file with the limit, and that with the bytes that are used.
    """
    version_2 = ("memory.max", "memory.current")
    version_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    found = [(root, *version_2), (root / "memory", *version_1)]
    try:
        lines = own.read_text().splitlines()
    except OSError:  # not Linux
        return found
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top, names = (root / "memory", version_1) if controllers else (root, version_2)
        inner = Path(path.lstrip("/"))
        if ".." not in inner.parts:  # else the cgroup is above what this container sees
            found += [(top / folder, *names) for folder in (inner, *inner.parents)]
    return found


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
