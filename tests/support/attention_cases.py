"""Seeded inputs for tests of attention kernels, and the error of a result."""

import math

import torch

from headinfer.attention import native_build
from headinfer.attention.state import AttentionState

# The bound for backends that compute in float32, independent of the dtype of K and V. (cpu-flash-bf16 does not.)
BOUND = 2e-6


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def relative_error(found, wanted):
    """The Frobenius norm of the difference, relative to that of `wanted`."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def native_bound(dtype, rows, target=None):
    """The bound of the output of the native kernel, which rounds weights to bfloat16 if it multiplies in bfloat16."""
    target = target or native_build.target_of(dtype)
    is_rounded = dtype == torch.bfloat16 and rows > 4 and "avx512_bf16" in getattr(target, "features", ())
    return 2**-8 if is_rounded else BOUND


def assert_matches(found, wanted, keys, bound=BOUND, out_bound=None):
    """Compare a state with the oracle's.

    Outputs over `keys` keys are usually about keys ** -0.5. A few may cancel to much less; the bound allows for that.
    """
    assert found.out.dtype == found.lse.dtype == torch.float32
    assert found.out.shape == wanted.out.shape
    assert found.lse.shape == wanted.lse.shape
    size = max(float(wanted.out.norm()), math.sqrt(wanted.out.numel() / keys))
    assert float((found.out.double() - wanted.out).norm()) <= (out_bound or bound) * size
    # A log-sum-exp may be near 0 by chance: its error is measured against the scores' order of magnitude.
    assert float((found.lse.double() - wanted.lse).abs().max()) <= bound * max(1.0, float(wanted.lse.abs().max()))


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
