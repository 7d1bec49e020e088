"""The plan of a run on this machine, with the memory that is free now.

A RunPlan is what travels from the command line or enable() to the engine: the user's options, the plan that was made
with them, and the options of the cache that follow from both. This module alone checks whether a run fits: plan_run()
for a new context, check_saved_kv() for one that a session holds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from headinfer.engine.machine import free_device_bytes, this_machine
from headinfer.engine.options import Options
from headinfer.errors import CapacityError
from headinfer.kv.host_memory import finish_release
from headinfer.plan.footprint import exchange_bytes, tail_bytes, weight_bytes, write_back_bytes
from headinfer.plan.hardware import Hardware
from headinfer.plan.memory import available_host_bytes, check_host_memory, free_disk_bytes
from headinfer.plan.model_shape import ModelShape
from headinfer.plan.planner import Plan, make_plan
from headinfer.plan.request import Request
from headinfer.plan.tiles import DEFAULT_BUDGET_BYTES, FixedTile, LayerWork, check_tiles, ring_slot_bytes
from headinfer.utils.files import check_folder
from headinfer.utils.kv_format import kv_bits
from headinfer.utils.units import format_bytes

__all__ = ["RunPlan", "RunRequest", "check_saved_kv", "engine_options", "plan_run", "tightest"]

_OTHER_KV_BYTES = 512 * 2**20  # device memory that is left to the KV and activations of a draft model
_HOST_OVERHEAD_BYTES = 256 * 2**20  # beside weights and KV, for a process that is running already


@dataclass(frozen=True)
class RunRequest:
    """A run to be planned.

    Attributes:
        shape: the model, or this rank's share of it.
        device: the device that computes.
        dtype: the dtype of weights and KV.
        context_tokens: tokens of the prompt and the answer.
        options: the user's options.
        chunk_tokens: tokens of a prefill chunk; None is planned.
        rows: rows of the batch.
        ranks_on_host: number of processes that share the host's memory.
        keeps_resident: whether tokens may stay on the device.
        is_loaded: whether the weights are in memory already.
        held_device_bytes: device bytes of KV of this context that exist already.
        held_host_bytes: host bytes of KV of this context that exist already.
        host_weight_bytes: weights that will be loaded into host memory; None if the check of host memory is left to
            the planner.
        other_model_bytes: weights of a draft model that will be loaded too.
        session_root: the folder of sessions, if the context is saved to one.
        saved_tokens: tokens of the context that the session holds already.
    """

    shape: ModelShape
    device: torch.device
    dtype: torch.dtype
    context_tokens: int
    options: Options = dataclasses.field(default_factory=Options)
    chunk_tokens: int | None = None
    rows: int = 1
    ranks_on_host: int = 1
    keeps_resident: bool = True
    is_loaded: bool = False
    held_device_bytes: int = 0
    held_host_bytes: int = 0
    host_weight_bytes: int | None = None
    other_model_bytes: int = 0
    session_root: Path | None = None
    saved_tokens: int = 0

    @cached_property
    def sparse_shape(self) -> ModelShape:
        """The model with the streaming heads of the options."""
        return self.shape.with_pattern(self.options.sparse_heads)

    @property
    def stored_bytes_per_token(self) -> int:
        """Bytes of one token of one row where KV is stored: in host memory, on a disk or in a session."""
        return self.sparse_shape.stored_bytes_per_token(self.dtype.itemsize, kv_bits(self.options.kv_dtype))

    @property
    def dtype_name(self) -> str:
        """The dtype as the planner names it, such as bfloat16."""
        return str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class RunPlan:
    """What a run will do.

    Attributes:
        plan: the plan, with its predictions.
        options: the options of the cache: the user's, with what they leave open taken from the plan. With them a run
            repeats the same arithmetic.
    """

    plan: Plan
    options: Options

    @property
    def chunk_tokens(self) -> int:
        """Tokens of a prefill chunk."""
        return self.plan.chunk_tokens


def plan_run(run: RunRequest) -> RunPlan:
    """Plan a run with the memory that is free now, and check that it fits.

    What the device has free beside weights, activations and a reserve (Hardware.overhead_bytes) is for KV.

    Raises:
        CapacityError: the run does not fit. The message says what would fit.
        UsageError: an option is out of range for the model, or the folder of the disk tier is not writable.
    """
    options = run.options
    if run.host_weight_bytes is not None:
        check_host_memory(
            run.context_tokens,
            run.stored_bytes_per_token,
            run.host_weight_bytes + (run.other_model_bytes if run.device.type == "cpu" else 0),
            available=_free_host_bytes() // run.ranks_on_host,
            kv_budget=options.host_kv_budget_bytes,
        )
    plan = make_plan(_planner_request(run))
    _check_session_disk(run)
    chosen = engine_options(options, plan)
    if not run.is_loaded:
        _check_tiles(run, chosen, plan.chunk_tokens)
    return RunPlan(plan, chosen)


def check_saved_kv(tokens: int, nbytes: int, weight_bytes: int, options: Mapping[str, Any], *, is_mapped: bool) -> int:
    """Check that the KV of a session fits this machine.

    Args:
        tokens: tokens of the session.
        nbytes: bytes of its data files.
        weight_bytes: weights that will be loaded into host memory.
        options: the fields of Options that replace those of the session.
        is_mapped: whether KV can be read where it is mapped, so that host memory need not hold all of it.

    Returns:
        The bytes of KV that host memory will hold.

    Raises:
        CapacityError: host memory or the disk tier does not hold the KV.
        UsageError: the folder of the disk tier is not writable.
    """
    budget_bytes = options.get("host_kv_budget_bytes")
    free_bytes = _free_host_bytes()
    if budget_bytes is not None or not is_mapped:
        token_bytes = -(-nbytes // tokens)
        check_host_memory(tokens, token_bytes, weight_bytes, available=free_bytes, kv_budget=budget_bytes)
    if budget_bytes is not None and options.get("disk_tier") is not None:
        folder = Path(options["disk_tier"])
        check_folder(folder, "keep KV")
        free_disk = free_disk_bytes(folder)
        over_bytes = nbytes - budget_bytes
        if over_bytes > free_disk:
            raise CapacityError(
                f"{format_bytes(over_bytes)} of KV exceed the host budget and {folder} has {format_bytes(free_disk)} "
                "free: raise --host-kv-budget, or name another folder with --disk-tier"
            )
    kept_bytes = min(free_bytes - weight_bytes, nbytes if budget_bytes is None else budget_bytes)
    return max(kept_bytes, 0)


def _free_host_bytes() -> int:
    """Return the free host memory, with that of caches that no longer exist."""
    finish_release()
    return available_host_bytes()


def _check_session_disk(run: RunRequest) -> None:
    """Check that the disk holds what a session will write."""
    if run.session_root is None:
        return
    nbytes = (run.context_tokens - run.saved_tokens) * run.stored_bytes_per_token
    free_bytes = free_disk_bytes(run.session_root)
    if nbytes > free_bytes:
        raise CapacityError(
            f"the session needs {format_bytes(nbytes)} on disk and {run.session_root} has {format_bytes(free_bytes)} "
            "free: choose another folder with --sessions, or a shorter document"
        )


def engine_options(options: Options, plan: Plan) -> Options:
    """Return the user's options, with what they leave open taken from a plan."""
    machine = plan.request.hardware
    if machine.is_host:
        return options  # segments are read in place; a ring on a CPU, for tests, has its own defaults
    return dataclasses.replace(
        options,
        device_kv_budget_bytes=plan.device_kv_budget_bytes,
        streaming_budget_bytes=plan.streaming_budget_bytes,
        rates=options.rates or machine.tile_rates(plan.request.dtype),
        **_cpu_options(options, plan),
    )


def _cpu_options(options: Options, plan: Plan) -> dict[str, Any]:
    """Return the plan's share of the host's CPU, if the user leaves it open and the plan gives the CPU a share.

    Otherwise the engine decides, which gives the CPU all that cannot be pinned.
    """
    if options.cpu_share is not None or not plan.cpu_share:
        return {}
    return {"cpu_share": plan.cpu_share, "cpu_rows": plan.query_rows}


def _planned_share(run: RunRequest, machine: Hardware) -> float | None:
    """Return the share of the CPU for the planner: the user's, or None if the planner may choose one."""
    options = run.options
    if machine.is_host:
        return 0.0
    if options.cpu_share is not None:
        return options.cpu_share
    is_alone = run.ranks_on_host == 1 and options.disk_tier is None
    return None if is_alone and machine.cpu_beside_link_bytes_per_s else 0.0


def tightest(devices: Iterable[torch.device]) -> torch.device | None:
    """Return the CUDA device with the least free memory. The plan of a model on several devices must fit it."""
    return min(devices, key=free_device_bytes, default=None)


def _planner_request(run: RunRequest) -> Request:
    """Return the request to the planner: this machine, with the memory that is free now."""
    options = run.options
    machine = this_machine(run.device)
    name = run.dtype_name
    if name not in machine.flops_per_s:  # a device without bfloat16 computes in float32
        rates = {**machine.flops_per_s, name: machine.flops_per_s["float32"]}
        machine = dataclasses.replace(machine, flops_per_s=rates)
    loaded_bytes = weight_bytes(run.shape, 8 * run.dtype.itemsize) if run.is_loaded else 0
    host_bytes = _free_host_bytes() // run.ranks_on_host + run.held_host_bytes
    device_bytes: int | None = None
    if machine.is_host:
        machine = dataclasses.replace(machine, overhead_bytes=_HOST_OVERHEAD_BYTES)
        host_bytes += loaded_bytes + run.held_device_bytes - run.other_model_bytes
    else:
        others = run.other_model_bytes + (_OTHER_KV_BYTES if run.other_model_bytes else 0)
        device_bytes = max(free_device_bytes(run.device) + loaded_bytes + run.held_device_bytes - others, 1)
    disk_bytes = 0
    if options.disk_tier is not None:
        folder = Path(options.disk_tier)
        check_folder(folder, "keep KV")
        disk_bytes = free_disk_bytes(folder)
    return Request(
        shape=run.shape,
        hardware=machine,
        context_tokens=run.context_tokens,
        host_bytes=max(host_bytes, 1),
        device_bytes=device_bytes,
        disk_bytes=disk_bytes,
        host_kv_budget_bytes=options.host_kv_budget_bytes,
        rows=run.rows,
        dtype=name,
        chunk_tokens=run.chunk_tokens,
        heads_per_group=options.heads_per_group,
        tile_tokens=options.tile_tokens,
        device_kv_budget_bytes=options.device_kv_budget_bytes,
        streaming_budget_bytes=options.streaming_budget_bytes,
        keeps_resident=run.keeps_resident,
        cpu_share=_planned_share(run, machine),
        kv_dtype=options.kv_dtype,
        sparse_heads=options.sparse_heads,
    )


def _check_tiles(run: RunRequest, options: Options, chunk_tokens: int) -> None:
    """Check that tiles can be chosen for the last chunk of a prefill and for a decode step.

    Raises:
        CapacityError: the device budget holds no ring, or a slot holds no tile.
        UsageError: a fixed tile is out of range for the model.
    """
    element_bytes = run.dtype.itemsize
    shape = run.sparse_shape
    layers = [shape.layers[index].full_part for index in shape.offloaded_layers]
    layer = max(layers, key=lambda layer: layer.full_heads)
    tails = sum(tail_bytes(shape, element_bytes)) + shape.window_bytes(element_bytes)
    budget_bytes = options.device_kv_budget_bytes or DEFAULT_BUDGET_BYTES
    streaming_bytes = min(options.streaming_budget_bytes or DEFAULT_BUDGET_BYTES, budget_bytes)
    exchange = exchange_bytes(shape, element_bytes, 1, run.rows) if options.cpu_share else 0
    slot_bytes = ring_slot_bytes(streaming_bytes, tails + 2 * write_back_bytes(streaming_bytes) + exchange)
    fixed = FixedTile(options.heads_per_group, options.tile_tokens)
    for query_tokens in (chunk_tokens, 1):
        work = LayerWork.of_layer(
            layer,
            element_bytes,
            rows=1,
            query_tokens=query_tokens,
            past_tokens=run.context_tokens,
            bits=kv_bits(options.kv_dtype),
        )
        check_tiles(work, slot_bytes, fixed)
