"""Attention backends: those that run on a CPU against the float64 oracle, and the choice of a backend."""

import dataclasses
import itertools
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from attention_cases import BOUND, assert_matches, native_bound, relative_error, seeded, with_head_stride
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headinfer.attention import cuda, native, native_build, triton_calls
from headinfer.attention.backends import BACKENDS, TABLE, Problem, backend_names, capability_of, choose, recorded
from headinfer.attention.reference import attend_reference, causal_mask
from headinfer.attention.state import AttentionState
from headinfer.engine.layer_pass import AttentionSpec
from headinfer.engine.streaming import attend_streaming
from headinfer.errors import UsageError
from headinfer.kv.byte_counter import ByteCounter
from headinfer.kv.host_memory import HostTier
from headinfer.kv.layer_kv import LayerKV
from headinfer.kv.write_back import WriteInPlace
from headinfer.plan.tiles import TilePlan

PROPERTY = settings(
    deadline=None, derandomize=True, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
BY_NAME = {backend.name: backend for backend in BACKENDS}
HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES)

NO_NATIVE = native.unavailable_reason(torch.float32)
needs_native = pytest.mark.skipif(bool(NO_NATIVE), reason=f"no native kernel: {NO_NATIVE}")
on_cpu = pytest.mark.parametrize(
    "name", [pytest.param("cpu-native", marks=needs_native), pytest.param("cpu-flash"), pytest.param("eager")]
)


# -- attend_full -----------------------------------------------------------------------------------------------

PIECE_TOKENS = (1, 15, 16, 17, 130, 1023, 1024, 1025, 2047, 5000)


@on_cpu
@PROPERTY
@given(data=st.data())
def test_attend_full_is_attention_over_all_pieces(name, data):
    draw = data.draw
    rng = seeded(draw(st.integers(0, 2**31 - 1)))
    dtype = draw(st.sampled_from(DTYPES))
    kv_heads, group = draw(st.sampled_from([(1, 1), (3, 1), (1, 5), (2, 4), (3, 7)]))  # MHA, MQA, GQA
    tokens = draw(st.integers(1, (64 if name == "cpu-native" else 40) // group))
    sizes = draw(st.lists(st.sampled_from(PIECE_TOKENS), min_size=1, max_size=4))
    widths = (8, 24, 32, 56, 64) if name == "cpu-native" else (1, 5, 16, 33, 64)
    key_dim = draw(st.sampled_from(widths))
    value_dim = draw(st.sampled_from(widths))
    softcap = draw(st.sampled_from([None, 3.0])) if name in ("cpu-native", "eager") else None
    scale = draw(st.sampled_from([0.1, 1.0, 3.0])) / math.sqrt(key_dim)
    extra = draw(st.sampled_from([0, 1, 7]))
    q = torch.randn(kv_heads * group, tokens, key_dim, generator=rng).to(dtype)
    pieces = [
        tuple(with_head_stride(kv_heads, size, dim, extra, rng, dtype) for dim in (key_dim, value_dim))
        for size in sizes
    ]
    k, v = (torch.cat(sides, dim=1) for sides in zip(*pieces, strict=True))
    wanted = attend_reference(q[None], k[None], v[None], scale=scale, softcap=softcap)[0]
    backend = BY_NAME[name]
    packed = q.reshape(kv_heads, group * tokens, key_dim)
    assert backend.refuses(Problem("cpu", dtype, group * tokens, key_dim, value_dim, softcap is not None)) is None
    found = backend.attend_full(packed, pieces, scale, softcap)
    assert_matches(
        AttentionState(found.out.view(*q.shape[:2], value_dim), found.lse.view(q.shape[:2])),
        wanted,
        sum(sizes),
        2 * BOUND,  # there may be only one output
        2 * native_bound(dtype, group * tokens) if name == "cpu-native" else None,
    )


@on_cpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (48, 80)])
def test_attend_full_with_common_head_dims_and_any_number_of_rows(name, dtype, dims):
    rng = seeded(6)
    k, v = (with_head_stride(2, 1061, dim, 3, rng, dtype) for dim in dims)
    for rows in (1, 2, 3, 4, 7, 32):
        q = torch.randn(2, rows, dims[0], generator=rng).to(dtype)
        wanted = attend_reference(q[None], k[None], v[None], scale=0.2)[0]
        out_bound = native_bound(dtype, rows) if name == "cpu-native" else None
        assert_matches(BY_NAME[name].attend_full(q, [(k, v)], 0.2, None), wanted, 1061, out_bound=out_bound)


@needs_native
@pytest.mark.parametrize(
    ("dtype", "rows"), [(torch.float32, 128), *((dtype, rows) for dtype in HALVES for rows in (65, 300, 512))]
)
def test_the_native_kernel_with_the_query_rows_of_a_short_chunk(dtype, rows):
    rng = seeded(rows)
    sizes = (1, 700, 90)
    pieces = [tuple(with_head_stride(2, size, dim, 3, rng, dtype) for dim in (48, 64)) for size in sizes]
    k, v = (torch.cat(sides, dim=1) for sides in zip(*pieces, strict=True))
    q = torch.randn(2, rows, 48, generator=rng).to(dtype)
    wanted = attend_reference(q[None], k[None], v[None], scale=0.2, softcap=3.0)[0]
    found = BY_NAME["cpu-native"].attend_full(q, pieces, 0.2, 3.0)
    assert_matches(found, wanted, sum(sizes), 2 * BOUND, 2 * native_bound(dtype, rows))
    last = BY_NAME["cpu-native"].attend_full(q[:, -1:], pieces, 0.2, 3.0)
    assert relative_error(found.lse[:, -1:], last.lse) <= 1e-5, "the rows keep their order"


@on_cpu
def test_splitting_the_keys_changes_results_only_by_rounding(name):
    rng = seeded(5)
    q = torch.randn(2, 4, 32, generator=rng)
    k, v = (torch.randn(2, 6000, 32, generator=rng) for _ in range(2))
    whole = BY_NAME[name].attend_full(q, [(k, v)], 0.3, None)
    cuts = [0, 1, 16, 1040, 5999, 6000]
    pieces = [(k[:, a:b], v[:, a:b]) for a, b in itertools.pairwise(cuts)]
    parts = BY_NAME[name].attend_full(q, pieces, 0.3, None)
    assert relative_error(parts.out, whole.out) <= BOUND
    assert relative_error(parts.lse, whole.lse) <= BOUND
    backwards = BY_NAME[name].attend_full(q, pieces[::-1], 0.3, None)
    assert relative_error(backwards.out, whole.out) <= BOUND


# -- attend_causal ---------------------------------------------------------------------------------------------


@on_cpu
@PROPERTY
@given(data=st.data())
def test_attend_causal_is_causal_attention_of_a_chunk_on_itself(name, data):
    draw = data.draw
    rng = seeded(draw(st.integers(0, 2**31 - 1)))
    dtype = draw(st.sampled_from(DTYPES))
    rows = draw(st.integers(1, 3))
    kv_heads, group = draw(st.sampled_from([(1, 1), (3, 1), (1, 5), (2, 3)]))
    tokens = draw(st.sampled_from([1, 2, 3, 15, 64, 255, 300]))
    key_dim, value_dim = (draw(st.sampled_from([1, 7, 16, 33, 64])) for _ in range(2))
    softcap = draw(st.sampled_from([None, 2.0])) if name == "eager" else None
    q, k, v = (
        torch.randn(rows, tokens, heads, dim, generator=rng).to(dtype).transpose(1, 2)  # the layout of models
        for heads, dim in ((kv_heads * group, key_dim), (kv_heads, key_dim), (kv_heads, value_dim))
    )
    found = BY_NAME[name].attend_causal(q, k, v, 0.3, softcap)
    assert_matches(found, attend_reference(q, k, v, scale=0.3, mask=causal_mask(tokens, tokens), softcap=softcap), 3e-6)


@on_cpu
@pytest.mark.parametrize("tokens", [1023, 1024, 1300])
def test_attend_causal_over_several_blocks(name, tokens):
    rng = seeded(tokens)
    q, k, v = (torch.randn(1, heads, tokens, dim, generator=rng) for heads, dim in ((2, 8), (1, 8), (1, 5)))
    found = BY_NAME[name].attend_causal(q, k, v, 0.3, None)
    assert_matches(found, attend_reference(q, k, v, scale=0.3, mask=causal_mask(tokens, tokens)), tokens)
    torch.testing.assert_close(found.out[0, :, 0], v[0, :, 0].expand(2, -1))  # the first query sees only the first key


# -- half precision --------------------------------------------------------------------------------------------


@on_cpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("sharpness", [0.05, 6.0], ids=["flat", "peaked"])
@pytest.mark.parametrize("tokens", [777, 4500])
def test_attend_full_in_half_precision_is_as_exact_as_torch(name, dtype, sharpness, tokens):
    """The relative Frobenius error against float64 is at most 1.5 times that of torch's attention."""
    rng = seeded(tokens)
    heads = 8
    group = 4
    dim = 128
    q = torch.randn(1, heads * group, 4, dim, generator=rng).to(dtype)
    k, v = (torch.randn(1, heads, tokens, dim, generator=rng).to(dtype) for _ in range(2))
    scale = sharpness / math.sqrt(dim)
    wanted = attend_reference(q, k, v, scale=scale).out
    assert wanted.numel() >= 10_000
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True)
    pieces = [(k[0, :, :500], v[0, :, :500]), (k[0, :, 500:], v[0, :, 500:])]
    state = BY_NAME[name].attend_full(q.view(heads, group * 4, dim), pieces, scale, None)
    ours = state.out.view_as(wanted).to(dtype)
    assert relative_error(ours, wanted) <= 1.5 * relative_error(theirs, wanted)


@on_cpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("sharpness", [0.05, 6.0], ids=["flat", "peaked"])
def test_attend_causal_in_half_precision_is_as_exact_as_torch(name, dtype, sharpness):
    rng = seeded(1)
    tokens = 300
    dim = 64
    q = torch.randn(1, 8, tokens, dim, generator=rng).to(dtype)
    k, v = (torch.randn(1, 2, tokens, dim, generator=rng).to(dtype) for _ in range(2))
    scale = sharpness / math.sqrt(dim)
    wanted = attend_reference(q, k, v, scale=scale, mask=causal_mask(tokens, tokens)).out
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale, is_causal=True, enable_gqa=True)
    ours = BY_NAME[name].attend_causal(q, k, v, scale, None).out.to(dtype)
    assert relative_error(ours, wanted) <= 1.5 * relative_error(theirs, wanted)


BF16 = BY_NAME["cpu-flash-bf16"]
AMX = (1, 0)


@PROPERTY
@given(data=st.data())
def test_bfloat16_with_unusual_shapes(data):
    draw = data.draw
    rng = seeded(draw(st.integers(0, 2**31 - 1)))
    dtype = torch.bfloat16
    kv_heads, group = draw(st.sampled_from([(1, 1), (3, 1), (1, 5), (2, 4)]))
    dim = draw(st.sampled_from([1, 7, 16, 33, 64, 80]))
    tokens = draw(st.sampled_from([1, 2, 15, 64, 130, 300]))
    sizes = draw(st.lists(st.sampled_from(PIECE_TOKENS), min_size=1, max_size=3))
    extra = draw(st.sampled_from([0, 1, 7]))
    scale = draw(st.sampled_from([0.1, 1.0, 3.0])) / math.sqrt(dim)
    q = torch.randn(kv_heads * group, tokens, dim, generator=rng).to(dtype)
    pieces = [tuple(with_head_stride(kv_heads, size, dim, extra, rng, dtype) for _ in range(2)) for size in sizes]
    k, v = (torch.cat(sides, dim=1) for sides in zip(*pieces, strict=True))
    full = BF16.attend_full(q.view(kv_heads, group * tokens, dim), pieces, scale, None)
    full = AttentionState(full.out.reshape(*q.shape), full.lse.reshape(q.shape[:2])).running()
    assert_matches(full, attend_reference(q[None], k[None], v[None], scale=scale)[0], sum(sizes), 2**-7)
    k, v = (with_head_stride(kv_heads, tokens, dim, extra, rng, dtype)[None] for _ in range(2))
    wanted = attend_reference(q[None], k, v, scale=scale, mask=causal_mask(tokens, tokens))
    assert_matches(BF16.attend_causal(q[None], k, v, scale, None), wanted, tokens, 2**-7)


def test_bfloat16_weights_are_summed_in_float32():
    """A sum that is rounded to bfloat16 would stop growing at 256 equal keys."""
    rng = seeded(3)
    tokens = 50_000
    q = torch.zeros(1, 128, 64, dtype=torch.bfloat16)
    k = torch.randn(1, tokens, 64, generator=rng).bfloat16()
    v = (1 + torch.rand(1, tokens, 64, generator=rng)).bfloat16()
    found = BF16.attend_full(q, [(k, v)], 0.1, None)
    torch.testing.assert_close(found.lse, torch.full((1, 128), math.log(tokens)), rtol=0, atol=1e-4)
    assert relative_error(found.out, v.double().mean(dim=1, keepdim=True).expand(1, 128, 64)) <= 2**-9


def test_bfloat16_is_chosen_only_on_cpus_with_amx(monkeypatch):
    monkeypatch.setattr(native_build, "load", lambda dtype: (None, ""))  # as if it could be built
    chunk = Problem("cpu", torch.bfloat16, 1000, 64, 64, capability=AMX)
    for rows, with_amx, without_amx in (
        (0, BF16.name, "cpu-flash"),
        (1025, BF16.name, "cpu-flash"),
        (65, BF16.name, "cpu-native"),
        (64, "cpu-native", "cpu-native"),
        (4, "cpu-native", "cpu-native"),
    ):
        problem = dataclasses.replace(chunk, query_rows=rows)
        assert choose(problem).name == with_amx
        assert choose(dataclasses.replace(problem, capability=(0, 0))).name == without_amx
    for other in (
        dataclasses.replace(chunk, dtype=torch.float16),
        dataclasses.replace(chunk, dtype=torch.float32),
        dataclasses.replace(chunk, value_dim=32),
    ):
        assert choose(other).name == "cpu-flash"
    assert choose(dataclasses.replace(chunk, softcap=True)).name == "eager"


@pytest.mark.parametrize(
    ("found", "wanted"),
    [({"amx_bf16": True, "amx_tile": True}, AMX), ({"amx_bf16": True, "amx_tile": False}, (0, 0)), ({}, (0, 0))],
)
def test_capability_of_cpus_with_and_without_amx(monkeypatch, found, wanted):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    assert capability_of.__wrapped__(torch.device("cpu")) == wanted


def test_capability_with_a_torch_that_does_not_report_it(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert capability_of.__wrapped__(torch.device("cpu")) == (0, 0)


@on_cpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", ["q", "k", "v"])
def test_nan_is_propagated(name, dtype, side):
    """A NaN in any piece or block reaches every output that depends on it and no other output."""
    for position in (0, 700, 2049, 2503):
        rng = seeded(12)
        q, k, v = (torch.randn(3, tokens, 32, generator=rng).to(dtype) for tokens in (4, 2504, 2504))
        clean = BY_NAME[name].attend_full(q, [(k[:, :500], v[:, :500]), (k[:, 500:], v[:, 500:])], 0.2, None)
        {"q": q, "k": k, "v": v}[side][1, position if side != "q" else 2, 5] = torch.nan
        state = BY_NAME[name].attend_full(q, [(k[:, :500], v[:, :500]), (k[:, 500:], v[:, 500:])], 0.2, None)
        for head in (0, 2):
            assert torch.equal(state.out[head], clean.out[head])
        if side == "q":
            assert state.out[1, 2].isnan().all()
            assert torch.equal(state.out[1, 3], clean.out[1, 3])
        elif side == "k":
            assert state.out[1].isnan().all()
        else:
            assert state.out[1, :, 5].isnan().all()


@on_cpu
def test_output_of_nan_keys_is_nan(name):
    k = torch.full((1, 40, 16), torch.nan)
    state = BY_NAME[name].attend_full(torch.ones(1, 2, 16), [(k, torch.ones(1, 40, 16))], 1.0, None)
    assert state.out.isnan().all()


@on_cpu
@pytest.mark.parametrize("offset", [-3000.0, 3000.0])
def test_large_scores_cost_no_precision_within_a_block(name, offset):
    rng = seeded(13)
    q = torch.zeros(1, 1, 16)
    v = torch.randn(1, 1024, 16, generator=rng)
    q[..., :2] = 1.0
    k = torch.zeros(1, 1024, 16)
    k[0, :, 0] = torch.randn(1024, generator=rng).mul(64).round().div(64)  # exact in float32 with the offset
    k[0, :, 1] = offset
    wanted = attend_reference(q[None], k[None], v[None], scale=1.0)[0]
    assert relative_error(BY_NAME[name].attend_full(q, [(k, v)], 1.0, None).out, wanted.out) <= BOUND


# -- the choice of a backend -----------------------------------------------------------------------------------

DECODE = Problem("cpu", torch.float32, 4, 64, 64)


def test_names_are_unique_and_eager_supports_everything():
    assert len(set(backend_names())) == len(backend_names()) == len(BACKENDS) + 1
    for device in ("cpu", "cuda", "mps"):
        for dtype in (*DTYPES, torch.float64):
            for rows in (0, 1, 1000):
                assert choose(Problem(device, dtype, rows, 17, 300, True), "eager").name == "eager"


def test_choice_on_a_cpu(monkeypatch):
    monkeypatch.setattr(native_build, "load", lambda dtype: (None, ""))  # as if it could be built
    assert choose(DECODE).name == "cpu-native"
    for dtype, most in ((torch.float32, 128), (torch.bfloat16, 1024), (torch.float16, 512)):
        assert choose(Problem("cpu", dtype, most, 64, 64)).name == "cpu-native"
        assert choose(Problem("cpu", dtype, most + 1, 64, 64)).name == "cpu-flash"
    for other in (
        Problem("cpu", torch.float32, 0, 64, 64),
        Problem("cpu", torch.float32, 4, 65, 64),
        Problem("cpu", torch.float32, 4, 64, 12),
        Problem("cpu", torch.float64, 4, 64, 64),
    ):
        assert choose(other).name == "cpu-flash"


@pytest.fixture
def triton_builds(monkeypatch):
    """Choose backends as on a machine where triton works."""
    monkeypatch.setattr(triton_calls, "unavailable_reason", lambda: "")


HOPPER = (9, 0)
AMPERE = (8, 6)
TURING = (7, 5)


@pytest.mark.usefixtures("triton_builds")
def test_choice_on_a_gpu():
    half = torch.bfloat16
    single = torch.float32
    for capability in (AMPERE, HOPPER, (10, 0), (12, 0), (0, 0)):
        for problem, name in (
            (Problem("cuda", half, 4, 128, 128), "cuda-flash"),
            (Problem("cuda", half, 4096, 256, 256), "cuda-flash"),
            (Problem("cuda", half, 4, 320, 128), "cuda-efficient"),
            (Problem("cuda", half, 4096, 128, 512), "cuda-efficient"),
            (Problem("cuda", single, 0, 128, 128), "cuda-efficient"),
            (Problem("cuda", single, 4, 128, 128), "cuda-triton"),
            (Problem("cuda", half, 0, 256, 256, softcap=True), "cuda-triton"),
            (Problem("cuda", single, 4, 64, 64, softcap=True), "cuda-triton"),
            (Problem("cuda", half, 0, 320, 320, softcap=True), "eager"),
            (Problem("cuda", torch.float64, 0, 64, 64), "eager"),
        ):
            assert choose(dataclasses.replace(problem, capability=capability)).name == name


def test_cudnn_is_chosen_for_full_tiles_on_hopper():
    tile = Problem("cuda", torch.bfloat16, 4096, 128, 128, capability=HOPPER, key_tokens=16384)
    assert choose(tile).name == "cuda-cudnn"
    for change in (
        {"is_full": False},
        {"query_rows": 64},
        {"query_rows": 4 * 50},
        {"query_rows": 0},
        {"key_dim": 256},
        {"key_tokens": 1023},
        {"capability": AMPERE},
        {"capability": (10, 0)},
    ):
        other = dataclasses.replace(tile, **change)
        assert choose(other).name == "cuda-flash"
        wanted = "cuda-cudnn" if "capability" in change else "cuda-flash"
        assert choose(other, "cuda-cudnn").name == wanted
    assert "soft cap" in cuda.cudnn_refuses(dataclasses.replace(tile, softcap=True))
    assert "bfloat16" in cuda.cudnn_refuses(dataclasses.replace(tile, dtype=torch.float32))
    assert "8.0" in cuda.cudnn_refuses(dataclasses.replace(tile, capability=TURING))


@pytest.mark.usefixtures("triton_builds")
def test_problems_that_the_triton_kernel_refuses(monkeypatch):
    problem = Problem("cuda", torch.float32, 4, 256, 17, softcap=True)
    assert cuda.triton_refuses(problem) is None
    assert "256" in cuda.triton_refuses(dataclasses.replace(problem, value_dim=257))
    assert "float64" in cuda.triton_refuses(dataclasses.replace(problem, dtype=torch.float64))
    assert "8.0" in cuda.triton_refuses(dataclasses.replace(problem, capability=TURING))
    monkeypatch.setattr(triton_calls, "unavailable_reason", lambda: "no compiler")
    assert cuda.triton_refuses(problem) == "no compiler"


def test_every_row_of_the_table_has_the_order_of_the_backends():
    """Recorded names can repeat every choice only because of this order."""
    assert all(backend in backend_names() for rule in TABLE for backend in rule.names)
    for rule in TABLE:
        assert list(rule.names) == [name for name in backend_names() if name in rule.names]
        assert rule.names[-1] == "eager"


def test_preferred_backends_are_tried_in_their_order():
    half = Problem("cuda", torch.bfloat16, 4096, 64, 64)
    single = Problem("cuda", torch.float32, 4096, 64, 64)
    assert choose(half, "cuda-flash,cuda-efficient").name == "cuda-flash"
    assert choose(half, "cuda-efficient, cuda-flash").name == "cuda-efficient"
    assert choose(single, "cuda-flash,cuda-efficient").name == "cuda-efficient"
    assert choose(single, "cuda-flash,eager").name == "eager"
    for unknown in ("cuda-flash,fastest", "cuda-flash,", ""):
        with pytest.raises(UsageError, match="no attention backend"):
            choose(half, unknown)


problems = st.builds(
    Problem,
    st.sampled_from(["cpu", "cuda"]),
    st.sampled_from([*DTYPES, torch.float64]),
    st.sampled_from([0, 1, 32, 33, 64, 65, 129, 513, 4096]),
    st.sampled_from([64, 128, 129, 256, 320]),
    st.sampled_from([64, 128, 129, 256, 320]),
    st.booleans(),
    st.sampled_from([(0, 0), TURING, AMPERE, HOPPER, (12, 0)]),
    st.sampled_from([0, 100, 8192]),
    st.booleans(),
)


@settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(problems, min_size=1, max_size=8),
    st.lists(st.sampled_from(backend_names()), max_size=3, unique=True),
)
@pytest.mark.usefixtures("triton_builds")
def test_recorded_names_repeat_every_choice(run, names):
    preferred = ",".join(names) if names else None
    chosen = [choose(problem, preferred).name for problem in run]
    again = ",".join(recorded(set(chosen), preferred))
    assert [choose(problem, again).name for problem in run] == chosen


def test_recorded_names_repeat_a_run():
    error, used = decode_error()
    names = recorded(used)
    assert set(names) == used
    assert decode_error(backend=",".join(names)) == (error, used)


@pytest.mark.parametrize("name", ["cpu-flash", "eager"])
def test_the_preferred_backend_is_tried_first(name):
    assert choose(DECODE, name).name == name


def test_a_preferred_backend_that_refuses_is_skipped():
    assert choose(Problem("cpu", torch.float32, 0, 64, 64, softcap=True), "cpu-flash").name == "eager"
    assert choose(Problem("cpu", torch.float32, 0, 64, 64), "cuda-flash").name == "cpu-flash"
    assert choose(Problem("cpu", torch.float32, 129, 64, 64), "cpu-native").name == "cpu-flash"


def test_an_unknown_name_is_an_error():
    with pytest.raises(UsageError, match=r"no attention backend 'fastest'.*cpu-flash"):
        choose(DECODE, "fastest")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("rows", [0, 1, 100])
def test_soft_caps_are_computed_by_a_backend_that_supports_them(device, rows):
    problem = Problem(device, torch.bfloat16, rows, 64, 64, softcap=True)
    backend = choose(problem)
    assert backend.name in (("cuda-triton", "eager") if device == "cuda" else ("cpu-native", "eager"))
    if backend.name == "cuda-triton":
        return  # test_triton.py tests its numbers
    rng = seeded(2)
    q, k, v = (torch.randn(1, 2, 9, 64, generator=rng) for _ in range(3))
    capped = backend.attend_full(q[0], [(k[0], v[0])], 4.0, 5.0)
    assert_matches(capped, attend_reference(q, k, v, scale=4.0, softcap=5.0)[0], 9)
    assert relative_error(capped.out, attend_reference(q, k, v, scale=4.0).out[0]) > 0.1  # the cap changes the result


# -- CUDA backends without a GPU -------------------------------------------------------------------------------

NAMES = ("varlen", "flash", "efficient", "cudnn")
PIECES = {name: getattr(cuda, f"{name}_piece") for name in NAMES}
CAUSAL = {name: BY_NAME[f"cuda-{name}"].attend_causal for name in NAMES}
needs_varlen = pytest.mark.skipif(cuda._varlen() is None, reason="this torch's varlen_attn has no grouped heads")
on_cuda = pytest.mark.parametrize("name", [pytest.param("varlen", marks=needs_varlen), *NAMES[1:]])


@pytest.mark.parametrize("refuses", [cuda.flash_refuses, cuda.varlen_refuses])
def test_problems_that_the_cuda_flash_kernels_refuse(refuses, monkeypatch):
    monkeypatch.setattr(cuda, "_varlen", lambda: object())
    for dtype in HALVES:
        for dim in (17, 64, 256):
            assert refuses(Problem("cuda", dtype, 1, dim, dim)) is None
    assert "soft cap" in refuses(Problem("cuda", torch.bfloat16, 1, 64, 64, softcap=True))
    assert "bfloat16" in refuses(Problem("cuda", torch.float32, 1, 64, 64))
    assert "256" in refuses(Problem("cuda", torch.bfloat16, 1, 64, 257))
    assert "256" in refuses(Problem("cuda", torch.bfloat16, 1, 257, 64))
    assert "8.0" in refuses(Problem("cuda", torch.float16, 1, 64, 64, capability=TURING))


def test_problems_that_the_other_cuda_kernels_refuse(monkeypatch):
    for dtype in DTYPES:
        assert cuda.efficient_refuses(Problem("cuda", dtype, 1, 512, 64)) is None
    assert "soft cap" in cuda.efficient_refuses(Problem("cuda", torch.float32, 1, 64, 64, softcap=True))
    assert "float64" in cuda.efficient_refuses(Problem("cuda", torch.float64, 1, 64, 64))
    assert "8.0" in cuda.efficient_refuses(Problem("cuda", torch.bfloat16, 1, 64, 64, capability=TURING))
    assert cuda.efficient_refuses(Problem("cuda", torch.float16, 1, 64, 64, capability=TURING)) is None
    monkeypatch.setattr(cuda, "_varlen", lambda: None)
    assert "log-sum-exp" in cuda.varlen_refuses(Problem("cuda", torch.bfloat16, 1, 64, 64))


@pytest.mark.parametrize("missing", ["return_aux", "enable_gqa", "scale"])
def test_an_older_varlen_attention_is_not_used(missing, monkeypatch):
    def older(query, *, return_aux=None, enable_gqa=False, scale=None): ...

    def without(query, **kwargs): ...

    module = SimpleNamespace(varlen_attn=older)
    monkeypatch.setattr(cuda.importlib, "import_module", lambda name: module)
    assert cuda._varlen() is module
    names = [name for name in ("return_aux", "enable_gqa", "scale") if name != missing]
    without.__signature__ = cuda.inspect.Signature(
        [cuda.inspect.Parameter(name, cuda.inspect.Parameter.KEYWORD_ONLY) for name in names]
    )
    monkeypatch.setattr(module, "varlen_attn", without)
    assert cuda._varlen() is None


@needs_varlen
def test_varlen_attention_has_the_expected_arguments():
    parameters = cuda.inspect.signature(cuda._varlen().varlen_attn).parameters
    assert list(parameters)[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert {"scale", "window_size", "enable_gqa", "return_aux"} <= parameters.keys()
    assert cuda._varlen().AuxRequest(lse=True).lse is True


ATEN_OPS = {
    "_scaled_dot_product_flash_attention_for_cpu": (
        {"query": "Tensor", "key": "Tensor", "value": "Tensor", "dropout_p": "float", "is_causal": "bool"},
        2,
    ),
    "_scaled_dot_product_flash_attention": (
        {
            "query": "Tensor",
            "key": "Tensor",
            "value": "Tensor",
            "dropout_p": "float",
            "is_causal": "bool",
            "return_debug_mask": "bool",
        },
        9,
    ),
    "_scaled_dot_product_efficient_attention": (
        {
            "query": "Tensor",
            "key": "Tensor",
            "value": "Tensor",
            "attn_bias": "Optional[Tensor]",
            "compute_log_sumexp": "bool",
            "dropout_p": "float",
            "is_causal": "bool",
        },
        4,
    ),
    "_scaled_dot_product_cudnn_attention": (
        {
            "query": "Tensor",
            "key": "Tensor",
            "value": "Tensor",
            "attn_bias": "Optional[Tensor]",
            "compute_log_sumexp": "bool",
            "dropout_p": "float",
            "is_causal": "bool",
            "return_debug_mask": "bool",
        },
        9,
    ),
}


@pytest.mark.parametrize("name", ATEN_OPS)
def test_aten_operations_have_the_expected_arguments(name):
    """This test detects a torch with other arguments without a GPU."""
    schema = getattr(torch.ops.aten, name).default._schema
    positional, returns = ATEN_OPS[name]
    assert {x.name: str(x.type) for x in schema.arguments if not x.kwarg_only} == positional
    assert list(positional) == [x.name for x in schema.arguments if not x.kwarg_only]
    scale = next(x for x in schema.arguments if x.name == "scale")
    assert scale.kwarg_only
    assert str(scale.type) == "Optional[float]"
    assert len(schema.returns) == returns
    assert [str(x.type) for x in schema.returns[:2]] == ["Tensor", "Tensor"]


def test_the_schema_of_every_called_aten_operation_is_tested():
    folder = Path(cuda.__file__).parent
    called = {name for path in folder.glob("*.py") for name in re.findall(r"torch\.ops\.aten\.(\w+)", path.read_text())}
    assert called == ATEN_OPS.keys()


@on_cuda
@pytest.mark.parametrize("dims", [(64, 64), (33, 48), (128, 72)])
def test_shapes_of_cuda_kernels(name, dims):
    """torch's shape functions run on the meta device."""

    def empty(*shape):
        return torch.empty(*shape, dtype=torch.bfloat16, device="meta")

    piece = PIECES[name](empty(2, 10, dims[0]), empty(2, 33, dims[0]), empty(2, 33, dims[1]), 0.1)
    assert piece.out.shape == (2, 10, dims[1])
    assert piece.lse.shape == (2, 10)
    q = empty(3, 8, 11, dims[0])
    k = empty(3, 2, 11, dims[0])
    v = empty(3, 2, 11, dims[1])
    causal = CAUSAL[name](q, k, v, 0.1, None)
    assert causal.out.shape == (3, 8, 11, dims[1])
    assert causal.lse.shape == (3, 8, 11)
    assert piece.out.dtype == torch.bfloat16  # the kernel's type; merging converts it to float32
    assert piece.lse.dtype == causal.out.dtype == causal.lse.dtype == torch.float32
    assert causal.out.is_contiguous()
    assert causal.lse.is_contiguous()


def fake_cudnn(lse_dims):
    """Replaces aten's cuDNN attention on a CPU. In some versions its log-sum-exp has a last dimension of 1."""
    aten = fake_aten(False)

    def attend(q, k, v, bias, with_lse, dropout, causal, debug, *, scale):
        assert bias is None
        assert with_lse
        assert q.shape[1] == k.shape[1]
        out, lse, *_ = aten(q, k, v, dropout, causal, debug, scale=scale)
        return out, lse if lse_dims == 3 else lse.unsqueeze(-1), None, None

    return attend


def fake_aten(wants_equal_heads):
    """Replaces an aten attention kernel on a CPU: it checks its input, and pads the log-sum-exp with infinities."""

    def attend(q, k, v, *, causal, scale):
        assert q.shape[-1] == k.shape[-1] == v.shape[-1]
        assert q.shape[-1] % 8 == 0
        assert not wants_equal_heads or q.shape[1] == k.shape[1] == v.shape[1]
        mask = causal_mask(q.shape[2], k.shape[2]) if causal else None
        state = attend_reference(q, k, v, scale=scale, mask=mask)
        lse = state.lse.float()
        if wants_equal_heads:
            lse = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=torch.inf)
        return state.out.to(q.dtype), lse, None, None

    if wants_equal_heads:
        return lambda q, k, v, bias, with_lse, dropout, causal, scale: attend(q, k, v, causal=causal, scale=scale)
    return lambda q, k, v, dropout, causal, debug, scale: attend(q, k, v, causal=causal, scale=scale)


def fake_varlen(q, k, v, starts_q, starts_k, longest_q, longest_k, *, scale, window_size, enable_gqa, return_aux):
    """Replaces varlen_attn on a CPU. It returns out [all tokens, Hq, D] and lse [Hq, all tokens]."""
    assert enable_gqa
    assert return_aux.lse
    assert starts_q.dtype == starts_k.dtype == torch.int32
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[1], q.shape[0])
    ends_q = starts_q.tolist()[1:]
    ends_k = starts_k.tolist()[1:]
    assert (ends_q[-1], ends_k[-1]) == (q.shape[0], k.shape[0])
    for a, b, c, d in zip(starts_q.tolist(), ends_q, starts_k.tolist(), ends_k, strict=False):
        assert b - a <= longest_q
        assert d - c <= longest_k
        mask = {(-1, -1): None, (-1, 0): causal_mask(b - a, d - c)}[window_size]
        state = attend_reference(*(x.transpose(0, 1)[None] for x in (q[a:b], k[c:d], v[c:d])), scale=scale, mask=mask)
        out[a:b] = state.out[0].transpose(0, 1).to(q.dtype)
        lse[:, a:b] = state.lse[0].float()
    return out, lse


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dims", [(64, 64), (33, 48), (128, 7)])
@pytest.mark.parametrize("lse_dims", [3, 4])
def test_packing_and_padding_for_cuda_kernels(name, dims, lse_dims, monkeypatch):
    """Replacements with the layouts of the real kernels show that packing and padding lose nothing."""
    module = SimpleNamespace(varlen_attn=fake_varlen, AuxRequest=lambda lse: SimpleNamespace(lse=lse))
    monkeypatch.setattr(cuda, "_varlen", lambda: module)
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_flash_attention", fake_aten(False))
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_efficient_attention", fake_aten(True))
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention", fake_cudnn(lse_dims))
    rng = seeded(31)
    q, k, v = (
        torch.randn(3, heads, 11, dim, generator=rng).to(torch.bfloat16)
        for heads, dim in ((6, dims[0]), (2, dims[0]), (2, dims[1]))
    )
    causal = CAUSAL[name](q, k, v, 0.3, None)
    wanted = attend_reference(q, k, v, scale=0.3, mask=causal_mask(11, 11))
    assert relative_error(causal.out, wanted.out) < 3e-3  # rounded to bfloat16 once
    assert relative_error(causal.lse, wanted.lse) < BOUND
    backend = BY_NAME[f"cuda-{name}"]
    packed = q[0].reshape(2, 33, dims[0])
    pieces = [(k[0, :, :4], v[0, :, :4]), (k[0, :, 4:], v[0, :, 4:])]
    full = backend.attend_full(packed, pieces, 0.3, None)
    wanted = attend_reference(packed[None], k[:1], v[:1], scale=0.3)
    assert relative_error(full.out[None], wanted.out) < 3e-3
    assert relative_error(full.lse[None], wanted.lse) < BOUND


@pytest.mark.parametrize("tokens", [2047, 2048, 3500])
@pytest.mark.parametrize("rows", [3, 64, 65])
def test_efficient_attention_splits_the_keys_for_few_query_rows(tokens, rows, monkeypatch):
    batches = []
    exact = fake_aten(True)

    def attend(q, *rest, **options):
        batches.append(q.shape[0])
        return exact(q, *rest, **options)

    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_efficient_attention", attend)
    rng = seeded(tokens)
    q, k, v = (torch.randn(2, count, 16, generator=rng) for count in (rows, tokens, tokens))
    found = cuda.efficient_piece(q, k, v, 0.3)
    wanted = attend_reference(q[None], k[None], v[None], scale=0.3)[0]
    if rows > 64 or tokens < 2048:
        assert batches == [1]
    else:
        assert batches == ([2] if tokens == 2048 else [3, 1])
    assert relative_error(found.out, wanted.out) < BOUND
    assert relative_error(found.lse, wanted.lse) < BOUND


# -- without the native kernel ---------------------------------------------------------------------------------


def decode_error(dtype=torch.float32, backend=None):
    """Run a decode step over 700 tokens. Returns its error against the oracle, and the backends that ran."""
    rng = seeded(21)
    counter = ByteCounter()
    used = set()
    k, v = (torch.randn(2, 2, 701, 32, generator=rng).to(dtype) for _ in range(2))
    q = torch.randn(2, 6, 1, 32, generator=rng).to(dtype)
    layer_kv = LayerKV(k, v, tier=HostTier(counter), counter=counter, write=WriteInPlace())
    layer_kv.append(k[:, :, :700], v[:, :, :700])
    plan = TilePlan(2, 701, "")
    out = attend_streaming(
        q,
        k[:, :, 700:],
        v[:, :, 700:],
        layer_kv,
        AttentionSpec(0.3),
        plan=plan,
        ring=None,
        backend=backend,
        used=used,
    )
    return relative_error(out, attend_reference(q, k, v, scale=0.3).out.transpose(1, 2)), used


@needs_native
def test_decode_uses_the_native_kernel():
    error, used = decode_error()
    assert error <= BOUND
    assert used == {"cpu-native"}


def test_decode_falls_back_without_the_native_kernel(monkeypatch):
    monkeypatch.setattr(native_build, "load", lambda dtype: (None, "no C compiler"))
    assert choose(DECODE).name == choose(DECODE, "cpu-native").name == "cpu-flash"
    error, used = decode_error()
    assert error <= BOUND
    assert used == {"cpu-flash"}


def test_the_native_kernel_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("HEADINFER_NATIVE", "0")
    monkeypatch.setattr(native_build, "load", native_build.load.__wrapped__)
    assert native.unavailable_reason(torch.float32) == "switched off by HEADINFER_NATIVE=0"
    assert choose(Problem("cpu", torch.float32, 4, 64, 64), "cpu-native").name == "cpu-flash"
