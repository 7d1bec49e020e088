"""The attention backends: kernels that return partial attention with its log-sum-exp, and the choice among them.

A backend implements two operations (`AttendFull` and `AttendCausal` below):

    attend_full(q [H, N, Dk], pieces of (k [H, T, Dk], v [H, T, Dv]))   every query row sees every key
    attend_causal(q [B, Hq, T, Dk], k [B, Hkv, T, Dk], v)               causal attention of a chunk to itself

choose() returns the first backend that supports a problem. The choice depends on the problem only, never on timing: the
same call gives the same bits. The tests compare every backend with reference.attend_reference().

If one tensor holds all K and V of a decode step, nothing has to be merged, and torch's scaled_dot_product_attention is
called, as transformers does without headinfer (sdpa_serves()).
"""

from __future__ import annotations

import functools
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
    "SDPA",
    "TABLE",
    "Backend",
    "Problem",
    "Rule",
    "backend_names",
    "capability_of",
    "choose",
    "preferences",
    "recorded",
    "sdpa_serves",
]

AttendFull = Callable[[torch.Tensor, Sequence[Piece], float, float | None], AttentionState]
"""attend_full(q, pieces, scale, softcap): attention of query rows to all keys of some pieces, without a mask.

Args:
    q: [H, N, Dk], for each KV head all query rows that share it: the query heads of its group, the tokens of the chunk
        and the batch rows that share the keys, packed. So each key is read once for all of them.
    pieces: at least one pair of k [H, T, Dk] and v [H, T, Dv]; T may differ between pieces.
    scale: the factor of the scores.
    softcap: caps the scores by softcap * tanh(score / softcap). None: no cap.

Returns:
    out [H, N, Dv], in float32 or the kernel's half type, of any strides, and lse [H, N], float32.
"""

AttendCausal = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float, float | None], AttentionState]
"""attend_causal(q, k, v, scale, softcap): causal attention of the T tokens of a chunk to themselves.

Args:
    q: [B, Hq, T, Dk].
    k: [B, Hkv, T, Dk]; Hq is a multiple of Hkv.
    v: [B, Hkv, T, Dv].
    scale: the factor of the scores.
    softcap: as for `AttendFull`.

Returns:
    out [B, Hq, T, Dv] and lse [B, Hq, T], a running state: float32 and contiguous, so that parts can be merged into it.
"""


@dataclass(frozen=True)
class Backend:
    """An attention kernel and what it supports.

    Attributes:
        name: the name that users choose it by.
        device_type: the type of the devices that it runs on: "cpu", "cuda" or "any".
        summary: a description of one line, for `headinfer info`.
        refuses: returns why the kernel does not support a problem, or None if it does.
        attend_full: see `AttendFull`.
        attend_causal: see `AttendCausal`. A backend whose kernel has no causal form uses that of another backend.
    """

    name: str
    device_type: str
    summary: str
    refuses: Callable[[Problem], str | None]
    attend_full: AttendFull
    attend_causal: AttendCausal


def _piece_by_piece(attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], AttentionState]) -> AttendFull:
    """Make attend_full() from a kernel that attends to one piece: the states are merged in the order of the pieces."""

    def attend_full(q: torch.Tensor, pieces: Sequence[Piece], scale: float, softcap: float | None) -> AttentionState:
        state = attend(q, *pieces[0], scale)
        if len(pieces) > 1:
            state = state.running()
        for k, v in pieces[1:]:
            state.merge_(attend(q, k, v, scale))
        return state

    return attend_full


# All rows of TABLE keep this order. That is why recorded() names repeat every choice.
BACKENDS: tuple[Backend, ...] = (
    Backend(
        "cpu-native",
        "cpu",
        "own C kernel for decode and short chunks, reads the segments in place",
        cpu.native_refuses,
        cpu.native_full,
        cpu.flash_causal,
    ),
    Backend(
        "cpu-flash-bf16",
        "cpu",
        "torch's CPU flash kernel, in bfloat16: for AMX",
        cpu.bf16_refuses,
        _piece_by_piece(cpu.bf16_piece),
        cpu.bf16_causal,
    ),
    Backend(
        "cpu-flash",
        "cpu",
        "torch's CPU flash kernel, in float32",
        cpu.flash_refuses,
        _piece_by_piece(cpu.flash_piece),
        cpu.flash_causal,
    ),
    Backend(
        "cuda-cudnn",
        "cuda",
        "aten cuDNN attention: full tiles, a chunk's query rows",
        cuda.cudnn_refuses,
        _piece_by_piece(cuda.cudnn_piece),
        cuda.flash_causal,
    ),
    Backend(
        "cuda-flash",
        "cuda",
        "aten flash attention",
        cuda.flash_refuses,
        _piece_by_piece(cuda.flash_piece),
        cuda.flash_causal,
    ),
    Backend(
        "cuda-varlen",
        "cuda",
        "torch.nn.attention.varlen (torch >= 2.12)",
        cuda.varlen_refuses,
        _piece_by_piece(cuda.varlen_piece),
        cuda.varlen_causal,
    ),
    Backend(
        "cuda-efficient",
        "cuda",
        "aten memory-efficient attention: float32 and wide heads",
        cuda.efficient_refuses,
        _piece_by_piece(cuda.efficient_piece),
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
    """A row of TABLE: which problems it applies to, and which backends to try for them.

    Attributes:
        names: the names of the backends, the fastest first.
        device_type: the type of the device.
        decode: True for few query rows (Problem.is_decode), False for many, None for both.
        softcap: True for capped scores, False for others, None for both.
        dtypes: the dtypes of q, k and v; empty for all.
        capability: the range of capabilities (capability_of()), from the first up to, but not including, the second.
    """

    names: tuple[str, ...]
    device_type: str
    decode: bool | None = None
    softcap: bool | None = None
    dtypes: tuple[torch.dtype, ...] = ()
    capability: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (99, 0))

    def matches(self, problem: Problem) -> bool:
        """Return whether the row applies to a problem."""
        lowest, end = self.capability
        return (
            self.device_type == problem.device_type
            and self.decode in (None, problem.is_decode)
            and self.softcap in (None, problem.softcap)
            and (not self.dtypes or problem.dtype in self.dtypes)
            and lowest <= problem.capability < end
        )


# choose() uses the first row that matches. A backend that the row does not name is used only if the user prefers it.
TABLE: tuple[Rule, ...] = (
    # With AMX, torch's kernel is several times faster in bfloat16 than in float32. On other CPUs float32 is faster.
    Rule(
        ("cpu-native", "cpu-flash-bf16", "cpu-flash", "eager"),
        "cpu",
        dtypes=(torch.bfloat16,),
        capability=(AMX, (99, 0)),
    ),
    # Decode reads K and V once. The native kernel does so at most of the memory bandwidth, torch's at a third of it.
    # native_refuses() leaves the query rows of long chunks to torch's kernel.
    Rule(("cpu-native", "cpu-flash", "eager"), "cpu"),
    # None of torch's kernels supports soft caps.
    Rule(("cuda-triton", "eager"), "cuda", softcap=True),
    # With few query rows, flash attention splits the keys among the multiprocessors. varlen is the public interface of
    # the same kernel; it also builds offsets, so it only replaces the private one in a torch that does not have that.
    # The others are for head dims above 256.
    Rule(("cuda-flash", "cuda-varlen", "cuda-efficient", "cuda-triton", "eager"), "cuda", decode=True, dtypes=HALVES),
    # On Hopper cuDNN uses the warpgroup instructions of the tensor cores (wgmma) and asynchronous copies, which torch's
    # flash attention does not. cuDNN makes a plan for each new shape, so cudnn_refuses() leaves tiles that are not full
    # to flash attention.
    Rule(
        ("cuda-cudnn", "cuda-flash", "cuda-varlen", "cuda-efficient", "cuda-triton", "eager"),
        "cuda",
        decode=False,
        dtypes=HALVES,
        capability=((9, 0), (10, 0)),
    ),
    # On other GPUs flash attention is as fast as cuDNN, or it has not been measured (Blackwell). It needs no plans.
    Rule(("cuda-flash", "cuda-varlen", "cuda-efficient", "cuda-triton", "eager"), "cuda", dtypes=HALVES),
    # In float32 efficient attention uses tensor cores, in several products that keep the precision; Triton's does not.
    # But Triton's splits the keys, so efficient_refuses() leaves few query rows to it.
    Rule(("cuda-efficient", "cuda-triton", "eager"), "cuda"),
)


SDPA = "sdpa"
"""The name of torch's scaled_dot_product_attention, which returns no log-sum-exp."""

_SDPA_LARGEST_HEAD_DIM = 256


@functools.lru_cache(maxsize=256)
@functools.lru_cache(maxsize=64)
def sdpa_serves(device_type: str, dtype: torch.dtype, key_dim: int, value_dim: int, preferred: str | None) -> bool:
    """Return whether torch's scaled_dot_product_attention computes a decode step whose K and V are one piece.

    On CUDA it is used where it takes grouped KV heads as they are, which is flash attention. Other kernels would get a
    copy of K and V for each query head.

    Args:
        device_type: "cpu" or "cuda".
        dtype: the dtype of q, k and v.
        key_dim: the head dim of q and k.
        value_dim: the head dim of v.
        preferred: names of backends, as for preferences(). Other names only exclude it.
    """
    names = preferences(preferred)
    if (names and SDPA not in names) or key_dim != value_dim:
        return False
    return device_type == "cpu" or (dtype in HALVES and key_dim <= _SDPA_LARGEST_HEAD_DIM)


def backend_names() -> list[str]:
    """Return the names of all backends: sdpa, and those of BACKENDS in their order."""
    return [SDPA, *_BY_NAME]


def preferences(preferred: str | None) -> list[str]:
    """Split the user's choice of backends into names.

    Args:
        preferred: a name, or several that are separated by commas; None: no preference.

    Raises:
        UsageError: there is no backend of such a name.
    """
    names = [name.strip() for name in preferred.split(",")] if preferred is not None else []
    for name in names:
        if name != SDPA and name not in _BY_NAME:
            raise UsageError(f"there is no attention backend {name!r}: choose one of {', '.join(backend_names())}")
    return names


def choose(problem: Problem, preferred: str | None = None) -> Backend:
    """Return the first backend that supports a problem: first of the preferred ones, then of those in TABLE.

    Args:
        problem: what the backend has to support.
        preferred: names of backends, as for preferences(); they are tried in this order. A preferred backend that does
            not support the problem is skipped.

    Raises:
        UsageError: there is no backend of a preferred name.
    """
    row = next((rule.names for rule in TABLE if rule.matches(problem)), ("eager",))
    for name in (*preferences(preferred), *row):
        if name == SDPA:
            continue
        backend = _BY_NAME[name]
        if backend.device_type in (problem.device_type, "any") and backend.refuses(problem) is None:
            return backend
    raise AssertionError("eager supports every problem")


def recorded(used: Collection[str], preferred: str | None = None) -> tuple[str, ...]:
    """Return the names of the backends that ran, in an order that repeats each choice if passed as preferences.

    `HeadCache.stats().attention_backends` reports them; as the option `backend` they repeat a run on another machine.

    Args:
        used: the names of the backends that ran.
        preferred: the preference that the backends were chosen with.
    """
    order = dict.fromkeys((*preferences(preferred), *backend_names()))
    return tuple(name for name in order if name in used)
