"""Builds and calls native.c, a C kernel for decode on CPUs: partial attention of few query rows.

The kernel reads K and V at most of the memory bandwidth, torch's CPU kernels at a third of it (`headinfer bench decode`
measures both). It is compiled on first use, for the instruction set of the machine, into the user's cache folder. If it
cannot be built, another backend is chosen; unavailable_reason() tells why.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import torch

from headinfer.attention.state import AttentionState
from headinfer.utils.tensors import Piece
from headinfer.utils.user_folders import cache_folder

__all__ = ["attend_native", "unavailable_reason"]

_SOURCE = Path(__file__).with_name("native.c")
_FLAGS = ("-march=native", "-std=gnu11", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-fopenmp")
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _Piece(ctypes.Structure):
    """piece_t of native.c."""

    _fields_ = (
        ("k", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("k_head_stride", ctypes.c_int64),
        ("v_head_stride", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
    )


class _BuildError(Exception):
    """The kernel cannot be built on this machine."""


def _cpu_identity() -> str:
    """Describe what -march=native depends on, since several machines may share one cache folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def _torch_openmp() -> list[str]:
    """Find torch's OpenMP runtime, so that the kernel shares its threads; if empty, use that of the compiler."""
    folders = (Path(torch.__file__).parent / "lib", Path(torch.__file__).parent.parent / "torch.libs")
    return [str(path) for folder in folders for path in sorted(folder.glob("libgomp*.so*"))][:1]


def _build() -> Path:
    """Compile native.c, unless the cache folder has the library already, and return the library's path."""
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise _BuildError("no C compiler (cc, gcc or clang) was found")
    # -O3 is faster only if a vector fits one register. Otherwise it spills registers and takes half a minute to build.
    flags = ("-O3" if "avx512f" in _cpu_identity() else "-O2", *_FLAGS)
    identity = "\n".join([_SOURCE.read_text(encoding="utf-8"), *flags, compiler, _cpu_identity(), *_torch_openmp()])
    target = cache_folder() / f"native-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            library = Path(folder) / "native.so"
            object_file = Path(folder) / "native.o"
            openmp = _torch_openmp() or ["-fopenmp"]
            for command in (
                [compiler, *flags, "-c", str(_SOURCE), "-o", str(object_file)],
                [compiler, "-shared", str(object_file), *openmp, "-lm", "-o", str(library)],
            ):
                done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
                if done.returncode:
                    raise _BuildError(f"{' '.join(command[:1])} failed: {done.stderr.strip()[:300]}")
            library.replace(target)  # atomic, because other processes may build or load it at the same time
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _BuildError(str(error)) from error
    return target


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """Return the library and an empty string, or None and why there is none."""
    if os.environ.get("HEADINFER_NATIVE", "1") == "0":
        return None, "switched off by HEADINFER_NATIVE=0"
    try:
        library = ctypes.CDLL(str(_build()))
    except (_BuildError, OSError) as error:
        return None, str(error)
    library.headinfer_attend.argtypes = [
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_float,
        ctypes.c_float,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_void_p,
    ]
    library.headinfer_scratch.argtypes = [ctypes.c_void_p, *(ctypes.c_int64,) * 4]
    library.headinfer_scratch.restype = ctypes.c_int64
    return library, ""


def unavailable_reason() -> str:
    """Return why this machine cannot use the native kernel, or "" if it can. The first call builds the kernel."""
    return _load()[1]


def _contiguous_heads(x: torch.Tensor) -> torch.Tensor:
    """Return x [H, T, D] with the tokens of each head contiguous: x itself if they are, else a copy."""
    return x if x.stride(2) == 1 and (x.shape[1] == 1 or x.stride(1) == x.shape[2]) else x.contiguous()


class _Scratch(threading.local):
    """The memory of partial results, one for each thread that calls the kernel. It grows to the largest call."""

    tensor = torch.empty(0)

    def floats(self, count: int) -> torch.Tensor:
        """Return at least `count` floats of any value."""
        if self.tensor.numel() < count:
            with torch.inference_mode(False):
                self.tensor = torch.empty(count)
        return self.tensor


_SCRATCH = _Scratch()


def attend_native(
    q: torch.Tensor,
    pieces: Sequence[Piece],
    *,
    scale: float,
    soft_cap: float | None = None,
    threads: int | None = None,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> AttentionState:
    """Compute attention of q to the keys of all pieces, without a mask.

    The result has the same bits for any number of threads. Several threads of Python may call this at the same time;
    the call releases the GIL. If `out` and `lse` are given, and q and the pieces have contiguous heads, the call
    allocates nothing beyond its scratch memory, which each calling thread keeps.

    Args:
        q: [H, N, Dk] in float32, bfloat16 or float16; Dk must be a multiple of 16.
        pieces: pairs of k [H, T, Dk] and v [H, T, Dv] in host memory, of the dtype of q; Dv must be a multiple of 16.
            Heads may have any stride; if the tokens of a head are not contiguous, the piece is copied.
        scale: the factor of the scores.
        soft_cap: caps the scores by soft_cap * tanh(score / soft_cap). None: no cap.
        threads: the number of threads that compute. None: torch.get_num_threads().
        out: a contiguous float32 tensor [H, N, Dv] in host memory that the output is written to. None: a new one.
        lse: a contiguous float32 tensor [H, N] in host memory, as `out`.

    Returns:
        out [H, N, Dv] and lse [H, N], float32: the given tensors, or new ones.

    Raises:
        MemoryError: the kernel cannot allocate its table of pieces.
    """
    library = _load()[0]
    assert library is not None
    heads, rows, key_dim = q.shape
    value_dim = pieces[0][1].shape[-1]
    # Segments and tails have contiguous heads, slices of a model's own K and V may not. This list keeps copies alive.
    pieces = [(_contiguous_heads(k), _contiguous_heads(v)) for k, v in pieces]
    table = (_Piece * len(pieces))()
    for entry, (k, v) in zip(table, pieces, strict=True):
        entry.k = k.data_ptr()
        entry.v = v.data_ptr()
        entry.k_head_stride = k.stride(0)
        entry.v_head_stride = v.stride(0)
        entry.tokens = k.shape[1]
    contiguous_q = q.contiguous()
    float_q = contiguous_q.float()
    out = _result(out, (heads, rows, value_dim))
    lse = _result(lse, (heads, rows))
    scratch = _SCRATCH.floats(library.headinfer_scratch(table, len(pieces), heads, rows, value_dim))
    failed = library.headinfer_attend(
        table,
        len(pieces),
        float_q.data_ptr(),
        contiguous_q.data_ptr(),
        heads,
        rows,
        key_dim,
        value_dim,
        scale,
        soft_cap or 0.0,
        _DTYPES[q.dtype],
        torch.get_num_threads() if threads is None else threads,
        scratch.data_ptr(),
        out.data_ptr(),
        lse.data_ptr(),
    )
    if failed:
        raise MemoryError("the native attention kernel cannot allocate memory for its table of pieces")
    return AttentionState(out, lse)


def _result(given: torch.Tensor | None, shape: tuple[int, ...]) -> torch.Tensor:
    """Return the tensor that a result is written to: the given one if its layout is right, or a new one."""
    if given is None:
        return torch.empty(shape)
    if given.shape != shape or given.dtype != torch.float32 or given.is_cuda or not given.is_contiguous():
        raise ValueError(f"a result must be a contiguous float32 tensor {list(shape)} in host memory")
    return given
