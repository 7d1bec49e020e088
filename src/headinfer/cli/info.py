"""The command `headinfer info`."""

from __future__ import annotations

import json
from typing import Any

from headinfer.cli.console import show
from headinfer.cli.options import Json
from headinfer.utils.units import format_bytes

__all__ = ["info"]


def info(as_json: Json = False) -> None:
    """Show versions, devices, memory, attention backends and model families of this installation."""
    from headinfer.cli.report import columns_table
    from headinfer.info import gather_info

    found = gather_info()
    if as_json:
        print(json.dumps(found))
        return
    show(columns_table("headinfer", ("", ""), _rows(found), "left"))
    header = ("name", "device", "what it does", "available")
    backends = [tuple(backend.values()) for backend in found["attention_backends"]]
    show(columns_table("attention backends, in the order tried", header, backends, "left"))


def _rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    cpu = found["cpu"]
    gpus = found["cuda_devices"]
    gpu_names = ", ".join(f"{gpu['name']} ({format_bytes(gpu['total_bytes'])})" for gpu in gpus)
    return [
        *found["versions"].items(),
        ("CPU", f"{cpu['name']}, {cpu['cores']} cores, {cpu['capability']}"),
        ("CUDA devices", gpu_names or "none"),
        *(("host memory pinned", _pinning(gpu)) for gpu in gpus),
        ("host memory available", format_bytes(found["memory"]["host_available_bytes"])),
        ("NUMA nodes", found["numa_placement"]),
        ("native decode kernel", found["native_kernel"]),
        ("model families", ", ".join(found["families"])),
    ]


def _pinning(gpu: dict[str, Any]) -> str:
    """Return whether host memory is pinned for a GPU, and on which NUMA node."""
    node = "" if gpu["numa_node"] is None else f", on NUMA node {gpu['numa_node']} if it has enough free memory"
    return f"{gpu['pinned_host_memory']} ({gpu['name']}{node})"
