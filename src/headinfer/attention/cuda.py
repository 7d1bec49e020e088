"""CUDA attention kernels that return a log-sum-exp: torch's, and our own in Triton. Importing this needs no CUDA.

backends.py documents attend_full() and attend_causal(). A function that is named ..._piece attends to one piece:
q [H, N, Dk], k [H, T, Dk] and v [H, T, Dv] give a state of out [H, N, Dv] and lse [H, N].

torch's kernels round each partial output to the half type of q once; merges are computed in float32. The output for a
piece keeps the kernel's dtype and layout, because merging it reads it only once.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from headinfer.attention import triton_calls
from headinfer.attention.problem import HALVES, Problem, attend_in_blocks, expand_heads
from headinfer.attention.state import AttentionState
from headinfer.utils.tensors import Piece

__all__ = [
    "cudnn_piece",
    "cudnn_refuses",
    "efficient_causal",
    "efficient_piece",
    "efficient_refuses",
    "flash_causal",
    "flash_piece",
    "flash_refuses",
    "triton_causal",
    "triton_full",
    "triton_refuses",
    "varlen_causal",
    "varlen_piece",
    "varlen_refuses",
]

_BLOCK_TOKENS = 1024  # keys per batch entry, for a kernel that does not split the keys itself
_CUDNN_MIN_TOKENS = 1024  # with fewer keys, a plan of cuDNN takes longer than it saves
_CUDNN_ROW_MULTIPLE = 1024  # all chunks of a prompt but the last one have a multiple of this many query rows
_ALL_TYPES = (torch.float32, *HALVES)
_NO_SOFTCAP = "does not support soft caps"
_NEEDS_AMPERE = "needs compute capability 8.0 or higher"


def _is_before_ampere(problem: Problem) -> bool:
    return (0, 0) < problem.capability < (8, 0)


def _pad_to_one_width(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pad to one head dim that is a multiple of 8, as the kernels require; a no-op for the usual head dims."""
    width = -(-max(k.shape[-1], v.shape[-1]) // 8) * 8
    q, k, v = (x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
    return q, k, v


# -- aten flash ----------------------------------------------------------------------------------------------


def flash_refuses(problem: Problem) -> str | None:
    """Return why torch's flash attention does not support a problem; None if it does.

    The kernel has no soft cap, supports half types and head dims up to 256 only, and needs an Ampere GPU or newer.
    """
    if problem.softcap:
        return _NO_SOFTCAP
    if problem.dtype not in HALVES:
        return "supports bfloat16 and float16 only"
    if _is_before_ampere(problem):
        return _NEEDS_AMPERE
    if max(problem.key_dim, problem.value_dim) > 256:
        return "supports head dims up to 256"
    return None


def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool) -> AttentionState:
    """Call the kernel: q [B, Hq, Tq, Dk], k [B, Hkv, Tk, Dk], v [B, Hkv, Tk, Dv]."""
    dim = v.shape[-1]
    q, k, v = _pad_to_one_width(q, k, v)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    return AttentionState(out[..., :dim], lse)


def flash_piece(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> AttentionState:
    """Attend to one piece."""
    return _flash(q[None], k[None], v[None], scale, causal=False)[0]


def flash_causal(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, softcap: float | None
) -> AttentionState:
    """Attend causally within a chunk; the kernel supports grouped-query attention."""
    return _flash(q, k, v, scale, causal=True).running()


# -- varlen: the public interface of flash attention, torch >= 2.12 ------------------------------------------


def _varlen() -> Any:
    """Import torch.nn.attention.varlen; None if it cannot return a log-sum-exp with grouped heads."""
    try:
        module = importlib.import_module("torch.nn.attention.varlen")
    except ImportError:
        return None
    parameters = inspect.signature(module.varlen_attn).parameters.keys()
    return module if {"return_aux", "enable_gqa", "scale"} <= parameters else None


def varlen_refuses(problem: Problem) -> str | None:
    """Return why varlen_attn does not support a problem; None if it does.

    It calls flash attention and has its limits. In older versions of torch it lacks arguments that are needed.
    """
    reason = flash_refuses(problem)
    if reason is not None:
        return reason
    return None if _varlen() is not None else "this torch's varlen_attn returns no log-sum-exp with grouped heads"


def _varlen_call(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, rows: int, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Call the kernel for `rows` rows of equal lengths, whose tokens are concatenated.

    q [rows * Tq, Hq, D], k and v [rows * Tk, Hkv, D] give out [rows * Tq, Hq, D] and lse [Hq, rows * Tq].
    """
    module = _varlen()
    queries = q.shape[0] // rows
    keys = k.shape[0] // rows
    starts_q = torch.arange(rows + 1, device=q.device, dtype=torch.int32) * queries
    starts_k = torch.arange(rows + 1, device=q.device, dtype=torch.int32) * keys
    out, lse = module.varlen_attn(
        q,
        k,
        v,
        starts_q,
        starts_k,
        queries,
        keys,
        scale=scale,
        window_size=(-1, 0) if causal else (-1, -1),
        enable_gqa=True,
        return_aux=module.AuxRequest(lse=True),
    )
    return out, lse


def varlen_piece(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> AttentionState:
    """Attend to one piece; the kernel takes strides, so nothing is copied."""
    dim = v.shape[-1]
    q, k, v = _pad_to_one_width(q, k, v)
    out, lse = _varlen_call(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), scale, 1, causal=False)
    return AttentionState(out.transpose(0, 1)[..., :dim], lse)


def varlen_causal(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, softcap: float | None
) -> AttentionState:
    """Attend causally within a chunk; each batch row is a sequence."""
    rows = q.shape[0]
    dim = v.shape[-1]
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in _pad_to_one_width(q, k, v))
    out, lse = _varlen_call(q, k, v, scale, rows, causal=True)
    out = out.unflatten(0, (rows, -1)).transpose(1, 2)
    lse = lse.unflatten(1, (rows, -1)).transpose(0, 1)
    return AttentionState(out[..., :dim], lse).running()


# -- cuDNN ---------------------------------------------------------------------------------------------------


def cudnn_refuses(problem: Problem) -> str | None:
    """Return why cuDNN's attention does not support a problem, or is slow for it; None if it is a good choice.

    The kernel has no soft cap, supports half types and head dims up to 128 only, and needs an Ampere GPU or newer.

    cuDNN makes a plan for every new shape, which takes the host tenths of a second. So only full tiles and the query
    rows of whole chunks are accepted, whose shapes repeat, and not questions of any length. Causal attention of a
    chunk to itself is refused, because flash attention supports grouped heads without copies of K and V.
    """
    if problem.softcap:
        return _NO_SOFTCAP
    if problem.dtype not in HALVES:
        return "supports bfloat16 and float16 only"
    if max(problem.key_dim, problem.value_dim) > 128:
        return "supports head dims up to 128"
    if problem.query_rows % _CUDNN_ROW_MULTIPLE or not problem.query_rows or not problem.is_full:
        return f"supports full tiles and multiples of {_CUDNN_ROW_MULTIPLE} query rows"
    if 0 < problem.key_tokens < _CUDNN_MIN_TOKENS:
        return f"supports tiles of {_CUDNN_MIN_TOKENS} tokens or more"
    if _is_before_ampere(problem):
        return _NEEDS_AMPERE
    return None if _has_cudnn() else "this torch has no cuDNN"


@functools.cache
def _has_cudnn() -> bool:
    """Return whether torch can call cuDNN; True without a CUDA device, so that choices depend on shapes only there."""
    return torch.version.hip is None and (not torch.cuda.is_available() or torch.backends.cudnn.is_available())


def cudnn_piece(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> AttentionState:
    """Attend to one piece."""
    dim = v.shape[-1]
    q, k, v = (x[None] for x in _pad_to_one_width(q, k, v))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, False, False, scale=scale
    )
    lse = lse.reshape(q.shape[1:3])  # [1, H, N] or [1, H, N, 1], depending on the version of torch
    return AttentionState(out[0, ..., :dim], lse)


# -- aten memory-efficient -----------------------------------------------------------------------------------


def efficient_refuses(problem: Problem) -> str | None:
    """Return why torch's memory-efficient attention does not support a problem; None if it does.

    The kernel has no soft cap, and needs an Ampere GPU or newer for bfloat16. It does not split keys: with few query
    rows in float32 it is left to the Triton kernel, which does.
    """
    if problem.softcap:
        return _NO_SOFTCAP
    if problem.dtype == torch.float32 and problem.is_decode and triton_refuses(problem) is None:
        return "does not split the keys among the multiprocessors, which cuda-triton does"
    if problem.dtype not in _ALL_TYPES:
        return f"does not support {problem.dtype}"
    if problem.dtype == torch.bfloat16 and _is_before_ampere(problem):
        return f"bfloat16 {_NEEDS_AMPERE}"
    return None


def _efficient(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool) -> AttentionState:
    """Call the kernel: q [B, H, Tq, Dk], k [B, H, Tk, Dk], v [B, H, Tk, Dv]."""
    dim = v.shape[-1]
    queries = q.shape[2]
    q, k, v = _pad_to_one_width(q, k, v)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal, scale=scale)
    return AttentionState(out[..., :dim], lse[..., :queries])  # the kernel pads lse


def efficient_piece(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> AttentionState:
    """Attend to one piece; the kernel does not split the keys itself."""
    return attend_in_blocks(lambda q, k, v: _efficient(q, k, v, scale, causal=False), q, k, v, _BLOCK_TOKENS)


def efficient_causal(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, softcap: float | None
) -> AttentionState:
    """Attend causally within a chunk; the kernel does not support grouped heads, so K and V are expanded."""
    return _efficient(q, expand_heads(q, k), expand_heads(q, v), scale, causal=True).running()


# -- the Triton kernels --------------------------------------------------------------------------------------


def triton_refuses(problem: Problem) -> str | None:
    """Return why the Triton kernel does not support a problem; None if it does.

    It has soft caps, supports head dims up to 256, and needs an Ampere GPU or newer and a working triton.
    """
    if problem.dtype not in _ALL_TYPES:
        return f"does not support {problem.dtype}"
    if max(problem.key_dim, problem.value_dim) > 256:
        return "supports head dims up to 256"
    if _is_before_ampere(problem):
        return _NEEDS_AMPERE
    return triton_calls.unavailable_reason() or None


def triton_full(q: torch.Tensor, pieces: Sequence[Piece], scale: float, softcap: float | None) -> AttentionState:
    """Attend to all pieces, one after the other; the kernel splits the keys if there are few query rows."""
    state: AttentionState | None = None
    for k, v in pieces:
        out, lse = triton_calls.attend(q[None], k[None], v[None], scale=scale, softcap=softcap, causal=False)
        part = AttentionState(out[0], lse[0])
        state = part if state is None else state.merge_(part)
    assert state is not None
    return state


def triton_causal(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, softcap: float | None
) -> AttentionState:
    """Attend causally within a chunk; the kernel supports grouped-query attention."""
    return AttentionState(*triton_calls.attend(q, k, v, scale=scale, softcap=softcap, causal=True))
