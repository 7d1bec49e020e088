"""Measures the rates of this machine for the planner, with torch and with headinfer's own kernels.

Each rate is the median of a few calls of a size that inference uses. A data sheet gives peaks, of which a run reaches a
share. A probe measures rates that were reached, so its shares are 1.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from headinfer.attention import native
from headinfer.attention.backends import Problem, capability_of, choose
from headinfer.bench.probe_cpu import cpu_rates
from headinfer.bench.timing import device_timer, median_s, timed
from headinfer.engine.machine import device_name, this_machine
from headinfer.plan.hardware import Hardware

__all__ = ["probe"]

_ROUNDS = 5
_BUFFER_BYTES = 1 << 30
_DISK_BYTES = 1 << 28
_CHUNK_TOKENS = 1024
_PAST_TOKENS = 8192
# A layer of Llama-3-8B: widths of the layer and of its MLP, KV heads, query heads per KV head, and the width of a head.
_HIDDEN = 4096
_WIDTH = 14_336
_HEADS = 8
_GROUP = 4
_DIM = 128
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def probe(device: torch.device, on_stage: Callable[[str], None], folder: Path | None = None) -> Hardware:
    """Measure a device of this machine and the host around it. It takes less than a minute on an idle machine.

    Args:
        device: the device to measure.
        on_stage: called with a line of progress before each stage.
        folder: where a temporary file of 256 MiB measures the disk. None takes the system's folder for temporary files.
    """
    base = this_machine(device)
    native.summary()  # builds the CPU's kernels ahead of the first run
    on_stage("host memory ...")
    dram_bytes_per_s = _dram_bytes_per_s()
    on_stage("disk ...")
    read_bytes_per_s, write_bytes_per_s = _disk_bytes_per_s(folder)
    on_stage("copies ...")
    if device.type == "cuda":
        device_bytes_per_s = _copy_bytes_per_s(device, device, 2)
        link_bytes_per_s = _copy_bytes_per_s(None, device)
        back_bytes_per_s = _copy_bytes_per_s(device, None)
    else:
        device_bytes_per_s = link_bytes_per_s = back_bytes_per_s = dram_bytes_per_s
    flops: dict[str, float] = {}
    attention: dict[str, float] = {}
    weights: dict[str, float] = {}
    for dtype in _DTYPES:
        name = str(dtype).removeprefix("torch.")
        if device.type == "cuda" and name not in base.flops_per_s:
            continue
        on_stage(f"matrices and attention in {name} ...")
        flops[name] = _matrix_flops_per_s(device, dtype)
        weights[name] = _weight_bytes_per_s(device, dtype)
        attention[name] = _attention_flops_per_s(device, dtype)
    return Hardware(
        name=device_name(device),
        device_memory_bytes=base.device_memory_bytes if device.type == "cuda" else psutil.virtual_memory().total,
        flops_per_s=flops,
        attention_flops_per_s=attention,
        weight_bytes_per_s=weights,
        device_bytes_per_s=device_bytes_per_s,
        kv_bytes_per_s=_kv_bytes_per_s(device),
        link_bytes_per_s=link_bytes_per_s,
        link_back_bytes_per_s=back_bytes_per_s,
        dram_bytes_per_s=dram_bytes_per_s,
        disk_read_bytes_per_s=read_bytes_per_s,
        disk_write_bytes_per_s=write_bytes_per_s,
        multiprocessors=base.multiprocessors,
        is_host=device.type == "cpu",
        launch_s=_launch_s(device),
        blocks_at_once=base.blocks_at_once,
        idle_gain=base.idle_gain,
        block_tokens=base.block_tokens,
        rest_share=base.rest_share,
        overhead_bytes=base.overhead_bytes,
        source=f"headinfer probe, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}",
        compute_share=1.0,
        device_share=1.0,
        link_share=1.0,
        dram_share=1.0,
        **cpu_rates(device, link_bytes_per_s, on_stage),
    )


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Return the median of the seconds of a few calls, with the work that they queue on the device."""
    return median_s(call, device_timer(device), rounds=_ROUNDS)


def _dram_bytes_per_s() -> float:
    buffer = torch.ones(_BUFFER_BYTES // 8, dtype=torch.int64)
    return _BUFFER_BYTES / median_s(buffer.sum, rounds=_ROUNDS)


def _copy_bytes_per_s(source: torch.device | None, target: torch.device | None, touched: int = 1) -> float:
    """Return the bytes per second of one large copy.

    Args:
        source: the device that is read; None: pinned host memory.
        target: the device that is written; None: pinned host memory.
        touched: how often each byte crosses the memory or link that is measured.
    """

    def buffer(device: torch.device | None) -> torch.Tensor:
        if device is not None:
            return torch.ones(_BUFFER_BYTES // 4, dtype=torch.uint8, device=device)
        return torch.ones(_BUFFER_BYTES // 4, dtype=torch.uint8).pin_memory()

    target_buffer = buffer(target)
    source_buffer = buffer(source)
    device = target if target is not None else source
    assert device is not None
    seconds = _seconds(lambda: target_buffer.copy_(source_buffer, non_blocking=True), device)
    return touched * source_buffer.numel() / seconds


def _disk_bytes_per_s(folder: Path | None) -> tuple[float, float]:
    """Return the bytes per second of sequential reads and writes, without the page cache if the system allows it."""
    part = os.urandom(1 << 22)
    with tempfile.NamedTemporaryFile(dir=folder) as file:

        def write() -> None:
            for _ in range(_DISK_BYTES // len(part)):
                file.write(part)
            file.flush()
            os.fsync(file.fileno())

        def read() -> None:
            while file.read(len(part)):
                pass

        written_s = timed(write)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        return _DISK_BYTES / timed(read), _DISK_BYTES / written_s


def _noise(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)


def _matrix_flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of the product of a chunk and a weight matrix."""
    x = _noise(_CHUNK_TOKENS, _HIDDEN, dtype=dtype, device=device)
    w = _noise(_HIDDEN, _HIDDEN, dtype=dtype, device=device)
    return 2 * _CHUNK_TOKENS * _HIDDEN**2 / _seconds(lambda: torch.nn.functional.linear(x, w), device)


def _weight_bytes_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """Return the bytes per second of the MLP's matrices, which exceed any cache, in their product with one token."""
    up, down = (torch.ones(2, *shape, dtype=dtype, device=device) for shape in ((_WIDTH, _HIDDEN), (_HIDDEN, _WIDTH)))
    x, wide = (_noise(1, width, dtype=dtype, device=device) for width in (_HIDDEN, _WIDTH))

    def multiply() -> None:
        for matrix in up:
            torch.nn.functional.linear(x, matrix)
        for matrix in down:
            torch.nn.functional.linear(wide, matrix)

    return (up.nbytes + down.nbytes) / _seconds(multiply, device)


def _attention_flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a chunk's queries on past keys, by the kernel that the engine chooses."""
    rows = _GROUP * _CHUNK_TOKENS
    q = _noise(_HEADS, rows, _DIM, dtype=dtype, device=device)
    k, v = (_noise(_HEADS, _PAST_TOKENS, _DIM, dtype=dtype, device=device) for _ in range(2))
    attend = choose(Problem(device.type, dtype, rows, _DIM, _DIM, capability=capability_of(device))).attend_full
    return 4 * _HEADS * rows * _PAST_TOKENS * _DIM / _seconds(lambda: attend(q, [(k, v)], 0.1, None), device)


def _kv_bytes_per_s(device: torch.device) -> float:
    """Return the bytes of KV per second that decode reads, in bfloat16, or in float16 on a GPU without bfloat16."""
    has_bfloat16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = torch.bfloat16 if has_bfloat16 else torch.float16
    q = _noise(_HEADS, _GROUP, _DIM, dtype=dtype, device=device)
    k, v = (torch.ones(_HEADS, 16 * _PAST_TOKENS, _DIM, dtype=dtype, device=device) for _ in range(2))
    attend = choose(Problem(device.type, dtype, _GROUP, _DIM, _DIM, capability=capability_of(device))).attend_full
    return (k.nbytes + v.nbytes) / _seconds(lambda: attend(q, [(k, v)], 0.1, None), device)


def _launch_s(device: torch.device) -> float:
    """Return host seconds to queue one small kernel, called through modules as in a model."""
    x = torch.ones(1, 64, device=device)
    block = torch.nn.Sequential(*(torch.nn.Linear(64, 64), torch.nn.SiLU()) * 50).to(device)
    with torch.inference_mode():
        return _seconds(lambda: block(x), device) / 100
