"""The shape of a tile: it fits its slot, obeys what the user fixed, and is long in prefill and wide in decode."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headinfer.errors import CapacityError, UsageError
from headinfer.plan.tiles import FEW_QUERY_TOKENS, RING_SLOTS, choose_tiles, ring_slot_bytes

PROPERTY = settings(deadline=None, derandomize=True, max_examples=300)
MIB = 2**20

LLAMA_8B = {"kv_heads": 8, "group_queries": 4, "head_token_bytes": 2 * 128 * 2, "rows": 1}
ADAPTIVE = {"slot_bytes": 64 * MIB, "multiprocessors": 132}

problems = st.fixed_dictionaries(
    {
        "kv_heads": st.integers(1, 40),
        "group_queries": st.integers(1, 16),
        "head_token_bytes": st.sampled_from([2, 64, 512, 1024, 2048]),
        "rows": st.integers(1, 16),
        "query_tokens": st.one_of(st.integers(1, 40), st.integers(1, 20_000)),
        "past_tokens": st.one_of(st.integers(0, 300), st.integers(0, 5_000_000)),
        "slot_bytes": st.integers(1, 200 * MIB),
        "multiprocessors": st.integers(1, 200),
    }
)


def fits(problem, heads, tokens):
    return heads * tokens * problem["head_token_bytes"] <= problem["slot_bytes"]


@PROPERTY
@given(problems, st.data())
def test_a_tile_fits_its_slot_and_keeps_what_was_fixed(problem, data):
    fixed_heads = data.draw(st.one_of(st.none(), st.integers(1, problem["kv_heads"])))
    fixed_tokens = data.draw(st.one_of(st.none(), st.integers(1, 100_000)))
    try:
        plan = choose_tiles(**problem, heads_per_group=fixed_heads, tile_tokens=fixed_tokens)
    except CapacityError:
        # Refused only where the heads that it would take have no room for a tile worth the name.
        wanted = fixed_tokens if fixed_tokens is not None else 16
        most = fixed_heads if fixed_heads is not None else problem["kv_heads"]
        assert not fits(problem, most, min(wanted, max(problem["past_tokens"], 1)))
        return
    assert 1 <= plan.heads_per_group <= problem["kv_heads"]
    assert 1 <= plan.tile_tokens <= max(problem["past_tokens"], 1)
    assert fits(problem, plan.heads_per_group, plan.tile_tokens)
    assert plan.why
    if fixed_heads is not None:
        assert plan.heads_per_group == fixed_heads
    if fixed_tokens is not None:
        assert plan.tile_tokens == min(fixed_tokens, max(problem["past_tokens"], 1))
    if fixed_heads is None and fixed_tokens is None:
        assert problem["kv_heads"] % plan.heads_per_group == 0
        longer = plan.tile_tokens + 1
        assert plan.tile_tokens == max(problem["past_tokens"], 1) or not fits(problem, plan.heads_per_group, longer)


@PROPERTY
@given(problems)
def test_all_heads_in_one_tile_while_the_past_fits(problem):
    problem["slot_bytes"] = problem["kv_heads"] * problem["head_token_bytes"] * max(problem["past_tokens"], 1)
    plan = choose_tiles(**problem)
    assert (plan.heads_per_group, plan.tile_tokens) == (problem["kv_heads"], max(problem["past_tokens"], 1))


@PROPERTY
@given(problems, st.one_of(st.none(), st.integers(1, 10_000)))
def test_without_a_ring_there_is_one_tile(problem, tile_tokens):
    problem["slot_bytes"] = None
    plan = choose_tiles(**problem, tile_tokens=tile_tokens)
    assert plan.heads_per_group == problem["kv_heads"]
    assert plan.tile_tokens == (tile_tokens or max(problem["past_tokens"], 1))


@PROPERTY
@given(problems)
def test_the_same_problem_gives_the_same_tile(problem):
    problem["slot_bytes"] += 100 * MIB
    assert choose_tiles(**problem) == choose_tiles(**problem)


@pytest.mark.parametrize("past_tokens", [65_536, 1_048_576, 4_194_304])
def test_prefill_takes_few_heads_and_long_tiles(past_tokens):
    prefill = choose_tiles(**LLAMA_8B, **ADAPTIVE, query_tokens=8192, past_tokens=past_tokens)
    assert prefill.heads_per_group == 2  # 1 head x 4 x 8192 query rows are 256 blocks of 128, fewer than 2 x 132
    assert prefill.tile_tokens == min(past_tokens, 65_536)
    assert "prefill" in prefill.why
    small = choose_tiles(**LLAMA_8B, slot_bytes=64 * MIB, query_tokens=8192, past_tokens=past_tokens)
    assert small.heads_per_group == 1
    assert small.tile_tokens == min(past_tokens, 131_072)


def test_prefill_takes_as_few_heads_as_keep_the_device_busy():
    found = [
        choose_tiles(**LLAMA_8B, **ADAPTIVE, query_tokens=tokens, past_tokens=10**6).heads_per_group
        for tokens in (16_384, 8448, 8192, 4096, 2048, 512, FEW_QUERY_TOKENS + 1)
    ]
    assert found == [1, 1, 2, 4, 8, 8, 8]
    twice = LLAMA_8B | {"rows": 2}
    assert choose_tiles(**twice, **ADAPTIVE, query_tokens=4096, past_tokens=10**6).heads_per_group == 2


@pytest.mark.parametrize("query_tokens", [1, FEW_QUERY_TOKENS])
@pytest.mark.parametrize("past_tokens", [65_536, 4_194_304])
def test_decode_takes_all_heads(query_tokens, past_tokens):
    plan = choose_tiles(**LLAMA_8B, slot_bytes=64 * MIB, query_tokens=query_tokens, past_tokens=past_tokens)
    assert (plan.heads_per_group, plan.tile_tokens) == (8, 16_384)
    assert "decode" in plan.why


@pytest.mark.parametrize("query_tokens", [1, 4096])
def test_a_fixed_number_of_heads_is_kept_and_the_tile_as_long_as_it_can_be(query_tokens):
    for heads in (1, 3, 8):
        plan = choose_tiles(**LLAMA_8B, **ADAPTIVE, query_tokens=query_tokens, past_tokens=10**6, heads_per_group=heads)
        assert (plan.heads_per_group, plan.tile_tokens) == (heads, 64 * MIB // (heads * 512))
        assert "option" in plan.why


@pytest.mark.parametrize("past_tokens", [0, 5, 10**6])
@pytest.mark.parametrize("slot_bytes", [None, 64 * MIB])
@pytest.mark.parametrize(
    ("option", "value", "range_"),
    [
        ("heads_per_group", 0, "1 to 8"),
        ("heads_per_group", -2, "1 to 8"),
        ("heads_per_group", 9, "1 to 8"),
        ("tile_tokens", 0, "at least 1"),
        ("tile_tokens", -1, "at least 1"),
    ],
)
def test_options_out_of_range_are_refused(option, value, range_, slot_bytes, past_tokens):
    with pytest.raises(UsageError, match=f"{option} is {value}: it must be {range_}"):
        choose_tiles(**LLAMA_8B, slot_bytes=slot_bytes, query_tokens=1, past_tokens=past_tokens, **{option: value})


@pytest.mark.parametrize(
    "options",
    [
        {"tile_tokens": 16_385},
        {"tile_tokens": 131_073, "heads_per_group": 1},
        {"tile_tokens": 43_691, "heads_per_group": 3},
    ],
)
def test_a_fixed_tile_larger_than_a_slot_is_refused(options):
    problem = {**LLAMA_8B, "slot_bytes": 64 * MIB, "query_tokens": 1}
    with pytest.raises(CapacityError, match="device_kv_budget"):
        choose_tiles(**problem, past_tokens=10**6, **options)
    smaller = options | {"tile_tokens": options["tile_tokens"] - 1}
    assert choose_tiles(**problem, past_tokens=10**6, **smaller).tile_tokens == smaller["tile_tokens"]
    assert choose_tiles(**problem, past_tokens=1000, **options).tile_tokens == 1000  # all of the past fits


def test_a_slot_without_room_for_a_tile_is_refused():
    problem = {**LLAMA_8B, "query_tokens": 1, "past_tokens": 10**6}
    assert choose_tiles(**problem, slot_bytes=8 * 16 * 512).tile_tokens == 16
    with pytest.raises(CapacityError, match="8 heads x 16 tokens needs 65536 bytes"):
        choose_tiles(**problem, slot_bytes=8 * 16 * 512 - 1)
    assert choose_tiles(**problem, slot_bytes=8 * 16 * 512 - 1, heads_per_group=4).tile_tokens == 31  # as it advises


@PROPERTY
@given(st.integers(1, 2**40), st.integers(0, 2**40))
def test_the_ring_takes_what_the_budget_leaves(budget, fixed):
    try:
        slot = ring_slot_bytes(budget, fixed)
    except CapacityError:
        assert budget - fixed < RING_SLOTS * 256
        return
    assert slot > 0
    assert slot % 256 == 0  # tensors of any dtype begin in a slot
    assert RING_SLOTS * slot + fixed <= budget < RING_SLOTS * (slot + 256) + fixed


def test_a_budget_used_up_says_what_would_do():
    with pytest.raises(CapacityError, match="give at least") as caught:
        ring_slot_bytes(1000, 5000)
    advised = int(str(caught.value).split("at least ")[1].split()[0])
    assert ring_slot_bytes(advised, 5000) >= MIB
