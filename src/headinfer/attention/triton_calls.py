"""Calls the kernels of triton_kernels.py, where this machine can run them.

Tensors in, tensors out. Nothing imports triton before a kernel is wanted. Block sizes and splits depend on shapes only;
where a device's shared memory is too small, fewer rows or pipeline stages are tried, which change no sum's order.
"""

from __future__ import annotations

import functools
import importlib
import math
import os
import subprocess
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["attend", "merge_", "unavailable_reason"]

_LOG2_E = math.log2(math.e)
_PARTS = (torch.float32, torch.bfloat16, torch.float16)
_PROGRAMS = 256  # as many as keep any device busy: keys are split where there are fewer blocks of rows
_SPLIT_KEYS = 512  # keys of a split at least
_MERGE_ELEMENTS = 2048  # outputs of one program
_fitting: dict[tuple[Any, ...], int] = {}  # which of _launches() a device's shared memory has room for


def _kernels() -> Any:
    return importlib.import_module("headinfer.attention.triton_kernels")


@functools.cache
def unavailable_reason() -> str:
    """Why the Triton kernels cannot be used here; empty where they can. Builds the smallest one on first use.

    Without any CUDA device it only asks whether triton can be imported: a choice is then a matter of shapes.
    """
    if os.environ.get("HEADINFER_TRITON", "1") == "0":
        return "switched off by HEADINFER_TRITON=0"
    try:
        kernels = _kernels()
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    if not torch.cuda.is_available():
        return ""
    errors = (kernels.triton.TritonError, RuntimeError, OSError, subprocess.CalledProcessError)
    try:  # triton needs a C compiler, and a device that it knows
        state, part = (torch.zeros(1, 1, 16, device="cuda"), torch.ones(1, 1, 16, device="cuda"))
        _merge(kernels, state, state[..., 0].clone(), part, part[..., 0])
    except errors as error:
        return f"triton cannot build a kernel: {str(error).strip()[:300]}"
    return ""


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _padded(dim: int) -> int:
    """The next power of two, as a tile needs it; at least 16, as tl.dot does."""
    return max(16, 1 << (dim - 1).bit_length())


# -- merging -------------------------------------------------------------------------------------------------


def _two_leading(x: torch.Tensor, leading: int) -> torch.Tensor | None:
    """x with its leading dims as two, without a copy; None where that cannot be."""
    while leading > 2 and x.shape[0] == 1:
        x, leading = x[0], leading - 1
    if leading > 2:
        return x.flatten(0, leading - 2) if x.is_contiguous() else None
    return x if leading == 2 else x[(None,) * (2 - leading)]


def merge_(out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor) -> bool:
    """Merge part [..., D] and part_lse [...] into out and lse in place, in one kernel; False where it cannot be done.

    out, lse and part_lse float32; part float32 or a half type. Up to two leading dims may have any strides.
    """
    leading = lse.ndim
    if unavailable_reason() or out.shape != part.shape or lse.shape != part_lse.shape or out.shape[:-1] != lse.shape:
        return False
    if not (out.dtype == lse.dtype == part_lse.dtype == torch.float32) or part.dtype not in _PARTS:
        return False
    found = [_two_leading(x, leading) for x in (out, lse, part, part_lse)]
    views = [x for x in found if x is not None]
    if len(views) < 4 or any(x.shape[-1] > 1 and x.stride(-1) != 1 for x in (views[0], views[2])):
        return False
    if out.numel():
        _merge(_kernels(), *views)
    return True


def _merge(kernels: Any, out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor) -> None:
    """out [A, R, D], lse [A, R]."""
    rows, dim = lse.numel(), out.shape[-1]
    width = 1 << (dim - 1).bit_length()
    block = max(1, _MERGE_ELEMENTS // width)
    strides = [stride for x in (out, lse, part, part_lse) for stride in x.stride()[:2]]
    with torch.cuda.device_of(out):
        kernels.merge[(_ceil_div(rows, block),)](
            out, lse, part, part_lse, rows, lse.shape[1], *strides, DIM=dim, WIDTH=width, BLOCK_ROWS=block
        )


# -- attention -----------------------------------------------------------------------------------------------


def _launches(rows: int, width: int, is_half: bool) -> Iterator[tuple[int, int, int]]:
    """(query rows of a block, warps, pipeline stages), the fastest first and the one with the least memory last."""
    most = 128 if is_half else 32  # float32 has no tensor cores here: its operands lie in registers
    block = next(size for size in (16, 32, 64, 128) if size >= min(rows, most))
    for size, stages in ((block, 3), (block, 2), (block // 2, 2), (block // 2, 1), (block // 4, 1)):
        if size >= 16:
            yield size, 8 if size * width >= 128 * 128 else 4, stages
    yield 16, 4, 1


def _split(blocks: int, keys: int, block_keys: int) -> tuple[int, int]:
    """(splits, keys of each): the last may have fewer, none is empty."""
    wanted = max(1, min(_ceil_div(_PROGRAMS, blocks), keys // _SPLIT_KEYS))
    each = _ceil_div(_ceil_div(keys, wanted), block_keys) * block_keys
    return _ceil_div(keys, each), each


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, softcap: float | None, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B, Hq, N, Dk], k [B, Hkv, T, Dk], v [B, Hkv, T, Dv], of one dtype, any strides; causal: N equals T.

    Returns out [B, Hq, N, Dv] and lse [B, Hq, N], float32 and contiguous.
    """
    kernels = _kernels()
    q, k, v = (x if x.shape[-1] == 1 or x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    batch, heads, rows, key_dim = q.shape
    keys, value_dim, is_half = k.shape[2], v.shape[3], q.dtype != torch.float32
    widths = _padded(key_dim), _padded(value_dim)
    width = max(widths)
    block_keys = (64 if is_half else 32) // (2 if width > 128 else 1)
    blocks = batch * heads * _ceil_div(rows, 128)
    splits, split_keys = (1, keys) if causal else _split(blocks, keys, block_keys)
    parts = torch.empty(splits, batch, heads, rows, value_dim, device=q.device)
    parts_lse = torch.empty(splits, batch, heads, rows, device=q.device)
    unit, cap = (scale * _LOG2_E, 0.0) if softcap is None else (scale / softcap, softcap * _LOG2_E)
    strides = [stride for x in (q, k, v) for stride in x.stride()[:3]]
    constants = {
        "GROUP": heads // k.shape[1],
        "CAUSAL": causal,
        "CAPPED": softcap is not None,
        "PRECISE": not is_half,
        "BLOCK_KEYS": block_keys,
        "KEY_DIM": key_dim,
        "KEY_WIDTH": widths[0],
        "VALUE_DIM": value_dim,
        "VALUE_WIDTH": widths[1],
    }
    launches = list(_launches(rows, width, is_half))
    about = (q.device, q.dtype, *widths, launches[0], causal, softcap is not None)
    with torch.cuda.device_of(q):
        for index in range(_fitting.get(about, 0), len(launches)):
            block_rows, warps, stages = launches[index]
            grid = (_ceil_div(rows, block_rows), batch * heads, splits)
            arguments = (q, k, v, parts, parts_lse, *strides, heads, rows, keys, split_keys, unit, cap)
            try:
                kernels.attend[grid](*arguments, **constants, BLOCK_ROWS=block_rows, num_warps=warps, num_stages=stages)
            except kernels.triton.OutOfResources:
                if index + 1 == len(launches):
                    raise
                continue
            _fitting[about] = index
            break
        if splits == 1:
            return parts[0], parts_lse[0]
        out, lse = torch.empty_like(parts[0]), torch.empty_like(parts_lse[0])
        kernels.join[(lse.numel(),)](
            parts, parts_lse, out, lse, lse.numel(), splits, BLOCK_SPLITS=16, VALUE_DIM=value_dim, VALUE_WIDTH=widths[1]
        )
    return out, lse
