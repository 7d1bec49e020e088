"""Transfers are hidden behind compute, and the link is never idle: simulated times.

The tests run the loop, the ring and the write-back with the shape of Llama-3-8B, 32 layers and 256 MiB of KV on the
device. tests/support/clock.py computes the times from the rates of a data sheet. Real times need a real device.
"""

import dataclasses
import functools
import math

import clock
import pytest
from clock import KV_HEADS, LAYERS, TOKEN_BYTES, last_pass

from headinfer.engine import streaming
from headinfer.kv.transfer import SlotRing
from headinfer.plan.cpu_share import shared_rates
from headinfer.plan.hardware import HARDWARE
from headinfer.plan.models import find_shape
from headinfer.plan.planner import make_plan
from headinfer.plan.request import Request
from headinfer.plan.roofline import LAYER_LAUNCHES
from headinfer.plan.tiles import TileRates

RTX_4090 = TileRates()
H100 = TileRates(600e12, 3.35e12, 55e9, 10e-6, 132)
on_both = pytest.mark.parametrize("rates", [RTX_4090, H100], ids=["RTX 4090", "H100"])
LONG = [65_536, 262_144, 1_048_576]


def hidden_chunk(rates):
    """Tokens of a chunk whose attention takes 1.5 times as long as fetching its past: 1.5 F e / (2 G W)."""
    return math.ceil(1.5 * rates.flops_per_s * 2 / (2 * 4 * rates.link_bytes_per_s) / 256) * 256


@functools.cache
def decode_step(rates, past_tokens):
    """The simulated times of a decode step, for several tests."""
    with pytest.MonkeyPatch.context() as patch:
        return last_pass(patch, rates, past_tokens, 1)


@on_both
@pytest.mark.parametrize(("past_tokens", "copies"), [(LONG[0], 20), (LONG[1], 32), (LONG[2], 80)])
def test_decode_keeps_the_link_busy(rates, past_tokens, copies):
    """A segment of 16,384 tokens is one copy for all heads. The last one, which is not full, is two for each head.

    With tiles of 24,448 tokens, cut anywhere in the segments, a layer took 112, 432 and 1,712 copies, and the H100's
    link reached 94.0, 94.2 and 94.2 % of its rate. An H200 measured 93.4 to 94.2 %.
    """
    found = decode_step(rates, past_tokens)
    assert found.fetched_bytes == pytest.approx(LAYERS * past_tokens * TOKEN_BYTES, rel=0.01)
    assert found.fetch_s >= 0.99 * found.seconds
    assert found.copies == LAYERS * copies
    assert found.fetched_bytes / found.seconds >= 0.985 * rates.link_bytes_per_s


@on_both
@pytest.mark.parametrize("past_tokens", LONG[:2])
def test_prefill_takes_about_as_long_as_its_kernels(monkeypatch, rates, past_tokens):
    found = last_pass(monkeypatch, rates, past_tokens, hidden_chunk(rates), count=2)
    assert found.fetched_bytes >= 0.99 * LAYERS * past_tokens * TOKEN_BYTES
    assert found.seconds <= 1.03 * found.needed_s  # merging tiles and unhidden transfers included


@on_both
@pytest.mark.parametrize("past_tokens", [1024, 4096, *LONG])
def test_decode_is_not_slower_than_the_papers_scheme(monkeypatch, rates, past_tokens):
    """The paper fetches the whole past of one head at a time, into two slots that grow with the past."""
    ours = decode_step(rates, past_tokens)
    budget = 2 * (past_tokens + 256) * TOKEN_BYTES // KV_HEADS + (80 << 20)
    scheme = {"heads_per_group": 1, "tile_tokens": past_tokens + 256}
    theirs = last_pass(
        monkeypatch, rates, past_tokens, 1, device_kv_budget_bytes=budget, streaming_budget_bytes=budget, **scheme
    )
    assert theirs.seconds >= (0.98 if past_tokens >= LONG[0] else 1.1) * ours.seconds


def test_the_next_layer_is_fetched_ahead_even_if_the_host_waits(monkeypatch):
    shares = []
    for prefetch in (SlotRing.prefetch, lambda *_: None):
        monkeypatch.setattr(SlotRing, "prefetch", prefetch)
        found = last_pass(monkeypatch, RTX_4090, LONG[0], 1, host_waits=True)
        shares.append(found.fetched_bytes / found.seconds / RTX_4090.link_bytes_per_s)
    assert shares[0] >= 0.98
    assert shares[1] <= 0.95


def test_a_short_last_tile_takes_time(monkeypatch):
    tiles_of = streaming.tiles_of

    def uneven(past, heads, plan):
        return tiles_of(past, heads, dataclasses.replace(plan, even_tokens=0))

    monkeypatch.setattr(streaming, "tiles_of", uneven)
    shape = {"heads_per_group": 4, "tile_tokens": 48_896}
    found = last_pass(monkeypatch, H100, LONG[0], hidden_chunk(H100), count=2, **shape)
    assert found.seconds > 1.04 * found.needed_s


def test_a_short_chunk_does_not_hide_its_copies(monkeypatch):
    found = last_pass(monkeypatch, H100, LONG[0], hidden_chunk(H100) // 3 // 256 * 256, count=2)
    assert found.seconds > 1.1 * found.needed_s


# -- the host's CPU attends to a share ---------------------------------------------------------------------------------

# The rates that an H200 measured (tests/plan/h200-hybrid.json), and those of a desktop: a link of 25 GB/s, and DRAM of
# 70 GB/s that the link and the CPU share.
WITH_CPU = {
    "H200": dataclasses.replace(
        HARDWARE["h200"],
        link_bytes_per_s=55.4e9,
        link_share=1.0,
        launch_s=10e-6,
        cpu_beside_link_bytes_per_s={"4": 71.7e9},
        link_beside_cpu_bytes_per_s={"4": 51.0e9},
    ),
    "desktop": dataclasses.replace(
        HARDWARE["rtx4090"], link_bytes_per_s=25e9, link_share=1.0, dram_bytes_per_s=70e9, dram_share=1.0
    ),
}


def planned_share(machine, past_tokens):
    budget = {"device_kv_budget_bytes": 256 << 20, "streaming_budget_bytes": 256 << 20}
    return make_plan(Request(find_shape("llama-3-8b"), machine, past_tokens, 1 << 40, **budget)).with_cpu_share


def with_cpu(monkeypatch, machine, past_tokens, share, layers=8):
    monkeypatch.setattr(clock, "LINEAR_LAUNCHES", LAYER_LAUNCHES)
    rates = machine.tile_rates("bfloat16")
    shared = shared_rates(machine, 4)
    return last_pass(monkeypatch, rates, past_tokens, 1, shared=shared, cpu_share=share, layers=layers)


@pytest.mark.parametrize(("name", "most"), [("H200", 0.52), ("desktop", 0.45)])
def test_a_token_at_1m_with_the_cpu(monkeypatch, name, most):
    machine = WITH_CPU[name]
    share = planned_share(machine, LONG[2])
    found = with_cpu(monkeypatch, machine, LONG[2], share, layers=LAYERS)
    link_alone_s = LAYERS * LONG[2] * TOKEN_BYTES / machine.link_bytes_per_s  # at its full rate
    assert found.seconds <= most * link_alone_s
    on_host = share * LAYERS * LONG[2] * TOKEN_BYTES
    assert found.attending_s == pytest.approx(on_host / shared_rates(machine, 4).cpu_bytes_per_s, rel=0.01)
    assert found.fetched_bytes == pytest.approx(LAYERS * LONG[2] * TOKEN_BYTES - on_host, rel=0.01)


@pytest.mark.parametrize("name", WITH_CPU)
def test_the_planned_share_is_the_best_of_a_scan(monkeypatch, name):
    machine = WITH_CPU[name]
    share = planned_share(machine, LONG[1])
    scan = [share + part / 64 for part in (-4, -2, -1, 0, 1, 2, 4)]
    seconds = [with_cpu(monkeypatch, machine, LONG[1], one).seconds for one in scan]
    assert seconds[3] <= 1.03 * min(seconds)


@pytest.mark.parametrize("name", WITH_CPU)
@pytest.mark.parametrize("past_tokens", [1024, 4096, 16_384, LONG[0]])
def test_nothing_is_slower_with_the_planned_share(monkeypatch, name, past_tokens):
    machine = WITH_CPU[name]
    share = planned_share(machine, past_tokens)
    assert (share > 0) == (past_tokens >= 16_384)
    if share:
        without = with_cpu(monkeypatch, machine, past_tokens, 0.0)
        most = 0.6 if past_tokens == LONG[0] else 0.9
        assert with_cpu(monkeypatch, machine, past_tokens, share).seconds <= most * without.seconds
