"""Measures what this machine attains: the rates of plan/hardware.py, with torch and with headinfer's own kernels.

Every rate is the median of a few calls of the size that inference makes. Shares become 1: nothing is a peak any more.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from headinfer.attention.backends import Problem, capability_of, choose
from headinfer.engine.machine import device_name, this_machine
from headinfer.plan.hardware import Hardware

__all__ = ["probe"]

_ROUNDS = 5
_BUFFER_BYTES = 1 << 30
_DISK_BYTES = 1 << 28
_CHUNK_TOKENS, _PAST_TOKENS = 1024, 8192
_HIDDEN, _WIDTH, _HEADS, _GROUP, _DIM = 4096, 14_336, 8, 4, 128  # a layer of Llama-3-8B
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def probe(device: torch.device, on_stage: Callable[[str], None], folder: Path | None = None) -> Hardware:
    """Measure a device of this machine and the host around it; half a minute on an idle machine.

    on_stage is called with a line before each stage. folder: where the disk is measured, by a temporary file of
    256 MiB; the system's temporary folder where it is None.
    """
    base = this_machine(device)
    on_stage("host memory ...")
    dram_bytes_per_s = _dram_bytes_per_s()
    on_stage("disk ...")
    read_bytes_per_s, write_bytes_per_s = _disk_bytes_per_s(folder)
    on_stage("copies ...")
    if device.type == "cuda":
        device_bytes_per_s = _copy_bytes_per_s(device, device, 2)
        link_bytes_per_s, back_bytes_per_s = (_copy_bytes_per_s(*way) for way in ((None, device), (device, None)))
    else:
        device_bytes_per_s = link_bytes_per_s = back_bytes_per_s = dram_bytes_per_s
    flops, attention, weights = {}, {}, {}
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
        overhead_bytes=base.overhead_bytes,
        source=f"headinfer probe, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}",
        compute_share=1.0,
        device_share=1.0,
        link_share=1.0,
        dram_share=1.0,
    )


def _seconds(call: Callable[[], object], device: torch.device | None = None) -> float:
    """The median of a few calls after one that warms up."""

    def timed() -> float:
        start = time.perf_counter()
        call()
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    timed()
    return statistics.median(timed() for _ in range(_ROUNDS))


def _dram_bytes_per_s() -> float:
    buffer = torch.ones(_BUFFER_BYTES // 8, dtype=torch.int64)
    return _BUFFER_BYTES / _seconds(buffer.sum)


def _copy_bytes_per_s(source: torch.device | None, target: torch.device | None, touched: int = 1) -> float:
    """Of one large copy; None is pinned host memory. touched: how often each byte crosses what is measured."""

    def buffer(where: torch.device | None) -> torch.Tensor:
        if where is not None:
            return torch.ones(_BUFFER_BYTES // 4, dtype=torch.uint8, device=where)
        return torch.ones(_BUFFER_BYTES // 4, dtype=torch.uint8).pin_memory()

    there, here = buffer(target), buffer(source)
    device = target if target is not None else source
    return touched * here.numel() / _seconds(lambda: there.copy_(here, non_blocking=True), device)


def _disk_bytes_per_s(folder: Path | None) -> tuple[float, float]:
    """Reading and writing one file in order, past the system's page cache where it can be left out."""
    block = os.urandom(1 << 22)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        start = time.perf_counter()
        for _ in range(_DISK_BYTES // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        written_s = time.perf_counter() - start
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        start = time.perf_counter()
        while file.read(len(block)):
            pass
        return _DISK_BYTES / (time.perf_counter() - start), _DISK_BYTES / written_s


def _noise(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)


def _matrix_flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """A chunk times a weight matrix."""
    x = _noise(_CHUNK_TOKENS, _HIDDEN, dtype=dtype, device=device)
    w = _noise(_HIDDEN, _HIDDEN, dtype=dtype, device=device)
    return 2 * _CHUNK_TOKENS * _HIDDEN**2 / _seconds(lambda: torch.nn.functional.linear(x, w), device)


def _weight_bytes_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """One token times the matrices of a layer's MLP, which no cache holds."""
    up, down = (torch.ones(2, *shape, dtype=dtype, device=device) for shape in ((_WIDTH, _HIDDEN), (_HIDDEN, _WIDTH)))
    x, wide = (_noise(1, width, dtype=dtype, device=device) for width in (_HIDDEN, _WIDTH))

    def multiply() -> None:
        for matrix in up:
            torch.nn.functional.linear(x, matrix)
        for matrix in down:
            torch.nn.functional.linear(wide, matrix)

    return (up.nbytes + down.nbytes) / _seconds(multiply, device)


def _attention_flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """A chunk's queries on past keys, by the kernel that the engine would take."""
    rows = _GROUP * _CHUNK_TOKENS
    q = _noise(_HEADS, rows, _DIM, dtype=dtype, device=device)
    k, v = (_noise(_HEADS, _PAST_TOKENS, _DIM, dtype=dtype, device=device) for _ in range(2))
    attend = choose(Problem(device.type, dtype, rows, _DIM, _DIM, capability=capability_of(device))).attend_full
    return 4 * _HEADS * rows * _PAST_TOKENS * _DIM / _seconds(lambda: attend(q, [(k, v)], 0.1, None), device)


def _kv_bytes_per_s(device: torch.device) -> float:
    """One token's queries on a long past, in bfloat16 (on a T4, which has none, in float16)."""
    has_none = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = torch.float16 if has_none else torch.bfloat16
    q = _noise(_HEADS, _GROUP, _DIM, dtype=dtype, device=device)
    k, v = (torch.ones(_HEADS, 16 * _PAST_TOKENS, _DIM, dtype=dtype, device=device) for _ in range(2))
    attend = choose(Problem(device.type, dtype, _GROUP, _DIM, _DIM, capability=capability_of(device))).attend_full
    return (k.nbytes + v.nbytes) / _seconds(lambda: attend(q, [(k, v)], 0.1, None), device)


def _launch_s(device: torch.device) -> float:
    """Host seconds to queue one small kernel, within modules as a model has them."""
    x = torch.ones(1, 64, device=device)
    block = torch.nn.Sequential(*(torch.nn.Linear(64, 64), torch.nn.SiLU()) * 50).to(device)
    with torch.inference_mode():
        return _seconds(lambda: block(x), device) / 100
