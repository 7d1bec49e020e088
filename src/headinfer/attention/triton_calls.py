"""Launches the kernels of triton_kernels.py, if this machine can run them.

triton is imported when the first kernel is needed. Block sizes and splits depend on shapes only. If the shared memory
of a device is too small, a launch with fewer query rows or pipeline stages is tried; neither changes the order of a
sum. Triton's launcher takes longer on the host than such a kernel on the device, so a compiled kernel is kept for the
next call with the same shapes, which launches it directly.
"""

from __future__ import annotations

import functools
import importlib
import math
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

__all__ = ["attend", "dequantise", "merge_", "quantise", "unavailable_reason"]

_LOG2_E = math.log2(math.e)
_PART_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PROGRAMS = 256  # enough to keep any device busy: keys are split if there are fewer blocks of rows
_SPLIT_KEYS = 512  # the fewest keys in a split
_MERGE_ELEMENTS = 2048  # output elements per program of the merge kernel
_MOST_COMPILED = 4096  # _compiled is emptied before it has more entries: each length of a tile adds one
_COMPILE = {"enable_fp_fusion": True}  # a default that Triton 3.10 will change, and with it the bits of results
_fitting: dict[tuple[Any, ...], int] = {}  # by kernel variant: the first of _launches() that fits the shared memory
_compiled: dict[tuple[Any, ...], Any] = {}  # compiled kernels by all that Triton may have compiled them for


def _kernels() -> Any:
    return importlib.import_module("headinfer.attention.triton_kernels")


@functools.cache
def unavailable_reason() -> str:
    """Return why the Triton kernels cannot be used on this machine, or "" if they can.

    The first call builds the smallest kernel. Without a CUDA device it only checks that triton can be imported, so that
    choices depend on shapes only there.
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
    try:  # triton needs a C compiler, and a device that it supports
        state = torch.zeros(1, 1, 16, device="cuda")
        part = torch.ones(1, 1, 16, device="cuda")
        tensors = (state, state[..., 0].clone(), part, part[..., 0])
        _merge(tensors, [x.stride() for x in tensors])
    except errors as error:
        return f"triton cannot build a kernel: {str(error).strip()[:300]}"
    return ""


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _padded(dim: int) -> int:
    """Return the next power of two, which a block's dims must be, and at least 16, which tl.dot requires."""
    return max(16, 1 << (dim - 1).bit_length())


# -- launching -----------------------------------------------------------------------------------------------


def _launch(
    name: str,
    grid: tuple[int, int, int],
    tensors: Sequence[torch.Tensor],
    strides: Sequence[int],
    numbers: Sequence[float],
    constants: Mapping[str, Any],
    **options: int,
) -> None:
    """Launch a kernel on the current device.

    Triton compiles a kernel for the dtypes of tensors and whether their addresses are multiples of 16, for whole
    numbers that are 1, multiples of 16 or beyond 32 bits, and for constants and options. To find the compiled kernel,
    Triton's launcher derives all of this from the arguments of each call. Here the kernel that it found is kept by the
    same properties, with the values themselves in place of what Triton derives from them.

    Args:
        name: the name of the kernel.
        grid: the number of programs.
        tensors: the first arguments of the kernel, on the current device.
        strides: the next arguments, for whose values Triton compiles.
        numbers: the next arguments, which are in `do_not_specialize`, or floats. Triton compiles for their types only.
        constants: the last arguments by name, in the order of the kernel.
        **options: warps and pipeline stages.
    """
    kernels = _kernels()
    kernel = getattr(kernels, name)
    key: tuple[Any, ...] | None = None
    is_compiled = isinstance(kernel, kernels.triton.JITFunction)  # not in Triton's interpreter
    if is_compiled and torch.version.hip is None and max(numbers, default=0) < 2**31:
        properties = [(x.dtype, x.data_ptr() % 16) for x in tensors]
        key = (name, tensors[0].device, *properties, *strides, *constants.values(), *options.values())
        compiled = _compiled.get(key)
        if compiled is not None:
            compiled[grid](*tensors, *strides, *numbers, *constants.values())
            return
    compiled = kernel[grid](*tensors, *strides, *numbers, **constants, **options, **_COMPILE)
    if key is not None and _can_launch(kernels, kernel, compiled, constants):
        if len(_compiled) >= _MOST_COMPILED:
            _compiled.clear()
        _compiled[key] = compiled


def _can_launch(kernels: Any, kernel: Any, compiled: Any, constants: Mapping[str, Any]) -> bool:
    """Return whether compiled[grid]() takes the arguments of a kernel in their order, as in Triton 3.6 to 3.9."""
    if not isinstance(compiled, kernels.triton.compiler.CompiledKernel):
        return False
    names = list(kernel.arg_names)
    return list(getattr(compiled.src, "signature", ())) == names and names[-len(constants) :] == list(constants)


# -- merging -------------------------------------------------------------------------------------------------


def _two_leading(x: torch.Tensor, leading: int) -> torch.Tensor | None:
    """Return a view of x whose leading dims are two; None if that needs a copy."""
    while leading > 2 and x.shape[0] == 1:
        x = x[0]
        leading -= 1
    if leading > 2:
        return x.flatten(0, leading - 2) if x.is_contiguous() else None
    return x if leading == 2 else x[(None,) * (2 - leading)]


def merge_(out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor) -> bool:
    """Merge a part into a state in place, with one kernel, as AttentionState.merge_() does.

    Args:
        out: [..., D], float32. Up to two leading dims may have any strides, more must be contiguous.
        lse: [...], float32.
        part: [..., D], float32 or a half type.
        part_lse: [...], float32.

    Returns:
        False, with nothing done, if triton is unavailable or the kernel does not support a dtype or layout.
    """
    leading = lse.ndim
    if unavailable_reason() or out.shape != part.shape or lse.shape != part_lse.shape or out.shape[:-1] != lse.shape:
        return False
    if not (out.dtype == lse.dtype == part_lse.dtype == torch.float32) or part.dtype not in _PART_DTYPES:
        return False
    possible_views = [_two_leading(x, leading) for x in (out, lse, part, part_lse)]
    views = [x for x in possible_views if x is not None]
    strides = [x.stride() for x in views]
    if len(views) < 4 or (out.shape[-1] > 1 and not strides[0][-1] == strides[2][-1] == 1):
        return False
    if math.prod(out.shape):
        _merge(views, strides)
    return True


def _merge(tensors: Sequence[torch.Tensor], strides: Sequence[Sequence[int]]) -> None:
    """Launch the merge kernel.

    Args:
        tensors: out [A, R, D], lse [A, R], part [A, R, D] and part_lse [A, R].
        strides: their strides.
    """
    outer, inner, dim = tensors[0].shape
    rows = outer * inner
    width = 1 << (dim - 1).bit_length()
    block = max(1, _MERGE_ELEMENTS // width)
    of_rows = [stride for each in strides for stride in each[:2]]
    constants = {"DIM": dim, "WIDTH": width, "BLOCK_ROWS": block}
    with torch.cuda.device_of(tensors[0]):
        _launch("merge", (_ceil_div(rows, block), 1, 1), tensors, of_rows, (rows, inner), constants)


# -- attention -----------------------------------------------------------------------------------------------


def _launches(rows: int, width: int, is_half: bool) -> Iterator[tuple[int, int, int]]:
    """Yield (query rows of a block, warps, pipeline stages): the fastest first, the one with the least memory last."""
    max_rows = 128 if is_half else 32  # float32 does not use tensor cores here: its operands are held in registers
    block = next(size for size in (16, 32, 64, 128) if size >= min(rows, max_rows))
    for size, stages in ((block, 3), (block, 2), (block // 2, 2), (block // 2, 1), (block // 4, 1)):
        if size >= 16:
            yield size, 8 if size * width >= 128 * 128 else 4, stages
    yield 16, 4, 1


def _split(blocks: int, keys: int, block_keys: int) -> tuple[int, int]:
    """Return the number of splits and the keys of each; the last split may have fewer keys, but is not empty."""
    wanted = max(1, min(_ceil_div(_PROGRAMS, blocks), keys // _SPLIT_KEYS))
    each = _ceil_div(_ceil_div(keys, wanted), block_keys) * block_keys
    return _ceil_div(keys, each), each


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, softcap: float | None, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute attention with the Triton kernels.

    Args:
        q: [B, Hq, N, Dk] in float32, bfloat16 or float16, of any strides; Hq is a multiple of Hkv.
        k: [B, Hkv, T, Dk], of the dtype of q.
        v: [B, Hkv, T, Dv], of the dtype of q.
        scale: the factor of the scores.
        softcap: caps the scores by softcap * tanh(score / softcap). None: no cap.
        causal: whether query i sees only the keys up to i; N must equal T then.

    Returns:
        out [B, Hq, N, Dv] and lse [B, Hq, N], float32 and contiguous.
    """
    q, k, v = (x if x.shape[-1] == 1 or x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    batch, heads, rows, key_dim = q.shape
    keys = k.shape[2]
    value_dim = v.shape[3]
    is_half = q.dtype != torch.float32
    key_width = _padded(key_dim)
    value_width = _padded(value_dim)
    width = max(key_width, value_width)
    block_keys = (64 if is_half else 32) // (2 if width > 128 else 1)
    blocks = batch * heads * _ceil_div(rows, 128)
    splits, split_keys = (1, keys) if causal else _split(blocks, keys, block_keys)
    parts = torch.empty(splits, batch, heads, rows, value_dim, device=q.device)
    parts_lse = torch.empty(splits, batch, heads, rows, device=q.device)
    if softcap is None:
        unit = scale * _LOG2_E
        cap = 0.0
    else:
        unit = scale / softcap
        cap = softcap * _LOG2_E
    strides = [stride for x in (q, k, v) for stride in x.stride()[:3]]
    constants = {
        "GROUP": heads // k.shape[1],
        "CAUSAL": causal,
        "CAPPED": softcap is not None,
        "PRECISE": not is_half,
        "BLOCK_ROWS": 0,
        "BLOCK_KEYS": block_keys,
        "KEY_DIM": key_dim,
        "KEY_WIDTH": key_width,
        "VALUE_DIM": value_dim,
        "VALUE_WIDTH": value_width,
    }
    launches = list(_launches(rows, width, is_half))
    tensors = (q, k, v, parts, parts_lse)
    numbers = (heads, rows, keys, split_keys, unit, cap)
    variant = (q.device, q.dtype, key_width, value_width, launches[0], causal, softcap is not None)
    with torch.cuda.device_of(q):
        for index in range(_fitting.get(variant, 0), len(launches)):
            block_rows, warps, stages = launches[index]
            grid = (_ceil_div(rows, block_rows), batch * heads, splits)
            constants["BLOCK_ROWS"] = block_rows
            try:
                _launch("attend", grid, tensors, strides, numbers, constants, num_warps=warps, num_stages=stages)
            except _kernels().triton.OutOfResources:
                if index + 1 == len(launches):
                    raise
                continue
            _fitting[variant] = index
            break
        if splits == 1:
            return parts[0], parts_lse[0]
        out = torch.empty_like(parts[0])
        lse = torch.empty_like(parts_lse[0])
        rows = lse.numel()
        constants = {"BLOCK_SPLITS": 16, "VALUE_DIM": value_dim, "VALUE_WIDTH": value_width}
        _launch("join", (rows, 1, 1), (parts, parts_lse, out, lse), (), (rows, splits), constants)
    return out, lse


# -- quantised K and V ---------------------------------------------------------------------------------------


def quantise(x: torch.Tensor, bits: int, *, is_keys: bool, wide: int, unit: int) -> torch.Tensor:
    """Quantise keys or values, to the bytes that quantised.encode_k() or encode_v() return.

    Args:
        x: [H, T, D] in float32, bfloat16 or float16, of any strides; T is a multiple of `unit`.
        bits: 8 or 4.
        is_keys: whether x are keys.
        wide: the elements of a head dim as they are stored.
        unit: tokens of a block.

    Returns:
        uint8 [H, T, bytes of a token].
    """
    x = x if x.stride(2) == 1 else x.contiguous()
    heads, tokens, dim = x.shape
    block_bytes = unit * wide * bits // 8 + 4 * (dim if is_keys else unit)
    packed = torch.empty(heads, tokens, block_bytes // unit, dtype=torch.uint8, device=x.device)
    constants = _block_constants(bits, dim, is_keys=is_keys, wide=wide, unit=unit)
    constants["WIDENING"] = 2**bits / (2**bits - 1)
    strides = (x.stride(0), x.stride(1), packed.stride(0))
    with torch.cuda.device_of(x):
        _launch("quantise", (tokens // unit, heads, 1), (x, packed), strides, (), constants, num_warps=8)
    return packed


def dequantise(
    packed: torch.Tensor, dim: int, bits: int, dtype: torch.dtype, *, is_keys: bool, wide: int, unit: int
) -> torch.Tensor:
    """Dequantise keys or values, as quantised.decode_k() or decode_v() do.

    Args:
        packed: uint8 [H, T, bytes of a token]; the tokens of a head are contiguous, and T is a multiple of `unit`.
        dim: the head dim D.
        bits: 8 or 4.
        dtype: float32, bfloat16 or float16.
        is_keys: whether they are keys.
        wide: the elements of a head dim as they are stored.
        unit: tokens of a block.

    Returns:
        [H, T, D].
    """
    heads, tokens, _ = packed.shape
    out = torch.empty(heads, tokens, dim, dtype=dtype, device=packed.device)
    constants = _block_constants(bits, dim, is_keys=is_keys, wide=wide, unit=unit)
    strides = (packed.stride(0), out.stride(0))
    with torch.cuda.device_of(packed):
        _launch("dequantise", (tokens // unit, heads, 1), (packed, out), strides, (), constants, num_warps=8)
    return out


def _block_constants(bits: int, dim: int, *, is_keys: bool, wide: int, unit: int) -> dict[str, Any]:
    return {"KEYS": is_keys, "BITS": bits, "DIM": dim, "WIDE": wide, "WIDTH": _padded(max(dim, wide)), "UNIT": unit}
