"""Partial attention with log-sum-exp, by kernel. The oracle of every one is `reference.attend_reference`.

A backend answers two questions:

    attend_full(q [H, N, Dk], pieces of (k [H, T, Dk], v [H, T, Dv]))   every query row sees every key
    attend_causal(q [B, Hq, T, Dk], k [B, Hkv, T, Dk], v)               a chunk on itself, causal

In `attend_full` the rows of q are all query rows that share a KV head: the group's query heads, the chunk's tokens and
the batch rows that share the keys, packed, so that each key is read once for all of them. It gives a part, whose `out`
may be in the kernel's own type and layout; `attend_causal` gives a state that parts can be merged into.

`choose` takes the first backend that serves the problem: of the names that the user prefers, then of the table's row
for the problem. Choices depend on the problem only, never on timing: the same call gives the same bits, and
`recorded` names give the same choices elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch

from headinfer.attention import cpu, cuda, eager
from headinfer.attention.problem import AMX, HALVES, Problem, capability_of
from headinfer.attention.state import AttentionState
from headinfer.errors import UsageError
from headinfer.utils.tensors import Piece

__all__ = [
    "BACKENDS",
    "TABLE",
    "Backend",
    "Problem",
    "Rule",
    "backend_names",
    "capability_of",
    "choose",
    "preferences",
    "recorded",
]

AttendFull = Callable[[torch.Tensor, Sequence[Piece], float, float | None], AttentionState]
AttendCausal = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float, float | None], AttentionState]


@dataclass(frozen=True)
class Backend:
    """A kernel: its name, where it runs, what it does in a line, why it refuses a problem (None: it serves)."""

    name: str
    device_type: str
    summary: str
    refuses: Callable[[Problem], str | None]
    attend_full: AttendFull
    attend_causal: AttendCausal


def _over_pieces(attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], AttentionState]) -> AttendFull:
    """`attend_full` for a kernel that takes one piece at a time: merges in the order of the pieces."""

    def attend_full(q: torch.Tensor, pieces: Sequence[Piece], scale: float, softcap: float | None) -> AttentionState:
        state = attend(q, *pieces[0], scale)
        if len(pieces) > 1:
            state = state.running()
        for k, v in pieces[1:]:
            state.merge_(attend(q, k, v, scale))
        return state

    return attend_full


# In one order for all rows of the table: so names in this order, given back as preferences, repeat every choice.
BACKENDS: tuple[Backend, ...] = (
    Backend(
        "cpu-native",
        "cpu",
        "own C kernel for decode, reads the segments in place",
        cpu.native_refuses,
        cpu.native_full,
        cpu.flash_causal,
    ),
    Backend(
        "cpu-flash-bf16",
        "cpu",
        "torch's CPU flash kernel, in bfloat16: for AMX",
        cpu.bf16_refuses,
        _over_pieces(cpu.bf16_piece),
        cpu.bf16_causal,
    ),
    Backend(
        "cpu-flash",
        "cpu",
        "torch's CPU flash kernel, in float32",
        cpu.flash_refuses,
        _over_pieces(cpu.flash_piece),
        cpu.flash_causal,
    ),
    Backend(
        "cuda-cudnn",
        "cuda",
        "aten cuDNN attention: full tiles, a chunk's query rows",
        cuda.cudnn_refuses,
        _over_pieces(cuda.cudnn_piece),
        cuda.flash_causal,
    ),
    Backend(
        "cuda-flash",
        "cuda",
        "aten flash attention",
        cuda.flash_refuses,
        _over_pieces(cuda.flash_piece),
        cuda.flash_causal,
    ),
    Backend(
        "cuda-varlen",
        "cuda",
        "torch.nn.attention.varlen (torch >= 2.12)",
        cuda.varlen_refuses,
        _over_pieces(cuda.varlen_piece),
        cuda.varlen_causal,
    ),
    Backend(
        "cuda-efficient",
        "cuda",
        "aten memory-efficient attention: float32 and wide heads",
        cuda.efficient_refuses,
        _over_pieces(cuda.efficient_piece),
        cuda.efficient_causal,
    ),
    Backend(
        "cuda-triton",
        "cuda",
        "own Triton kernel: soft cap, split keys, head dims up to 256",
        cuda.triton_refuses,
        cuda.triton_full,
        cuda.triton_causal,
    ),
    Backend(
        "eager",
        "any",
        "float32 matrix products: soft cap, any width",
        lambda _: None,
        eager.attend_full,
        eager.attend_causal,
    ),
)
_BY_NAME = {backend.name: backend for backend in BACKENDS}


@dataclass(frozen=True)
class Rule:
    """A row of the table: the problems that it is about, and the backends to try for them, the fastest first.

    decode: few query rows (True), many (False), or either (None). capability: from the first up to below the second.
    """

    names: tuple[str, ...]
    device_type: str
    decode: bool | None = None
    softcap: bool | None = None
    dtypes: tuple[torch.dtype, ...] = ()
    capability: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (99, 0))

    def matches(self, problem: Problem) -> bool:
        """Whether the row is about the problem."""
        lowest, beyond = self.capability
        return (
            self.device_type == problem.device_type
            and self.decode in (None, problem.is_decode)
            and self.softcap in (None, problem.softcap)
            and (not self.dtypes or problem.dtype in self.dtypes)
            and lowest <= problem.capability < beyond
        )


# The first row that matches counts. What it does not name is used only where the user prefers it.
TABLE: tuple[Rule, ...] = (
    # On AMX torch's kernel is several times faster in bfloat16 than in float32, which serves other CPUs better.
    Rule(
        ("cpu-native", "cpu-flash-bf16", "cpu-flash", "eager"),
        "cpu",
        dtypes=(torch.bfloat16,),
        capability=(AMX, (99, 0)),
    ),
    # Decode reads K and V once: our kernel does so at most of the memory's bandwidth, torch's at a third of it.
    Rule(("cpu-native", "cpu-flash", "eager"), "cpu", decode=True),
    Rule(("cpu-flash", "eager"), "cpu"),
    # None of torch's kernels caps scores.
    Rule(("cuda-triton", "eager"), "cuda", softcap=True),
    # Flash attention splits the keys among the multiprocessors itself where there are few query rows. varlen is the
    # public door to the same kernel; it packs offsets on the way, so it is for a torch that has closed the other door.
    # The rest is for heads wider than 256: efficient attention, then matrix products.
    Rule(("cuda-flash", "cuda-varlen", "cuda-efficient", "cuda-triton", "eager"), "cuda", decode=True, dtypes=HALVES),
    # On Hopper cuDNN uses the tensor cores' own instructions (wgmma) and asynchronous copies, torch's flash attention
    # does not. It plans anew for each shape, so it refuses tiles that are not full, and flash attention takes those.
    Rule(
        ("cuda-cudnn", "cuda-flash", "cuda-varlen", "cuda-efficient", "cuda-triton", "eager"),
        "cuda",
        decode=False,
        dtypes=HALVES,
        capability=((9, 0), (10, 0)),
    ),
    # Elsewhere flash attention is as fast as cuDNN, or nobody has measured (Blackwell): the one without plans.
    Rule(("cuda-flash", "cuda-varlen", "cuda-efficient", "cuda-triton", "eager"), "cuda", dtypes=HALVES),
    # float32: efficient attention multiplies on tensor cores, in parts that keep the precision; our kernel does not.
    Rule(("cuda-efficient", "cuda-triton", "eager"), "cuda"),
)


def backend_names() -> list[str]:
    """The names that `choose` takes."""
    return [backend.name for backend in BACKENDS]


def preferences(preferred: str | None) -> list[str]:
    """The names in a user's choice: one, or several with commas between them. Raises UsageError on an unknown one."""
    names = [name.strip() for name in preferred.split(",")] if preferred is not None else []
    for name in names:
        if name not in _BY_NAME:
            raise UsageError(f"there is no attention backend {name!r}: choose one of {', '.join(backend_names())}")
    return names


def choose(problem: Problem, preferred: str | None = None) -> Backend:
    """The first backend that serves the problem: of the preferred ones in their order, then of the table's.

    preferred: a name, or several with commas between them. Raises UsageError where one is no backend's name.
    """
    row = next((rule.names for rule in TABLE if rule.matches(problem)), ("eager",))
    for name in (*preferences(preferred), *row):
        backend = _BY_NAME[name]
        if backend.device_type in (problem.device_type, "any") and backend.refuses(problem) is None:
            return backend
    raise AssertionError("eager serves every problem")


def recorded(used: Collection[str], preferred: str | None = None) -> tuple[str, ...]:
    """The names of the backends that ran, in the order in which they are preferences that repeat each choice."""
    order = dict.fromkeys((*preferences(preferred), *backend_names()))
    return tuple(name for name in order if name in used)
