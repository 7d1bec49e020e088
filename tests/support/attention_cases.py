"""Seeded inputs for tests of attention kernels, and the error of a result."""

import torch

from headinfer.attention.state import AttentionState

# The bound for backends that compute in float32, independent of the dtype of K and V. (cpu-flash-bf16 does not.)
BOUND = 2e-6


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def relative_error(found, wanted):
    """The Frobenius norm of the difference, relative to that of `wanted`."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def with_head_stride(heads, tokens, dim, extra, rng, dtype, device="cpu"):
    """Make normal numbers [heads, tokens, dim]. Each head is contiguous, with `extra` tokens of NaN between heads."""
    memory = torch.full((heads, tokens + extra, dim), torch.nan, dtype=dtype)
    memory[:, :tokens] = torch.randn(heads, tokens, dim, generator=rng).to(dtype)
    return memory.to(device)[:, :tokens]


def random_state(shape, dim, rng, *, dtype=torch.float64, spread=30.0, empty=0.2):
    """Make a random attention state. A share `empty` of its rows has seen no key."""
    out = torch.randn(*shape, dim, generator=rng, dtype=dtype)
    lse = spread * torch.randn(*shape, generator=rng, dtype=dtype)
    unseen = torch.rand(shape, generator=rng) < empty
    return AttentionState(out.masked_fill(unseen.unsqueeze(-1), 0.0), lse.masked_fill(unseen, -torch.inf))


def copy_of(state):
    return AttentionState(state.out.clone(), state.lse.clone())
