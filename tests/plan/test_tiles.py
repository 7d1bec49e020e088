"""The shape of a tile: it fits its slot, keeps what the user fixed, and is the cheapest by the cost model."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headinfer.errors import CapacityError, UsageError
from headinfer.plan import tiles
from headinfer.plan.tiles import FEW_QUERY_TOKENS, RING_SLOTS, FixedTile, LayerWork, TileRates, ring_slot_bytes

PROPERTY = settings(deadline=None, derandomize=True, max_examples=300)
MIB = 2**20

LLAMA_8B = {"kv_heads": 8, "group_queries": 4, "head_token_bytes": 2 * 128 * 2, "rows": 1}
SLOT = {"slot_bytes": 64 * MIB}
rates = st.builds(
    TileRates,
    flops_per_s=st.floats(1e10, 1e15),
    device_bytes_per_s=st.floats(1e10, 5e12),
    link_bytes_per_s=st.floats(1e9, 4e11),
    launch_s=st.floats(1e-6, 1e-4),
    multiprocessors=st.integers(1, 200),
)

problems = st.fixed_dictionaries(
    {
        "kv_heads": st.integers(1, 40),
        "group_queries": st.integers(1, 16),
        "head_token_bytes": st.sampled_from([2, 64, 512, 1024, 2048]),
        "rows": st.integers(1, 16),
        "query_tokens": st.one_of(st.integers(1, 40), st.integers(1, 20_000)),
        "past_tokens": st.one_of(st.integers(0, 300), st.integers(0, 5_000_000)),
        "slot_bytes": st.integers(1, 200 * MIB),
        "rates": rates,
    }
)


def choose_tiles(*, slot_bytes, rates=None, heads_per_group=None, tile_tokens=None, **work):
    return tiles.choose_tiles(
        LayerWork(element_bytes=2, **work), slot_bytes, rates, FixedTile(heads_per_group, tile_tokens)
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
    except CapacityError:  # refused only if a slot is too small for a tile of the fewest heads
        wanted = fixed_tokens if fixed_tokens is not None else 16
        assert not fits(problem, fixed_heads or 1, min(wanted, max(problem["past_tokens"], 1)))
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


def seconds(problem, heads, tokens):
    shape = {name: value for name, value in problem.items() if name not in ("slot_bytes", "rates")}
    return tiles.layer_seconds(LayerWork(element_bytes=2, **shape), problem["rates"], heads, tokens)


@PROPERTY
@given(problems)
def test_no_tile_of_the_slots_size_is_clearly_cheaper(problem):
    problem["slot_bytes"] += problem["kv_heads"] * 16 * problem["head_token_bytes"]
    plan = choose_tiles(**problem)
    chosen = seconds(problem, plan.heads_per_group, plan.tile_tokens)
    past = max(problem["past_tokens"], 1)
    for heads in (n for n in range(1, problem["kv_heads"] + 1) if problem["kv_heads"] % n == 0):
        longest = min(problem["slot_bytes"] // (heads * problem["head_token_bytes"]), past)
        for tokens in (longest, -(-longest // 2), -(-longest // 4), -(-longest // 8)):
            if tokens >= min(16, past):
                assert chosen <= seconds(problem, heads, tokens) / 0.98 * (1 + 1e-9)


@PROPERTY
@given(problems, st.floats(1.0, 100.0))
def test_faster_machines_are_not_slower(problem, factor):
    fast = problem["rates"]
    faster = TileRates(
        fast.flops_per_s * factor,
        fast.device_bytes_per_s * factor,
        fast.link_bytes_per_s * factor,
        fast.launch_s / factor,
        fast.multiprocessors,
    )
    for heads in range(1, problem["kv_heads"] + 1):
        assert seconds(problem | {"rates": faster}, heads, 64) <= seconds(problem, heads, 64)


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


H100 = TileRates(840e12, 2.8e12, 50e9, 20e-6, 132)


@pytest.mark.parametrize("past_tokens", [262_144, 1_048_576, 4_194_304])
def test_prefill_takes_few_heads_and_long_tiles(past_tokens):
    """Few, since a tile's merge costs the same for any number of its tokens; enough to fill the device."""
    wide = choose_tiles(**LLAMA_8B, **SLOT, rates=H100, query_tokens=8192, past_tokens=past_tokens)
    assert wide.heads_per_group == 2  # 1 head x 4 x 8192 query rows are 256 blocks of 128, fewer than 2 x 132
    assert wide.tile_tokens >= 16_384
    few = choose_tiles(**LLAMA_8B, **SLOT, rates=H100, query_tokens=1024, past_tokens=past_tokens)
    assert few.heads_per_group >= 4
    assert "cheapest" in wide.why


@pytest.mark.parametrize("query_tokens", [4096, 16_384])
def test_an_rtx_4090_with_256_mib_at_1m_tokens(query_tokens):
    """33 MiB of tails and 32 of write-back leave slots of 95 MiB: few heads x long tiles, and all heads in decode."""
    problem = {**LLAMA_8B, "slot_bytes": 95 * MIB, "rates": TileRates(), "past_tokens": 2**20}
    prefill = choose_tiles(**problem, query_tokens=query_tokens)
    # 4 x 4096 query rows are 128 blocks of 128, half of what fills 128 multiprocessors.
    assert prefill.heads_per_group == (2 if query_tokens == 4096 else 1)
    assert prefill.tile_tokens >= 45_000
    decode = choose_tiles(**problem, query_tokens=1)
    assert decode.heads_per_group == 8
    assert decode.tile_tokens * 256 >= 2**20, "copies of K and of V are not small"


def test_a_past_that_fits_a_slot_is_still_cut_where_that_hides_its_copy():
    """One tile for all heads is copied before anything is computed; a group at a time hides behind the one before."""
    plan = choose_tiles(**LLAMA_8B, **SLOT, rates=H100, query_tokens=8192, past_tokens=16_384)
    assert plan.heads_per_group * plan.tile_tokens < 8 * 16_384
    tiny = choose_tiles(**LLAMA_8B, **SLOT, rates=H100, query_tokens=1, past_tokens=64)
    assert (tiny.heads_per_group, tiny.tile_tokens) == (8, 64)


@pytest.mark.parametrize("query_tokens", [1, FEW_QUERY_TOKENS])
@pytest.mark.parametrize("past_tokens", [262_144, 4_194_304])
def test_decode_takes_large_copies(query_tokens, past_tokens):
    plan = choose_tiles(**LLAMA_8B, **SLOT, rates=H100, query_tokens=query_tokens, past_tokens=past_tokens)
    assert plan.heads_per_group >= 4
    assert plan.tile_tokens * 256 >= 2**19, "copies of K and of V are not small"


@pytest.mark.parametrize("query_tokens", [1, 4096])
def test_a_fixed_number_of_heads_is_kept_and_the_tile_is_a_segment_or_as_long_as_it_can_be(query_tokens):
    for heads in (1, 3, 8):
        plan = choose_tiles(**LLAMA_8B, **SLOT, query_tokens=query_tokens, past_tokens=10**6, heads_per_group=heads)
        longest = 64 * MIB // (heads * 512)  # in decode a segment, which is one copy
        assert (plan.heads_per_group, plan.tile_tokens) == (heads, 16_384 if query_tokens == 1 else longest)
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
        {"tile_tokens": 131_073},
        {"tile_tokens": 131_073, "heads_per_group": 1},
        {"tile_tokens": 16_385, "heads_per_group": 8},
        {"tile_tokens": 43_691, "heads_per_group": 3},
    ],
)
def test_a_fixed_tile_larger_than_a_slot_is_refused(options):
    problem = {**LLAMA_8B, "slot_bytes": 64 * MIB, "query_tokens": 1}
    with pytest.raises(CapacityError, match="device_kv_budget_bytes"):
        choose_tiles(**problem, past_tokens=10**6, **options)
    smaller = options | {"tile_tokens": options["tile_tokens"] - 1}
    assert choose_tiles(**problem, past_tokens=10**6, **smaller).tile_tokens == smaller["tile_tokens"]
    assert choose_tiles(**problem, past_tokens=1000, **options).tile_tokens == 1000  # all of the past fits


def test_a_slot_without_room_for_a_tile_is_refused():
    problem = {**LLAMA_8B, "query_tokens": 1, "past_tokens": 10**6}
    assert choose_tiles(**problem, slot_bytes=8 * 16 * 512, heads_per_group=8).tile_tokens == 16
    with pytest.raises(CapacityError, match="8 heads x 16 tokens needs 65536 bytes"):
        choose_tiles(**problem, slot_bytes=8 * 16 * 512 - 1, heads_per_group=8)
    with pytest.raises(CapacityError, match="1 heads x 16 tokens needs 8192 bytes"):
        choose_tiles(**problem, slot_bytes=16 * 512 - 1)
    assert choose_tiles(**problem, slot_bytes=16 * 512).tile_tokens == 16


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
