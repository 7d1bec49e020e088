"""Facts about this installation and this machine: versions, devices, memory, backends, model families."""

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
from headinfer.attention.backends import BACKENDS, SDPA, Problem, capability_of
from headinfer.attention.problem import AMX
from headinfer.kv.byte_counter import ByteCounter
from headinfer.kv.host_memory import HostTier
from headinfer.kv.numa import memory_nodes, node_of, placement
from headinfer.plan.families import SUPPORTED_FAMILIES
from headinfer.plan.memory import available_host_bytes
from headinfer.utils.units import format_bytes

__all__ = ["accelerator", "gather_info", "machine", "pinning"]

_TRIAL_BYTES = 256 * 2**20  # pinned to see whether the system allows it
_DRIVER = Path("/proc/driver/nvidia/version")

_SDPA = {
    "name": SDPA,
    "device": "any",
    "what": "torch's scaled_dot_product_attention: a decode step whose KV is one piece on the device",
    "available": "yes",
}


def gather_info() -> dict[str, Any]:
    """Collect what `headinfer info` shows.

    Returns:
        A dictionary that json.dumps() accepts: versions, cpu, cuda_devices, memory, numa_nodes, numa_placement,
        native_kernel, attention_backends and families.
    """
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
        "numa_nodes": len(memory_nodes()) or 1,
        "numa_placement": placement(memory_nodes(), has_gpu=torch.cuda.is_available()),
        "native_kernel": native.summary(),
        "attention_backends": [_SDPA, *(_backend(backend) for backend in BACKENDS)],
        "families": list(SUPPORTED_FAMILIES),
    }


def machine() -> str:
    """Describe the machine and its versions in one line, the GPUs first. Result files contain it."""
    found = gather_info()
    cpu = found["cpu"]
    versions = found["versions"]
    gpus = [f"{gpu['name']} ({format_bytes(gpu['total_bytes'])})" for gpu in found["cuda_devices"]]
    parts = [
        *gpus,
        f"{cpu['name']}, {cpu['cores']} cores, {cpu['capability']}",
        f"{format_bytes(found['memory']['host_total_bytes'])} RAM",
        platform.system(),
        f"torch {versions['torch']}, transformers {versions['transformers']}",
    ]
    if gpus:
        parts.append(f"CUDA {versions['cuda']}, driver {versions['driver']}")
    return ", ".join(parts)


def accelerator(device: torch.device) -> dict[str, Any]:
    """Describe the device that computes, for result files.

    Args:
        device: the CPU or a CUDA device.

    Returns:
        For a CUDA device name, total_bytes, free_bytes, capability, numa_node, pinned_host_memory, driver and cuda;
        for the CPU name and total_bytes. total_bytes is the memory of the device, even if a process is limited to
        less.
    """
    if device.type == "cuda":
        index = device.index if device.index is not None else torch.cuda.current_device()
        return {**_cuda_device(index), "driver": driver_version(), "cuda": torch.version.cuda}
    return {"name": f"CPU, {_cpu_name()}", "total_bytes": int(psutil.virtual_memory().total)}


def driver_version(path: Path = _DRIVER) -> str:
    """Return the version of the NVIDIA driver, from the file of its kernel module; "unknown" if it cannot be read."""
    try:
        words = path.read_text(encoding="utf-8").splitlines()[0].split()
    except (OSError, IndexError):
        return "unknown"
    return next((word for word in words if word.replace(".", "").isdigit() and "." in word), "unknown")


def _backend(backend: Any) -> dict[str, str]:
    """Return name, device and summary of an attention backend, and whether it serves a typical problem here."""
    device_type = "cpu" if backend.device_type == "any" else backend.device_type
    dtype = torch.float32 if backend.name == "cuda-efficient" else torch.bfloat16
    if device_type == "cuda" and not torch.cuda.is_available():
        reason: str | None = "no CUDA device"
    elif device_type == "cuda":  # a chunk on itself (rows is 0), which every CUDA kernel supports
        capability = capability_of(torch.device("cuda"))
        reason = backend.refuses(Problem(device_type, dtype, 0, 128, 128, capability=capability))
    else:  # decode (one query row), which has a CPU kernel of its own
        reason = backend.refuses(Problem(device_type, dtype, 1, 128, 128, capability=(0, 0)))
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
    """Return "yes" if the system pins host memory for a CUDA device, else "no" with the reason and what happens."""
    tier = HostTier(ByteCounter(), device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the returned text says the same
        tier.allocate((_TRIAL_BYTES,), torch.uint8)
    if not tier.pin_refusal:
        return "yes"
    return f"no, KV goes to the device through a few buffers: {tier.pin_refusal}"


def _cpu_capability() -> str:
    """Return the widest vector instructions that torch uses, and AMX if the CPU has it."""
    vectors = torch.backends.cpu.get_cpu_capability()
    return f"{vectors} and AMX" if capability_of(torch.device("cpu")) == AMX else vectors


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
