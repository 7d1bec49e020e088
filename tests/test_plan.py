"""The planner: never over a budget, never worse with more memory, and the same as slow and independent counts."""

import dataclasses
import random

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import headinfer
from headinfer.errors import CapacityError, UnsupportedError, UsageError
from headinfer.hf.models import resolve
from headinfer.kv import head_store
from headinfer.model_shape import LayerShape, ModelShape
from headinfer.plan import footprint
from headinfer.plan.compare import METHODS, OURS, Baseline, memory_by_method, seconds_by_method
from headinfer.plan.fit import CHUNK_TOKENS, HOST_OVERHEAD_BYTES, STREAMING_BYTES, longest_context
from headinfer.plan.footprint import BASELINES, Footprint, baseline_footprint, streaming_footprint
from headinfer.plan.hardware import HARDWARE, Hardware, find_hardware
from headinfer.plan.models import BUILT_IN_CONFIGS, find_shape
from headinfer.plan.planner import candidates, make_plan
from headinfer.plan.request import Request
from headinfer.plan.roofline import MERGE_BYTES, Schedule, decode_seconds, prefill_seconds
from headinfer.plan.tiles import choose_tiles

PROPERTY = settings(deadline=None, derandomize=True, max_examples=150)
MIB, GIB, M = 2**20, 2**30, 2**20
LLAMA, RTX4090 = find_shape("llama-3-8b"), HARDWARE["rtx4090"]


def shape_of(layers, hidden=256, inner=512, vocab=1000):
    """A model of these layers, with weights as a plain decoder has them."""
    full = []
    for layer in layers:
        dims = layer.key_dim + layer.value_dim
        weights = hidden * (layer.query_heads + layer.kv_heads) * dims + 3 * hidden * inner
        full.append(dataclasses.replace(layer, weights=weights, active_weights=weights, mlp_width=inner))
    return ModelShape(tuple(full), hidden, inner, vocab, 0, "llama", vocab * hidden, vocab * hidden)


def random_request(rng):
    """Shapes, budgets and contexts far from and near to what fits, on a small GPU or a CPU."""
    layers = [LayerShape("full_attention", *rng.choice([(4, 2, 64, 64), (8, 8, 32, 32), (6, 3, 128, 64)]))]
    layers *= rng.randint(1, 4)
    layers += [LayerShape("sliding_attention", 4, 2, 64, 64, window_tokens=512)] * rng.randint(0, 2)
    is_host = rng.random() < 0.2
    hardware = dataclasses.replace(
        HARDWARE["laptop-cpu" if is_host else rng.choice(["rtx3060", "l4"])],
        device_memory_bytes=int(2 ** rng.uniform(22, 34)),
        overhead_bytes=rng.choice([0, MIB]),
    )
    return Request(
        shape_of(layers, hidden=rng.choice([64, 256]), inner=rng.choice([64, 1024])),
        hardware,
        context_tokens=int(2 ** rng.uniform(0, 24)),
        host_bytes=HOST_OVERHEAD_BYTES + int(2 ** rng.uniform(20, 38)),
        disk_bytes=rng.choice([0, 0, int(2 ** rng.uniform(20, 40))]),
        device_bytes=rng.choice([None, int(2 ** rng.uniform(22, 34))]),
        rows=rng.choice([1, 1, 3]),
        dtype=rng.choice(["bfloat16", "float32"]),
        chunk_tokens=rng.choice([None, None, 300]),
        device_kv_budget_bytes=rng.choice([None, None, int(2 ** rng.uniform(20, 32))]),
        keeps_resident=rng.random() < 0.5,
    )


requests = st.integers(0, 2**32).map(lambda seed: random_request(random.Random(seed)))


def plan_or_none(request):
    try:
        return make_plan(request)
    except CapacityError:
        return None


# -- budgets -------------------------------------------------------------------------------------------------------


def test_no_plan_exceeds_a_budget_and_parts_add_up():
    """Two thousand random requests; what is refused does not fit with the least that any plan needs."""
    rng, fitted, refused = random.Random(0), 0, 0
    for _ in range(2000):
        request = random_request(rng)
        plan = plan_or_none(request)
        if plan is None:
            refused += 1
            assert longest_context(request) < request.context_tokens
            continue
        fitted += 1
        memory, is_host = plan.footprint, request.hardware.is_host
        assert request.keeps_resident or memory.resident_bytes == 0
        assert memory.device_bytes <= request.room_bytes
        assert memory.host_bytes + (memory.device_bytes if is_host else 0) <= request.host_bytes
        assert memory.disk_kv_bytes <= request.disk_bytes
        budget = request.device_kv_budget_bytes
        assert is_host or budget is None or memory.device_kv_budget_bytes <= budget
        kept = (
            memory.resident_bytes
            + memory.ring_bytes
            + memory.tail_bytes
            + memory.spare_tail_bytes
            + memory.staging_bytes
        )
        assert memory.device_kv_budget_bytes == kept
        rest = memory.weights_bytes + memory.activation_bytes + memory.overhead_bytes + memory.local_bytes
        assert memory.device_bytes == kept + rest
        for cost in (plan.prefill_cost, plan.decode_cost):
            parts = [cost.linear_s, cost.attention_s, cost.merge_s, cost.exposed_transfer_s, cost.exposed_launch_s]
            assert min(parts) >= 0
            assert cost.total_s == pytest.approx(sum(parts))
            assert cost.total_s >= max(cost.compute_s, cost.device_memory_s) - cost.merge_s - 1e-9
            assert cost.total_s * (1 + 1e-9) >= cost.transfer_s - 1e-9 or request.hardware.is_host
        assert plan.explain()
    assert fitted > 500
    assert refused > 200


@PROPERTY
@given(requests, st.sampled_from(["host_bytes", "device_bytes", "disk_bytes", "device_kv_budget_bytes"]),
       st.floats(1, 16))  # fmt: skip
def test_more_memory_never_worsens_a_plan(request, field, factor):
    plan = plan_or_none(request)
    assume(plan is not None and getattr(request, field) is not None)
    more = make_plan(dataclasses.replace(request, **{field: int(getattr(request, field) * factor)}))
    assert more.total_s <= plan.total_s * (1 + 1e-9)


@PROPERTY
@given(requests, st.integers(1, 2**20))
def test_a_longer_context_never_needs_fewer_bytes(request, added):
    shape, tokens = request.shape, request.context_tokens
    for method in BASELINES:
        short, long = (baseline_footprint(shape, method, n, chunk_tokens=512) for n in (tokens, tokens + added))
        assert_no_fewer(short, long)
    for streaming_bytes in (None, 64 * MIB):
        options = {"chunk_tokens": 512, "streaming_bytes": streaming_bytes, "rows": request.rows}
        assert_no_fewer(*(streaming_footprint(shape, n, **options) for n in (tokens, tokens + added)))
    if plan_or_none(dataclasses.replace(request, context_tokens=tokens + added)) is not None:
        make_plan(request)


def assert_no_fewer(short, long):
    for name in (field.name for field in dataclasses.fields(Footprint)):
        assert getattr(short, name) <= getattr(long, name), name


@PROPERTY
@given(requests)
def test_the_longest_context_fits_and_a_longer_one_does_not(request):
    longest = longest_context(request)
    if longest:
        least = dataclasses.replace(request, context_tokens=longest)
        assert plan_or_none(least) is not None
    assert plan_or_none(dataclasses.replace(request, context_tokens=longest + longest // 2**13 + 2 * 128)) is None


# -- against slow counts ----------------------------------------------------------------------------------------------


@settings(PROPERTY, max_examples=60)
@given(st.integers(1, 3), st.sampled_from([1, 2, 4]), st.floats(22, 30), st.floats(20, 32), st.floats(5, 21))
def test_the_plan_is_the_best_of_all_that_fit(layers, kv_heads, device_power, host_power, token_power):
    """All chunks, ring sizes and numbers of resident heads, with bytes counted by hand."""
    shape = shape_of([LayerShape("full_attention", 4, kv_heads, 64, 64)] * layers)
    hardware = dataclasses.replace(HARDWARE["rtx3060"], device_memory_bytes=int(2**device_power), overhead_bytes=0)
    tokens, host_bytes = int(2**token_power), HOST_OVERHEAD_BYTES + int(2**host_power)
    request = Request(shape, hardware, tokens, host_bytes)
    head_bytes, best = tokens * 128 * 2, None
    weights = 2 * (layers * (256 * (4 + kv_heads) * 128 + 3 * 256 * 512) + 2 * 256 * 1000)
    host_kv = 0 if tokens <= 256 else -(-tokens // 128) * 128 * layers * kv_heads * 128 * 2
    tails = (layers + 1) * 256 * kv_heads * 128 * 2
    for chunk in CHUNK_TOKENS:
        token_bytes = max((3 * 512 + 4 * 256) * 2, (2 * 256 + 4 * 128 + kv_heads * 128) * 2 + 2 * 4 * 65 * 4)
        fixed = weights + min(chunk, tokens) * token_bytes + 1000 * 6 + tails
        for streaming in (*STREAMING_BYTES, None):
            staging = 0 if streaming is None else 2 * min(4 * MIB, streaming // 16 // 256 * 256)
            ring = 0 if streaming is None else 2 * ((streaming - tails - staging) // 2 // 256 * 256)
            if ring < 0 or (streaming is not None and ring == 0):
                continue
            for resident in range(layers * kv_heads + 1):
                everything = resident == layers * kv_heads
                used = fixed + staging + ring + resident * head_bytes
                if (
                    everything != (streaming is None)
                    or used > hardware.device_memory_bytes
                    or (host_kv + HOST_OVERHEAD_BYTES > host_bytes)
                ):
                    continue
                per_layer = [resident // layers + (index < resident % layers) for index in range(layers)]
                seconds = seconds_of(request, chunk, ring, per_layer)
                if seconds is not None:
                    best = min(seconds, best or seconds)
    plan = plan_or_none(request)
    assert (plan is None) == (best is None)
    if plan is not None:
        assert plan.total_s == pytest.approx(best)


def seconds_of(request, chunk, ring, per_layer):
    layer = request.layers[0]
    slot = {"slot_bytes": ring // 2 or None, "rates": request.hardware.tile_rates(request.dtype)}
    shape = {"kv_heads": layer.kv_heads, "group_queries": layer.query_heads // layer.kv_heads}
    tiles = []
    for queries in (chunk, 1):
        problem = {**shape, **slot, "head_token_bytes": 256, "rows": 1, "query_tokens": queries}
        try:
            tiles.append(choose_tiles(**problem, past_tokens=request.context_tokens))
        except CapacityError:
            return None
    shares = tuple(1 - n / layer.kv_heads for n in per_layer) if ring else ()
    pairs = [(tile.heads_per_group, tile.tile_tokens) for tile in tiles]
    schedule = Schedule(chunk, shares, *pairs, merges=bool(ring), writes_back=bool(ring))
    prefill = prefill_seconds(request.shape, request.hardware, request.context_tokens, schedule)
    return (
        prefill.total_s
        + 256 * decode_seconds(request.shape, request.hardware, request.context_tokens, schedule).total_s
    )


@PROPERTY
@given(
    st.sampled_from([128, 512, 4096]), st.integers(1, 40), st.floats(0, 1), st.integers(1, 8),
    st.floats(8, 11.5), st.floats(9, 13), st.booleans(),
)  # fmt: skip
def test_closed_forms_are_sums_over_chunks(chunk, chunks, share, heads, link_power, flop_power, merges):
    """Prefill chunk by chunk, as the loop runs, against the closed form."""
    hardware = dataclasses.replace(
        RTX4090,
        link_bytes_per_s=10**link_power,
        link_back_bytes_per_s=10**link_power,
        flops_per_s={"bfloat16": 10**flop_power},
        launch_s=1e-12,
        link_share=1,
    )
    layer = LayerShape("full_attention", 8, 8, 64, 64)
    tile_tokens = 10**9
    schedule = Schedule(chunk, (share,), (heads, tile_tokens), (heads, tile_tokens), merges=merges, writes_back=True)
    shape = shape_of([layer])
    found = prefill_seconds(shape, hardware, chunk * chunks, schedule)
    flops, bandwidth = hardware.attained_flops_per_s("bfloat16"), hardware.attained_device_bytes_per_s
    link = hardware.attained_link_bytes_per_s
    busy_s, exposed_s = 0.0, 0.0
    for index in range(chunks):
        past = index * chunk
        attention = 2 * 8 * 128 * chunk * chunk / 2 / flops
        attention += max(2 * 8 * 128 * chunk * past / flops, past * 8 * 128 * 2 / bandwidth)
        merge = share * 8 * 64 * chunk * MERGE_BYTES / bandwidth * (1 + past / tile_tokens) if merges and past else 0
        copies = share * past * 8 * 128 * 2 / link + chunk * 8 * 128 * 2 / 10**link_power
        busy_s += attention + merge
        exposed_s += max(0.0, copies - attention - merge)
    assert found.attention_s + found.merge_s == pytest.approx(busy_s)
    first_tiles_s = (chunks - 1) * chunk * chunks * heads / 8 * 8 * 128 * 2 / link  # at most, each not hidden
    assert exposed_s * (1 - 1e-6) - 1e-9 <= found.exposed_transfer_s
    assert found.exposed_transfer_s <= (exposed_s + (first_tiles_s if merges else 0)) * (1 + 1e-6) + 1e-9


# -- golden ---------------------------------------------------------------------------------------------------------


def test_constants_are_those_of_the_engine():
    assert footprint.TAIL_UNIT_TOKENS == head_store.TAIL_UNIT_TOKENS
    assert footprint.SEGMENT_TOKENS == head_store._LARGE_SEGMENT_TOKENS


@pytest.mark.parametrize("tokens", [200, 256, 257, 3000, 16_385, 16_511, 16_512, 16_600, 32_769])
def test_the_footprint_is_what_the_engine_holds(tokens):
    """Ring, tails, write-back and host bytes of a cache that is really filled."""
    source = resolve("random:tiny-llama?layers=3&hidden=64&heads=4&kv_heads=2")
    model = source.load(dtype=torch.float32, device="cpu", seed=0)
    budget = 2 * MIB
    with torch.no_grad(), headinfer.enable(model, device_kv_budget=budget, staging="early") as enabled:
        cache = headinfer.HeadCache(model.config, device_kv_budget=budget, staging="early", expected_tokens=tokens)
        model(torch.zeros(1, 1, dtype=torch.long), past_key_values=cache)
        for layer in cache.head_layers:
            layer.store.append(*torch.zeros(2, 1, 2, tokens - 2, 16))
        model(torch.zeros(1, 1, dtype=torch.long), past_key_values=cache)
        stats = cache.stats()
    del enabled
    shape = ModelShape.from_config(source.config)
    found = streaming_footprint(shape, tokens, chunk_tokens=1000, streaming_bytes=budget, element_bytes=4)
    assert (found.ring_bytes, found.staging_bytes) == (stats.device_ring_bytes, stats.device_staging_bytes)
    assert (found.tail_bytes, found.spare_tail_bytes) == (stats.device_tail_bytes, stats.device_tail_bytes // 3)
    assert found.host_kv_bytes == stats.host_kv_bytes
    assert found.device_kv_budget_bytes <= budget


def test_llama_3_8b_needs_256_mib_of_kv_on_the_device_at_any_context():
    for tokens in (64 * 1024, M, 4 * M):
        request = Request(LLAMA, RTX4090, tokens, 1000 * GIB, device_kv_budget_bytes=256 * MIB)
        plan = make_plan(request)
        assert plan.footprint.device_kv_bytes <= 256 * MIB
        assert plan.footprint.host_kv_bytes == tokens * 128 * 1024


def test_decode_at_1m_tokens_is_bound_by_the_link():
    plan = make_plan(Request(LLAMA, RTX4090, M, 1000 * GIB, device_kv_budget_bytes=256 * MIB))
    assert plan.decode_cost.bound == "link"
    assert plan.decode_cost.total_s == pytest.approx(128 * GIB / 25.2e9, rel=0.02)
    assert plan.prefill_cost.bound == "compute"


def test_more_of_what_bounds_makes_it_faster():
    base = Request(LLAMA, RTX4090, M, 1000 * GIB)
    faster_link = dataclasses.replace(RTX4090, link_bytes_per_s=63e9)
    slow_dram = dataclasses.replace(RTX4090, dram_bytes_per_s=10e9)
    link, dram = (make_plan(dataclasses.replace(base, hardware=x)) for x in (faster_link, slow_dram))
    assert link.decode_cost.total_s < 0.55 * make_plan(base).decode_cost.total_s
    assert dram.decode_cost.bound == "DRAM"
    on_disk = make_plan(dataclasses.replace(base, host_bytes=10 * GIB, disk_bytes=200 * GIB))
    assert on_disk.decode_cost.bound == "disk"
    assert on_disk.footprint.disk_kv_bytes == 120 * GIB
    assert "--disk-tier" in on_disk.explain()[-1]
    budgeted = make_plan(dataclasses.replace(base, host_kv_budget_bytes=32 * GIB, disk_bytes=200 * GIB))
    assert budgeted.footprint.host_kv_bytes == 32 * GIB
    assert budgeted.footprint.disk_kv_bytes == 96 * GIB
    early = make_plan(dataclasses.replace(base, prefetches_next_layer=True))
    assert early.total_s < make_plan(base).total_s


def test_short_contexts_stay_on_the_device():
    plan = make_plan(Request(LLAMA, RTX4090, 8192, 64 * GIB))
    assert plan.resident_heads == (8,) * 32
    assert plan.footprint.ring_bytes == 0
    assert plan.decode_cost.total_s == pytest.approx(Baseline(plan.request, "standard", 8192).decode(8192).total_s)


def test_resident_heads_are_those_of_layers_that_are_offloaded():
    gemma = find_shape("gemma-3-4b")
    plan = make_plan(Request(gemma, RTX4090, M, 64 * GIB))
    assert all(
        heads == 0 for heads, layer in zip(plan.resident_heads, gemma.layers, strict=True) if layer.window_tokens
    )
    assert sum(plan.resident_heads) > 0


@pytest.mark.parametrize("name", BUILT_IN_CONFIGS)
@pytest.mark.parametrize("device", ["h200", "laptop-cpu"])
def test_every_built_in_model_can_be_planned(name, device):
    plan = make_plan(Request(find_shape(name), HARDWARE[device], 64 * 1024, 4000 * GIB, weight_bits=1))
    assert plan.total_s > 0
    assert set(memory_by_method(plan)) <= set(METHODS)
    table = seconds_by_method(plan, (1024, 64 * 1024))
    assert table[OURS][1] is not None


# -- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"host_bytes": 94 * GIB}, r"1M tokens need 128 GiB of host RAM for KV; this machine has 92 GiB for it: "
         r"at most 753,888 tokens fit, or give it 130 GiB of RAM"),
        ({"host_bytes": 94 * GIB, "disk_bytes": GIB}, r"and 1 GiB of disk: at most 744K tokens fit"),
        ({"device_bytes": 12 * GIB}, "the weights need 14.96 GiB at 16 bits each, and the RTX 4090 has 11 GiB"),
        ({"device_bytes": 16 * GIB}, "chunks of 128 need 16.* of device memory"),
        ({"device_kv_budget_bytes": 20 * MIB}, "a device KV budget of 20 MiB is too small"),
        ({"tile_tokens": 10**7, "context_tokens": 2 * 10**7}, "no ring slot holds the tile asked for"),
        ({"hardware": HARDWARE["laptop-cpu"], "host_bytes": 64 * GIB}, "1M tokens need 128 GiB of host RAM for KV"),
    ],
)  # fmt: skip
def test_what_cannot_fit_is_refused_with_what_would(change, message):
    base = Request(LLAMA, RTX4090, M, 4000 * GIB)
    with pytest.raises(CapacityError, match=message):
        make_plan(dataclasses.replace(base, **change))


@pytest.mark.parametrize("change", [{"context_tokens": 0}, {"rows": -1}, {"dtype": "int3"}, {"heads_per_group": 9},
                                    {"chunk_tokens": 0}])  # fmt: skip
def test_options_out_of_range_are_refused(change):
    with pytest.raises(UsageError):
        make_plan(dataclasses.replace(Request(LLAMA, RTX4090, M, 400 * GIB), **change))


def test_a_model_without_full_attention_has_nothing_to_offload():
    with pytest.raises(UnsupportedError, match="no full-attention layer"):
        Request(shape_of([LayerShape("sliding_attention", 4, 2, 64, 64, 512)]), RTX4090, 1000, GIB)


# -- hardware ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HARDWARE)
def test_hardware_is_saved_and_loaded_and_names_its_source(name, tmp_path):
    hardware = HARDWARE[name]
    hardware.save(tmp_path / "deep" / "probe.json")
    assert Hardware.load(tmp_path / "deep" / "probe.json") == hardware
    assert find_hardware(str(tmp_path / "deep" / "probe.json")) == hardware
    assert find_hardware(f"NVIDIA GeForce {name.upper()}") == hardware
    assert hardware.source
    assert hardware.attained_link_bytes_per_s <= hardware.link_bytes_per_s


def test_a_broken_hardware_file_says_so(tmp_path):
    path = tmp_path / "probe.json"
    for text in ("{", "[]", '{"name": "x"}'):
        path.write_text(text)
        with pytest.raises(UsageError, match="no description of hardware"):
            Hardware.load(path)
    with pytest.raises(UsageError, match="link_bytes_per_s is 0"):
        dataclasses.replace(RTX4090, link_bytes_per_s=0)


def test_units_stand_in_every_name():
    """A figure of bytes, seconds or a rate says so in its name."""
    counts = {"multiprocessors", "disk_share", "name", "source", "is_host", "flops_per_s", "transfer_name"}
    for kind in (Footprint, Hardware):
        for field in dataclasses.fields(kind):
            assert field.name.endswith(("_bytes", "_s", "_share")) or field.name in counts, field.name
    from headinfer.plan.roofline import Seconds

    assert all(field.name.endswith("_s") or field.name in counts for field in dataclasses.fields(Seconds))


def test_candidates_are_listed_small_ones_first():
    found = [plan.chunk_tokens for plan in candidates(Request(LLAMA, RTX4090, M, 400 * GIB))]
    assert found == sorted(found)
    assert len(set(found)) == len(CHUNK_TOKENS)
