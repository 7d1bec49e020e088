"""CUDA kernels that return a log-sum-exp. Shapes as in backends.py; nothing here runs at import.

The kernels round each partial output to the input's half type once; the merges are in float32.
"""

from __future__ import annotations

import importlib
import inspect
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812

from headinfer.attention.state import AttentionState

if TYPE_CHECKING:
    from headinfer.attention.backends import Problem

__all__ = [
    "efficient_piece",
    "efficient_refuses",
    "efficient_square",
    "flash_piece",
    "flash_refuses",
    "flash_square",
    "varlen_piece",
    "varlen_refuses",
    "varlen_square",
]

_HALVES = (torch.bfloat16, torch.float16)


def _half_up_to_256(problem: Problem) -> str | None:
    if problem.softcap:
        return "no soft cap"
    if problem.dtype not in _HALVES:
        return "for bfloat16 and float16"
    if max(problem.key_dim, problem.value_dim) > 256:
        return "head dims up to 256"
    return None


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
    if _varlen() is None:
        return "this torch's varlen_attn returns no log-sum-exp with grouped heads"
    return _half_up_to_256(problem)


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
    return AttentionState(out.transpose(0, 1)[..., :dim].float().contiguous(), lse.contiguous())


def varlen_square(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, softcap: float | None
) -> AttentionState:
    """q [B, Hq, T, Dk], k [B, Hkv, T, Dk], v [B, Hkv, T, Dv], causal."""
    rows, dim = q.shape[0], v.shape[-1]
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in _same_width(q, k, v))
    out, lse = _varlen_call(q, k, v, scale, rows, causal=True)
    out = out.unflatten(0, (rows, -1)).transpose(1, 2)[..., :dim].float().contiguous()
    return AttentionState(out, lse.unflatten(1, (rows, -1)).transpose(0, 1).contiguous())


# -- aten flash ----------------------------------------------------------------------------------------------


def flash_refuses(problem: Problem) -> str | None:
    """None where aten's flash attention serves the problem."""
    return _half_up_to_256(problem)


def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool) -> AttentionState:
    dim = v.shape[-1]
    q, k, v = _same_width(q, k, v)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    return AttentionState(out[..., :dim].float().contiguous(), lse.contiguous())


def flash_piece(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> AttentionState:
    """q [H, N, Dk], k [H, T, Dk], v [H, T, Dv]."""
    return _flash(q[None], k[None], v[None], scale, causal=False)[0]


def flash_square(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, softcap: float | None
) -> AttentionState:
    """q [B, Hq, T, Dk], k [B, Hkv, T, Dk], v [B, Hkv, T, Dv], causal; the kernel groups the heads itself."""
    return _flash(q, k, v, scale, causal=True)


# -- aten memory-efficient -----------------------------------------------------------------------------------


def efficient_refuses(problem: Problem) -> str | None:
    """None where aten's memory-efficient attention serves the problem."""
    if problem.softcap:
        return "no soft cap"
    if problem.dtype not in (torch.float32, *_HALVES):
        return f"no {problem.dtype}"
    return None


def _efficient(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool) -> AttentionState:
    dim, queries = v.shape[-1], q.shape[2]
    q, k, v = _same_width(q, k, v)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal, scale=scale)
    return AttentionState(
        out[..., :dim].float().contiguous(), lse[..., :queries].float().contiguous()
    )  # lse comes padded


def efficient_piece(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> AttentionState:
    """q [H, N, Dk], k [H, T, Dk], v [H, T, Dv]."""
    return _efficient(q[None], k[None], v[None], scale, causal=False)[0]


def efficient_square(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, softcap: float | None
) -> AttentionState:
    """q [B, Hq, T, Dk], k [B, Hkv, T, Dk], v [B, Hkv, T, Dv], causal."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    return _efficient(q, k, v, scale, causal=True)
