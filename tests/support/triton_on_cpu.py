"""Tests of the Triton kernels in Triton's interpreter. test_triton.py runs them with TRITON_INTERPRET=1."""

import math
import os

import pytest
import torch
from attention_cases import BOUND, copy_of, random_state, relative_error, seeded, with_head_stride
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from headinfer.attention import triton_calls
from headinfer.attention.backends import BACKENDS, Problem
from headinfer.attention.quantised import UNIT, decode_k, decode_v, encode_k, encode_v
from headinfer.attention.reference import attend_reference, causal_mask
from headinfer.attention.state import AttentionState
from headinfer.utils.kv_format import padded_value_dim

assert os.environ["TRITON_INTERPRET"] == "1", "test_triton.py runs this file"

from triton.runtime import interpreter  # noqa: E402

# numpy warns of infinities and NaN, which the kernels expect.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES)
TRITON = next(backend for backend in BACKENDS if backend.name == "cuda-triton")
# The error of an output relative to float64. In half precision the weights are rounded before they multiply the values.
ERROR = {torch.float32: 2 * BOUND, torch.bfloat16: 4e-3, torch.float16: 6e-4}


def property_of(examples):
    phases = [Phase.explicit, Phase.generate]  # shrinking takes minutes in the interpreter
    return settings(deadline=None, derandomize=True, max_examples=examples, phases=phases)


@pytest.fixture(autouse=True, scope="module")
def _bfloat16_products():
    """Convert bfloat16 to float32 in products. The interpreter would multiply the bits as integers."""
    builder = interpreter.InterpreterBuilder
    create_dot = builder.create_dot

    def widened(x):
        if x.dtype.scalar != interpreter.tl.bfloat16:
            return x
        bits = x.data.astype("uint32") << 16
        return interpreter.TensorHandle(bits.view("float32"), interpreter.tl.float32)

    builder.create_dot = lambda self, a, b, *rest: create_dot(self, widened(a), widened(b), *rest)
    yield
    builder.create_dot = create_dot


def assert_matches(found, wanted, keys, dtype):
    assert found.out.dtype == found.lse.dtype == torch.float32
    assert found.out.shape == wanted.out.shape
    size = max(float(wanted.out.norm()), math.sqrt(wanted.out.numel() / keys))
    assert float((found.out.double() - wanted.out).norm()) <= ERROR[dtype] * size
    assert float((found.lse.double() - wanted.lse).abs().max()) <= 2 * BOUND * max(1.0, float(wanted.lse.abs().max()))


# -- attention -------------------------------------------------------------------------------------------------


@property_of(25)
@given(data=st.data())
def test_attend_full_is_attention_over_all_pieces(data):
    draw = data.draw
    rng = seeded(draw(st.integers(0, 2**31 - 1)))
    dtype = draw(st.sampled_from(DTYPES))
    heads = draw(st.sampled_from([1, 3]))
    rows = draw(st.sampled_from([1, 3, 16, 17, 40, 130]))
    sizes = draw(st.lists(st.sampled_from([1, 15, 64, 65, 255, 507, 1100]), min_size=1, max_size=2))
    key_dim, value_dim = (draw(st.sampled_from([1, 5, 16, 33, 64, 80])) for _ in range(2))
    softcap = draw(st.sampled_from([None, 2.0, 50.0]))
    scale = draw(st.sampled_from([0.05, 1.0, 4.0])) / math.sqrt(key_dim)  # flat to peaked
    extra = draw(st.sampled_from([0, 7]))
    q = torch.randn(rows, heads, key_dim, generator=rng).to(dtype).transpose(0, 1)
    pieces = [
        tuple(with_head_stride(heads, size, dim, extra, rng, dtype) for dim in (key_dim, value_dim)) for size in sizes
    ]
    k, v = (torch.cat(sides, dim=1) for sides in zip(*pieces, strict=True))
    assert TRITON.refuses(Problem("cuda", dtype, rows, key_dim, value_dim, softcap is not None)) is None
    found = TRITON.attend_full(q, pieces, scale, softcap)
    wanted = attend_reference(q[None], k[None], v[None], scale=scale, softcap=softcap)[0]
    assert_matches(found, wanted, sum(sizes), dtype)


@property_of(16)
@given(data=st.data())
def test_attend_causal_is_causal_attention_of_a_chunk_on_itself(data):
    draw = data.draw
    rng = seeded(draw(st.integers(0, 2**31 - 1)))
    dtype = draw(st.sampled_from(DTYPES))
    batch = draw(st.sampled_from([1, 3]))
    (kv_heads, group) = draw(st.sampled_from([(1, 1), (1, 5), (2, 3)]))
    tokens = draw(st.sampled_from([1, 2, 15, 16, 63, 64, 127, 129, 255]))
    key_dim, value_dim = (draw(st.sampled_from([1, 7, 16, 48, 64])) for _ in range(2))
    softcap = draw(st.sampled_from([None, 2.0]))
    scale = draw(st.sampled_from([0.02, 0.3]))
    q, k, v = (
        torch.randn(batch, tokens, heads, dim, generator=rng).to(dtype).transpose(1, 2)  # the layout of models
        for heads, dim in ((kv_heads * group, key_dim), (kv_heads, key_dim), (kv_heads, value_dim))
    )
    found = TRITON.attend_causal(q, k, v, scale, softcap)
    wanted = attend_reference(q, k, v, scale=scale, mask=causal_mask(tokens, tokens), softcap=softcap)
    assert found.out.is_contiguous()
    assert_matches(found, wanted, tokens, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [(256, 256), (192, 128), (96, 250)])
def test_wide_heads(dtype, dims):
    rng = seeded(4)
    q, k, v = (
        torch.randn(2, tokens, dim, generator=rng).to(dtype)
        for tokens, dim in zip((5, 300, 300), (dims[0], *dims), strict=True)
    )
    wanted = attend_reference(q[None], k[None], v[None], scale=0.05, softcap=50.0)[0]
    assert_matches(TRITON.attend_full(q, [(k, v)], 0.05, 50.0), wanted, 300, dtype)


@pytest.mark.parametrize("keys", [2047, 2048, 9_001])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_decode_splits_the_keys(keys, softcap):
    rng = seeded(keys)
    q, k, v = (torch.randn(1, tokens, 32, generator=rng) for tokens in (3, keys, keys))
    splits, _ = triton_calls._split(1, keys, 32)
    assert splits > 2
    wanted = attend_reference(q[None], k[None], v[None], scale=0.3, softcap=softcap)[0]
    assert_matches(TRITON.attend_full(q, [(k, v)], 0.3, softcap), wanted, keys, torch.float32)
    one_query = TRITON.attend_full(q[:, 1:2], [(k, v)], 0.3, softcap)
    assert_matches(one_query, wanted[:, 1:2], keys, torch.float32)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_splitting_the_keys_changes_results_only_by_rounding(softcap):
    rng = seeded(5)
    q, k, v = (torch.randn(2, tokens, 32, generator=rng) for tokens in (4, 2000, 2000))
    whole = TRITON.attend_full(q, [(k, v)], 0.3, softcap)
    for cut in (1, 255, 700, 1999):
        parts = TRITON.attend_full(q, [(k[:, :cut], v[:, :cut]), (k[:, cut:], v[:, cut:])], 0.3, softcap)
        assert relative_error(parts.out, whole.out) <= BOUND
        assert relative_error(parts.lse, whole.lse) <= BOUND


@pytest.mark.parametrize("size", [1e-3, 0.1, 0.29, 0.31, 1.0, 30.0])
def test_soft_cap_is_precise_for_all_scores(size):
    """With one key the log-sum-exp is the score."""
    q = torch.full((1, 1, 1), size * 50.0)
    for sign in (1.0, -1.0):
        found = TRITON.attend_full(q, [(torch.full((1, 1, 1), sign), torch.ones(1, 1, 1))], 1.0, 50.0)
        wanted = sign * 50.0 * math.tanh(float(q) / 50.0)
        assert abs(float(found.lse) - wanted) <= 5e-7 * abs(wanted)
        assert float(found.out) == 1.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_is_propagated_only_to_dependent_outputs(dtype):
    rng = seeded(12)
    clean_inputs = [torch.randn(3, tokens, 32, generator=rng).to(dtype) for tokens in (4, 1104, 1104)]
    clean = TRITON.attend_full(clean_inputs[0], [tuple(clean_inputs[1:])], 0.2, None)
    cases = [("q", 2), *((side, position) for side in "kv" for position in (0, 700, 1103))]
    for side, position in cases:
        q, k, v = (given.clone() for given in clean_inputs)
        {"q": q, "k": k, "v": v}[side][1, position, 5] = torch.nan
        state = TRITON.attend_full(q, [(k, v)], 0.2, None)
        for head in (0, 2):
            assert torch.equal(state.out[head], clean.out[head])
        if side == "q":
            assert state.out[1, 2].isnan().all()
            assert torch.equal(state.out[1, 3], clean.out[1, 3])
        elif side == "k":
            assert state.out[1].isnan().all()
        else:
            assert state.out[1, :, 5].isnan().all()


@pytest.mark.parametrize("offset", [-3000.0, 3000.0])
def test_large_scores_do_not_overflow(offset):
    rng = seeded(13)
    q = torch.ones(1, 2, 16)
    k = torch.zeros(1, 900, 16)
    v = torch.randn(1, 900, 16, generator=rng)
    k[0, :, 0] = offset
    k[0, :, 1] = torch.randn(900, generator=rng).mul(4).round()
    wanted = attend_reference(q[None], k[None], v[None], scale=1.0)[0]
    found = TRITON.attend_full(q, [(k, v)], 1.0, None)
    assert relative_error(found.lse, wanted.lse) <= BOUND
    assert relative_error(found.out, wanted.out) <= 1e-3  # scores of 3000 are rounded by up to 4e-4 in float32


def test_scores_of_minus_infinity_give_an_empty_row():
    q = torch.ones(1, 2, 16)
    q[0, 1] = -1.0
    k = torch.full((1, 1100, 16), torch.inf)
    state = TRITON.attend_full(-q, [(k, torch.ones(1, 1100, 16))], 1.0, None)
    assert state.lse[0, 0] == -torch.inf
    assert (state.out[0, 0] == 0).all()


# -- merging ---------------------------------------------------------------------------------------------------

shapes = st.sampled_from([(1,), (7,), (3, 5), (1, 70), (2, 70), (2, 3, 5), (1, 3, 70), (1, 2, 3, 5), (2, 3, 1, 5)])


@property_of(60)
@given(shapes, st.sampled_from([1, 3, 8, 33, 128, 300]), st.integers(0, 2**31 - 1), st.sampled_from(DTYPES))
def test_merge_agrees_with_torch(shape, dim, seed, dtype):
    rng = seeded(seed)
    state, part = (random_state(shape, dim, rng, dtype=torch.float32, empty=0.3) for _ in range(2))
    part.out = part.out.to(dtype)
    wanted = copy_of(state).merge_(part)  # on the CPU: torch's operations
    assert triton_calls.merge_(state.out, state.lse, part.out, part.lse)
    assert not state.out.isnan().any()
    torch.testing.assert_close(state.out, wanted.out, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(state.lse, wanted.lse, rtol=1e-6, atol=1e-6)


@property_of(30)
@given(shapes, st.sampled_from([1, 8, 33]), st.integers(0, 2**31 - 1))
def test_merging_with_an_empty_state_changes_nothing(shape, dim, seed):
    state = random_state(shape, dim, seeded(seed), dtype=torch.float32)
    for mine, other in (
        (state, AttentionState.empty(shape, dim, "cpu")),
        (AttentionState.empty(shape, dim, "cpu"), state),
    ):
        found = copy_of(mine)
        assert triton_calls.merge_(found.out, found.lse, other.out, other.lse)
        assert torch.equal(found.out, state.out)
        assert torch.equal(found.lse, state.lse)


def test_a_view_of_a_state_merges_a_part_in_a_kernels_layout():
    """The part has the layout of flash attention, tokens before heads. The state is a slice of a larger one."""
    rng = seeded(4)
    state = random_state((2, 6, 9), 8, rng, dtype=torch.float32)
    part = AttentionState(
        torch.randn(5, 6, 8, generator=rng).to(torch.bfloat16).transpose(0, 1), torch.randn(6, 5, generator=rng)
    )
    wanted = copy_of(state)
    before = copy_of(state)
    wanted[1, :, 3:8].merge_(part)
    view = state[1, :, 3:8]
    assert triton_calls.merge_(view.out, view.lse, part.out, part.lse)
    torch.testing.assert_close(state.out, wanted.out, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(state.lse, wanted.lse, rtol=1e-6, atol=1e-6)
    assert torch.equal(state.out[0], before.out[0])
    assert torch.equal(state.lse[1, :, :3], before.lse[1, :, :3])


def test_merging_propagates_nan_and_creates_none():
    state = AttentionState.empty((4,), 2, "cpu")
    other = AttentionState(torch.ones(4, 2), torch.tensor([0.0, torch.nan, -torch.inf, torch.inf]))
    other.out[2] = 0.0
    assert triton_calls.merge_(state.out, state.lse, other.out, other.lse)
    assert state.out[0].tolist() == state.out[3].tolist() == [1, 1]
    assert state.out[1].isnan().all()
    assert state.lse[1].isnan()
    assert state.out[2].tolist() == [0, 0]
    assert state.lse.tolist()[2:] == [-torch.inf, torch.inf]


def test_other_layouts_are_left_to_torch():
    state = AttentionState(torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 4))
    before = copy_of(state)
    for part in (
        AttentionState(state.out.double(), state.lse),
        AttentionState(state.out[:1], state.lse[:1]),
        AttentionState(state.out.transpose(1, 2).contiguous().transpose(1, 2), state.lse),  # three dims, strided
        AttentionState(torch.zeros(2, 3, 8, 4).mT, state.lse),  # the last dim is strided
    ):
        assert not triton_calls.merge_(state.out, state.lse, part.out, part.lse)
    assert not triton_calls.merge_(state.out.double(), state.lse.double(), state.out.double(), state.lse.double())
    assert torch.equal(state.out, before.out)
    assert triton_calls.merge_(state.out[:0], state.lse[:0], state.out[:0], state.lse[:0])  # nothing to do


# -- quantisation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "dim", "dtype"), [(8, 80, torch.bfloat16), (4, 80, torch.float16)])
def test_quantised_bytes_and_what_they_decode_to_are_those_of_torch(bits, dim, dtype):
    rng = seeded(bits + dim)
    x = (torch.randn(2, 128, dim + 8, generator=rng) * 3 + 1).to(dtype)[:, :, :dim]
    x[0, :64] = 2.0  # a block without a width
    x[1, :, 3] *= 100
    decoded = torch.float32 if dtype == torch.bfloat16 else dtype  # the interpreter does not round to bfloat16
    for is_keys, encode, decode, wide in (
        (True, encode_k, decode_k, dim),
        (False, encode_v, decode_v, padded_value_dim(dim)),
    ):
        form = {"is_keys": is_keys, "wide": wide, "unit": UNIT}
        packed = encode(x, bits)
        assert torch.equal(triton_calls.quantise(x, bits, **form), packed)
        found = triton_calls.dequantise(packed[:, 64:], dim, bits, decoded, **form)
        assert torch.equal(found, decode(packed, dim, bits, decoded)[:, 64:])
