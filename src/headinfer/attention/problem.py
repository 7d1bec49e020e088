"""The description of an attention problem, by which a backend is chosen, and helpers that several backends share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from headinfer.attention.state import AttentionState, join

__all__ = ["AMX", "FEW_ROWS", "HALVES", "Problem", "attend_in_blocks", "capability_of", "expand_heads"]

HALVES = (torch.bfloat16, torch.float16)

AMX = (1, 0)
"""Stands for the capability of a CPU with AMX, whose matrix units multiply bfloat16."""

FEW_ROWS = 64
"""Up to this many query rows per KV head, only splitting the keys gives every core of a device work."""


@dataclass(frozen=True)
class Problem:
    """The properties of a call of attend_full() or attend_causal() that decide which backends can serve it.

    Attributes:
        device_type: the type of the tensors' device, "cpu" or "cuda".
        dtype: the dtype of q, k and v.
        query_rows: N, the query rows per KV head in attend_full(); 0 stands for attend_causal().
        key_dim: dk, the head dim of q and k.
        value_dim: dv, the head dim of v.
        softcap: whether the scores are capped.
        capability: the compute capability of a CUDA device, AMX for a CPU that has it, (0, 0) if unknown or none.
        key_tokens: T, the number of keys; 0 if unknown.
        is_full: whether this is a tile of the usual size, so that many calls have the same shape.
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
        """Whether there are few query rows, so that reading the keys bounds the speed, not matrix products."""
        return 0 < self.query_rows <= FEW_ROWS


@functools.cache
def capability_of(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a CUDA device, AMX for a CPU that has it, else (0, 0)."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)
    get_capabilities = getattr(torch.cpu, "get_capabilities", dict)  # older versions of torch do not have it
    features: dict[str, object] = get_capabilities()
    has_amx = device.type == "cpu" and features.get("amx_bf16") and features.get("amx_tile")
    return AMX if has_amx else (0, 0)


def expand_heads(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Repeat each head of k (or v) for the query heads that share it, for kernels without grouped-query attention.

    Args:
        q: [B, Hq, ...].
        k: [B, Hkv, T, D]; Hq is a multiple of Hkv.

    Returns:
        [B, Hq, T, D]; k itself if Hq equals Hkv.
    """
    groups = q.shape[1] // k.shape[1]
    return k if groups == 1 else k.repeat_interleave(groups, dim=1)


def attend_in_blocks(
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], AttentionState],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_tokens: int,
) -> AttentionState:
    """Attend to one piece; if there are few query rows, pass blocks of its keys as batch entries of one call.

    This gives every core work with kernels that do not split the keys themselves. The blocks are views, not copies.

    Args:
        attend: the kernel: q [B, H, N, Dk], k [B, H, T, Dk] and v [B, H, T, Dv] give a state of out [B, H, N, Dv].
        q: [H, N, Dk].
        k: [H, T, Dk].
        v: [H, T, Dv].
        block_tokens: the number of keys in a block. A rest of fewer keys is one more call.

    Returns:
        The state over all keys: out [H, N, Dv] and lse [H, N].
    """
    heads, rows, _ = q.shape
    tokens = k.shape[1]
    entries = tokens // block_tokens
    if rows > FEW_ROWS or entries < 2:
        return attend(q[None], k[None], v[None])[0]
    whole = entries * block_tokens
    k_blocks, v_blocks = (x[:, :whole].unflatten(1, (entries, -1)).transpose(0, 1) for x in (k, v))
    state = join(attend(q.expand(entries, heads, rows, -1), k_blocks, v_blocks))
    if whole < tokens:
        state.merge_(attend(q[None], k[None, :, whole:], v[None, :, whole:])[0])
    return state
