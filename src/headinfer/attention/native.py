"""Calls native.c, a C kernel for decode on CPUs: partial attention of few query rows.

The kernel reads K and V in place, and at four query rows at most of the memory bandwidth (`headinfer bench attention`
measures it). native_build.py compiles it. If that fails, another backend is chosen; unavailable_reason() tells why.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence

import torch

from headinfer.attention import native_build
from headinfer.attention.native_build import Target
from headinfer.attention.state import AttentionState
from headinfer.utils.tensors import Piece

__all__ = [
    "attend_native",
    "attend_quantised",
    "plain_read",
    "quantised_refusal",
    "summary",
    "unavailable_reason",
]


class _Piece(ctypes.Structure):
    """piece_t of native.c."""

    _fields_ = (
        ("k", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("k_head_stride", ctypes.c_int64),
        ("v_head_stride", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
    )


class _Call(ctypes.Structure):
    """call_t of native.c."""

    _fields_ = (
        ("pieces", ctypes.c_void_p),
        ("n_pieces", ctypes.c_int64),
        ("q", ctypes.c_void_p),
        ("heads", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("dk", ctypes.c_int64),
        ("dv", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("soft_cap", ctypes.c_float),
        ("scratch", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("lse", ctypes.c_void_p),
    )


class _Scratch(threading.local):
    """The memory of partial results, one for each thread that calls the kernel. It grows to the largest call."""

    tensor = torch.empty(0, dtype=torch.uint8)

    def of(self, nbytes: int) -> torch.Tensor:
        """Return at least `nbytes` bytes of any value."""
        if self.tensor.numel() < nbytes:
            with torch.inference_mode(False):
                self.tensor = torch.empty(nbytes, dtype=torch.uint8)
        return self.tensor


_SCRATCH = _Scratch()
_QUANTISED = {8: torch.quint8, 4: torch.quint4x2}  # the dtypes for which native_build.py builds this kernel, by bits


def unavailable_reason(dtype: torch.dtype) -> str:
    """Return why this machine cannot use the kernel for a dtype, or "" if it can. The first call builds the kernel."""
    return native_build.load(dtype)[1]


def quantised_refusal(bits: int) -> str:
    """Return why this machine cannot use the kernel for K and V in 8 or 4 bits, or "" if it can."""
    return unavailable_reason(_QUANTISED[bits])


def summary() -> str:
    """Build the kernel for all dtypes, and say in one line which targets were built for this CPU, or why none was."""
    names: dict[str, list[str]] = {}
    for dtype in native_build.DTYPES:
        reason = unavailable_reason(dtype)
        target = native_build.target_of(dtype)
        what = reason if reason or isinstance(target, str) else f"built for {target.name}"
        names.setdefault(what, []).append(str(dtype).removeprefix("torch."))
    if len(names) == 1:
        return next(iter(names))
    return "; ".join(f"{what} ({', '.join(dtypes)})" for what, dtypes in names.items())


def _contiguous_heads(x: torch.Tensor) -> torch.Tensor:
    """Return x [H, T, D] with the tokens of each head contiguous: x itself if they are, else a copy."""
    return x if x.stride(2) == 1 and (x.shape[1] == 1 or x.stride(1) == x.shape[2]) else x.contiguous()


def _result(given: torch.Tensor | None, shape: tuple[int, ...]) -> torch.Tensor:
    """Return the tensor that a result is written to: the given one if its layout is right, or a new one."""
    if given is None:
        return torch.empty(shape)
    if given.shape != shape or given.dtype != torch.float32 or given.is_cuda or not given.is_contiguous():
        raise ValueError(f"a result must be a contiguous float32 tensor {list(shape)} in host memory")
    return given


def attend_native(
    q: torch.Tensor,
    pieces: Sequence[Piece],
    *,
    scale: float,
    soft_cap: float | None = None,
    threads: int | None = None,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    target: Target | None = None,
) -> AttentionState:
    """Compute attention of q to the keys of all pieces, without a mask.

    The result has the same bits for any number of threads. Several threads of Python may call this at the same time;
    the call releases the GIL. If `out` and `lse` are given, and q and the pieces have contiguous heads, the call
    allocates nothing beyond its scratch memory, which each calling thread keeps. It grows with N, and not with T.

    All sums are float32. If q is bfloat16, the CPU has AVX512-BF16 or AMX, and there are more than 4 query rows,
    weights are rounded to bfloat16 before they are multiplied by v, as on GPUs; lse is as exact as otherwise.

    Args:
        q: [H, N, Dk] in float32, bfloat16 or float16; Dk must be a multiple of 8.
        pieces: pairs of k [H, T, Dk] and v [H, T, Dv] in host memory, of the dtype of q; Dv must be a multiple of 8.
            Heads may have any stride; if the tokens of a head are not contiguous, the piece is copied.
        scale: the factor of the scores.
        soft_cap: caps the scores by soft_cap * tanh(score / soft_cap). None: no cap.
        threads: the number of threads that compute. None: torch.get_num_threads().
        out: a contiguous float32 tensor [H, N, Dv] in host memory that the output is written to. None: a new one.
        lse: a contiguous float32 tensor [H, N] in host memory, as `out`.
        target: the instructions to use, one of native_build.targets_here(). None: the fastest ones.

    Returns:
        out [H, N, Dv] and lse [H, N], float32: the given tensors, or new ones.

    Raises:
        RuntimeError: the kernel cannot be built.
        ValueError: `out` or `lse` has another shape, dtype or layout.
    """
    # Segments and tails have contiguous heads, slices of a model's own K and V may not. This list keeps copies alive.
    pieces = [(_contiguous_heads(k), _contiguous_heads(v)) for k, v in pieces]
    return _attend(q.dtype, q, pieces, pieces[0][1].shape[-1], scale, soft_cap, threads, target, out, lse)


def attend_quantised(
    q: torch.Tensor,
    pieces: Sequence[Piece],
    *,
    bits: int,
    value_dim: int,
    scale: float,
    soft_cap: float | None = None,
    threads: int | None = None,
    target: Target | None = None,
) -> AttentionState:
    """Compute attention of q to the quantised keys of all pieces, without a mask, without dequantising them.

    The result differs from attention to the dequantised K and V, since query rows and weights are rounded to integers
    for each block of tokens: to 15 bits with 8 bits of K and V, and to 8 bits with 4. The oracle is attend_reference()
    on decode_k() and decode_v(). The result has the same bits for any number of threads.

    Args:
        q: [H, N, D] in float32, bfloat16 or float16; D must be a multiple of 16.
        pieces: pairs of k and v as quantised.encode_k() and encode_v() return them, in host memory. Heads may have any
            stride.
        bits: of K and V, 8 or 4.
        value_dim: the head dim Dv of V, a multiple of 8.
        scale: the factor of the scores.
        soft_cap: caps the scores by soft_cap * tanh(score / soft_cap). None: no cap.
        threads: the number of threads that compute. None: torch.get_num_threads().
        target: the instructions to use, one of native_build.targets_here(). None: the fastest ones.

    Returns:
        out [H, N, Dv] and lse [H, N], float32.

    Raises:
        RuntimeError: the kernel cannot be built.
    """
    return _attend(_QUANTISED[bits], q.float(), pieces, value_dim, scale, soft_cap, threads, target)


def _attend(
    dtype: torch.dtype,
    q: torch.Tensor,
    pieces: Sequence[Piece],
    value_dim: int,
    scale: float,
    soft_cap: float | None,
    threads: int | None,
    target: Target | None,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> AttentionState:
    """Call the library of a dtype of K and V, whose pieces have contiguous heads."""
    library, reason = native_build.load(dtype) if target is None else native_build.built(target, dtype)
    if library is None:
        raise RuntimeError(reason)
    heads, rows, key_dim = q.shape
    table = (_Piece * len(pieces))()
    for entry, (k, v) in zip(table, pieces, strict=True):
        entry.k = k.data_ptr()
        entry.v = v.data_ptr()
        entry.k_head_stride = k.stride(0)
        entry.v_head_stride = v.stride(0)
        entry.tokens = k.shape[1]
    q = q.contiguous()
    out = _result(out, (heads, rows, value_dim))
    lse = _result(lse, (heads, rows))
    call = _Call(
        pieces=ctypes.addressof(table),
        n_pieces=len(pieces),
        q=q.data_ptr(),
        heads=heads,
        rows=rows,
        dk=key_dim,
        dv=value_dim,
        threads=torch.get_num_threads() if threads is None else threads,
        scale=scale,
        soft_cap=soft_cap or 0.0,
        out=out.data_ptr(),
        lse=lse.data_ptr(),
    )
    scratch = _SCRATCH.of(library.headinfer_scratch(ctypes.byref(call)))
    call.scratch = scratch.data_ptr()
    library.headinfer_attend(ctypes.byref(call))
    return AttentionState(out, lse)


def plain_read(x: torch.Tensor, *, threads: int, target: Target) -> None:
    """Read a contiguous tensor in host memory with vector loads: nothing that reads it all can be faster.

    Args:
        x: the tensor.
        threads: the number of threads that read.
        target: the instructions to use.

    Raises:
        RuntimeError: the kernel cannot be built.
    """
    library, reason = native_build.built(target, x.dtype)
    if library is None:
        raise RuntimeError(reason)
    library.headinfer_read(x.data_ptr(), x.nbytes, threads)
