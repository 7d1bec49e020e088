"""CPU attention kernels that return a log-sum-exp: torch's flash attention, and the native kernel.

backends.py documents attend_full() and attend_causal(). A function that is named ..._piece attends to one piece:
q [H, N, Dk], k [H, T, Dk] and v [H, T, Dv] give a state of out [H, N, Dv] and lse [H, N].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812

from headinfer.attention import native
from headinfer.attention.problem import AMX, HALVES, Problem, attend_in_blocks, expand_heads
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

_BLOCK_TOKENS = 2048  # keys per batch entry if there are few query rows
_MAX_FLOAT32_BYTES = 16 * 1024 * 1024  # of the float32 copies of K and V: more heads are computed one group at a time
_NATIVE_CALL_ROWS = 128  # query rows per KV head of a call of the native kernel, whose scratch memory grows with them
# Up to so many query rows per KV head, the native kernel is faster than torch's, which converts half types to float32.
_NATIVE_ROWS = {torch.float32: 128, torch.bfloat16: 1024, torch.float16: 512}
_NATIVE_ROWS_WITH_AMX = 64  # in bfloat16, since torch's kernel multiplies in AMX too; more rows were never measured
_NO_SOFTCAP = "does not support soft caps"


# -- torch's kernel in float32 ------------------------------------------------------------------------------------


def flash_refuses(problem: Problem) -> str | None:
    """Return why torch's CPU flash attention, in float32, does not support a problem: it has no soft cap."""
    return _NO_SOFTCAP if problem.softcap else None


def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool = False) -> AttentionState:
    """Call the kernel in float32: q [B, H, Tq, Dk], k [B, H, Tk, Dk], v [B, H, Tk, Dv].

    Half types are converted to float32. On CPUs without half-precision matrix units the kernel is 4 times slower in
    bfloat16 than in float32, on those with AVX512-BF16 it is equally fast, and float32 rounds no partial result.
    """
    dim = v.shape[-1]
    width = max(k.shape[-1], v.shape[-1])  # the kernel supports only one head dim for K and V
    q, k, v = (F.pad(x.float(), (0, width - x.shape[-1])) if x.shape[-1] < width else x.float() for x in (q, k, v))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    return AttentionState(out[..., :dim].contiguous(), lse.contiguous())


def flash_piece(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> AttentionState:
    """Attend to one piece in float32."""
    heads = q.shape[0]
    tokens = k.shape[1]
    group_heads = max(1, _MAX_FLOAT32_BYTES // (4 * tokens * (k.shape[2] + v.shape[2])))
    if k.dtype in HALVES and group_heads < heads:
        groups = [slice(first, first + group_heads) for first in range(0, heads, group_heads)]
        states = [flash_piece(q[group], k[group], v[group], scale) for group in groups]
        return AttentionState(torch.cat([state.out for state in states]), torch.cat([state.lse for state in states]))
    return attend_in_blocks(lambda q, k, v: _flash(q, k, v, scale), q, k, v, _BLOCK_TOKENS)


def flash_causal(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, softcap: float | None
) -> AttentionState:
    """Attend causally within a chunk, in float32."""
    return _flash(q, expand_heads(q, k), expand_heads(q, v), scale, causal=True)


# -- torch's kernel in bfloat16 -----------------------------------------------------------------------------------


def bf16_refuses(problem: Problem) -> str | None:
    """Return why torch's CPU flash attention, in bfloat16, does not support a problem; None if it does.

    The kernel has no soft cap, and supports only one head dim for K and V.
    """
    if problem.softcap:
        return _NO_SOFTCAP
    if problem.dtype != torch.bfloat16:
        return "supports bfloat16 only"
    return "supports only one head dim for K and V" if problem.key_dim != problem.value_dim else None


def _bf16(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool = False) -> AttentionState:
    """Call the kernel in bfloat16: q [B, H, Tq, D], k and v [B, H, Tk, D]; `out` is bfloat16, as on GPUs.

    The kernel's exponential has a relative error of 2^-13, and so has the log-sum-exp that merges weigh parts by, at
    any number of keys. The rounding of `out` to bfloat16 has 2^-9.
    """
    return AttentionState(
        *torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    )


def bf16_piece(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> AttentionState:
    """Attend to one piece in bfloat16."""
    return attend_in_blocks(lambda q, k, v: _bf16(q, k, v, scale), q, k, v, _BLOCK_TOKENS)


def bf16_causal(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, softcap: float | None
) -> AttentionState:
    """Attend causally within a chunk, in bfloat16."""
    return _bf16(q, expand_heads(q, k), expand_heads(q, v), scale, causal=True).running()


# -- the native kernel -------------------------------------------------------------------------------------------------


def native_refuses(problem: Problem) -> str | None:
    """Return why the native kernel does not support a problem; None if it does.

    It is for the query rows of a decode step or of a short chunk. Without a C compiler it cannot be built.
    """
    if problem.dtype not in _NATIVE_ROWS:
        return f"does not support {problem.dtype}"
    most = _NATIVE_ROWS[problem.dtype]
    if problem.capability == AMX and problem.dtype == torch.bfloat16:
        most = _NATIVE_ROWS_WITH_AMX
    if not 0 < problem.query_rows <= most:
        return f"supports 1 to {most} query rows per KV head"
    if problem.key_dim % 8 or problem.value_dim % 8:
        return "supports head dims that are multiples of 8"
    return native.unavailable_reason(problem.dtype) or None


def native_full(q: torch.Tensor, pieces: Sequence[Piece], scale: float, softcap: float | None) -> AttentionState:
    """Attend to all pieces in one call of the native kernel, or in several for many query rows."""
    states = [
        native.attend_native(rows, pieces, scale=scale, soft_cap=softcap) for rows in q.split(_NATIVE_CALL_ROWS, dim=1)
    ]
    if len(states) == 1:
        return states[0]
    out = torch.cat([state.out for state in states], dim=1)
    return AttentionState(out, torch.cat([state.lse for state in states], dim=1))
