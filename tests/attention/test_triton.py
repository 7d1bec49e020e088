"""The Triton kernels and their launches.

tests/support/triton_on_cpu.py tests the results of the kernels in Triton's interpreter. It runs in a separate process,
because the interpreter has to be enabled before triton is imported and disables the compiler. To run it alone:
TRITON_INTERPRET=1 pytest tests/support/triton_on_cpu.py
"""

import collections
import importlib
import importlib.util
import math
import os
import random
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
    triton = type("T", (), {"OutOfResources": OutOfResources, "JITFunction": type(None)})
    fake = type("Kernels", (), {"attend": kernel, "triton": triton})
    monkeypatch.setattr(triton_calls, "_kernels", lambda: fake)
    monkeypatch.setattr(triton_calls, "_fitting", {})
    q = torch.zeros(1, 1, 200, 64, dtype=torch.bfloat16)
    for _ in range(2):
        triton_calls.attend(q, q, q, scale=1.0, softcap=None, causal=True)
    assert kernel.tried == [(128, 3), (128, 2), (64, 2), (64, 1), (32, 1), (32, 1)]


# -- compiled kernels that are kept ------------------------------------------------------------------------------------


class Launcher:
    """Counts how Triton launches kernels that nothing compiles: through its own launcher, or directly.

    Attributes:
        launched: of each launch the compiled kernel, the grid and the arguments.
        through_triton: the number of launches for which Triton looked for the compiled kernel.
    """

    def __init__(self):
        self.launched = []
        self.through_triton = 0


@pytest.fixture
def launcher(monkeypatch):
    """Triton's own code for launches, up to the driver, for an H100 that does not exist."""
    triton = pytest.importorskip("triton")
    compiler = importlib.import_module("triton.backends.compiler")
    found = Launcher()

    class Compiled(triton.compiler.CompiledKernel):
        packed_metadata = function = module = metadata = None
        name = "fake"

        def __init__(self, src, target, options, **_):
            self.src = src
            self.attributes = (src.signature, src.constants, src.attrs, options)

        def _init_handles(self):
            pass

        @property
        def run(self):
            return lambda x, y, z, stream, function, packed, data, enter, leave, *arguments: found.launched.append(
                (self, (x, y, z), arguments)
            )

    class Driver:
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)
        get_current_target = staticmethod(lambda: compiler.GPUTarget("cuda", 90, 32))

    run = triton.JITFunction.run

    def counted(self, *arguments, **options):
        found.through_triton += 1
        return run(self, *arguments, **options)

    monkeypatch.setattr(triton.compiler, "compile", Compiled)
    monkeypatch.setattr(triton.JITFunction, "run", counted)
    monkeypatch.setattr(triton_calls, "_compiled", {})
    kernels = triton_calls._kernels()
    for name in ("attend", "join", "merge"):
        kernel = getattr(kernels, name)
        monkeypatch.setattr(kernel, "device_caches", collections.defaultdict(kernel.create_binder))
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    return found


def random_tensor(rng, *shape, dtype=torch.float32):
    """A tensor of zeros with random gaps between rows, at a random offset."""
    gaps = [rng.choice([0, 0, 0, 1, 16]) for _ in shape[:-1]]
    padded = [size + gap for size, gap in zip(shape, [0, *gaps], strict=True)]
    offset = rng.choice([0, 0, 0, 1, 8])
    memory = torch.zeros(math.prod(padded) + offset, dtype=dtype)[offset:].view(padded)
    return memory[tuple(slice(size) for size in shape)]


def call_at_random(rng):
    """Merge or attend with tensors of a random shape, dtype and layout."""
    rows = rng.choice([1, 16])
    dim = rng.choice([1, 16, 24])
    dtype = rng.choice([torch.float32, torch.bfloat16])
    if rng.random() < 0.5:
        state = [random_tensor(rng, 2, rows, dim), random_tensor(rng, 2, rows)]
        part = [random_tensor(rng, 2, rows, dim, dtype=dtype), random_tensor(rng, 2, rows)]
        assert triton_calls.merge_(*state, *part)
        return
    keys = rng.choice([1, 16, 1500])
    q, k, v = (random_tensor(rng, 1, 2, size, dim, dtype=dtype) for size in (rows, keys, keys))
    causal = rows == keys
    triton_calls.attend(q, k, v, scale=0.5, softcap=rng.choice([None, 2.0]), causal=causal)


def test_a_kept_kernel_is_the_one_that_triton_would_launch(launcher, monkeypatch):
    rng = random.Random(7)
    direct = 0
    for _ in range(1000):
        state = rng.getstate()
        launcher.launched.clear()
        launcher.through_triton = 0
        call_at_random(rng)
        found = list(launcher.launched)
        direct += len(found) - launcher.through_triton
        rng.setstate(state)
        with monkeypatch.context() as patch:
            patch.setattr(triton_calls, "_can_launch", lambda *_: False)
            patch.setattr(triton_calls, "_compiled", {})
            launcher.launched.clear()
            call_at_random(rng)
        assert len(found) == len(launcher.launched)
        for (kernel, grid, arguments), (wanted, wanted_grid, wanted_arguments) in zip(
            found, launcher.launched, strict=True
        ):
            assert kernel is wanted
            assert grid == wanted_grid
            assert len(arguments) == len(wanted_arguments)
            for argument, other in zip(arguments, wanted_arguments, strict=True):
                assert type(argument) is type(other)
                if not isinstance(argument, torch.Tensor):
                    assert argument == other
    assert direct > 100


def test_only_the_first_launch_of_a_shape_goes_through_triton(launcher):
    state = AttentionState(torch.zeros(8, 4, 64), torch.zeros(8, 4))
    for _ in range(3):
        state_again = AttentionState(state.out.clone(), state.lse.clone())
        assert triton_calls.merge_(state.out, state.lse, state_again.out, state_again.lse)
    assert (launcher.through_triton, len(launcher.launched)) == (1, 3)
    q = torch.zeros(1, 8, 1, 64)
    for keys in (5000, 5001, 5002):  # a tile of decode, in a slot of one size
        slot = torch.zeros(1, 2, 6000, 64)
        triton_calls.attend(q, slot[:, :, :keys], slot[:, :, :keys], scale=1.0, softcap=None, causal=False)
    assert (launcher.through_triton, len(launcher.launched)) == (3, 9)  # attention, and the merge of its splits
    assert [arguments[16] for _, _, arguments in launcher.launched[3::2]] == [5000, 5001, 5002]


def test_what_triton_compiles_for_is_never_mixed_up(launcher):
    """Each other call differs from the usual one in one property, and needs another kernel."""
    memory = torch.zeros(10_000)
    lse = torch.zeros(4, 16)
    usual_part = torch.zeros(4, 16, 8)

    def merge(start=0, row=64, part=usual_part):
        state = memory[start : start + 64 * row].view(4, 16, row)[..., :8]
        assert triton_calls.merge_(state, lse, part, lse)
        return launcher.launched[-1][0]

    usual = merge()
    others = [
        merge(start=1),
        merge(row=63),
        merge(part=usual_part.bfloat16()),
        merge(part=torch.zeros(4, 16, 16)[..., :8]),
    ]
    assert usual not in others
    assert merge() is usual
    assert merge(start=4, row=80) is usual  # still multiples of 16


def test_numbers_beyond_32_bits_go_through_triton(launcher):
    kernels = triton_calls._kernels()
    x = torch.zeros(4, 8)
    constants = {"BLOCK_SPLITS": 16, "VALUE_DIM": 8, "VALUE_WIDTH": 16}
    for rows in (4, 2**31, 2**31, 4):
        triton_calls._launch("join", (1, 1, 1), (x, x, x, x), (), (rows, 3), constants)
    small, large, again, last = (kernel for kernel, _, _ in launcher.launched)
    assert small is last is not large is again
    assert launcher.through_triton == 3
    assert kernels.join.arg_names[4] == "rows"
    assert large.src.signature["rows"] == "i64"


@pytest.mark.parametrize("difference", ["result", "order", "constants"])
def test_another_triton_launches_as_before(launcher, monkeypatch, difference):
    """If a future Triton returns something else, or orders arguments otherwise, all launches go through it."""
    kernel = triton_calls._kernels().merge
    if difference == "result":
        run = type(kernel).run
        monkeypatch.setattr(type(kernel), "run", lambda *arguments, **options: [run(*arguments, **options)])
    elif difference == "order":
        monkeypatch.setattr(kernel, "arg_names", kernel.arg_names[::-1])
    x = torch.zeros(4, 16, 8)
    y = torch.zeros(4, 16)
    if difference == "constants":
        monkeypatch.setattr(torch.version, "hip", "6.0")
    for _ in range(3):
        assert triton_calls.merge_(x, y, x, y)
    assert (launcher.through_triton, len(launcher.launched)) == (3, 3)
    assert not triton_calls._compiled


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from headinfer.attention import triton_kernels as kernels

HALF = "*bf16"
SINGLE = "*fp32"


def build(kernel, capability, half, constants, **options):
    pointers = {"q": half, "k": half, "v": half, "part": HALF}
    pointers |= dict.fromkeys(("out", "lse", "parts", "parts_lse", "part_lse"), SINGLE)
    pointers |= {"x": half, "packed": "*u8"}
    types = {**pointers, "unit": "fp32", "cap": "fp32", **dict.fromkeys(constants, "constexpr")}
    names = kernel.arg_names
    source = ASTSource(
        kernel, {x: types.get(x, "i32") for x in names}, {(names.index(x),): y for x, y in constants.items()}
    )
    assert compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["cubin"]


for capability in (80, 90):
    build(kernels.merge, capability, HALF, {"DIM": 128, "WIDTH": 128, "BLOCK_ROWS": 16})
    build(kernels.join, capability, HALF, {"BLOCK_SPLITS": 16, "VALUE_DIM": 96, "VALUE_WIDTH": 128})
    for bits, keys in ((8, True), (4, False)):
        block = {"KEYS": keys, "BITS": bits, "DIM": 96, "WIDE": 96, "WIDTH": 128, "UNIT": 64}
        build(kernels.quantise, capability, HALF, {**block, "WIDENING": 1.1}, num_warps=8)
        build(kernels.dequantise, capability, HALF, block, num_warps=8)
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
