"""The CPU kernel native.c: every target that can run here against the float64 oracle, its numerics, and its build."""

import math
import platform

import pytest
import torch
from attention_cases import BOUND, assert_matches, native_bound, relative_error, seeded, with_head_stride

from headinfer.attention import native, native_build
from headinfer.attention.native import attend_native
from headinfer.attention.native_build import TARGETS, Target
from headinfer.attention.reference import attend_reference
from headinfer.cli import console

BFLOAT16 = torch.bfloat16
DTYPES = tuple(native_build.DTYPES)

NO_NATIVE = native.unavailable_reason(torch.float32)
needs_native = pytest.mark.skipif(bool(NO_NATIVE), reason=f"no native kernel: {NO_NATIVE}")
pytestmark = needs_native


def emulated(target):
    """Make the target of AMX with its tile instructions emulated in C, for CPUs without AMX."""
    features = tuple(name for name in target.features if not name.startswith("amx"))
    return Target(f"{target.name}-emulated", features, target.dtypes, (*target.defines, "EMULATED_TILES"))


BY_NAME = {target.name: target for target in (*TARGETS, emulated(TARGETS[0]))}
CASES = [(name, dtype) for name, target in BY_NAME.items() for dtype in target.dtypes if dtype in DTYPES]
on_targets = pytest.mark.parametrize(
    ("target", "dtype"),
    [pytest.param(BY_NAME[name], dtype, id=f"{name}-{str(dtype).removeprefix('torch.')}") for name, dtype in CASES],
)


def skip_unless_it_runs(target):
    if not native_build._features().issuperset(target.features):
        pytest.skip(f"this CPU is no {target.name}")


# -- every target ----------------------------------------------------------------------------------------------

SHAPES = (  # rows, head dims, tokens of the pieces
    (1, (128, 128), (1, 1061)),
    (2, (8, 8), (17,)),
    (3, (24, 40), (513, 16)),
    (4, (64, 64), (512, 1, 2, 1500)),
    (5, (56, 120), (33, 1000)),
    (7, (80, 48), (777,)),
    (16, (128, 128), (1, 515)),
    (17, (40, 24), (31, 63)),
    (33, (96, 64), (1024, 3)),
    (64, (16, 72), (600,)),
)


@on_targets
def test_every_target_is_attention_over_all_pieces(target, dtype):
    """Rows from 1 to 64, head dims that are multiples of 8, K and V of other widths, odd tokens, soft caps, threads."""
    skip_unless_it_runs(target)
    rng = seeded(1)
    for number, (rows, dims, sizes) in enumerate(SHAPES):
        soft_cap = 3.0 if number % 3 == 1 else None
        scale = 1.5 / math.sqrt(dims[0])
        q = torch.randn(2, rows, dims[0], generator=rng).to(dtype)
        pieces = [tuple(with_head_stride(2, tokens, dim, 3, rng, dtype) for dim in dims) for tokens in sizes]
        k, v = (torch.cat(sides, dim=1) for sides in zip(*pieces, strict=True))
        wanted = attend_reference(q[None], k[None], v[None], scale=scale, softcap=soft_cap)[0]
        found = attend_native(q, pieces, scale=scale, soft_cap=soft_cap, threads=1, target=target)
        assert_matches(found, wanted, sum(sizes), 2 * BOUND, 2 * native_bound(dtype, rows, target))
        other = attend_native(q, pieces, scale=scale, soft_cap=soft_cap, threads=3, target=target)
        assert torch.equal(other.out, found.out)
        assert torch.equal(other.lse, found.lse)


@on_targets
def test_every_target_is_as_exact_as_torch(target, dtype):
    """The relative Frobenius error against float64 is at most 1.5 times that of torch's attention."""
    skip_unless_it_runs(target)
    if dtype == torch.float32:
        return
    rng = seeded(2)
    for rows, sharpness in ((4, 0.05), (16, 0.05), (16, 6.0), (64, 1.0)):
        q = torch.randn(4, rows, 64, generator=rng).to(dtype)
        k, v = (torch.randn(4, 1111, 64, generator=rng).to(dtype) for _ in range(2))
        scale = sharpness / 8
        wanted = attend_reference(q[None], k[None], v[None], scale=scale).out[0]
        theirs = torch.nn.functional.scaled_dot_product_attention(q[None], k[None], v[None], scale=scale)[0]
        ours = attend_native(q, [(k, v)], scale=scale, target=target).out.to(dtype)
        assert relative_error(ours, wanted) <= 1.5 * relative_error(theirs, wanted)


@on_targets
def test_nan_reaches_only_the_outputs_that_depend_on_it(target, dtype):
    skip_unless_it_runs(target)
    for rows in (4, 16):
        q, k, v = (torch.randn(2, tokens, 24, generator=seeded(3)).to(dtype) for tokens in (rows, 1001, 1001))
        for side, position in (("k", 1000), ("v", 1000), ("q", 1)):
            inputs = {"q": q.clone(), "k": k.clone(), "v": v.clone()}
            inputs[side][1, position, 5] = torch.nan
            out = attend_native(inputs["q"], [(inputs["k"], inputs["v"])], scale=0.2, target=target).out
            is_nan = torch.zeros(2, rows, 24, dtype=torch.bool)
            wanted = {"q": is_nan[1, 1], "k": is_nan[1], "v": is_nan[1, :, 5]}[side]
            wanted.fill_(True)
            assert torch.equal(out.isnan(), is_nan)


@on_targets
def test_pieces_without_keys_change_nothing(target, dtype):
    skip_unless_it_runs(target)
    q, k, none = (torch.randn(2, tokens, 24, generator=seeded(4)).to(dtype) for tokens in (5, 70, 0))
    nothing = attend_native(q, [(none, none)], scale=0.2, target=target)
    assert torch.equal(nothing.out, torch.zeros(2, 5, 24))
    assert torch.equal(nothing.lse, torch.full((2, 5), -torch.inf))
    found = attend_native(q, [(none, none), (k, k), (none, none)], scale=0.2, target=target)
    wanted = attend_native(q, [(k, k)], scale=0.2, target=target)
    assert torch.equal(found.out, wanted.out)
    assert torch.equal(found.lse, wanted.lse)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="AMX is of x86-64")
def test_amx_compiles():
    """No CPU of ours has AMX: its instructions are compiled, and emulated in the tests above."""
    assert native_build._build(TARGETS[0], BFLOAT16).exists()


# -- numerics --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e2, 1e4, 3e4])
def test_native_with_very_large_scores(dtype, size):
    rng = seeded(8)
    q, k = (torch.randn(2, tokens, 32, generator=rng).mul(math.sqrt(size)).to(dtype) for tokens in (3, 2500))
    v = torch.randn(2, 2500, 48, generator=rng).to(dtype)
    wanted = attend_reference(q[None], k[None], v[None], scale=1.0)[0]
    assert float(wanted.lse.abs().max()) > size
    found = attend_native(q, [(k, v)], scale=1.0)
    assert found.out.isfinite().all()
    assert relative_error(found.lse, wanted.lse) <= BOUND
    assert relative_error(found.out, wanted.out) <= 1e-4  # scores of 1e5 are rounded by up to 4e-3 in float32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [-3000.0, 0.0, 3000.0])
@pytest.mark.parametrize("spread", [80.0, 200.0, 1000.0])
def test_native_with_widely_spread_scores(dtype, offset, spread):
    """The weights are between 1 and e^-spread, the best key is at a random position, and all scores have an offset."""
    rng = seeded(9)
    tokens = 2100
    q = torch.zeros(1, 1, 16, dtype=dtype)
    q[..., :2] = 1.0
    k = torch.zeros(1, tokens, 16)
    k[0, :, 0] = (torch.rand(tokens, generator=rng) * spread).to(dtype).mul(8).round().div(8)  # exact in float32
    k[0, :, 1] = offset
    v = torch.randn(1, tokens, 16, generator=rng).to(dtype)
    wanted = attend_reference(q[None], k.to(dtype)[None], v[None], scale=1.0)[0]
    found = attend_native(q, [(k.to(dtype), v)], scale=1.0)
    assert_matches(found, wanted, tokens)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 5, 1024, 3001])
@pytest.mark.parametrize("size", [0.0, 1.0, -100.0])
def test_native_with_equal_keys_gives_the_mean_of_the_values(dtype, tokens, size):
    rng = seeded(tokens)
    q = torch.full((2, 5, 32), size, dtype=dtype)
    k = torch.ones(2, tokens, 32, dtype=dtype)
    v = torch.randn(2, tokens, 16, generator=rng).to(dtype)
    found = attend_native(q, [(k, v)], scale=0.5)
    assert relative_error(found.out, v.double().mean(dim=1, keepdim=True).expand(2, 5, 16)) <= BOUND
    lse = torch.full((2, 5), 0.5 * 32 * size + math.log(tokens))
    torch.testing.assert_close(found.lse, lse, rtol=1e-6, atol=1e-6)


def test_native_converts_the_smallest_half_precision_numbers_exactly():
    """These are subnormal numbers of float16 and negative zeros."""
    v = torch.tensor([6e-8, -6e-8, 3e-5, -0.0, 65504.0, 1.0] + [0.0] * 10, dtype=torch.float16)
    found = attend_native(
        torch.zeros(1, 1, 16, dtype=torch.float16),
        [(torch.zeros(1, 1, 16, dtype=torch.float16), v.view(1, 1, 16))],
        scale=1.0,
    )
    assert torch.equal(found.out.flatten(), v.float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("soft_cap", [None, 5.0, 50.0])
def test_native_writes_into_given_tensors_with_and_without_a_soft_cap(dtype, soft_cap):
    rng = seeded(14)
    q = torch.randn(2, 7, 64, generator=rng).to(dtype)
    k, v = (torch.randn(2, 2503, dim, generator=rng).to(dtype) for dim in (64, 32))
    wanted = attend_reference(q[None], k[None], v[None], scale=1.0, softcap=soft_cap)[0]
    out = torch.full((2, 7, 32), torch.nan)
    lse = torch.full((2, 7), torch.nan)
    pieces = [(k[:, :1001], v[:, :1001]), (k[:, 1001:], v[:, 1001:])]
    found = attend_native(q, pieces, scale=1.0, soft_cap=soft_cap, threads=2, out=out, lse=lse)
    assert found.out is out
    assert found.lse is lse
    assert_matches(found, wanted, 2503, out_bound=native_bound(dtype, 7))


def test_native_refuses_results_of_another_layout():
    q, k = (torch.randn(2, tokens, 16) for tokens in (4, 10))
    for wrong in (torch.empty(2, 4, 32)[..., ::2], torch.empty(2, 4, 16, dtype=torch.float64), torch.empty(2, 3, 16)):
        with pytest.raises(ValueError, match="contiguous float32"):
            attend_native(q, [(k, k)], scale=1.0, out=wrong)


# -- the build -------------------------------------------------------------------------------------------------


def test_targets_by_the_features_of_a_cpu(monkeypatch, tmp_path):
    read = native_build._features.__wrapped__

    def features(text):
        cpuinfo = tmp_path / "cpuinfo"
        cpuinfo.write_text(f"processor : 0\nflags\t\t: {text}\nflags : none\n")
        return read(cpuinfo)

    every = " ".join(TARGETS[0].features)
    monkeypatch.setattr(native_build, "_may_use_tiles", lambda found: "amx_tile" in found)
    for text, half, single in (
        (every, "amx", "avx512"),
        (every.replace("amx_tile", ""), "avx512-bf16", "avx512"),
        ("avx2 fma f16c sse2", "avx2", "avx2"),
        ("avx2 fma", "plain", "plain"),
        ("", "plain", "plain"),
    ):
        found = features(text)
        monkeypatch.setattr(native_build, "_features", lambda found=found: found)
        assert native_build.target_of(BFLOAT16).name == half
        assert native_build.target_of(torch.float32).name == single


def test_tiles_that_the_system_does_not_permit_are_not_used(monkeypatch, tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("flags : avx2 amx_tile amx_bf16\n")
    monkeypatch.setattr(native_build, "_may_use_tiles", lambda found: False)
    assert native_build._features.__wrapped__(cpuinfo) == {"avx2", "amx_bf16"}
    assert native_build._features.__wrapped__(tmp_path / "none") == frozenset()


def test_the_environment_chooses_a_target(monkeypatch):
    monkeypatch.setattr(native_build, "_features", lambda: frozenset(TARGETS[1].features))
    for value, half, single in (("1", "avx512-bf16", "avx512"), ("amx", "avx512-bf16", "avx512"), ("plain",) * 3):
        monkeypatch.setenv("HEADINFER_NATIVE", value)
        assert native_build.target_of(BFLOAT16).name == half
        assert native_build.target_of(torch.float32).name == single
    for value, reason in (("0", "switched off by HEADINFER_NATIVE=0"), ("fast", "it must be 0, 1 or one of amx")):
        monkeypatch.setenv("HEADINFER_NATIVE", value)
        assert reason in native_build.load.__wrapped__(BFLOAT16)[1]


def test_a_failed_build_says_why(monkeypatch, tmp_path):
    plain = TARGETS[-1]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho 'native.c:1: error: no such thing' >&2; exit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    library, reason = native_build.built.__wrapped__(plain, BFLOAT16)
    assert library is None
    assert "cannot be built" in reason
    assert "no such thing" in reason
    assert list((tmp_path / "headinfer").iterdir()) == []
    monkeypatch.setattr(native_build.shutil, "which", lambda name: None)
    assert "no C compiler" in native_build.built.__wrapped__(plain, BFLOAT16)[1]


def test_a_cache_folder_that_cannot_be_written_to_is_not_an_error(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert "cannot be written to" in native_build.built.__wrapped__(TARGETS[-1], BFLOAT16)[1]


def test_a_build_is_announced_once(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native_build, "_run", lambda command: open(command[-1], "w").close())
    monkeypatch.setenv("COLUMNS", "300")
    console.show_log()
    console.show_log()
    for _ in range(2):
        native_build._build(TARGETS[-1], BFLOAT16)
        assert [path.suffix for path in (tmp_path / "headinfer").iterdir()] == [".so"]  # no unfinished file remains
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["building the attention kernel for this CPU (plain, bfloat16), once ..."]


def test_the_summary_names_what_was_built(monkeypatch):
    monkeypatch.setattr(native_build, "_features", lambda: frozenset(TARGETS[1].features))
    monkeypatch.setattr(native_build, "load", lambda dtype: (None, ""))
    assert native.summary() == "built for avx512 (float32, float16); built for avx512-bf16 (bfloat16)"
    monkeypatch.setattr(native_build, "load", lambda dtype: (None, "no C compiler"))
    assert native.summary() == "no C compiler"
