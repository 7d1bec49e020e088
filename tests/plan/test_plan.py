"""The planner: it keeps all budgets, more memory never makes a plan worse, and figures equal independent counts."""

import dataclasses
import itertools
import math
import random

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import headinfer
from headinfer.errors import CapacityError, UnsupportedError, UsageError
from headinfer.hf.models import resolve
from headinfer.kv import layer_kv, segment_sizes
from headinfer.plan import footprint
from headinfer.plan.compare import METHODS, OURS, Baseline, memory_by_method, seconds_by_method
from headinfer.plan.fit import CHUNK_TOKENS, HOST_OVERHEAD_BYTES, STREAMING_BYTES, longest_context, refusal
from headinfer.plan.footprint import (
    BASELINES,
    Footprint,
    baseline_footprint,
    exchange_bytes,
    host_kv_tokens,
    resident_tokens,
    streaming_footprint,
)
from headinfer.plan.guesses import best_width, guesses_sentences, least_chance, speedup
from headinfer.plan.hardware import HARDWARE, Hardware, find_hardware
from headinfer.plan.model_shape import LayerShape, ModelShape
from headinfer.plan.models import BUILT_IN_CONFIGS, find_shape
from headinfer.plan.operating_points import hiding_chunk_tokens
from headinfer.plan.planner import candidates, make_plan
from headinfer.plan.request import Request
from headinfer.plan.roofline import MERGE_BYTES, Schedule, decode_seconds, prefill_seconds
from headinfer.plan.tiles import LayerWork, choose_tiles

PROPERTY = settings(deadline=None, derandomize=True, max_examples=150)
MIB = 2**20
GIB = 2**30
M = 2**20
LLAMA = find_shape("llama-3-8b")
RTX4090 = HARDWARE["rtx4090"]


def shape_of(layers, hidden=256, inner=512, vocab=1000):
    """A model of these layers, with weights as a plain decoder has them."""
    full = []
    for layer in layers:
        dims = layer.key_dim + layer.value_dim
        weights = hidden * (layer.query_heads + layer.kv_heads) * dims + 3 * hidden * inner
        full.append(dataclasses.replace(layer, weights=weights, active_weights=weights, mlp_width=inner))
    return ModelShape(tuple(full), hidden, inner, vocab, 0, "llama", vocab * hidden, vocab * hidden)


def random_request(rng):
    """Return a request on a small GPU or a CPU that fits, nearly fits or does not fit."""
    layers = [LayerShape("full_attention", *rng.choice([(4, 2, 64, 64), (8, 8, 32, 32), (6, 3, 128, 64)]))]
    layers *= rng.randint(1, 4)
    layers += [LayerShape("full_attention", 4, 4, 64, 32)] * rng.choice([0, 0, 1])
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
        streaming_budget_bytes=rng.choice([None, None, None, int(2 ** rng.uniform(20, 26))]),
        prefetches_next_layer=rng.random() < 0.5,
        keeps_resident=rng.random() < 0.7,
        host_kv_budget_bytes=rng.choice([None, None, None, int(2 ** rng.uniform(20, 38))]),
    )


requests = st.integers(0, 2**32).map(lambda seed: random_request(random.Random(seed)))


def plan_or_none(request):
    try:
        return make_plan(request)
    except CapacityError:
        return None


# -- budgets -------------------------------------------------------------------------------------------------------


def test_no_plan_exceeds_a_budget_and_parts_add_up():
    """Of a thousand random requests, those that are refused exceed what the smallest plan needs."""
    rng = random.Random(0)
    fitted = 0
    refused = 0
    for _ in range(1000):
        request = random_request(rng)
        plan = plan_or_none(request)
        if plan is None:
            refused += 1
            assert longest_context(request) < request.context_tokens
            assert "KV budget of 0 B" not in str(refusal(request))
            continue
        fitted += 1
        memory = plan.footprint
        is_host = request.hardware.is_host
        assert request.keeps_resident or memory.resident_bytes == 0
        assert memory.device_bytes <= request.room_bytes
        assert memory.host_bytes + (memory.device_bytes if is_host else 0) <= request.host_bytes
        assert memory.disk_kv_bytes <= request.disk_bytes
        budget = request.device_kv_budget_bytes
        assert is_host or budget is None or memory.device_kv_budget_bytes <= plan.device_kv_budget_bytes <= budget
        if not is_host:
            assert memory.device_kv_budget_bytes - memory.resident_bytes <= plan.streaming_budget_bytes
            assert request.streaming_budget_bytes in (None, plan.streaming_budget_bytes)
            assert_the_engine_keeps_the_same(plan)
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


def assert_the_engine_keeps_the_same(plan):
    """Check resident tokens by the engine's rule: equal parts of the budget that streaming leaves, in flush units."""
    request = plan.request
    kept_bytes = 0
    room = plan.device_kv_budget_bytes - plan.streaming_budget_bytes
    layers = request.shape.offloaded_layers
    for index, layer in enumerate(request.shape.layers):
        wanted = 0
        token_bytes = layer.kv_bytes_per_token(request.element_bytes) * request.rows
        if index in layers:
            wanted = min(room // (len(layers) * token_bytes) // 128 * 128, host_kv_tokens(request.context_tokens))
            kept_bytes += wanted * token_bytes
        assert plan.resident_tokens[index] == wanted
    assert plan.footprint.resident_bytes == kept_bytes


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
    shape = request.shape
    tokens = request.context_tokens
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
    """Compare with all chunks, ring sizes and numbers of resident tokens, whose bytes are counted by hand."""
    shape = shape_of([LayerShape("full_attention", 4, kv_heads, 64, 64)] * layers)
    hardware = dataclasses.replace(HARDWARE["rtx3060"], device_memory_bytes=int(2**device_power), overhead_bytes=0)
    tokens = int(2**token_power)
    host_bytes = HOST_OVERHEAD_BYTES + int(2**host_power)
    request = Request(shape, hardware, tokens, host_bytes)
    token_bytes = kv_heads * 128 * 2
    best = None
    weights = 2 * (layers * (256 * (4 + kv_heads) * 128 + 3 * 256 * 512) + 2 * 256 * 1000)
    host_kv = 0 if tokens <= 256 else -(-tokens // 128) * 128 * layers * kv_heads * 128 * 2
    host_tokens = host_kv // (layers * token_bytes)
    tails = (layers + 1) * 256 * token_bytes
    for chunk in CHUNK_TOKENS:
        activations = max((3 * 512 + 4 * 256) * 2, (2 * 256 + 4 * 128 + kv_heads * 128) * 2 + 2 * 4 * 65 * 4)
        fixed = weights + min(chunk, tokens) * activations + 1000 * 6
        for streaming in STREAMING_BYTES:
            staging = 2 * min(4 * MIB, streaming // 16 // 256 * 256)
            ring = 2 * ((streaming - tails - staging) // 2 // 256 * 256)
            if ring <= 0 or host_kv + HOST_OVERHEAD_BYTES > host_bytes:
                continue
            if fixed + tails + staging + ring > hardware.device_memory_bytes:
                continue
            most = (hardware.device_memory_bytes - fixed - streaming) // (layers * token_bytes)
            for resident in sorted({0, max(0, min(most // 128, host_tokens // 128 // 2)), max(0, most // 128)}):
                seconds = seconds_of(request, chunk, ring, min(resident * 128, host_tokens), host_tokens)
                if seconds is not None:
                    best = min(seconds, best or seconds)
    plan = plan_or_none(request)
    assert (plan is None) == (best is None)
    if plan is not None:
        assert plan.total_s == pytest.approx(best)


def seconds_of(request, chunk, ring, resident, host_tokens):
    layer = request.layers[0]
    tokens = request.context_tokens
    rates = request.hardware.tile_rates(request.dtype)
    tiles = []
    for queries in (chunk, 1):
        work = LayerWork(
            kv_heads=layer.kv_heads,
            group_queries=layer.query_heads // layer.kv_heads,
            head_token_bytes=256,
            element_bytes=2,
            rows=1,
            query_tokens=queries,
            past_tokens=tokens,
        )
        try:
            tiles.append(choose_tiles(work, ring // 2, rates))
        except CapacityError:
            return None
    pairs = [(tile.heads_per_group, tile.tile_tokens) for tile in tiles]
    if resident == host_tokens:
        pairs = [(layer.kv_heads, tokens)] * 2
        resident = max(resident, tokens)
    per_layer = (resident,) * len(request.layers)
    schedule = Schedule(chunk, per_layer, *pairs, merges=True, writes_back=True, prefetches_next_layer=True)
    prefill = prefill_seconds(request.shape, request.hardware, tokens, schedule)
    return prefill.total_s + 256 * decode_seconds(request.shape, request.hardware, tokens, schedule).total_s


def busy_by_hand(heads, chunk):
    """The share of an H200 that 8 heads keep busy, `heads` at a time: 132 multiprocessors, a block of 128 rows each."""
    seconds = 0.0
    for first in range(0, 8, heads):
        blocks = min(heads, 8 - first) * (chunk // 128)
        seconds += 1 if blocks < 132 else blocks // 132
        if blocks > 132 and blocks % 132:
            seconds += 0.75 + 0.25 * (blocks % 132) / 132
    return 8 * (chunk // 128) / 132 / seconds


@settings(PROPERTY, max_examples=400)
@given(
    st.sampled_from([128, 512, 4096]), st.integers(1, 40), st.floats(0, 1.1), st.integers(1, 8), st.floats(1, 6),
    st.floats(8, 11.5), st.floats(8, 11.5), st.floats(9, 13), st.booleans(), st.booleans(), st.booleans(),
    st.sampled_from([1, 512]),
)  # fmt: skip
def test_closed_forms_are_sums_over_chunks(
    chunk, chunks, share, heads, tile_power, link_power, back_power, flop_power, merges, writes_back, prefetches, block
):
    """Compare the closed form of prefill with a sum over its chunks.

    With blocks of 512 tokens another kernel, of half the rate, serves the chunk itself and the rest of a past or tile.
    """
    hardware = dataclasses.replace(
        RTX4090,
        link_bytes_per_s=10**link_power,
        link_back_bytes_per_s=10**back_power,
        flops_per_s={"bfloat16": 10**flop_power},
        launch_s=1e-15,
        link_share=1,
        multiprocessors=132,
        blocks_at_once=1,
        idle_gain=0.25,
        block_tokens=block,
        rest_share=1 if block == 1 else 0.5,
    )
    layer = LayerShape("full_attention", 8, 8, 64, 64)
    tokens = chunk * chunks
    tile_tokens = int(10**tile_power)
    resident = int(share * tokens) // 128 * 128
    pair = (heads, tile_tokens)
    switches = {"merges": merges, "writes_back": writes_back, "prefetches_next_layer": prefetches}
    schedule = Schedule(chunk, (resident,), pair, pair, **switches)
    shape = shape_of([layer])
    found = prefill_seconds(shape, hardware, tokens, schedule)
    flops = hardware.attained_flops_per_s("bfloat16")
    bandwidth = hardware.attained_device_bytes_per_s
    token_s = 8 * 128 * 2 / hardware.attained_link_bytes_per_s
    copied_s = token_s
    if merges:
        slices = 1 if 16_384 % tile_tokens == 0 else 1 + tile_tokens / 16_384
        copied_s += math.ceil(8 / heads) * 2 * heads * slices * hardware.copy_s / tile_tokens
    else:
        copied_s += math.ceil(8 / heads) * 2 * hardware.copy_s / tile_tokens
    flops_of_pair = 2 * 8 * 128 / busy_by_hand(heads, chunk)
    calls = 1
    rest = 0
    if block > 1:
        blocks = tile_tokens // block
        rest = tile_tokens % block
        calls = blocks // 4 + [0, 1, 1, 2][blocks % 4] + (rest > 0)
    linear_s = max(2 * shape.active_weights * chunk / flops, 2 * shape.layers[0].weights / bandwidth)
    tile_s = min(tile_tokens, max(tokens - resident, 0)) * heads / 8 * token_s
    back_s = chunk * 8 * 128 * 2 / 10**back_power if writes_back else 0.0
    attention_s = merge_s = exposed_s = transfer_s = 0.0
    for past in range(0, tokens, chunk):
        streamed = max(past - resident, 0)
        square = flops_of_pair * chunk * chunk / 2 / flops * (1 if block == 1 else 2)
        attention = square + max(flops_of_pair * chunk * past / flops, past * 8 * 128 * 2 / bandwidth)
        if past and block > 1:
            attention += flops_of_pair * chunk * (block / 2 + streamed * rest / tile_tokens) / flops
        passes = streamed / tile_tokens * calls + 1 if merges and past else 0
        merge = 8 * 64 * chunk * MERGE_BYTES / bandwidth * passes
        fetch = streamed * copied_s
        early = min(tile_s, linear_s) if prefetches else 0.0
        exposed_s += max(0.0, fetch - early - attention - merge, back_s - linear_s - attention - merge)
        if merges and not prefetches and streamed:
            exposed_s += max(0.0, tile_s - square * heads / 8)
        attention_s = attention_s + attention
        merge_s = merge_s + merge
        transfer_s = transfer_s + max(fetch, back_s)
    assert found.attention_s == pytest.approx(attention_s)
    assert found.merge_s == pytest.approx(merge_s)
    assert found.transfer_s == pytest.approx(transfer_s)
    assert found.exposed_transfer_s == pytest.approx(exposed_s, rel=1e-6, abs=1e-9 * (attention_s + transfer_s))


def test_decode_by_hand():
    """Llama-3-8B at 1M tokens, of which 64K are resident; other work hides a little of the transfer."""
    kept = 64 * 1024
    tile = (8, 8192)
    schedule = Schedule(8192, (kept,) * 32, tile, tile, merges=True, writes_back=True)
    machine = dataclasses.replace(RTX4090, launch_s=1e-9, copy_s=3e-6)
    link = RTX4090.attained_link_bytes_per_s
    device = RTX4090.attained_device_bytes_per_s
    copies = (M - kept) // 8192 * 16  # K and V of each head, in half of a segment
    fetch_s = (M - kept) * 4096 / link + copies * 3e-6
    attention_s = M * 4096 / device
    linear_s = 2 * (LLAMA.active_weights + LLAMA.head_weights) / device / 32
    last_s = 8192 * 4096 / device
    tile_s = 8192 * 4096 / link + 16 * 3e-6
    late = decode_seconds(LLAMA, machine, M, schedule)
    assert late.exposed_transfer_s == pytest.approx(32 * (fetch_s - attention_s + last_s))
    assert late.total_s == pytest.approx(32 * (linear_s + fetch_s + last_s))
    early = decode_seconds(LLAMA, machine, M, dataclasses.replace(schedule, prefetches_next_layer=True))
    assert early.total_s == pytest.approx(late.total_s - 32 * min(tile_s, linear_s + last_s))
    assert early.transfer_s == late.transfer_s == pytest.approx(32 * fetch_s)
    everything = dataclasses.replace(schedule, resident_tokens=(M,) * 32)
    assert decode_seconds(LLAMA, machine, M, everything).total_s == pytest.approx(32 * (linear_s + attention_s))


def test_the_smallest_chunk_that_hides_the_transfer():
    """It is F * e / (2 * G * W) tokens, for which attention and transfer take equally long."""
    exact = dataclasses.replace(RTX4090, compute_share=1.0, link_bytes_per_s=25e9, link_share=1.0)
    assert hiding_chunk_tokens(LLAMA.layers[0], exact, "bfloat16") == 1652  # 165.2e12 * 2 / (2 * 4 * 25e9)
    assert hiding_chunk_tokens(find_shape("llama-2-7b").layers[0], exact, "bfloat16") == 6608
    assert hiding_chunk_tokens(LLAMA.layers[0], exact, "float32") == 1652  # half the FLOP/s, twice the bytes
    slow_dram = dataclasses.replace(exact, dram_bytes_per_s=10e9, dram_share=1.0)
    assert hiding_chunk_tokens(LLAMA.layers[0], slow_dram, "bfloat16") == 4130
    for layer in (LLAMA.layers[0], find_shape("gemma-2-9b").layers[1]):
        chunk = hiding_chunk_tokens(layer, RTX4090, "bfloat16")
        attention_s = layer.flops_per_pair * chunk / RTX4090.attained_attention_flops_per_s("bfloat16")
        transfer_s = layer.kv_bytes_per_token(2) / RTX4090.attained_link_bytes_per_s
        assert transfer_s <= attention_s <= transfer_s * (1 + 1 / (chunk - 1))
    plan = make_plan(Request(LLAMA, RTX4090, M, 1000 * GIB))
    hiding = hiding_chunk_tokens(LLAMA.layers[0], RTX4090, "bfloat16")
    assert f"Chunks of {hiding:,} tokens or more hide the transfer behind attention." in plan.explain()


# -- golden ---------------------------------------------------------------------------------------------------------


def test_constants_are_those_of_the_engine():
    assert footprint.TAIL_UNIT_TOKENS == layer_kv.TAIL_UNIT_TOKENS
    assert footprint.SEGMENT_TOKENS == segment_sizes._LARGE_SEGMENT_TOKENS


TOKENS = [200, 256, 258, 3000, 16_385, 16_511, 16_512, 16_600, 32_769]


@pytest.mark.parametrize(
    ("tokens", "room", "share"),
    [*itertools.product(TOKENS, [0, 500_000, 64 * MIB], [0.0]), (16_600, 0, 0.5), (3000, 500_000, 1.0)],
)
def test_the_footprint_is_what_the_engine_holds(tokens, room, share):
    """Compare ring, tails, write-back, exchange, resident and host bytes with those of a cache that was filled."""
    source = resolve("random:tiny-llama?layers=3&hidden=64&heads=4&kv_heads=2")
    model = source.load(dtype=torch.float32, device="cpu", seed=0)
    budget = 2 * MIB
    options = {"device_kv_budget_bytes": budget + room, "streaming_budget_bytes": budget, "transport": "eager"}
    options["cpu_share"] = share
    with torch.no_grad(), headinfer.enable(model, **options) as enabled:
        cache = headinfer.HeadCache(model.config, expected_tokens=tokens, **options)
        model(torch.zeros(1, 1, dtype=torch.long), past_key_values=cache)
        for layer in cache.head_layers:
            layer.layer_kv.append(*torch.zeros(2, 1, 2, tokens - 2, 16))
        model(torch.zeros(1, 1, dtype=torch.long), past_key_values=cache)
        stats = cache.stats()
    del enabled
    shape = ModelShape.from_config(source.config)
    kept = resident_tokens(room, 3, shape.layers[0].kv_bytes_per_token(4), 1, host_kv_tokens(tokens))
    found = streaming_footprint(
        shape,
        tokens,
        chunk_tokens=1000,
        streaming_bytes=budget,
        resident_tokens=[kept] * 3,
        element_bytes=4,
        exchange=exchange_bytes(shape, 4, 1) if share else 0,
    )
    assert found.resident_bytes == stats.device_resident_bytes
    staging_bytes = found.staging_bytes + found.exchange_bytes
    assert (found.ring_bytes, staging_bytes) == (stats.device_ring_bytes, stats.device_staging_bytes)
    assert (stats.cpu_attended_bytes > 0) == (found.exchange_bytes > 0)
    assert (found.tail_bytes, found.spare_tail_bytes) == (stats.device_tail_bytes, stats.device_tail_bytes // 3)
    assert found.host_kv_bytes + found.exchange_bytes == stats.host_kv_bytes
    assert found.device_kv_budget_bytes <= budget + room


def test_llama_3_8b_needs_256_mib_of_kv_on_the_device_at_any_context():
    for tokens in (1, 300, 1024, 64 * 1024, M, 4 * M, 16 * M):
        request = Request(LLAMA, RTX4090, tokens, 4000 * GIB, device_kv_budget_bytes=256 * MIB)
        plan = make_plan(request)
        assert plan.footprint.device_kv_bytes <= plan.device_kv_budget_bytes <= 256 * MIB
        assert plan.footprint.host_kv_bytes == host_kv_tokens(tokens) * 128 * 1024
        streamed = make_plan(dataclasses.replace(request, streaming_budget_bytes=256 * MIB))
        assert streamed.streaming_budget_bytes == streamed.device_kv_budget_bytes == 256 * MIB
        assert sum(streamed.resident_tokens) == 0
        assert plan.total_s <= streamed.total_s * (1 + 1e-9)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("tokens", [256, 257, 1000, 16_385, 16_600])
def test_resident_kv_is_counted_to_the_byte(tokens, rows):
    """Layers have equal parts, in flush units, of at most what the host holds. If all is resident, there is no ring."""
    layers = [LayerShape("full_attention", 4, 2, 64, 64), LayerShape("full_attention", 4, 4, 64, 32)]
    shape = shape_of(layers)
    sizes = (2 * 128 * 2, 4 * 96 * 2)
    host_tokens = host_kv_tokens(tokens)
    for room in (0, 2 * 128 * sizes[1] * rows - 1, 2 * 128 * sizes[1] * rows, MIB, GIB):
        kept = [resident_tokens(room, 2, size, rows, host_tokens) for size in sizes]
        assert kept == [min(room // 2 // (128 * size * rows) * 128, host_tokens) for size in sizes]
        options = {"chunk_tokens": 512, "streaming_bytes": 4 * MIB, "rows": rows}
        found = streaming_footprint(shape, tokens, resident_tokens=kept, **options)
        bare = streaming_footprint(shape, tokens, **options)
        assert found.resident_bytes == (kept[0] * sizes[0] + kept[1] * sizes[1]) * rows <= room
        is_all = kept == [host_tokens] * 2
        assert found == dataclasses.replace(
            bare, resident_bytes=found.resident_bytes, ring_bytes=0 if is_all else bare.ring_bytes
        )
        assert is_all or room < GIB


def test_decode_at_1m_tokens_is_bound_by_the_link():
    plan = make_plan(Request(LLAMA, RTX4090, M, 1000 * GIB, device_kv_budget_bytes=256 * MIB))
    assert plan.decode_cost.bound == "link"
    assert plan.decode_cost.total_s == pytest.approx(128 * GIB / 25.2e9, rel=0.02)
    assert plan.prefill_cost.bound == "compute"


def test_a_faster_bounding_resource_makes_a_plan_faster():
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
    late = make_plan(dataclasses.replace(base, prefetches_next_layer=False))
    assert make_plan(base).total_s < late.total_s
    streamed = make_plan(dataclasses.replace(base, keeps_resident=False))
    assert make_plan(base).decode_cost.total_s < 0.96 * streamed.decode_cost.total_s


def test_short_contexts_stay_on_the_device():
    plan = make_plan(Request(LLAMA, RTX4090, 8192, 64 * GIB))
    assert plan.resident_tokens == (8192,) * 32
    assert plan.footprint.resident_bytes == GIB
    assert plan.footprint.ring_bytes == 0
    assert plan.footprint.staging_bytes > 0, "written through to the host"
    assert plan.decode_cost.total_s == pytest.approx(Baseline(plan.request, "standard", 8192).decode(8192).total_s)


def test_resident_tokens_are_those_of_layers_that_are_offloaded():
    gemma = find_shape("gemma-3-4b")
    plan = make_plan(Request(gemma, RTX4090, M, 64 * GIB))
    kept = {tokens for tokens, layer in zip(plan.resident_tokens, gemma.layers, strict=True) if layer.is_offloaded}
    assert len(kept) == 1
    assert 0 < min(kept) < M
    assert sum(plan.resident_tokens) == len(gemma.offloaded_layers) * min(kept)
    assert f"The first {min(kept):,} tokens" in " ".join(plan.explain())


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
        ({"host_kv_budget_bytes": 8 * GIB, "disk_bytes": 40 * GIB}, r"1M tokens need 128 GiB for KV, of which the host "
         r"KV budget keeps 8 GiB in memory, and the disk has 40 GiB free for the other 120 GiB: at most 393,456 tokens "
         r"fit; raise the host KV budget, or use another disk"),
        ({"host_kv_budget_bytes": 8 * GIB}, "the disk has 0 B free for the other 120 GiB"),
        ({"host_kv_budget_bytes": 95 * GIB, "host_bytes": 94 * GIB, "disk_bytes": GIB}, "92 GiB for it and 1 GiB of"),
        ({"device_bytes": 12 * GIB}, "the weights need 14.96 GiB at 16 bits each, and the RTX 4090 has 11 GiB"),
        ({"device_bytes": 16 * GIB}, "chunks of 128 need 16.* of device memory"),
        ({"device_kv_budget_bytes": 20 * MIB}, "a device KV budget of 20 MiB is too small"),
        ({"tile_tokens": 10**7, "context_tokens": 2 * 10**7}, "no ring slot holds the tile asked for"),
        ({"hardware": HARDWARE["laptop-cpu"], "host_bytes": 64 * GIB}, "1M tokens need 128 GiB of host RAM for KV"),
    ],
)  # fmt: skip
def test_a_job_that_does_not_fit_is_refused_with_what_would_fit(change, message):
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


@pytest.mark.parametrize(
    ("name", "listed"),
    [
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA A100-PCIE-40GB", "a100-40"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("Tesla T4", "t4"),
    ],
)
def test_names_of_cuda_find_their_hardware(name, listed):
    assert find_hardware(name) == HARDWARE[listed]


def test_a_broken_hardware_file_says_so(tmp_path):
    path = tmp_path / "probe.json"
    for text in ("{", "[]", '{"name": "x"}'):
        path.write_text(text)
        with pytest.raises(UsageError, match="not a description of hardware"):
            Hardware.load(path)
    with pytest.raises(UsageError, match="link_bytes_per_s is 0"):
        dataclasses.replace(RTX4090, link_bytes_per_s=0)


def test_field_names_end_with_their_unit():
    """The name of each field of bytes, seconds or a rate ends with its unit."""
    counts = {"multiprocessors", "disk_share", "name", "source", "is_host", "flops_per_s", "transfer_name"}
    counts |= {"blocks_at_once", "idle_gain", "block_tokens", "cpu_threads_beside_link"}
    for kind in (Footprint, Hardware):
        for field in dataclasses.fields(kind):
            assert field.name.endswith(("_bytes", "_s", "_share")) or field.name in counts, field.name
    from headinfer.plan.seconds import Seconds

    assert all(field.name.endswith("_s") or field.name in counts for field in dataclasses.fields(Seconds))


def test_a_plan_says_what_guesses_cost_and_when_they_pay():
    def plan(device, **changes):
        shape = find_shape("llama-3-8b")
        return make_plan(Request(shape, find_hardware(device), 64 * 1024, host_bytes=64 * 2**30, **changes))

    on_gpu = plan("rtx4090", keeps_resident=False)
    assert max(on_gpu.guess_costs) < 1.01, "the link bounds a token and a pass with guesses"
    shown = on_gpu.as_dict()["guesses"]
    assert shown["pass_costs"] == list(on_gpu.guess_costs)
    assert shown["least_chance"] == 0.05
    assert shown["best"][-1] == {"chance": 1.0, "guesses": 15, "speedup": pytest.approx(16, rel=0.01)}
    assert "Guesses pay if at least 5% of them are right" in on_gpu.explain()[-1]

    on_cpu = plan("cpu")
    costs = on_cpu.guess_costs
    assert list(costs) == sorted(costs)
    assert costs[15] > 2, "the kernel of the CPU is bound by arithmetic"
    least = least_chance(costs)
    assert not best_width(costs, least - 0.01)
    assert (1 + least) / costs[1] >= 1.05
    assert f"{costs[15]:.2f} times as long as a new token" in on_cpu.explain()[-2]
    width = best_width(costs, 0.5)
    times = f"{speedup(costs, width, 0.5):.2g} times"
    assert f"If half of them are right, {width} in a pass are best: {times} the tokens" in on_cpu.explain()[-1]
    assert guesses_sentences([1.0 + width for width in range(16)])[-1].startswith("Guesses do not pay")
    assert plan("rtx4090", rows=2).as_dict()["guesses"] is None, "a batch is decoded without guesses"


def test_candidates_come_in_order_of_their_chunks():
    found = [plan.chunk_tokens for plan in candidates(Request(LLAMA, RTX4090, M, 400 * GIB))]
    assert found == sorted(found)
    assert len(set(found)) == len(CHUNK_TOKENS)
