"""Builds native.c, the CPU kernel of decode, for the instructions that this CPU has.

A library serves one target, which is a set of CPU features, and one dtype of K and V. An idle core compiles it in about
a second. It is compiled when it is first needed, into the user's cache folder; the logger of this module says so. If it
cannot be built, load() says why.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from headinfer.utils.user_folders import cache_folder

__all__ = ["DTYPES", "QUANTISED", "TARGETS", "Target", "built", "load", "target_of", "targets_here"]

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The dtypes of q, K and V, with their numbers in native.c."""

QUANTISED = {torch.quint8: 3, torch.quint4x2: 4}
"""The dtypes of quantised K and V (quantised.py), with their numbers in native.c. Then q is float32."""

_LOG = logging.getLogger(__name__)
_FOLDER = Path(__file__).parent
_SOURCES = ("native.c", "native_vector.h", "native_matrix.h", "native_tiles.h", "native_quantised.h")
_FLAGS = ("-O3", "-std=gnu11", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-fopenmp")
_BUILD_S = 600  # a compiler that takes longer hangs
_SWITCH = "HEADINFER_NATIVE"


@dataclass(frozen=True)
class Target:
    """A set of CPU features that the kernel is compiled for.

    Attributes:
        name: the name, for people and for the environment variable HEADINFER_NATIVE.
        features: the features that a CPU must have, as /proc/cpuinfo names them.
        dtypes: the dtypes that it makes a difference for.
        defines: macros of native.c.
    """

    name: str
    features: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = (*DTYPES, *QUANTISED)
    defines: tuple[str, ...] = ()

    def flags(self, dtype: torch.dtype) -> list[str]:
        """Return the compiler's flags. Each feature has a flag of almost the same name."""
        features = [f"-m{feature.replace('amx_', 'amx-').replace('_', '')}" for feature in self.features]
        return [*_FLAGS, *features, *(f"-D{name}" for name in (*self.defines, f"DTYPE={(DTYPES | QUANTISED)[dtype]}"))]


_AVX2 = ("avx2", "fma", "f16c")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512dq", "avx512vl")
_AVX512_BF16 = (*_AVX512, "avx512_bf16")
_BF16 = (torch.bfloat16,)

TARGETS = (
    Target("amx", (*_AVX512_BF16, "amx_tile", "amx_bf16"), _BF16, ("TILES",)),
    Target("avx512-bf16", _AVX512_BF16, _BF16),
    Target("avx512-vnni", (*_AVX512, "avx512_vnni"), tuple(QUANTISED)),
    Target("avx512", _AVX512),
    Target("avx2", _AVX2),
    Target("plain"),  # what every CPU of the architecture has: SSE2 on x86-64, NEON on aarch64
)
"""All targets, the fastest first. `amx` has never been run on a CPU with AMX: tests emulate the tile instructions."""


class _BuildError(Exception):
    """The kernel cannot be built on this machine."""


@functools.cache
def _features(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Return the features of this CPU that the system lets programs use."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    flags = next((line.split(":", 1)[1] for line in lines if line.startswith("flags")), "")
    found = frozenset(flags.split())
    return found if _may_use_tiles(found) else found - {"amx_tile"}


def _may_use_tiles(features: frozenset[str]) -> bool:
    """Ask Linux for the permission to use AMX in this process, which it gives on request."""
    if "amx_tile" not in features or platform.machine() != "x86_64" or sys.platform != "linux":
        return False
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return bool(ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0)


def targets_here(dtype: torch.dtype) -> list[Target]:
    """Return the targets that this CPU can run and that differ for a dtype, the fastest first."""
    return [target for target in TARGETS if dtype in target.dtypes and _features().issuperset(target.features)]


def target_of(dtype: torch.dtype) -> Target | str:
    """Return the target that serves a dtype, or why there is none.

    It is the fastest one that this CPU can run. The environment variable HEADINFER_NATIVE may name another target: then
    the first one that is not faster. 0 switches the kernel off.
    """
    wanted = os.environ.get(_SWITCH, "1")
    if wanted == "0":
        return f"switched off by {_SWITCH}=0"
    here = targets_here(dtype)
    if wanted == "1":
        return here[0]
    names = [target.name for target in TARGETS]
    if wanted not in names:
        return f"{_SWITCH} is {wanted!r}: it must be 0, 1 or one of {', '.join(names)}"
    slower = names[names.index(wanted) :]
    return next(target for target in here if target.name in slower)


def _compiler() -> str:
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise _BuildError("no C compiler (cc, gcc or clang) was found: install one")
    return compiler


def _torch_openmp() -> list[str]:
    """Find torch's OpenMP runtime, so that the kernel shares its threads; if empty, use that of the compiler."""
    folders = (Path(torch.__file__).parent / "lib", Path(torch.__file__).parent.parent / "torch.libs")
    return [str(path) for folder in folders for path in sorted(folder.glob("libgomp*.so*"))][:1]


def _build(target: Target, dtype: torch.dtype) -> Path:
    """Compile the kernel, unless the cache folder has the library already, and return the library's path."""
    compiler = _compiler()
    flags = target.flags(dtype)
    openmp = _torch_openmp() or ["-fopenmp"]
    sources = [(_FOLDER / name).read_text(encoding="utf-8") for name in _SOURCES]
    identity = "\n".join([*sources, *flags, compiler, platform.machine(), *openmp])
    library = cache_folder() / f"native-{target.name}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    if library.exists():
        return library
    name = str(dtype).removeprefix("torch.")
    _LOG.info("building the attention kernel for this CPU (%s, %s), once ...", target.name, name)
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            object_file = Path(folder) / "native.o"
            linked = Path(folder) / "native.so"
            _run([compiler, *flags, "-c", str(_FOLDER / "native.c"), "-o", str(object_file)])
            _run([compiler, "-shared", str(object_file), *openmp, "-lm", "-o", str(linked)])
            linked.replace(library)  # atomic, because other processes may build or load it at the same time
    except OSError as error:
        raise _BuildError(f"{library.parent} cannot be written to ({error.strerror or error})") from error
    return library


def _run(command: list[str]) -> None:
    """Run a compiler."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_BUILD_S)
    except subprocess.TimeoutExpired as error:
        raise _BuildError(f"{command[0]} took more than {_BUILD_S} s") from error
    if done.returncode:
        lines = done.stderr.splitlines()
        reason = next((line for line in lines if "error" in line), lines[0] if lines else f"code {done.returncode}")
        raise _BuildError(f"{command[0]} failed: {reason.strip()[:200]}")


@functools.cache
def built(target: Target, dtype: torch.dtype) -> tuple[ctypes.CDLL | None, str]:
    """Return the library of a target, built if necessary, and an empty text, or None and why there is none."""
    try:
        library = ctypes.CDLL(str(_build(target, dtype)))
    except (_BuildError, OSError) as error:
        return None, f"the attention kernel for this CPU cannot be built: {error}"
    library.headinfer_attend.argtypes = [ctypes.c_void_p]
    library.headinfer_attend.restype = None
    library.headinfer_scratch.argtypes = [ctypes.c_void_p]
    library.headinfer_scratch.restype = ctypes.c_int64
    library.headinfer_read.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
    library.headinfer_read.restype = ctypes.c_int64
    return library, ""


@functools.cache
def load(dtype: torch.dtype) -> tuple[ctypes.CDLL | None, str]:
    """Return the library that serves a dtype on this CPU, built if necessary, or None and why there is none."""
    target = target_of(dtype)
    return (None, target) if isinstance(target, str) else built(target, dtype)
