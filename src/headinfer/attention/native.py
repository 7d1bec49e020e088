"""Builds and calls native.c: partial attention for few query rows at memory bandwidth, on any CPU with a C compiler.

torch's CPU kernels reach a third of the DRAM's bandwidth in decode, this one most of it (`headinfer bench decode`). It
is compiled once per machine, for its own instruction set, into the user's cache folder. Without a compiler the torch
kernel serves, and `unavailable_reason()` says why.
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
    _fields_ = (
        ("k", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("k_head_stride", ctypes.c_int64),
        ("v_head_stride", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
    )


class _BuildError(Exception):
    """Why there is no native kernel on this machine."""


def _cpu_identity() -> str:
    """What -march=native depends on: the same cache folder may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def _torch_openmp() -> list[str]:
    """torch's own OpenMP runtime, so that both share one pool of threads; none means the compiler's."""
    folders = (Path(torch.__file__).parent / "lib", Path(torch.__file__).parent.parent / "torch.libs")
    return [str(path) for folder in folders for path in sorted(folder.glob("libgomp*.so*"))][:1]


def _build() -> Path:
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise _BuildError("no C compiler (cc, gcc or clang) was found")
    # -O3 gains only where the vectors fit one register; elsewhere it spills, and takes half a minute to build.
    flags = ("-O3" if "avx512f" in _cpu_identity() else "-O2", *_FLAGS)
    identity = "\n".join([_SOURCE.read_text(encoding="utf-8"), *flags, compiler, _cpu_identity(), *_torch_openmp()])
    target = cache_folder() / f"native-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            fresh, object_file = Path(folder) / "native.so", Path(folder) / "native.o"
            openmp = _torch_openmp() or ["-fopenmp"]
            for command in (
                [compiler, *flags, "-c", str(_SOURCE), "-o", str(object_file)],
                [compiler, "-shared", str(object_file), *openmp, "-lm", "-o", str(fresh)],
            ):
                done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
                if done.returncode:
                    raise _BuildError(f"{' '.join(command[:1])} failed: {done.stderr.strip()[:300]}")
            fresh.replace(target)  # whole or not at all, also with several processes building
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _BuildError(str(error)) from error
    return target


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
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
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
    ]
    return library, ""


def unavailable_reason() -> str:
    """Why the native kernel cannot be used on this machine; empty where it can. Builds it on first use."""
    return _load()[1]


def _by_head(x: torch.Tensor) -> torch.Tensor:
    """x [H, T, D] with each head's tokens contiguous: as it is where it can be, else a copy."""
    return x if x.stride(2) == 1 and (x.shape[1] == 1 or x.stride(1) == x.shape[2]) else x.contiguous()


def attend_native(q: torch.Tensor, pieces: Sequence[Piece], *, scale: float) -> AttentionState:
    """Attention of q over the keys of all pieces, none masked.

    q [H, N, Dk]; each piece k [H, T, Dk] and v [H, T, Dv] of q's dtype (float32, bfloat16 or float16), in host
    memory, any stride between heads; Dk and Dv multiples of 16.
    Returns out [H, N, Dv] and lse [H, N], float32. The same bits for any number of threads.
    """
    library = _load()[0]
    assert library is not None
    heads, rows, key_dim = q.shape
    value_dim = pieces[0][1].shape[-1]
    table = (_Piece * len(pieces))()
    # Segments and tails are in this layout; slices of a model's own K and V may not be. The list keeps copies alive.
    pieces = [(_by_head(k), _by_head(v)) for k, v in pieces]
    for entry, (k, v) in zip(table, pieces, strict=True):
        entry.k, entry.v = k.data_ptr(), v.data_ptr()
        entry.k_head_stride, entry.v_head_stride, entry.tokens = k.stride(0), v.stride(0), k.shape[1]
    own = q.contiguous()
    query = own.float()
    out = torch.empty(heads, rows, value_dim)
    lse = torch.empty(heads, rows)
    failed = library.headinfer_attend(
        table,
        len(pieces),
        query.data_ptr(),
        own.data_ptr(),
        heads,
        rows,
        key_dim,
        value_dim,
        scale,
        _DTYPES[q.dtype],
        out.data_ptr(),
        lse.data_ptr(),
    )
    if failed:
        raise MemoryError("the native attention kernel found no memory for its partial results")
    return AttentionState(out, lse)
