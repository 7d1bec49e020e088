"""The algebra of partial attention: any split of the keys, merged in any order, gives attention over all keys."""

import pytest
import torch
from attention_cases import copy_of, random_state, seeded
from hypothesis import given, settings
from hypothesis import strategies as st

from headinfer.attention.reference import attend_reference, causal_mask
from headinfer.attention.state import AttentionState, join, merge

PROPERTY = settings(deadline=None, derandomize=True, max_examples=60)

seeds = st.integers(0, 2**31 - 1)
shapes = st.lists(st.sampled_from([1, 2, 3, 5, 7]), min_size=1, max_size=3).map(tuple)
dims = st.sampled_from([1, 3, 8, 33])


def assert_close(found, wanted, tolerance):
    assert found.out.shape == wanted.out.shape
    assert found.lse.shape == wanted.lse.shape
    torch.testing.assert_close(found.out, wanted.out, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found.lse, wanted.lse, rtol=tolerance, atol=tolerance)


@PROPERTY
@given(shapes, dims, seeds)
def test_merging_with_an_empty_state_changes_nothing(shape, dim, seed):
    state = random_state(shape, dim, seeded(seed), dtype=torch.float32)
    empty = AttentionState.empty(shape, dim, "cpu")
    for merged in (merge(state, empty), merge(empty, state)):
        assert torch.equal(merged.out, state.out)
        assert torch.equal(merged.lse, state.lse)


@PROPERTY
@given(shapes, dims)
def test_two_empty_states_merge_to_an_empty_one(shape, dim):
    first, second = (AttentionState.empty(shape, dim, "cpu") for _ in range(2))
    merged = merge(first, second)
    assert merged.out.shape == (*shape, dim)
    assert merged.lse.shape == shape
    assert merged.out.dtype == merged.lse.dtype == torch.float32
    assert torch.equal(merged.out, torch.zeros(*shape, dim))
    assert torch.equal(merged.lse, torch.full(shape, -torch.inf))


@PROPERTY
@given(shapes, dims, seeds, st.sampled_from([1.0, 30.0, 3000.0]))
def test_merge_is_commutative(shape, dim, seed, spread):
    rng = seeded(seed)
    first, second = (random_state(shape, dim, rng, spread=spread) for _ in range(2))
    assert_close(merge(first, second), merge(second, first), 1e-12)


@PROPERTY
@given(shapes, dims, seeds, st.sampled_from([1.0, 30.0, 3000.0]))
def test_merge_is_associative(shape, dim, seed, spread):
    rng = seeded(seed)
    a, b, c = (random_state(shape, dim, rng, spread=spread) for _ in range(3))
    assert_close(merge(merge(a, b), c), merge(a, merge(b, c)), 1e-11)


@PROPERTY
@given(shapes, dims, seeds)
def test_merge_in_float32_is_commutative_and_associative_up_to_rounding(shape, dim, seed):
    rng = seeded(seed)
    a, b, c = (random_state(shape, dim, rng, dtype=torch.float32, spread=5.0) for _ in range(3))
    assert_close(merge(a, b), merge(b, a), 2e-6)
    assert_close(merge(merge(a, b), c), merge(a, merge(b, c)), 5e-6)


def test_only_merge_in_place_changes_its_argument():
    rng = seeded(3)
    first, second = (random_state((3, 5, 7), 8, rng, dtype=torch.float32) for _ in range(2))
    before = (copy_of(first), copy_of(second))
    merged = merge(first, second)
    for state, old in zip((first, second), before, strict=True):
        assert torch.equal(state.out, old.out)
        assert torch.equal(state.lse, old.lse)
    assert first.merge_(second) is first
    assert torch.equal(first.out, merged.out)
    assert torch.equal(first.lse, merged.lse)
    assert not torch.equal(first.out, before[0].out)


def test_a_slice_of_a_state_merges_in_place():
    rng = seeded(4)
    state, part = (random_state((3, 5, 7), 8, rng, dtype=torch.float32, empty=0.0) for _ in range(2))
    before = copy_of(state)
    index = (slice(1, 2), slice(None), slice(2, 6))
    state[index].merge_(part[index])
    wanted = merge(before, part)
    inside = torch.zeros(3, 5, 7, dtype=torch.bool)
    inside[index] = True
    assert torch.equal(state.lse, torch.where(inside, wanted.lse, before.lse))
    assert torch.equal(state.out, torch.where(inside.unsqueeze(-1), wanted.out, before.out))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parts_may_be_half_precision_and_running_states_are_float32(dtype):
    rng = seeded(8)
    state, part = (random_state((3, 5), 8, rng, dtype=torch.float32) for _ in range(2))
    half = AttentionState(part.out.to(dtype).transpose(0, 1).contiguous().transpose(0, 1), part.lse)
    running = half.running()
    assert running.out.dtype == torch.float32
    assert running.out.is_contiguous()
    assert torch.equal(running.out, half.out.float())
    found = merge(state, half)
    wanted = merge(state, running)
    assert torch.equal(found.out, wanted.out)
    assert torch.equal(found.lse, wanted.lse)
    same = state.running()
    assert same.out is state.out
    assert same.lse is state.lse


def test_join_merges_all_parts():
    parts = random_state((4, 3, 5), 8, seeded(9), dtype=torch.float32, spread=5.0, empty=0.0)
    wanted = parts[0].running()
    for index in range(1, 4):
        wanted = merge(wanted, parts[index])
    assert_close(join(parts), wanted, 2e-6)


@st.composite
def split_attention(draw):
    """Draw q, k, v, mask and scale of an attention, and a split of its keys into parts, some of them empty."""
    rng = seeded(draw(seeds))
    rows, kv_heads, group = draw(st.sampled_from([(1, 1, 1), (3, 5, 1), (2, 3, 7), (5, 1, 3)]))
    queries = draw(st.sampled_from([1, 3, 7]))
    keys = draw(st.sampled_from([1, 2, 5, 31, 64]))
    key_dim = draw(dims)
    value_dim = draw(dims)
    q, k, v = (
        torch.randn(rows, heads, tokens, dim, generator=rng, dtype=torch.float64)
        for heads, tokens, dim in (
            (kv_heads * group, queries, key_dim),
            (kv_heads, keys, key_dim),
            (kv_heads, keys, value_dim),
        )
    )
    density = draw(st.sampled_from([0.1, 0.5, 1.0]))
    mask = torch.rand(rows, kv_heads * group, queries, keys, generator=rng) < density
    if draw(st.booleans()):
        mask[rows // 2] = False  # a row that sees no key at all
    count = draw(st.integers(1, 5))
    owner = torch.randint(count, (keys,), generator=rng)
    parts = [(owner == part).nonzero().flatten() for part in draw(st.permutations(range(count)))]
    return q, k, v, mask, draw(st.sampled_from([0.1, 1.0, 20.0])), parts


def partial(q, k, v, mask, scale, keys, dtype):
    if len(keys) == 0:
        return AttentionState.empty(q.shape[:-1], v.shape[-1], "cpu", dtype)
    state = attend_reference(q, k[:, :, keys], v[:, :, keys], scale=scale, mask=mask[..., keys])
    return AttentionState(state.out.to(dtype), state.lse.to(dtype))


def merge_as_tree(states):
    while len(states) > 1:
        states = [merge(*states[i : i + 2]) if i + 1 < len(states) else states[i] for i in range(0, len(states), 2)]
    return states[0]


@PROPERTY
@given(split_attention())
def test_any_split_merged_in_any_order_gives_the_whole(problem):
    q, k, v, mask, scale, parts = problem
    whole = attend_reference(q, k, v, scale=scale, mask=mask)
    states = [partial(q, k, v, mask, scale, keys, torch.float64) for keys in parts]
    one_by_one = AttentionState.empty(q.shape[:-1], v.shape[-1], "cpu", torch.float64)
    for state in states:
        one_by_one.merge_(state)
    for merged in (one_by_one, merge_as_tree(states)):
        assert not merged.out.isnan().any()
        assert_close(merged, whole, 1e-11)
        sees_nothing = ~mask.any(dim=-1)
        assert (merged.out[sees_nothing] == 0).all()
        assert (merged.lse[sees_nothing] == -torch.inf).all()


@PROPERTY
@given(split_attention())
def test_a_split_merged_in_float32_gives_the_whole_up_to_rounding(problem):
    q, k, v, mask, _, parts = problem
    whole = attend_reference(q, k, v, scale=0.3, mask=mask)
    merged = merge_as_tree([partial(q, k, v, mask, 0.3, keys, torch.float32) for keys in parts])
    assert_close(AttentionState(merged.out.double(), merged.lse.double()), whole, 3e-6)


def test_merging_propagates_nan_and_creates_none():
    state = AttentionState.empty((4,), 2, "cpu")
    other = AttentionState(torch.ones(4, 2), torch.tensor([0.0, torch.nan, -torch.inf, torch.inf]))
    other.out[2] = 0.0
    merged = merge(state, other)
    assert merged.out[:, 0].tolist()[0] == 1
    assert merged.out[1].isnan().all()
    assert merged.lse[1].isnan()
    assert merged.out[2].tolist() == [0, 0]
    assert merged.lse[2] == -torch.inf
    assert merged.out[3].tolist() == [1, 1]


@PROPERTY
@given(split_attention(), seeds, st.sampled_from([-50.0, 0.0, 3.0, 50.0]))
def test_sinks_act_like_a_key_with_value_zero(problem, seed, shift):
    q, k, v, mask, scale, parts = problem
    heads = q.shape[1]
    sinks = shift + torch.randn(heads, generator=seeded(seed), dtype=torch.float64)
    scores = scale * (q @ k.repeat_interleave(heads // k.shape[1], dim=1).mT)
    column = sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    scores = torch.cat([scores.masked_fill(~mask, -torch.inf), column], dim=-1)
    wanted = torch.softmax(scores, dim=-1)[..., :-1] @ v.repeat_interleave(heads // k.shape[1], dim=1)
    merged = merge_as_tree([partial(q, k, v, mask, scale, keys, torch.float64) for keys in parts])
    before = copy_of(merged)
    found = merged.with_sinks(sinks[:, None])
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)
    assert torch.equal(merged.out, before.out)  # the state does not change
    assert torch.equal(merged.lse, before.lse)


def test_half_precision_sinks_are_converted_to_float32():
    state = random_state((1, 4, 3), 8, seeded(7), dtype=torch.float32, spread=2.0)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.bfloat16)
    found = state.with_sinks(sinks[:, None])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, state.with_sinks(sinks.float()[:, None]), rtol=0, atol=0)


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 9), (5, 5), (3, 10)])
def test_last_query_of_the_oracles_causal_mask_sees_every_key(queries, keys):
    mask = causal_mask(queries, keys)
    assert mask.shape == (queries, keys)
    for i in range(queries):
        assert mask[i].tolist() == [j <= keys - queries + i for j in range(keys)]


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_oracle_agrees_with_torch(softcap):
    rng = seeded(11)
    q = torch.randn(2, 6, 5, 7, generator=rng, dtype=torch.float64)
    k, v = (torch.randn(2, 3, 9, dim, generator=rng, dtype=torch.float64) for dim in (7, 4))
    mask = causal_mask(5, 9)
    found = attend_reference(q, k, v, scale=0.7, mask=mask, softcap=softcap)
    k = k.repeat_interleave(2, dim=1)
    v = v.repeat_interleave(2, dim=1)
    if softcap is None:
        wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.7)
    else:
        scores = softcap * torch.tanh(0.7 * (q @ k.mT) / softcap)
        wanted = torch.softmax(scores.masked_fill(~mask, -torch.inf), dim=-1) @ v
    torch.testing.assert_close(found.out, wanted, rtol=1e-12, atol=1e-12)
