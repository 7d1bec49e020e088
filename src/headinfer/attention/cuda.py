"""CUDA kernels that return a log-sum-exp. Shapes as in backends.py; nothing here runs at import.

torch's kernels round each partial output to the input's half type once; the merges are in float32. A piece's output
stays in the kernel's own type and layout, since merging reads it once; that of `attend_causal` is the running state.
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
from headinfer.attention.problem import HALVES, Problem, expand_heads, over_blocks
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

_SPLIT_TOKENS = 1024  # keys of a batch entry, for a kernel that does not split them itself
_PLANNED_TOKENS = 1024  # keys of a tile from which a plan of cuDNN's is worth making
_PLANNED_ROWS = 1024  # query rows come in multiples of this in a prompt's chunks, but for its last one
_ALL_TYPES = (torch.float32, *HALVES)
_AMPERE = "for compute capability 8.0 and up"


def _half_up_to_256(problem: Problem) -> str | None:
    if problem.softcap:
        return "no soft cap"
    if problem.dtype not in HALVES:
        return "for bfloat16 and float16"
    if _is_before_ampere(problem):
        return _AMPERE
    if max(problem.key_dim, problem.value_dim) > 256:
        return "head dims up to 256"
    return None


def _is_before_ampere(problem: Problem) -> bool:
    return (0, 0) < problem.capability < (8, 0)


def _same_width(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pad to one width that is a multiple of 8, as the kernels want; a no-op for the usual head dims."""
    width = -(-max(k.shape[-1], v.shape[-1]) // 8) * 8
    q, k, v = (x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
    return q, k, v


# -- varlen: the public interface of flash attention, torch >= 2.12 ------------------------------------------


def _varlen() -> Any:
    """torch.nn.attention.varlen where it can return a log-sum-exp with grouped heads, else None."""
    try:
        module = importlib.import_module("torch.nn.attention.varlen")
    except ImportError:
        return None
    has = inspect.signature(module.varlen_attn).parameters.keys()
    return module if {"return_aux", "enable_gqa", "scale"} <= has else None


def varlen_refuses(problem: Problem) -> str | None:
    """None where varlen_attn serves the problem."""
    if (reason := _half_up_to_256(problem)) is not None:
        return reason
    return None if _varlen() is not None else "this torch's varlen_attn returns no log-sum-exp with grouped heads"


def _varlen_call(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, rows: int, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [rows * Tq, Hq, D], k and v [rows * Tk, Hkv, D]: out [rows * Tq, Hq, D], lse [Hq, rows * Tq]."""
    module, queries, keys = _varlen(), q.shape[0] // rows, k.shape[0] // rows
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
    """q [H, N, Dk], k [H, T, Dk], v [H, T, Dv]; no copies: the kernel takes strides."""
    dim = v.shape[-1]
    q, k, v = _same_width(q, k, v)
    out, lse = _varlen_call(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), scale, 1, causal=False)
    return AttentionState(out.transpose(0, 1)[..., :dim], lse)


def varlen_causal(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, softcap: float | None
) -> AttentionState:
    """q [B, Hq, T, Dk], k [B, Hkv, T, Dk], v [B, Hkv, T, Dv], causal."""
    rows, dim = q.shape[0], v.shape[-1]
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in _same_width(q, k, v))
    out, lse = _varlen_call(q, k, v, scale, rows, causal=True)
    out, lse = out.unflatten(0, (rows, -1)).transpose(1, 2), lse.unflatten(1, (rows, -1)).transpose(0, 1)
    return AttentionState(out[..., :dim], lse).running()


# -- aten flash ----------------------------------------------------------------------------------------------


def flash_refuses(problem: Problem) -> str | None:
    """None where aten's flash attention serves the problem."""
    return _half_up_to_256(problem)


def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool) -> AttentionState:
    dim = v.shape[-1]
    q, k, v = _same_width(q, k, v)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    return AttentionState(out[..., :dim], lse)


def flash_piece(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> AttentionState:
    """q [H, N, Dk], k [H, T, Dk], v [H, T, Dv]."""
    return _flash(q[None], k[None], v[None], scale, causal=False)[0]


def flash_causal(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, softcap: float | None
) -> AttentionState:
    """q [B, Hq, T, Dk], k [B, Hkv, T, Dk], v [B, Hkv, T, Dv], causal; the kernel groups the heads itself."""
    return _flash(q, k, v, scale, causal=True).running()


# -- cuDNN ---------------------------------------------------------------------------------------------------


def cudnn_refuses(problem: Problem) -> str | None:
    """None where cuDNN's attention serves the problem and is worth a plan, which it makes for every new shape.

    A plan takes the host tenths of a second: for tiles that come again and again, not for questions of any length. A
    chunk on itself goes to flash attention, which groups heads without copies of K and V.
    """
    if problem.softcap:
        return "no soft cap"
    if problem.dtype not in HALVES:
        return "for bfloat16 and float16"
    if max(problem.key_dim, problem.value_dim) > 128:
        return "head dims up to 128"
    if problem.query_rows % _PLANNED_ROWS or not problem.query_rows or not problem.is_full:
        return f"for full tiles and multiples of {_PLANNED_ROWS} query rows"
    if 0 < problem.key_tokens < _PLANNED_TOKENS:
        return f"for tiles of {_PLANNED_TOKENS} tokens and more"
    if _is_before_ampere(problem):
        return _AMPERE
    return None if _has_cudnn() else "this torch has no cuDNN"


@functools.cache
def _has_cudnn() -> bool:
    """Whether it can be called; without any CUDA device, where a choice is a matter of shapes, yes."""
    return torch.version.hip is None and (not torch.cuda.is_available() or torch.backends.cudnn.is_available())


def cudnn_piece(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> AttentionState:
    """q [H, N, Dk], k [H, T, Dk], v [H, T, Dv]."""
    dim = v.shape[-1]
    q, k, v = (x[None] for x in _same_width(q, k, v))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, False, False, scale=scale
    )
    return AttentionState(out[0, ..., :dim], lse.reshape(q.shape[1:3]))  # [1, H, N] or [1, H, N, 1], by version


# -- aten memory-efficient -----------------------------------------------------------------------------------


def efficient_refuses(problem: Problem) -> str | None:
    """None where aten's memory-efficient attention serves the problem."""
    if problem.softcap:
        return "no soft cap"
    if problem.dtype not in _ALL_TYPES:
        return f"no {problem.dtype}"
    if problem.dtype == torch.bfloat16 and _is_before_ampere(problem):
        return f"bfloat16 is {_AMPERE}"
    return None


def _efficient(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool) -> AttentionState:
    dim, queries = v.shape[-1], q.shape[2]
    q, k, v = _same_width(q, k, v)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal, scale=scale)
    return AttentionState(out[..., :dim], lse[..., :queries])  # lse comes padded


def efficient_piece(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> AttentionState:
    """q [H, N, Dk], k [H, T, Dk], v [H, T, Dv]; the kernel does not split the keys itself."""
    return over_blocks(lambda q, k, v: _efficient(q, k, v, scale, causal=False), q, k, v, _SPLIT_TOKENS)


def efficient_causal(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, softcap: float | None
) -> AttentionState:
    """q [B, Hq, T, Dk], k [B, Hkv, T, Dk], v [B, Hkv, T, Dv], causal."""
    return _efficient(q, expand_heads(q, k), expand_heads(q, v), scale, causal=True).running()


# -- our Triton kernels --------------------------------------------------------------------------------------


def triton_refuses(problem: Problem) -> str | None:
    """None where our Triton kernel serves the problem: soft caps, and whatever else fits a tile."""
    if problem.dtype not in _ALL_TYPES:
        return f"no {problem.dtype}"
    if max(problem.key_dim, problem.value_dim) > 256:
        return "head dims up to 256"
    if _is_before_ampere(problem):
        return _AMPERE
    return triton_calls.unavailable_reason() or None


def triton_full(q: torch.Tensor, pieces: Sequence[Piece], scale: float, softcap: float | None) -> AttentionState:
    """q [H, N, Dk], pieces of k [H, T, Dk] and v [H, T, Dv]; keys are split where there are few query rows."""
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
    """q [B, Hq, T, Dk], k [B, Hkv, T, Dk], v [B, Hkv, T, Dv], causal; the kernel groups the heads itself."""
    return AttentionState(*triton_calls.attend(q, k, v, scale=scale, softcap=softcap, causal=True))
