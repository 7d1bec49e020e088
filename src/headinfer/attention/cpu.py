"""CPU kernels that return a log-sum-exp: torch's flash attention and our own for decode. Shapes as in backends.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812

from headinfer.attention import native
from headinfer.attention.problem import HALVES, Problem, expand_heads, over_blocks
from headinfer.attention.state import AttentionState
from headinfer.utils.tensors import Piece

__all__ = [
    "bf16_causal",
    "bf16_piece",
    "bf16_refuses",
    "flash_causal",
    "flash_piece",
    "flash_refuses",
    "native_full",
    "native_refuses",
]

_SPLIT_TOKENS = 2048  # keys per batch entry where few query rows must keep all cores busy
_WIDENED_BYTES = 16 * 1024 * 1024  # of K and V in float32 at a time: heads are taken in turns


# -- torch's kernel in float32 ------------------------------------------------------------------------------------


def flash_refuses(problem: Problem) -> str | None:
    """None where torch's CPU flash attention, computed in float32, serves the problem."""
    return "no soft cap" if problem.softcap else None


def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool = False) -> AttentionState:
    """q [B, H, Tq, Dk], k [B, H, Tk, Dk], v [B, H, Tk, Dv].

    Half types are widened tile by tile: on CPUs without half-precision matrix units torch's kernel is 4 times
    slower in bfloat16 than in float32, on those with AVX512-BF16 it is equal, and nothing is rounded twice.
    """
    dim, width = v.shape[-1], max(k.shape[-1], v.shape[-1])  # the kernel wants K and V of one width
    q, k, v = (F.pad(x.float(), (0, width - x.shape[-1])) if x.shape[-1] < width else x.float() for x in (q, k, v))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    return AttentionState(out[..., :dim].contiguous(), lse.contiguous())


def flash_piece(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> AttentionState:
    """q [H, N, Dk], k [H, T, Dk], v [H, T, Dv]."""
    heads, tokens = q.shape[0], k.shape[1]
    together = max(1, _WIDENED_BYTES // (4 * tokens * (k.shape[2] + v.shape[2])))
    if k.dtype in HALVES and together < heads:
        turns = [
            flash_piece(q[h : h + together], k[h : h + together], v[h : h + together], scale)
            for h in range(0, heads, together)
        ]
        return AttentionState(torch.cat([turn.out for turn in turns]), torch.cat([turn.lse for turn in turns]))
    return over_blocks(lambda q, k, v: _flash(q, k, v, scale), q, k, v, _SPLIT_TOKENS)


def flash_causal(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, softcap: float | None
) -> AttentionState:
    """q [B, Hq, T, Dk], k [B, Hkv, T, Dk], v [B, Hkv, T, Dv], causal."""
    return _flash(q, expand_heads(q, k), expand_heads(q, v), scale, causal=True)


# -- torch's kernel in bfloat16 -----------------------------------------------------------------------------------


def bf16_refuses(problem: Problem) -> str | None:
    """None where torch's CPU flash attention serves the problem in bfloat16, as it serves transformers."""
    if problem.softcap:
        return "no soft cap"
    if problem.dtype != torch.bfloat16:
        return "for bfloat16"
    return "wants K and V of one width" if problem.key_dim != problem.value_dim else None


def _bf16(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool = False) -> AttentionState:
    """q [B, H, Tq, D], k and v [B, H, Tk, D]; `out` is bfloat16, as on GPUs.

    Its exponential is good to 2^-13, so is the log-sum-exp that parts are weighed by, at any length: bfloat16 has 2^-9.
    """
    return AttentionState(
        *torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    )


def bf16_piece(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> AttentionState:
    """q [H, N, Dk], k [H, T, Dk], v [H, T, Dv]."""
    return over_blocks(lambda q, k, v: _bf16(q, k, v, scale), q, k, v, _SPLIT_TOKENS)


def bf16_causal(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, softcap: float | None
) -> AttentionState:
    """q [B, Hq, T, Dk], k [B, Hkv, T, Dk], v [B, Hkv, T, Dv], causal."""
    return _bf16(q, expand_heads(q, k), expand_heads(q, v), scale, causal=True).running()


# -- our kernel for few query rows ------------------------------------------------------------------------------


def native_refuses(problem: Problem) -> str | None:
    """None where our own kernel serves the problem."""
    if problem.softcap:
        return "no soft cap"
    if not 0 < problem.query_rows <= 32:
        return "for 1 to 32 query rows per KV head"
    if problem.key_dim % 16 or problem.value_dim % 16:
        return "head dims must be multiples of 16"
    if problem.dtype not in (torch.float32, *HALVES):
        return f"no {problem.dtype}"
    return native.unavailable_reason() or None


def native_full(q: torch.Tensor, pieces: Sequence[Piece], scale: float, softcap: float | None) -> AttentionState:
    """q [H, N, Dk], all pieces in one call."""
    return native.attend_native(q, pieces, scale=scale)
