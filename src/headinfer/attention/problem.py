"""What a kernel is asked, and what several of them do around their kernel."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from headinfer.attention.state import AttentionState, join

__all__ = ["AMX", "FEW_ROWS", "HALVES", "Problem", "capability_of", "expand_heads", "over_blocks"]

HALVES = (torch.bfloat16, torch.float16)
AMX = (1, 0)  # the capability of a CPU that multiplies matrices in bfloat16
FEW_ROWS = 64  # with up to so many query rows per KV head a device is kept busy only by splitting the keys


@dataclass(frozen=True)
class Problem:
    """What a kernel must be able to do. `query_rows` is N of `attend_full`, or 0 for `attend_causal`.

    capability: of a CUDA device, or AMX of a CPU that has it; (0, 0): unknown or none. key_tokens: T, 0 where unknown.
    is_full: a tile of the usual size, whose shape comes again and again.
    """

    device_type: str
    dtype: torch.dtype
    query_rows: int
    key_dim: int
    value_dim: int
    softcap: bool = False
    capability: tuple[int, int] = (0, 0)
    key_tokens: int = 0
    is_full: bool = True

    @property
    def is_decode(self) -> bool:
        """Few query rows: bound by reading the keys, not by matrix products."""
        return 0 < self.query_rows <= FEW_ROWS


@functools.cache
def capability_of(device: torch.device) -> tuple[int, int]:
    """The compute capability of a CUDA device, AMX of a CPU that has it, else (0, 0)."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)
    able: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # not in every torch
    return AMX if device.type == "cpu" and able.get("amx_bf16") and able.get("amx_tile") else (0, 0)


def expand_heads(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """k [B, Hkv, T, D] with each head repeated for its query heads: [B, Hq, T, D]."""
    groups = q.shape[1] // k.shape[1]
    return k if groups == 1 else k.repeat_interleave(groups, dim=1)


def over_blocks(
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], AttentionState],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_tokens: int,
) -> AttentionState:
    """A piece for few query rows: blocks of keys become batch entries of one call, so that every core has work.

    q [H, N, Dk], k [H, T, Dk], v [H, T, Dv]; attend takes them with a batch dim in front. Views, no copies.
    """
    (heads, rows, _), tokens = q.shape, k.shape[1]
    entries = tokens // block_tokens
    if rows > FEW_ROWS or entries < 2:
        return attend(q[None], k[None], v[None])[0]
    whole = entries * block_tokens
    k_blocks, v_blocks = (x[:, :whole].unflatten(1, (entries, -1)).transpose(0, 1) for x in (k, v))
    state = join(attend(q.expand(entries, heads, rows, -1), k_blocks, v_blocks))
    if whole < tokens:
        state.merge_(attend(q[None], k[None, :, whole:], v[None, :, whole:])[0])
    return state
