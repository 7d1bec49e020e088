"""What this installation and machine can do."""

from __future__ import annotations

import os
import platform
import warnings
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

import headinfer
from headinfer.attention import native
from headinfer.attention.backends import BACKENDS, Problem, capability_of
from headinfer.attention.problem import AMX
from headinfer.hf.families import SUPPORTED_FAMILIES
from headinfer.kv.byte_counter import ByteCounter
from headinfer.kv.numa import node_of
from headinfer.kv.tiers import HostTier
from headinfer.plan.memory import available_host_bytes
from headinfer.utils.units import format_bytes

__all__ = ["accelerator", "gather_info", "machine", "pinning"]

_TRIAL_BYTES = 256 * 2**20
_DRIVER = Path("/proc/driver/nvidia/version")
_NUMA_NODES = Path("/sys/devices/system/node")


def gather_info() -> dict[str, Any]:
    """Versions, devices, memory, attention backends and served families, ready for JSON."""
    return {
        "versions": {
            "headinfer": headinfer.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "cuda": torch.version.cuda or "none",
            "driver": driver_version(),
        },
        "cpu": {
            "name": _cpu_name(),
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "capability": _cpu_capability(),
        },
        "cuda_devices": [_cuda_device(index) for index in range(torch.cuda.device_count())],
        "memory": {
            "host_total_bytes": int(psutil.virtual_memory().total),
            "host_available_bytes": available_host_bytes(),
        },
        "numa_nodes": len(list(_NUMA_NODES.glob("node[0-9]*"))) or 1,
        "native_kernel": native.unavailable_reason() or "built",
        "attention_backends": [_backend(backend) for backend in BACKENDS],
        "families": list(SUPPORTED_FAMILIES),
    }


def machine() -> str:
    """One line that names the machine and the versions, its GPUs first."""
    found = gather_info()
    gpus = "".join(f"{gpu['name']} ({format_bytes(gpu['total_bytes'])}), " for gpu in found["cuda_devices"])
    versions = found["versions"]
    below = f", CUDA {versions['cuda']}, driver {versions['driver']}" if gpus else ""
    return (
        f"{gpus}{found['cpu']['name']}, {found['cpu']['cores']} cores, {found['cpu']['capability']}, "
        f"{format_bytes(found['memory']['host_total_bytes'])} RAM, {platform.system()}, "
        f"torch {versions['torch']}, transformers {versions['transformers']}{below}"
    )


def accelerator(device: torch.device) -> dict[str, Any]:
    """What computes: a CUDA device's name, total_bytes, capability and NUMA node, with its driver; or the CPU's name.

    The bytes are the device's own, whatever a process is held to.
    """
    if device.type == "cuda":
        index = device.index if device.index is not None else torch.cuda.current_device()
        return {**_cuda_device(index), "driver": driver_version(), "cuda": torch.version.cuda}
    return {"name": f"CPU, {_cpu_name()}", "total_bytes": int(psutil.virtual_memory().total)}


def driver_version(path: Path = _DRIVER) -> str:
    """The NVIDIA driver's version as its kernel module tells it; "unknown" where it does not."""
    try:
        words = path.read_text(encoding="utf-8").splitlines()[0].split()
    except (OSError, IndexError):
        return "unknown"
    return next((word for word in words if word.replace(".", "").isdigit() and "." in word), "unknown")


def _backend(backend: Any) -> dict[str, str]:
    device_type = "cpu" if backend.device_type == "any" else backend.device_type
    dtype = torch.float32 if backend.name == "cuda-efficient" else torch.bfloat16
    if device_type == "cuda" and not torch.cuda.is_available():
        reason: str | None = "no CUDA device"
    else:  # on CUDA the chunk on itself, which every kernel there does; on CPUs decode, which has a kernel of its own
        rows, capability = (0, capability_of(torch.device("cuda"))) if device_type == "cuda" else (1, (0, 0))
        reason = backend.refuses(Problem(device_type, dtype, rows, 128, 128, capability=capability))
    return {
        "name": backend.name,
        "device": backend.device_type,
        "what": backend.summary,
        "available": "yes" if reason is None else f"no: {reason}",
    }


def _cuda_device(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    free_bytes, _ = torch.cuda.mem_get_info(index)
    device = torch.device("cuda", index)
    return {
        "name": properties.name,
        "total_bytes": properties.total_memory,
        "free_bytes": free_bytes,
        "capability": f"{properties.major}.{properties.minor}",
        "numa_node": node_of(device),
        "pinned_host_memory": pinning(device),
    }


def pinning(device: torch.device) -> str:
    """Whether the system pins host memory for a device: "yes", or why not and what serves instead."""
    tier = HostTier(ByteCounter(), device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it is said here
        tier.allocate((_TRIAL_BYTES,), torch.uint8)
    if not tier.pin_refusal:
        return "yes"
    return f"no, KV goes to the device through a few buffers: {tier.pin_refusal}"


def _cpu_capability() -> str:
    """The widest vectors that torch uses, and matrix units where there are any."""
    vectors = torch.backends.cpu.get_cpu_capability()
    return f"{vectors} and AMX" if capability_of(torch.device("cpu")) == AMX else vectors


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
