"""Partial attention with log-sum-exp, by kernel. The oracle of every one is `reference.attend_reference`.

A backend answers two questions:

    past(q [H, N, Dk], pieces of (k [H, T, Dk], v [H, T, Dv]))   every query row sees every key
    square(q [B, Hq, T, Dk], k [B, Hkv, T, Dk], v)               a chunk on itself, causal

In `past` the rows of q are all query rows that share a KV head: the group's query heads, the chunk's tokens and
the batch rows that share the keys, packed, so that each key is read once for all of them.
`choose` takes the first backend of the device's table that serves the problem; a name given by the user is tried
first. Choices depend on the problem's shape only, never on timing: the same call gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812

from headinfer.attention import cuda, native
from headinfer.attention.state import AttentionState
from headinfer.errors import UsageError

__all__ = ["BACKENDS", "Backend", "Problem", "backend_names", "choose"]

Piece = tuple[torch.Tensor, torch.Tensor]
Past = Callable[[torch.Tensor, Sequence[Piece], float, float | None], AttentionState]
Square = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float, float | None], AttentionState]

_HALVES = (torch.bfloat16, torch.float16)
_SPLIT_TOKENS = 2048  # keys per batch entry where few query rows must keep all cores busy
_WIDENED_BYTES = 16 * 1024 * 1024  # of K and V in float32 at a time: heads are taken in turns


@dataclass(frozen=True)
class Problem:
    """What a kernel must be able to do. `query_rows` is N of `past`, or 0 for `square`."""

    device_type: str
    dtype: torch.dtype
    query_rows: int
    key_dim: int
    value_dim: int
    softcap: bool = False


@dataclass(frozen=True)
class Backend:
    """A kernel: its name, where it runs, what it does in a line, why it refuses a problem (None: it serves)."""

    name: str
    device_type: str
    summary: str
    refuses: Callable[[Problem], str | None]
    past: Past
    square: Square


def _over_pieces(attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], AttentionState]) -> Past:
    """`past` for a kernel that takes one piece at a time: merges in the order of the pieces."""

    def past(q: torch.Tensor, pieces: Sequence[Piece], scale: float, softcap: float | None) -> AttentionState:
        state = attend(q, *pieces[0], scale)
        for k, v in pieces[1:]:
            state.merge_(attend(q, k, v, scale))
        return state

    return past


def _expand_heads(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """k [B, Hkv, T, D] with each head repeated for its query heads: [B, Hq, T, D]."""
    groups = q.shape[1] // k.shape[1]
    return k if groups == 1 else k.repeat_interleave(groups, dim=1)


# -- cpu-flash: torch's CPU flash kernel, computed in float32 ------------------------------------------------


def _flash_cpu(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool = False) -> AttentionState:
    """q [B, H, Tq, Dk], k [B, H, Tk, Dk], v [B, H, Tk, Dv].

    Half types are widened tile by tile: on CPUs without half-precision matrix units torch's kernel is 4 times
    slower in bfloat16 than in float32, on those with AVX512-BF16 it is equal, and nothing is rounded twice.
    """
    dim, width = v.shape[-1], max(k.shape[-1], v.shape[-1])  # the kernel wants K and V of one width
    q, k, v = (F.pad(x.float(), (0, width - x.shape[-1])) if x.shape[-1] < width else x.float() for x in (q, k, v))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    return AttentionState(out[..., :dim].contiguous(), lse.contiguous())


def _flash_cpu_piece(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> AttentionState:
    heads, rows, tokens = q.shape[0], q.shape[1], k.shape[1]
    together = max(1, _WIDENED_BYTES // (4 * tokens * (k.shape[2] + v.shape[2])))
    if k.dtype in _HALVES and together < heads:
        turns = [
            _flash_cpu_piece(q[h : h + together], k[h : h + together], v[h : h + together], scale)
            for h in range(0, heads, together)
        ]
        return AttentionState(torch.cat([turn.out for turn in turns]), torch.cat([turn.lse for turn in turns]))
    entries = tokens // _SPLIT_TOKENS
    if rows > 64 or entries < 2:
        return _flash_cpu(q[None], k[None], v[None], scale)[0]
    # Decode: blocks of keys become batch entries of one call, so that every core has work; views, no copies.
    whole = entries * _SPLIT_TOKENS
    k_blocks, v_blocks = (x[:, :whole].unflatten(1, (entries, -1)).transpose(0, 1) for x in (k, v))
    parts = _flash_cpu(q.expand(entries, heads, rows, -1), k_blocks, v_blocks, scale)
    weights = torch.softmax(parts.lse, dim=0)
    state = AttentionState((weights.unsqueeze(-1) * parts.out).sum(dim=0), torch.logsumexp(parts.lse, dim=0))
    if whole < tokens:
        state.merge_(_flash_cpu(q[None], k[None, :, whole:], v[None, :, whole:], scale)[0])
    return state


def _flash_cpu_square(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, softcap: float | None
) -> AttentionState:
    return _flash_cpu(q, _expand_heads(q, k), _expand_heads(q, v), scale, causal=True)


# -- cpu-native: our kernel for few query rows ----------------------------------------------------------------


def _native_refuses(problem: Problem) -> str | None:
    if problem.softcap:
        return "no soft cap"
    if not 0 < problem.query_rows <= 32:
        return "for 1 to 32 query rows per KV head"
    if problem.key_dim % 16 or problem.value_dim % 16:
        return "head dims must be multiples of 16"
    if problem.dtype not in (torch.float32, *_HALVES):
        return f"no {problem.dtype}"
    return native.why_not() or None


def _native_past(q: torch.Tensor, pieces: Sequence[Piece], scale: float, softcap: float | None) -> AttentionState:
    return native.attend_native(q, pieces, scale=scale)


# -- eager: matrix products in float32, any device, any width, with soft cap ----------------------------------

_EAGER_TOKENS = 1024  # keys at a time at most
_EAGER_SCORES = 2**24  # scores at a time, where there are many query rows


def _eager_tokens(rows: int) -> int:
    """Keys at a time for so many query rows over all heads."""
    return min(_EAGER_TOKENS, max(_EAGER_SCORES // rows, 16))


def _eager_block(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, softcap: float | None, hidden: torch.Tensor | None
) -> AttentionState:
    """q [..., Tq, Dk], k [..., Tk, Dk], v [..., Tk, Dv]; hidden [Tq, Tk] is True where a key is not seen."""
    scores = (q.float() @ k.float().mT) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.softmax(scores, dim=-1).masked_fill((lse == -torch.inf).unsqueeze(-1), 0.0)
    return AttentionState(weights @ v.float(), lse)


def _eager_past(q: torch.Tensor, pieces: Sequence[Piece], scale: float, softcap: float | None) -> AttentionState:
    state = AttentionState.empty(q.shape[:-1], pieces[0][1].shape[-1], q.device)
    step = _eager_tokens(q.shape[0] * q.shape[1])
    for k, v in pieces:
        for start in range(0, k.shape[1], step):
            block = slice(start, start + step)
            state.merge_(_eager_block(q, k[:, block], v[:, block], scale, softcap, None))
    return state


def _eager_square(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, softcap: float | None
) -> AttentionState:
    k, v, tokens = _expand_heads(q, k), _expand_heads(q, v), q.shape[2]
    state = AttentionState.empty(q.shape[:-1], v.shape[-1], q.device)
    step = _eager_tokens(q.shape[:-1].numel())
    for start in range(0, tokens, step):
        block = slice(start, start + step)
        place = torch.arange(tokens, device=q.device)
        hidden = place[:, None] < place[None, block]
        state.merge_(_eager_block(q, k[:, :, block], v[:, :, block], scale, softcap, hidden))
    return state


def _no_softcap(problem: Problem) -> str | None:
    return "no soft cap" if problem.softcap else None


_CPU_FLASH = Backend(
    "cpu-flash",
    "cpu",
    "torch's CPU flash kernel, in float32",
    _no_softcap,
    _over_pieces(_flash_cpu_piece),
    _flash_cpu_square,
)

BACKENDS: tuple[Backend, ...] = (
    Backend(
        "cpu-native",
        "cpu",
        "own C kernel for decode, reads the segments in place",
        _native_refuses,
        _native_past,
        _flash_cpu_square,
    ),
    _CPU_FLASH,
    Backend(
        "cuda-varlen",
        "cuda",
        "torch.nn.attention.varlen (torch >= 2.12)",
        cuda.varlen_refuses,
        _over_pieces(cuda.varlen_piece),
        cuda.varlen_square,
    ),
    Backend(
        "cuda-flash",
        "cuda",
        "aten flash attention",
        cuda.flash_refuses,
        _over_pieces(cuda.flash_piece),
        cuda.flash_square,
    ),
    Backend(
        "cuda-efficient",
        "cuda",
        "aten memory-efficient attention: float32 and wide heads",
        cuda.efficient_refuses,
        _over_pieces(cuda.efficient_piece),
        cuda.efficient_square,
    ),
    Backend("eager", "any", "float32 matrix products: soft cap, any width", lambda _: None, _eager_past, _eager_square),
)


def backend_names() -> list[str]:
    """The names that `choose` takes, in the order in which it tries them."""
    return [backend.name for backend in BACKENDS]


def choose(problem: Problem, preferred: str | None = None) -> Backend:
    """The first backend that serves the problem, the preferred one tried before the others.

    Raises UsageError where `preferred` is no backend's name.
    """
    if preferred is not None and preferred not in backend_names():
        raise UsageError(f"there is no attention backend {preferred!r}: choose one of {', '.join(backend_names())}")
    for backend in sorted(BACKENDS, key=lambda backend: backend.name != preferred):
        if backend.device_type in (problem.device_type, "any") and backend.refuses(problem) is None:
            return backend
    raise AssertionError("eager serves every problem")
