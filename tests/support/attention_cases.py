"""Seeded inputs of attention kernels, and how far a result is from the right one."""

import torch

from headinfer.attention.state import AttentionState

# These compute in float32, whatever the dtype of K and V: one bound for all. (cpu-flash-bf16 does not.)
BOUND = 2e-6


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def relative_error(found, wanted):
    """Frobenius norm of the difference over that of `wanted`."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def with_head_stride(heads, tokens, dim, extra, rng, dtype, device="cpu"):
    """[heads, tokens, dim] of normal numbers; each head contiguous, other data (NaN) between the heads."""
    memory = torch.full((heads, tokens + extra, dim), torch.nan, dtype=dtype)
    memory[:, :tokens] = torch.randn(heads, tokens, dim, generator=rng).to(dtype)
    return memory.to(device)[:, :tokens]


def random_state(shape, dim, rng, *, dtype=torch.float64, spread=30.0, empty=0.2):
    """A state as some keys could give it; a part of its rows has seen none."""
    out = torch.randn(*shape, dim, generator=rng, dtype=dtype)
    lse = spread * torch.randn(*shape, generator=rng, dtype=dtype)
    unseen = torch.rand(shape, generator=rng) < empty
    return AttentionState(out.masked_fill(unseen.unsqueeze(-1), 0.0), lse.masked_fill(unseen, -torch.inf))


def copy_of(state):
    return AttentionState(state.out.clone(), state.lse.clone())
