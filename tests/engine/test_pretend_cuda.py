"""Runs the tests of a GPU on simulated devices (tests/support/pretend_cuda.py), each in a separate process.

To run all of them:

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
    """The reason why devices cannot be simulated with this torch; empty if they can."""
    if torch.cuda.is_available():
        return "this machine has a real device"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    library = Path(torch.__file__).parent / "lib" / "libc10.so"
    if not library.is_file() or not hasattr(ctypes.CDLL(str(library)), GUARDS):
        return "the device guards of this torch were not found"
    return ""


pytestmark = pytest.mark.skipif(bool(unavailable_reason()), reason=unavailable_reason())


def run_on_simulated_devices(*arguments, triton=False):
    run_pytest(
        "-p",
        "pretend_cuda",
        *arguments,
        HEADINFER_TRITON=str(int(triton)),  # the interpreter runs kernels hundreds of times slower
        PYTHONPATH=os.pathsep.join(filter(None, [str(TESTS / "support"), os.environ.get("PYTHONPATH")])),
        TRITON_INTERPRET="1",
    )


def test_simulated_devices_detect_mistakes():
    run_on_simulated_devices("tests/support/on_pretended_cuda.py")


def test_engine_and_transformers():
    run_on_simulated_devices(
        "-m", "gpu", "tests/engine/test_gpu.py", "-k", "not (float64 and (dims1 or dims2)) and not inputs1-256"
    )


def test_engine_with_triton_kernels():
    run_on_simulated_devices("-m", "gpu", "tests/engine/test_gpu.py", "-k", "float64 and dims1 and 0.5", triton=True)


def test_benchmarks():
    run_on_simulated_devices("-m", "gpu", "tests/bench/test_gpu_bench.py")
