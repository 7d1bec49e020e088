"""Transfers are hidden behind compute, and the link never idles: on a clock.

Llama-3-8B's shape, all 32 layers, 256 MiB of the device for KV; the real loop, ring and write-back, with the seconds
that the rates of a data sheet give (clock.py). How fast a real device is, only a real device shows.
"""

import dataclasses
import math

import pytest
from clock import KV_HEADS, LAYERS, TOKEN_BYTES, last_pass

from headinfer.engine import streaming
from headinfer.kv.transfer import SlotRing
from headinfer.plan.tiles import TileRates

RTX_4090 = TileRates()
H100 = TileRates(600e12, 3.35e12, 55e9, 10e-6, 132)
on_both = pytest.mark.parametrize("rates", [RTX_4090, H100], ids=["RTX 4090", "H100"])
LONG = [65_536, 262_144, 1_048_576]


def hidden_chunk(rates):
    """Tokens of a chunk whose attention takes half as long again as its past's way over the link: 1.5 F e / (2 G W)."""
    return math.ceil(1.5 * rates.flops_per_s * 2 / (2 * 4 * rates.link_bytes_per_s) / 256) * 256


@on_both
@pytest.mark.parametrize("past_tokens", LONG)
def test_decode_keeps_the_link_busy(monkeypatch, rates, past_tokens):
    found = last_pass(monkeypatch, rates, past_tokens, 1)
    assert found.fetched_bytes == pytest.approx(LAYERS * past_tokens * TOKEN_BYTES, rel=0.01)
    assert found.fetched_bytes / found.seconds >= 0.99 * rates.link_bytes_per_s


@on_both
@pytest.mark.parametrize("past_tokens", LONG[:2])
def test_prefill_takes_no_longer_than_its_kernels(monkeypatch, rates, past_tokens):
    found = last_pass(monkeypatch, rates, past_tokens, hidden_chunk(rates), count=2)
    assert found.fetched_bytes >= 0.99 * LAYERS * past_tokens * TOKEN_BYTES
    assert found.seconds <= 1.03 * found.needed_s  # with the merging of tiles, and whatever is not hidden


@on_both
@pytest.mark.parametrize("past_tokens", [1024, 4096, *LONG])
def test_decode_is_no_slower_than_the_papers_scheme(monkeypatch, rates, past_tokens):
    """One head's whole past at a time, in two slots that grow with it."""
    ours = last_pass(monkeypatch, rates, past_tokens, 1)
    budget = 2 * (past_tokens + 256) * TOKEN_BYTES // KV_HEADS + (80 << 20)
    scheme = {"heads_per_group": 1, "tile_tokens": past_tokens + 256}
    theirs = last_pass(
        monkeypatch, rates, past_tokens, 1, device_kv_budget_bytes=budget, streaming_budget_bytes=budget, **scheme
    )
    assert theirs.seconds >= (0.98 if past_tokens >= LONG[0] else 1.1) * ours.seconds


def test_the_next_layer_is_fetched_ahead_where_the_host_waits(monkeypatch):
    shares = []
    for expect in (SlotRing.expect, lambda *_: None):
        monkeypatch.setattr(SlotRing, "expect", expect)
        found = last_pass(monkeypatch, RTX_4090, LONG[0], 1, host_waits=True)
        shares.append(found.fetched_bytes / found.seconds / RTX_4090.link_bytes_per_s)
    assert shares[0] >= 0.98
    assert shares[1] <= 0.95


def test_the_clock_sees_a_short_last_tile(monkeypatch):
    tiles_of = streaming.tiles_of

    def uneven(layer_kv, heads, plan, token_ranges):
        return tiles_of(layer_kv, heads, dataclasses.replace(plan, is_even=False), token_ranges)

    monkeypatch.setattr(streaming, "tiles_of", uneven)
    found = last_pass(monkeypatch, H100, LONG[0], hidden_chunk(H100), count=2)
    assert found.seconds > 1.04 * found.needed_s


def test_the_clock_sees_a_chunk_too_short_to_hide_its_copies(monkeypatch):
    found = last_pass(monkeypatch, H100, LONG[0], hidden_chunk(H100) // 3 // 256 * 256, count=2)
    assert found.seconds > 1.1 * found.needed_s
