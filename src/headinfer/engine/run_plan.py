"""The plan of a run on this machine, with the memory that is free now, and the engine's options that follow from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from headinfer.engine.machine import free_device_bytes, this_machine
from headinfer.engine.options import Options
from headinfer.plan.footprint import weight_bytes
from headinfer.plan.memory import available_host_bytes, free_disk_bytes
from headinfer.plan.model_shape import ModelShape
from headinfer.plan.planner import Plan, make_plan
from headinfer.plan.request import Request
from headinfer.utils.files import check_folder

__all__ = ["fixed_fields", "plan_run", "planned", "tightest"]

_HOST_OVERHEAD_BYTES = 256 * 2**20  # the process runs already: what is left to come beside weights and KV


def plan_run(
    shape: ModelShape,
    device: torch.device,
    dtype: torch.dtype,
    context_tokens: int,
    *,
    rows: int = 1,
    ranks_on_host: int = 1,
    held_device_bytes: int = 0,
    held_host_bytes: int = 0,
    is_loaded: bool = False,
    fixed: Mapping[str, Any] | None = None,
) -> Plan:
    """The plan for reading `context_tokens` tokens on a device of this machine, with the memory that is free now.

    is_loaded: the weights lie there already. held_device_bytes, held_host_bytes: KV of these tokens that does too.
    ranks_on_host: processes that share the host's memory. fixed: fields of Request that the user chose, and disk_tier.
    What the device has free beside weights, activations and a reserve (Hardware.overhead_bytes) is for KV. Raises
    CapacityError with what would fit, and UsageError for a disk_tier that cannot be written to.
    """
    machine, name = this_machine(device), str(dtype).removeprefix("torch.")
    if name not in machine.flops_per_s:  # a device without bfloat16 computes in float32
        machine = dataclasses.replace(
            machine, flops_per_s={**machine.flops_per_s, name: machine.flops_per_s["float32"]}
        )
    loaded = weight_bytes(shape, 8 * dtype.itemsize) if is_loaded else 0
    host_bytes, device_bytes = available_host_bytes() // ranks_on_host + held_host_bytes, None
    if machine.is_host:
        machine = dataclasses.replace(machine, overhead_bytes=_HOST_OVERHEAD_BYTES)
        host_bytes += loaded + held_device_bytes
    else:
        device_bytes = free_device_bytes(device) + loaded + held_device_bytes
    fixed = dict(fixed or {})
    folder = fixed.pop("disk_tier", None)
    if folder is not None:
        check_folder(Path(folder), "keep KV")
    request = Request(
        shape=shape,
        hardware=machine,
        context_tokens=context_tokens,
        host_bytes=max(host_bytes, 1),
        disk_bytes=free_disk_bytes(Path(folder)) if folder is not None else 0,
        device_bytes=device_bytes,
        rows=rows,
        dtype=name,
        **fixed,
    )
    return make_plan(request)


def tightest(devices: Iterable[torch.device]) -> torch.device | None:
    """The CUDA device with the least free memory, which a model's plan must fit where it lies on several."""
    return min(devices, key=free_device_bytes, default=None)


def fixed_fields(options: Options, chunk_tokens: int | None) -> dict[str, Any]:
    """What a user's options leave no choice about, as fields of a Request."""
    return {
        "chunk_tokens": chunk_tokens,
        "heads_per_group": options.heads_per_group,
        "tile_tokens": options.tile_tokens,
        "device_kv_budget_bytes": options.device_kv_budget_bytes,
        "streaming_budget_bytes": options.streaming_budget_bytes,
        "host_kv_budget_bytes": options.host_kv_budget_bytes,
        "disk_tier": options.disk_tier,
    }


def planned(options: Options, plan: Plan) -> Options:
    """The options with what they leave open taken from a plan: with them, a run does the same arithmetic again."""
    machine = plan.request.hardware
    if machine.is_host:
        return options  # segments are read in place; a ring that stands for a GPU's keeps its own defaults
    return dataclasses.replace(
        options,
        device_kv_budget_bytes=plan.device_kv_budget_bytes,
        streaming_budget_bytes=plan.streaming_bytes,
        rates=options.rates or machine.tile_rates(plan.request.dtype),
    )
