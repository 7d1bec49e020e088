"""The Triton kernels and their launches.

tests/support/triton_on_cpu.py tests the results of the kernels in Triton's interpreter. It runs in a separate process,
because the interpreter has to be enabled before triton is imported and disables the compiler. To run it alone:
TRITON_INTERPRET=1 pytest tests/support/triton_on_cpu.py
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from own_process import HANG_S, run_pytest

from headinfer.attention import triton_calls
from headinfer.attention.backends import Problem, choose
from headinfer.attention.state import AttentionState

SUPPORT = Path(__file__).parents[1] / "support"
SWITCHED_OFF = "switched off by HEADINFER_TRITON=0"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_kernels_in_the_interpreter():
    run_pytest(SUPPORT / "triton_on_cpu.py", TRITON_INTERPRET="1")


@pytest.fixture
def no_triton(monkeypatch):
    """Behave like a machine without triton (Windows, or torch for CPUs)."""

    def absent():
        raise ImportError("No module named 'triton'")

    monkeypatch.setattr(triton_calls, "_kernels", absent)
    monkeypatch.setattr(triton_calls, "unavailable_reason", triton_calls.unavailable_reason.__wrapped__)


@pytest.mark.usefixtures("no_triton")
def test_other_backends_are_chosen_without_triton():
    assert "No module named 'triton'" in triton_calls.unavailable_reason()
    assert choose(Problem("cuda", torch.bfloat16, 0, 64, 64, softcap=True)).name == "eager"
    assert choose(Problem("cuda", torch.bfloat16, 0, 64, 64), "cuda-triton").name == "cuda-flash"
    state = AttentionState(torch.zeros(2, 3), torch.zeros(2))
    assert not triton_calls.merge_(state.out, state.lse, state.out, state.lse)


def test_importing_the_backends_does_not_import_triton():
    script = (
        "import sys\n"
        "from headinfer.attention import triton_calls\n"
        "from headinfer.attention.backends import choose\n"
        "import headinfer.engine.streaming\n"
        "assert 'headinfer.attention.triton_kernels' not in sys.modules\n"
        "print(triton_calls.unavailable_reason())\n"
    )
    environment = {**os.environ, "HEADINFER_TRITON": "0"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True, timeout=HANG_S
    )
    assert done.stdout.strip() == SWITCHED_OFF


class OnDevice:
    """An object that looks like a tensor on a CUDA device to merge_."""

    is_cuda = True


def test_merging_on_cuda_uses_the_kernel(monkeypatch):
    seen = []
    monkeypatch.setattr(triton_calls, "merge_", lambda *tensors: seen.append(tensors) or True)
    state, part = (AttentionState(OnDevice(), object()) for _ in range(2))
    assert state.merge_(part) is state
    assert seen == [(state.out, state.lse, part.out, part.lse)]
    on_cpu = AttentionState(torch.zeros(2, 3), torch.zeros(2))
    on_cpu.merge_(AttentionState(torch.ones(2, 3), torch.zeros(2)))
    assert len(seen) == 1
    assert on_cpu.out.tolist() == [[0.5] * 3] * 2


def test_splits_cover_all_keys_and_are_not_empty():
    for blocks in (1, 3, 8, 100, 1000):
        for keys in (1, 255, 511, 512, 1023, 1024, 1025, 4096, 50_001, 4_000_000):
            for block_keys in (16, 32, 64):
                splits, each = triton_calls._split(blocks, keys, block_keys)
                assert (splits - 1) * each < keys <= splits * each
                assert each % block_keys == 0
                assert splits == 1 or each >= triton_calls._SPLIT_KEYS
                assert splits <= -(-triton_calls._PROGRAMS // blocks)
                assert (splits - 1) * each + each < 2**31  # keys are counted in 32 bits


@pytest.mark.parametrize("is_half", [True, False])
@pytest.mark.parametrize("width", [16, 64, 128, 256])
@pytest.mark.parametrize("rows", [1, 16, 17, 64, 255, 8192])
def test_launches_end_with_the_smallest_one(rows, width, is_half):
    launches = list(triton_calls._launches(rows, width, is_half))
    assert launches[-1] == (16, 4, 1)
    assert all(block in (16, 32, 64, 128) and warps in (4, 8) for block, warps, _ in launches)
    assert launches[0][0] < 2 * max(rows, 16)


def test_launch_that_does_not_fit_is_replaced_by_a_smaller_one(monkeypatch):
    """The device has little shared memory. The next call with the same shape starts with the launch that fitted."""

    class OutOfResources(Exception):
        pass

    class Kernel:
        def __init__(self):
            self.tried = []

        def __getitem__(self, grid):
            def launch(*arguments, BLOCK_ROWS, num_stages, **rest):
                self.tried.append((BLOCK_ROWS, num_stages))
                if BLOCK_ROWS > 32:
                    raise OutOfResources

            return launch

    kernel = Kernel()
    fake = type("Kernels", (), {"attend": kernel, "triton": type("T", (), {"OutOfResources": OutOfResources})})
    monkeypatch.setattr(triton_calls, "_kernels", lambda: fake)
    monkeypatch.setattr(triton_calls, "_fitting", {})
    q = torch.zeros(1, 1, 200, 64, dtype=torch.bfloat16)
    for _ in range(2):
        triton_calls.attend(q, q, q, scale=1.0, softcap=None, causal=True)
    assert kernel.tried == [(128, 3), (128, 2), (64, 2), (64, 1), (32, 1), (32, 1)]


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from headinfer.attention import triton_kernels as kernels

HALF = "*bf16"
SINGLE = "*fp32"


def build(kernel, capability, half, constants, **options):
    pointers = {"q": half, "k": half, "v": half, "part": HALF}
    pointers |= dict.fromkeys(("out", "lse", "parts", "parts_lse", "part_lse"), SINGLE)
    types = {**pointers, "unit": "fp32", "cap": "fp32", **dict.fromkeys(constants, "constexpr")}
    names = kernel.arg_names
    source = ASTSource(
        kernel, {x: types.get(x, "i32") for x in names}, {(names.index(x),): y for x, y in constants.items()}
    )
    assert compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["cubin"]


for capability in (80, 90):
    build(kernels.merge, capability, HALF, {"DIM": 128, "WIDTH": 128, "BLOCK_ROWS": 16})
    build(kernels.join, capability, HALF, {"BLOCK_SPLITS": 16, "VALUE_DIM": 96, "VALUE_WIDTH": 128})
    shapes = ((HALF, 128, 64, True, 8), (HALF, 16, 64, False, 4), (SINGLE, 32, 32, True, 4))
    for half, rows, keys, causal, warps in shapes:
        dims = {"KEY_DIM": 96, "KEY_WIDTH": 128, "VALUE_DIM": 128, "VALUE_WIDTH": 128}
        flags = {"GROUP": 2, "CAUSAL": causal, "CAPPED": True, "PRECISE": half == SINGLE}
        blocks = {"BLOCK_ROWS": rows, "BLOCK_KEYS": keys}
        build(kernels.attend, capability, half, {**dims, **flags, **blocks}, num_warps=warps, num_stages=3)
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_kernels_compile_for_several_gpus(tmp_path):
    (tmp_path / "build.py").write_text(COMPILE)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "build.py")],
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=HANG_S,
    )
    assert done.returncode == 0, done.stderr[-3000:]
