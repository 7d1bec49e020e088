"""The bytes that a plan counts with sparse heads are those that a cache holds."""

import pytest
import torch

import headinfer
from headinfer.engine.options import Options
from headinfer.engine.run_plan import RunRequest, plan_run
from headinfer.hf.models import resolve
from headinfer.kv import head_window
from headinfer.plan import layer_shape
from headinfer.plan.fit import resident, resident_room_bytes
from headinfer.plan.footprint import exchange_bytes, host_kv_tokens, streaming_footprint
from headinfer.plan.hardware import HARDWARE
from headinfer.plan.model_shape import ModelShape
from headinfer.plan.request import Request
from headinfer.utils.head_pattern import HeadPattern

MIB = 2**20
TOKENS = 3000
# Layers with one, no and both heads full.
PATTERN = HeadPattern(((0, 1), (0, 0), (1, 1)), sink_tokens=16, recent_tokens=100)


@pytest.fixture(scope="module")
def model():
    source = resolve("random:tiny-llama?layers=3&hidden=64&heads=4&kv_heads=2")
    return source.load(dtype=torch.float32, device="cpu", seed=0)


def test_constants_are_those_of_the_cache():
    assert layer_shape.WINDOW_SLACK_TOKENS == head_window.SLACK_TOKENS


@pytest.mark.parametrize(("room", "share"), [(0, 0.0), (600_000, 0.0), (64 * MIB, 0.0), (0, 0.5)])
def test_the_footprint_is_what_the_cache_holds(model, room, share):
    """Compare ring, tails, write-back, exchange, windows, resident and host bytes."""
    budget = 4 * MIB
    options = {"device_kv_budget_bytes": budget + room, "streaming_budget_bytes": budget, "transport": "eager"}
    options |= {"cpu_share": share, "sparse_heads": PATTERN}
    ids = torch.arange(TOKENS - 1).remainder(50)[None]
    with torch.no_grad(), headinfer.enable(model, **options):
        cache = headinfer.HeadCache(model.config, expected_tokens=TOKENS, **options)
        model(ids, past_key_values=cache, logits_to_keep=1)
        model(ids[:, :1], past_key_values=cache)
        stats = cache.stats()
    shape = ModelShape.from_config(model.config).with_pattern(PATTERN)
    host_tokens = host_kv_tokens(TOKENS)
    token_bytes = 2 * 16 * 4
    kept = min(room // 3 // token_bytes // 128 * 128, host_tokens)
    found = streaming_footprint(
        shape,
        TOKENS,
        chunk_tokens=1000,
        streaming_bytes=budget,
        resident_tokens=[kept] * 2,
        element_bytes=4,
        exchange=exchange_bytes(shape, 4, 1) if share else 0,
    )
    assert found.resident_bytes == stats.device_resident_bytes == 3 * kept * token_bytes
    assert found.ring_bytes == stats.device_ring_bytes
    assert found.staging_bytes + found.exchange_bytes == stats.device_staging_bytes
    assert (stats.cpu_attended_bytes > 0) == (found.exchange_bytes > 0)
    assert (found.tail_bytes, found.spare_tail_bytes) == (stats.device_tail_bytes, stats.device_tail_bytes * 2 // 3)
    assert (
        found.host_kv_bytes + found.exchange_bytes
        == stats.host_kv_bytes
        == 3 * host_tokens * token_bytes + found.exchange_bytes
    )
    assert found.window_bytes == 2 * 3 * token_bytes * (16 + 100 + 256)
    assert stats.device_window_bytes <= found.window_bytes // 2
    assert found.device_kv_budget_bytes <= budget + room


def test_the_room_of_resident_tokens_is_the_least_with_which_they_are_kept():
    """Layers have parts of it in proportion to their full heads."""
    shape = ModelShape.from_config(resolve("random:tiny-llama?layers=3&hidden=64&heads=4&kv_heads=2").config)
    request = Request(
        shape,
        HARDWARE["rtx3060"],
        TOKENS,
        4 * 2**30,
        dtype="float32",
        device_kv_budget_bytes=4 * MIB + 600_000,
        sparse_heads=PATTERN,
    )
    kept = resident(
        request,
        4 * MIB,
        streaming_footprint(request.shape, TOKENS, chunk_tokens=128, streaming_bytes=4 * MIB, element_bytes=4),
    )
    assert kept == (600_000 // 3 // 128 // 128 * 128,) * 2
    assert resident_room_bytes(request, kept) == 3 * kept[0] * 128 <= 600_000


def test_a_run_is_planned_with_its_sparse_heads(model):
    shape = ModelShape.from_config(model.config)
    for options in (Options(), Options(sparse_heads=PATTERN)):
        run = RunRequest(shape, torch.device("cpu"), torch.float32, TOKENS, options, is_loaded=True)
        found = plan_run(run)
        heads = 3 if options.sparse_heads else 6
        assert run.stored_bytes_per_token == heads * 2 * 16 * 4
        assert found.plan.footprint.host_kv_bytes == host_kv_tokens(TOKENS) * run.stored_bytes_per_token
        assert found.plan.request.is_approximate == bool(options.sparse_heads)
        assert found.options == options
