"""The share of the host's CPU in decode: the closed form, the rates, and what plans and runs make of them.

h200-hybrid.json has what an H200 and its host measured: GB/s by threads and query rows, and "both" at the same time as
copies to the device, the CPU's first.
"""

import dataclasses
import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from headinfer.engine.options import Options, known_fields
from headinfer.engine.run_plan import RunRequest, engine_options, plan_run
from headinfer.errors import UsageError
from headinfer.plan.cpu_share import HostWay, SharedRates, best_share, layer_seconds, share_at_rows, shared_rates
from headinfer.plan.footprint import exchange_bytes
from headinfer.plan.hardware import HARDWARE, Hardware
from headinfer.plan.models import find_shape
from headinfer.plan.planner import make_plan
from headinfer.plan.request import Request

FOUND = json.loads((Path(__file__).parent / "h200-hybrid.json").read_text())
GIGA = 1e9
GIB = 2**30
MIB = 2**20
M = 2**20
LLAMA = find_shape("llama-3-8b")
CPU_GB, LINK_GB = FOUND["both_attend_12"]
RATES = SharedRates(CPU_GB * GIGA, LINK_GB * GIGA, FOUND["h2d_alone"] * GIGA, is_measured=True)
LAYER_BYTES = 4096.0 * M  # of Llama-3-8B at 1M tokens
PROBED = dataclasses.replace(
    HARDWARE["h200"],
    source="headinfer probe",
    link_bytes_per_s=FOUND["h2d_alone"] * GIGA,
    link_share=1.0,
    launch_s=10e-6,
    cpu_beside_link_bytes_per_s={"4": CPU_GB * GIGA},
    link_beside_cpu_bytes_per_s={"4": LINK_GB * GIGA},
)
FLOOR = {"device_kv_budget_bytes": 256 * MIB, "keeps_resident": False}
SHARES = [part / 128 for part in range(129)]


@pytest.mark.parametrize("way", [HostWay(0.0), HostWay(3e-3, 4e-3), HostWay(20e-3), HostWay(1e-3, 60e-3)])
def test_the_closed_form_finds_the_best_of_all_shares(way):
    share = best_share(LAYER_BYTES, RATES, way)
    seconds = {one: layer_seconds(one, LAYER_BYTES, RATES, way) for one in SHARES}
    assert 0 < share <= 1
    assert 0 <= min(seconds, key=seconds.get) - share <= 1 / 128  # rounded down
    assert seconds[share] <= 1.02 * min(seconds.values())


def test_two_rates_add_up_without_overhead():
    """With an H200's rates a layer is 2.2 times as fast as over the link alone."""
    share = best_share(LAYER_BYTES, RATES, HostWay(0.0))
    assert share == int(128 * CPU_GB / (CPU_GB + LINK_GB)) / 128 == 74 / 128
    alone_s = layer_seconds(0, LAYER_BYTES, RATES, HostWay(0.0))
    assert alone_s / layer_seconds(share, LAYER_BYTES, RATES, HostWay(0.0)) == pytest.approx(2.18, abs=0.01)


def test_no_share_is_used_that_does_not_pay():
    way = HostWay(2e-3)
    shares = [best_share(n * MIB, RATES, way) for n in (0, 1, 4, 16, 64, 128, 256, 1024, 4096)]
    assert shares[:5] == [0.0] * 5
    assert shares[-1] > 0.5
    assert all(low <= high for low, high in pairwise(shares))
    assert best_share(LAYER_BYTES, dataclasses.replace(RATES, cpu_bytes_per_s=0.0), HostWay(0.0)) == 0
    little = dataclasses.replace(RATES, cpu_bytes_per_s=1 * GIGA, link_bytes_per_s=RATES.alone_bytes_per_s)
    assert best_share(LAYER_BYTES, little, HostWay(0.0)) == 0  # 2 % are not worth it


def test_dram_is_shared_if_nothing_was_measured():
    desktop = dataclasses.replace(HARDWARE["rtx4090"], link_bytes_per_s=25e9, link_share=1.0, dram_bytes_per_s=70e9)
    desktop = dataclasses.replace(desktop, dram_share=1.0)
    assert shared_rates(desktop, 4) == SharedRates(45e9, 25e9, 25e9, is_measured=False)
    slow = dataclasses.replace(desktop, dram_bytes_per_s=20e9)
    assert shared_rates(slow, 4) == SharedRates(0.0, 20e9, 20e9, is_measured=False)


def test_more_query_rows_take_longer():
    """Seconds per byte are linear in the rows: 8 and 32 rows are predicted from 4 and 16 as they were measured."""
    for threads in (4, 8, 12):
        at = {rows: FOUND[f"attend_{threads}_rows{rows}"] * GIGA for rows in (4, 8, 16, 32)}
        both = {str(rows): at[rows] for rows in (4, 16)}
        links = dict.fromkeys(both, LINK_GB * GIGA)
        machine = dataclasses.replace(PROBED, cpu_beside_link_bytes_per_s=both, link_beside_cpu_bytes_per_s=links)
        predicted = {rows: shared_rates(machine, rows).cpu_bytes_per_s for rows in (1, 4, 8, 16, 32)}
        assert (predicted[1], predicted[4], predicted[16]) == pytest.approx((at[4], at[4], at[16]))
        assert predicted[8] == pytest.approx(at[8], rel=0.21)
        assert 0.83 * at[32] <= predicted[32] <= at[32]
    assert share_at_rows(0.5, None, 64) == share_at_rows(0.5, 4, 4) == 0.5
    assert share_at_rows(0.5, 4, 16) == 0.2
    assert share_at_rows(0.5, 4, 64) == 0
    assert share_at_rows(1.0, 4, 64) == 1


def test_a_plan_uses_a_share_only_if_its_rates_were_measured():
    plan = make_plan(Request(LLAMA, PROBED, M, 1000 * GIB, **FLOOR))
    assert plan.cpu_share == plan.decode.cpu_share == plan.with_cpu_share == 73 / 128
    ratio = plan.decode_cost.total_s / plan.decode_cost_with(0.0).total_s
    assert ratio <= 0.52
    assert plan.prefill.cpu_share == 0
    shown = plan.as_dict()
    assert shown["cpu_share"] == plan.cpu_share
    assert shown["decode_s_per_token"] / shown["link_only_decode_s_per_token"] == ratio
    assert shown["with_cpu"] == {
        "cpu_share": plan.cpu_share,
        "decode_s_per_token": plan.decode_cost.total_s,
        "is_measured": True,
    }
    assert any("attends to 57% of what would stream" in line for line in plan.explain())

    guessed = make_plan(Request(LLAMA, HARDWARE["rtx4090"], M, 1000 * GIB, **FLOOR))
    assert guessed.cpu_share == 0
    assert guessed.with_cpu_share > 0.5
    assert guessed.decode_cost_with(guessed.with_cpu_share).total_s <= 0.45 * guessed.decode_cost.total_s
    assert not guessed.as_dict()["with_cpu"]["is_measured"]
    assert any("by a model of DRAM: headinfer probe measures it" in line for line in guessed.explain())

    given = make_plan(Request(LLAMA, HARDWARE["rtx4090"], M, 1000 * GIB, cpu_share=0.25, **FLOOR))
    assert given.cpu_share == given.with_cpu_share == 0.25
    assert given.decode_cost.total_s == pytest.approx(0.75 * guessed.decode_cost.total_s, rel=0.02)
    for share in (-0.1, 1.5):
        with pytest.raises(UsageError, match="it must be a number from 0 to 1"):
            Request(LLAMA, PROBED, M, GIB, cpu_share=share)


@pytest.mark.parametrize("tokens", [1024, 4096, 8192])
def test_short_contexts_do_without_the_cpu(tokens):
    plan = make_plan(Request(LLAMA, PROBED, tokens, 1000 * GIB, **FLOOR))
    assert plan.cpu_share == plan.with_cpu_share == 0
    assert plan.footprint.exchange_bytes == 0
    assert not any("CPU" in line for line in plan.explain())


def test_no_plan_with_the_cpu_exceeds_a_budget():
    wanted = {1: exchange_bytes(LLAMA, 2, 1), 16: exchange_bytes(LLAMA, 2, 16)}
    assert wanted == {tokens: 2 * tokens * 32 * (128 * 2 + 129 * 4) for tokens in (1, 16)}
    for budget in (128 * MIB, 256 * MIB, 3 * GIB):
        for decode_tokens, rows in ((1, 1), (16, 1), (1, 2)):
            request = Request(
                LLAMA,
                PROBED,
                256 * 1024,
                1000 * GIB,
                device_kv_budget_bytes=budget,
                decode_tokens=decode_tokens,
                rows=rows,
            )
            plan = make_plan(request)
            assert bool(plan.cpu_share) == (decode_tokens == 1)
            for one in (plan, make_plan(dataclasses.replace(request, cpu_share=0.5))):
                assert one.footprint.exchange_bytes == (rows * wanted[decode_tokens] if one.cpu_share else 0)
                assert one.footprint.device_kv_budget_bytes <= one.device_kv_budget_bytes <= budget


def test_all_on_the_device_or_on_disk_leaves_nothing_for_the_cpu():
    resident = make_plan(Request(LLAMA, PROBED, 64 * 1024, 1000 * GIB))
    assert resident.is_all_resident
    assert resident.with_cpu_share == 0
    on_disk = make_plan(Request(LLAMA, PROBED, M, 40 * GIB, disk_bytes=1000 * GIB, **FLOOR))
    assert on_disk.footprint.disk_kv_bytes
    assert on_disk.with_cpu_share == 0
    on_cpu = make_plan(Request(LLAMA, HARDWARE["laptop-cpu"], 4096, 1000 * GIB, cpu_share=0.5))
    assert on_cpu.cpu_share == 0


def test_a_run_gets_the_share_unless_the_user_sets_one(monkeypatch, tmp_path):
    monkeypatch.setattr("headinfer.engine.run_plan.this_machine", lambda _: PROBED)
    monkeypatch.setattr("headinfer.engine.run_plan.free_device_bytes", lambda _: 60 * GIB)
    monkeypatch.setattr("headinfer.engine.run_plan.available_host_bytes", lambda: 1000 * GIB)
    monkeypatch.setattr("headinfer.engine.run_plan.free_disk_bytes", lambda _: 1000 * GIB)

    def planned(run=(), **options):
        made = Options(device_kv_budget_bytes=256 * MIB, **options)
        request = RunRequest(LLAMA, torch.device("cuda", 0), torch.bfloat16, M, made, **dict(run))
        chosen = plan_run(request).options
        return chosen.cpu_share, chosen.cpu_rows

    assert planned() == (73 / 128, 4)
    kept = json.loads(json.dumps(Options(cpu_share=73 / 128, cpu_rows=4).arithmetic()))  # as a session keeps it
    assert Options(**known_fields(kept)) == Options(cpu_share=73 / 128, cpu_rows=4)
    assert planned(cpu_share=0.0) == (0.0, None)
    assert planned(cpu_share=0.3) == (0.3, None)
    assert planned(run={"ranks_on_host": 2}) == (None, None)
    assert planned(host_kv_budget_bytes=500 * GIB, disk_tier=str(tmp_path)) == (None, None)
    plain = make_plan(Request(LLAMA, HARDWARE["h200"], M, 1000 * GIB, **FLOOR))
    assert engine_options(Options(), plain).cpu_share is None  # the engine gives the CPU what cannot be pinned


def test_measured_rates_are_checked_saved_and_loaded(tmp_path):
    probed = dataclasses.replace(PROBED, cpu_kv_bytes_per_s={"4": {"1": 1e9, "12": 9.4e10}, "16": {"1": 1e9}})
    probed.save(tmp_path / "probe.json")
    assert Hardware.load(tmp_path / "probe.json") == probed
    old = {name: value for name, value in dataclasses.asdict(probed).items() if "cpu" not in name}
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert shared_rates(Hardware.load(tmp_path / "old.json"), 4).is_measured is False
    for change, message in (
        ({"cpu_beside_link_bytes_per_s": {"4": 0}}, "cpu_beside_link_bytes_per_s at 4 query rows is 0"),
        ({"cpu_beside_link_bytes_per_s": {"x": 1e9}}, "'x' query rows: it must be a positive number"),
        ({"cpu_beside_link_bytes_per_s": 5}, "must be a rate for each number of query rows"),
        ({"cpu_beside_link_bytes_per_s": {"8": 1e9}}, "must have the same"),
        ({"cpu_threads_beside_link": 0}, "cpu_threads_beside_link is 0: it must be a positive whole number"),
        ({"cpu_kv_bytes_per_s": {"4": {"two": 1e9}}}, "'two' threads: it must be a positive number"),
    ):
        with pytest.raises(UsageError, match=message):
            dataclasses.replace(PROBED, **change)
