"""Describes this machine for the planner: its rates and its free memory.

The rates are those that `headinfer probe` measured here. Without a probe they come from the table of devices, and for
an unknown device they are guessed from its cores or multiprocessors. Rates change the speed of a plan only: any plan
gives the same tokens.
"""

from __future__ import annotations

import dataclasses
import os
import re

import psutil
import torch

from headinfer.errors import UsageError
from headinfer.plan.hardware import HARDWARE, Hardware, find_hardware, probe_path
from headinfer.utils.values import shown

__all__ = ["chosen_device", "device_name", "free_device_bytes", "this_machine"]

_CORE_FLOPS_PER_S = 3e9 * 32  # two 256-bit multiply-adds in float32 per cycle, at 3 GHz
_MULTIPROCESSOR_FLOPS_PER_S = 1e12  # tensor cores in a half type: about those of an RTX 30 card


def chosen_device(name: str) -> torch.device:
    """Return the device that a --device option names.

    Args:
        name: cpu, cuda, cuda:N, or auto, which is CUDA if there is any.

    Returns:
        The CPU, or a CUDA device; `cuda` has no index.

    Raises:
        UsageError: there is no such device.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if count else "cpu")
    found = re.fullmatch(r"cpu|cuda(?::(\d{1,4}))?", name)
    if found is None:
        raise UsageError(f"--device is {shown(name)}: choose cpu, cuda, cuda:N or auto")
    if name != "cpu" and not count:
        raise UsageError(f"--device is {name}: this torch ({torch.__version__}) sees no CUDA device; use --device cpu")
    if found[1] is not None and int(found[1]) >= count:
        devices = "cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        raise UsageError(f"--device is {name}: this machine has {devices}; choose cpu or one of them")
    return torch.device(name if found[1] is None else f"cuda:{int(found[1])}")


def device_name(device: torch.device) -> str:
    """Return the name of a device, under which its probe is stored."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"this CPU, {psutil.cpu_count(logical=False) or psutil.cpu_count() or 1} cores"


def free_device_bytes(device: torch.device) -> int:
    """Return the bytes of a CUDA device that this process can still allocate.

    These are the bytes that no process uses and those that torch has cached, within the share that torch may use
    (torch.cuda.set_per_process_memory_fraction).
    """
    if device.index is None:  # some functions of torch need an index
        device = torch.device("cuda", torch.cuda.current_device())
    free, total = torch.cuda.mem_get_info(device)
    allocated = torch.cuda.memory_allocated(device)
    share = round(torch.cuda.get_per_process_memory_fraction(device) * total)
    return int(max(min(free + torch.cuda.memory_reserved(device), share) - allocated, 0))


def this_machine(device: torch.device) -> Hardware:
    """Return the probed, listed or guessed rates of a device of this machine, and its memory."""
    name = device_name(device)
    if os.path.isfile(probe_path()):
        probed = Hardware.load(probe_path())
        if probed.name == name:
            return probed
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        try:
            listed = find_hardware(name)
        except UsageError:
            listed = dataclasses.replace(
                HARDWARE["rtx3090"],
                source="guessed from the number of multiprocessors",
                flops_per_s={
                    dtype: found.multi_processor_count * _MULTIPROCESSOR_FLOPS_PER_S * share
                    for dtype, share in (("bfloat16", 1.0), ("float16", 1.0), ("float32", 0.5))
                },
            )
        return dataclasses.replace(
            listed,
            name=name,
            device_memory_bytes=found.total_memory,
            multiprocessors=found.multi_processor_count,
        )
    cores = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    return dataclasses.replace(
        HARDWARE["laptop-cpu"],
        name=name,
        source="guessed from the number of cores",
        flops_per_s=dict.fromkeys(("bfloat16", "float16", "float32"), cores * _CORE_FLOPS_PER_S),
        device_memory_bytes=psutil.virtual_memory().total,
    )
