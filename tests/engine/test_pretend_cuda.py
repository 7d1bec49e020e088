"""The tests of a GPU on devices that are not there: see pretend_cuda.py. Each runs in a process of its own.

All of it:

    TRITON_INTERPRET=1 PYTHONPATH=tests/support pytest -p pretend_cuda -m gpu tests/engine/test_gpu.py \\
        tests/bench/test_gpu_bench.py
"""

import ctypes
import importlib.util
import os
from pathlib import Path

import pytest
import torch
from own_process import TESTS, run_pytest

GUARDS = "_ZN3c104impl26device_guard_impl_registryE"


def unavailable_reason():
    """Why this torch cannot pretend; empty where it can."""
    if torch.cuda.is_available():
        return "there is a real device"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    library = Path(torch.__file__).parent / "lib" / "libc10.so"
    if not library.is_file() or not hasattr(ctypes.CDLL(str(library)), GUARDS):
        return "this torch keeps its device guards elsewhere"
    return ""


pytestmark = pytest.mark.skipif(bool(unavailable_reason()), reason=unavailable_reason())


def rehearse(*arguments, triton=False):
    run_pytest(
        "-p",
        "pretend_cuda",
        *arguments,
        timeout_s=900,
        HEADINFER_TRITON=str(int(triton)),  # a kernel takes its interpreter hundreds of times as long
        PYTHONPATH=os.pathsep.join(filter(None, [str(TESTS / "support"), os.environ.get("PYTHONPATH")])),
        TRITON_INTERPRET="1",
    )


def test_the_pretence_sees_mistakes_and_commands_run():
    rehearse("tests/support/on_pretended_cuda.py")


def test_the_engine_and_transformers():
    rehearse("-m", "gpu", "tests/engine/test_gpu.py", "-k", "not (float64 and (dims1 or dims2)) and not inputs1-256")


def test_the_engine_with_triton_kernels():
    rehearse("-m", "gpu", "tests/engine/test_gpu.py", "-k", "float64 and dims1 and 0.5", triton=True)


def test_the_benchmarks():
    rehearse("-m", "gpu", "tests/bench/test_gpu_bench.py")
