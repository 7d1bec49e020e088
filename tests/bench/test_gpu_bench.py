"""The GPU's suites on a CPU: all of their code but CUDA's clocks, with a tiny model and tiny sizes."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from measured import measured_section
from own_process import HANG_S
from transformers import DynamicCache

from headinfer import enable
from headinfer.bench import gpu_point
from headinfer.bench import run as bench_run
from headinfer.bench.baselines import Baseline, baselines_of, compare, ring_budget_bytes
from headinfer.bench.choice import choose
from headinfer.bench.gpu_decode import WITH_CPU
from headinfer.bench.job import GpuJob, Rates
from headinfer.bench.measurement import OURS, goal_reached, shown
from headinfer.bench.past import Past, noise
from headinfer.bench.results import result_json, result_markdown, result_paths
from headinfer.bench.run import GPU_SUITES, check_device, run_suites
from headinfer.bench.runners import HeadRunner, TransformersRunner
from headinfer.bench.sizes import QUICK_GPU, GpuSizes
from headinfer.errors import CapacityError, UsageError
from headinfer.utils.kv_format import KV_DTYPES, pair_bytes

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
LAYERS = 2
KV_HEADS = 2
LONG = 5120  # tokens whose KV is that of one layer for all
DIM = 16
TOKEN_BYTES = 2 * KV_HEADS * DIM * 4  # of one layer, float32
MODEL = "random:tiny-llama?layers=2&hidden=64&intermediate=64&heads=4&kv_heads=2"
SIZES = GpuSizes(
    model=MODEL,
    dtype=torch.float32,
    decode_tokens=(2048, LONG, 512),
    chunk_offsets=(1024, LONG),
    whole_tokens=(1024,),
    real_model=MODEL,
    real_tokens=(1000,),
    real_new_tokens=4,
    chunk_tokens=384,
    cpu_tokens=2048,
    cpu_share=0.5,
    floor_bytes=2 << 20,
    real_kv_bytes=2 * 3072 * TOKEN_BYTES,  # so LONG tokens are a simulation
    copy_bytes=(1 << 20,),
    matrix=64,
    rounds=1,
    rounds_s=60.0,  # so that a pass of a busy machine is warmed up too
)
FEWER_BITS = {"int8 KV", "int4 KV"}
BASELINES = {
    "paper's scheme",
    "resident store",
    "offloaded cache",
    "DynamicCache",
    "layer-wise",
    "what is free",
} | FEWER_BITS


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def run(request):
    stages = []
    device = CPU if request.param == "cpu" else check_device("cuda")
    job = GpuJob(device, SIZES, stages.append)
    by_suite = list(run_suites(list(GPU_SUITES), job))
    assert sum(stage.startswith("measuring ") for stage in stages) == len(GPU_SUITES)
    # each point of decode and prefill, and the device bytes of all contexts, come as soon as they are measured
    assert len(by_suite) == len(SIZES.decode_tokens) + 1 + len(SIZES.chunk_offsets) + len(SIZES.whole_tokens) + 3
    return job, [line for found in by_suite for line in found]


@pytest.fixture(scope="module")
def job(run):
    return run[0]


def of(lines, suite, who=None):
    return [line for line in lines if line.suite == suite and who in (None, line.who)]


# -- what is measured ------------------------------------------------------------------------------------------------


def test_all_suites_measure_and_notes_explain_missing_figures(run):
    _, lines = run
    assert list(dict.fromkeys(line.suite for line in lines)) == ["rates", *GPU_SUITES]
    for line in lines:
        assert (line.value is None) <= bool(line.note), line
        assert line.value is None or line.value > 0 or line.unit == "bytes", line
        assert (line.reached is None) or line.goal, line


def test_decode_streams_all_of_the_host_and_holds_equal_device_bytes(run):
    _, lines = run
    ours = of(lines, "decode", OURS)
    assert [line.details["past_tokens"] for line in ours] == list(SIZES.decode_tokens)
    for line in ours:
        on_host = line.details["past_tokens"] - 128
        assert line.details["streamed_bytes"] == LAYERS * on_host * TOKEN_BYTES
        assert line.details["streamed_bytes_per_s"] == line.details["streamed_bytes"] / line.value
        assert line.device_kv_bytes <= SIZES.floor_bytes
        assert line.reached
    assert len({line.device_kv_bytes for line in ours}) == 1
    (spread,) = (line for line in of(lines, "decode") if "difference" in line.who)
    assert spread.value == 0
    assert spread.reached


def test_decode_with_the_cpu_is_compared_with_the_link_only(run):
    """In turns, at contexts that are long enough. The CPU attends to whole units of 1,024 tokens of what streams."""
    _, lines = run
    found = of(lines, "decode", WITH_CPU)
    assert [line.details["past_tokens"] for line in found] == [2048, LONG]
    for line in found:
        on_host = int(0.5 * (line.details["past_tokens"] - 128)) // 1024 * 1024
        passes = line.details["cpu_attended_bytes"] / (LAYERS * on_host * TOKEN_BYTES) if on_host else 0
        assert line.details["cpu_share"] == 0.5
        assert passes == (line.rounds + 1 if on_host else 0)  # one pass warms up
        assert line.value > 0
        assert line.ratio > 0
        assert line.goal == "<= 1 x"
        assert line.device_kv_bytes <= SIZES.floor_bytes
    assert all(
        line.details["cpu_share"] == line.details["cpu_attended_bytes"] == 0 for line in of(lines, "decode", OURS)
    )


def test_a_simulation_is_labelled_and_holds_one_layer(run):
    _, lines = run
    for suite in ("decode", "prefill"):
        for line in of(lines, suite):
            past = line.details.get("past_tokens")
            if past is not None:
                has_its_own = line.who == "DynamicCache" or (line.who == "offloaded cache" and line.value is not None)
                is_shared = past == LONG and not has_its_own
                assert line.details["simulation"] == is_shared, line
                if line.value is not None:
                    assert line.note.startswith("simulation") == is_shared, line
    held = {line.details["past_tokens"]: line.details["host_kv_bytes"] for line in of(lines, "decode", OURS)}
    assert held == {tokens: (tokens - 128) * TOKEN_BYTES * (1 if tokens == LONG else LAYERS) for tokens in held}


@pytest.mark.parametrize("suite", ["decode", "prefill"])
def test_every_baseline_is_measured_or_its_note_says_why_not(run, suite):
    job, lines = run
    points = {line.point for line in of(lines, suite) if line.who in BASELINES and not line.point.startswith("all of")}
    assert len(points) == (3 if suite == "decode" else 2)
    for point in points:
        found = {line.who: line for line in of(lines, suite) if line.point == point and line.who in BASELINES}
        assert found.keys() == BASELINES
        missing = {"what is free"} if job.is_cuda else {"offloaded cache", "what is free"}
        assert {who: line.note for who, line in found.items() if line.value is None}.keys() == missing
        assert all(line.ratio > 0 for line in found.values() if line.value is not None)
        past = found["paper's scheme"].details["past_tokens"]
        assert found["paper's scheme"].details["heads_per_group"] == 1
        assert found["layer-wise"].details["heads_per_group"] == KV_HEADS
        for name, heads in (("paper's scheme", 1), ("layer-wise", KV_HEADS)):
            assert found[name].details["tile_tokens"] == past
            slots = 2 * heads * past * TOKEN_BYTES // KV_HEADS
            assert slots < found[name].device_kv_bytes <= ring_budget_bytes(job, slots // 2)
        layers = 1 if past == LONG else LAYERS
        resident = found["resident store"].details["device_resident_bytes"]
        past_on_device = past if suite == "prefill" else past - 128
        assert layers * past_on_device * TOKEN_BYTES <= resident <= (layers * past + 256) * TOKEN_BYTES
        assert found["DynamicCache"].device_kv_bytes == LAYERS * past * TOKEN_BYTES
        for who in FEWER_BITS:
            assert found[who].details["kv_dtype"] == who.removesuffix(" KV")


def test_a_past_in_fewer_bits_takes_less_host_memory():
    job = GpuJob(CPU, SIZES, lambda line: None)
    exact, int8, int4 = (Past(job, 1024, kv_dtype).host_bytes for kv_dtype in KV_DTYPES)
    of_pair = [pair_bytes(DIM, DIM, 4, bits) for bits in (0, 8, 4)]
    assert exact // of_pair[0] == int8 // of_pair[1] == int4 // of_pair[2] > 0


def test_a_whole_prefill_writes_all_kv_back_and_is_compared_with_the_resident_store(run):
    _, lines = run
    ours, resident = (line for line in of(lines, "prefill") if line.details.get("is_whole"))
    assert (ours.who, resident.who) == (OURS, "resident store")
    assert ours.details["link_to_host_bytes"] == LAYERS * (1024 - 128) * TOKEN_BYTES
    assert resident.details["device_resident_bytes"] > 0 == ours.details["device_resident_bytes"]
    assert resident.ratio == resident.value / ours.value


def test_a_real_prompt_is_read_and_continued(run):
    job, lines = run
    reading, of_product, decode, *of_link = of(lines, "real")
    assert {line.point for line in of(lines, "real")} == {f"all of 1,000 tokens, {MODEL}"}
    found = reading.details
    assert found["tokens"] == found["chunks"][-1][0] == 1000
    assert found["seconds"] == reading.value == found["chunks"][-1][1]
    assert len(found["token_seconds"]) == decode.rounds == SIZES.real_new_tokens - 1
    assert found["kv_bytes"] == 1000 * LAYERS * TOKEN_BYTES
    assert of_product.value > 0
    assert not of_link or of_link[0].value > 0
    assert found["stats"]["host_kv_bytes"] > 0 < reading.device_kv_bytes
    assert "Model: " in result_markdown(job, lines, ["bench"])
    text = result_markdown(job, of(lines, "rates") + of(lines, "real"), ["bench", "real"])
    assert f"### {reading.point}" in text
    assert not any(words in text for words in ("Model: ", "goals"))


def test_a_real_prompt_needs_memory_and_time(job, monkeypatch):
    from headinfer.bench import gpu_real

    other = job.with_model(MODEL)
    other.until = time.monotonic() + 0.001
    assert "it would take about" in next(gpu_real.real(other))[0].note
    monkeypatch.setattr(gpu_real, "available_host_bytes", lambda: 100 * LAYERS * TOKEN_BYTES)
    assert gpu_real.longest_tokens(other) == 85
    assert next(gpu_real.real(other))[0].note.startswith("does not fit: ")
    monkeypatch.setattr(gpu_real, "available_host_bytes", lambda: 1 << 50)
    assert gpu_real.longest_tokens(other) == (2**20 - SIZES.real_new_tokens) // 1024 * 1024


def test_a_real_prompt_shows_its_progress_and_ends_when_its_time_has_passed(job, monkeypatch):
    from headinfer.bench import gpu_real

    said = []
    now = [100.0]
    other = job.with_model(MODEL)
    other.say = said.append
    other.until = time.monotonic() + 1000
    monkeypatch.setattr(gpu_real.time, "perf_counter", lambda: now[0])
    watch = gpu_real._Watch(other, 4096)

    def cache(tokens):
        return SimpleNamespace(
            head_layers=[SimpleNamespace(get_seq_length=lambda: tokens)],
            stats=lambda: SimpleNamespace(link_to_device_bytes=10 * tokens),
        )

    for tokens, seconds in ((1024, 105.0), (2048, 120.0), (4096, 130.0), (4097, 131.0), (4098, 133.0)):
        now[0] = seconds
        watch.on_forward(cache(tokens))
    (line,) = said
    assert line.startswith("  2K of 4K tokens, 20 s of about ")
    assert watch.read_s == 30.0
    assert watch.token_s == [1.0, 2.0]
    assert watch.streamed_bytes == 20
    other.until = time.monotonic() - 1
    with pytest.raises(gpu_real._OutOfTimeError):
        watch.on_forward(cache(1024))


def test_kernels_are_exact_and_one_is_preferred(run):
    job, lines = run
    for phase in ("decode", "prefill"):
        found = [line for line in of(lines, "attention") if line.point.startswith(phase)]
        able = [line for line in found if line.value is not None]
        assert {"cuda-efficient" if job.is_cuda else "cpu-flash", "eager"} <= {line.who for line in able}
        assert sum(line.details["is_preferred"] for line in able) == 1
        assert all(0 < line.details["error_against_float64"] < 1e-5 for line in able)
        assert all(line.note.startswith("refuses") for line in found if line.value is None)


def test_the_link_both_ways_and_as_the_ring_copies(run):
    job, lines = run
    found = of(lines, "link")
    ways = {line.who for line in found}
    for kind in ("pageable", "pinned"):
        for way in ("to the device", "to the host"):
            assert {f"{kind}, {way}", f"{kind}, {way}, both at once"} <= ways
    for more, copies in (("", 0), (", a copy for each K and V", 2), (", from two segments", 4)):
        tiles = [line for line in found if line.who == "pinned, through the ring" + more]
        assert [line.point for line in tiles] == ["decode's tiles", "prefill's tiles"]
        for line in tiles:
            assert line.details["tile_tokens"] > 0
            assert line.details["copies_per_tile"] == max(copies * line.details["heads_per_group"], 1)
    rates = {line.who: line.value for line in of(lines, "rates")}
    assert rates["pinned, to the device"] == job.rates.link_bytes_per_s / 1e9


# -- the pasts -------------------------------------------------------------------------------------------------------


def logits(job, cache, tokens):
    ids = torch.full((1, tokens), 7, device=job.device)
    before = cache.stats().link_to_device_bytes
    with enable(job.model, chunk_tokens=tokens), torch.inference_mode():
        found = job.model(ids, past_key_values=cache, logits_to_keep=1).logits
    return found, cache.stats().link_to_device_bytes - before


@pytest.mark.parametrize("tokens", [1, 384])
def test_a_simulation_gives_the_same_bits_and_moves_the_same_bytes(job, tokens):
    """The noise is the same in all layers, so a simulation differs only in the memory that K and V are read from."""
    room = tokens if tokens > 1 else 0
    past_tokens = 2048
    other = GpuJob(job.device, dataclasses.replace(SIZES, real_kv_bytes=1), print)
    real = Past(job, past_tokens)
    shared = Past(other, past_tokens)
    assert (real.is_simulation, shared.is_simulation) == (False, True)
    found = [
        logits(job, past.cache(room_tokens=room, device_kv_budget_bytes=2 << 20), tokens) for past in (real, shared)
    ]
    assert torch.equal(found[0][0], found[1][0])
    on_host = past_tokens - 128 + (128 if tokens > 1 else 0)
    assert found[0][1] == found[1][1] == LAYERS * on_host * TOKEN_BYTES
    dynamic = DynamicCache(config=job.model.config)
    for layer in dynamic.layers:
        layer.update(*noise(job, past_tokens))
    with torch.inference_mode():
        wanted = job.model(
            torch.full((1, tokens), 7, device=job.device), past_key_values=dynamic, logits_to_keep=1
        ).logits
    assert (found[0][0] - wanted).abs().max() < 1e-4 * wanted.std()


def test_caches_of_one_past_share_host_memory_and_nothing_else(job):
    past = Past(job, 2048)
    held = past.host_bytes
    resident = past.cache(device_kv_budget_bytes=16 << 20, streaming_budget_bytes=2 << 20)
    streamed_cache = past.cache(device_kv_budget_bytes=2 << 20)
    for _ in range(2):  # what is resident comes in the first pass
        bits_near, moved = logits(job, resident, 1)
        resident.crop(-1)
    bits_streamed, streamed = logits(job, streamed_cache, 1)
    assert moved == 0 < streamed == held
    assert resident.stats().device_resident_bytes > 0 == streamed_cache.stats().device_resident_bytes
    assert (bits_near - bits_streamed).abs().max() < 1e-4 * bits_streamed.std()
    assert (
        resident.engine.counter.host_bytes == streamed_cache.engine.counter.host_bytes == 0
    )  # all of it is the past's


def test_a_chunk_needs_no_new_host_memory_and_leaves_the_past_as_it_was(job):
    past = Past(job, 2048)
    cache = past.cache(room_tokens=384, device_kv_budget_bytes=2 << 20)
    held = cache.engine.counter.host_bytes
    first = None
    for _ in range(3):
        found, _ = logits(job, cache, 384)
        assert cache.engine.counter.host_bytes == held
        cache.crop(-384)
        assert cache.get_seq_length() == 2048
        assert first is None or torch.equal(found, first)
        first = found


# -- what does not fit, and what gets no time --------------------------------------------------------------------------


@torch.inference_mode()
def test_a_smaller_card_refuses_what_does_not_fit(job):
    small = GpuJob(CPU, SIZES, print, gpu_memory_bytes=3 << 20)
    small.rates = job.rates
    past = Past(small, LONG)
    own = HeadRunner(small, past.cache(device_kv_budget_bytes=2 << 20), 1)
    found = {one.name: one for one in compare(small, own, 0.01, baselines_of(small, past, 1, 0.01, {}))}
    for name in ("DynamicCache", "layer-wise", "paper's scheme", "resident store"):
        assert found[name].note.startswith("does not fit"), found[name]
        assert found[name].ratio is None


@torch.inference_mode()
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory.\nmore"), CapacityError("no room")])
def test_a_baseline_that_runs_out_of_memory_has_a_note(job, error):
    def opened():
        raise error

    def fails():
        raise RuntimeError("of our own")

    past = Past(job, 512)
    own = HeadRunner(job, past.cache(device_kv_budget_bytes=2 << 20), 1)
    (found,) = compare(job, own, 0.01, [Baseline("greedy", 0, 0.0, opened)])
    assert found.note == f"ran out of memory: {str(error).splitlines()[0]}"
    with pytest.raises(RuntimeError, match="of our own"):
        compare(job, own, 0.01, [Baseline("ours", 0, 0.0, fails)])
    (theirs,) = compare(job, own, 0.01, [Baseline("theirs", 0, 0.0, fails, is_foreign=True)])
    assert theirs.note == "failed: of our own"
    (slow,) = compare(job, own, 0.01, [Baseline("slow", 0, 1e6, opened)])
    assert slow.note == "not measured: a pass would take about 1000000 s"


class NoStream:
    """Stands for transformers' prefetch stream on a machine without a device."""

    def wait_stream(self, other):
        pass

    __enter__ = __exit__ = lambda *_: None


@torch.inference_mode()
def test_transformers_caches_start_each_pass_from_the_same_past(job, monkeypatch):
    monkeypatch.setattr(torch, "Stream", NoStream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda _: NoStream())
    for offloaded in (False, True):
        runner = TransformersRunner(job, 512, 384, offloaded=offloaded)
        for _ in range(2):
            assert runner.cache.get_seq_length() == 512
            runner.run()
            assert runner.cache.get_seq_length() == 512 + 384
            runner.after()
        held = 512 * TOKEN_BYTES * (2 if offloaded else LAYERS)
        assert runner.kv_bytes() == held


def test_a_cap_counts_as_the_device_does(monkeypatch):
    """The device has 140 GiB: other processes hold 20, tensors of this one 16, and its allocator 2 more."""
    one = GpuJob(CPU, SIZES, print)
    one.device = torch.device("cuda", 0)
    one.is_cuda = True
    for name, value in (("memory_allocated", 16 << 30), ("memory_reserved", 18 << 30)):
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (102 << 30, 140 << 30))
    spare = 512 << 20
    for cap, free in ((140, 102 + 2), (24, 24 - 16), (16, 0)):
        monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda _, cap=cap: cap / 140)
        assert one.free_device_bytes() == max((free << 30) - spare, 0)


def test_what_gets_no_time_has_a_note_that_says_so():
    by_suite = run_suites(["decode", "prefill"], GpuJob(CPU, SIZES, print, limit_s=1e-6))
    found = [line for lines in by_suite for line in lines if line.suite != "rates"]
    assert [line.suite for line in found] == ["decode"] * 3 + ["prefill"] * (2 + 2)
    assert all(line.value is None and line.note == "not measured: out of time" for line in found)


@torch.inference_mode()
def test_the_resident_store_is_compared_with_the_same_kernels(job):
    from headinfer.bench.gpu_prefill import _with_its_kernels

    found = gpu_point.open_point(job, "prefill", 2048, 384)
    made = baselines_of(job, found.past, 384, 0.01, {"resident store": ">= 0.97"})
    baselines = [baseline for baseline in made if baseline.name == "resident store"]
    (outcome,) = compare(job, found.own, 0.01, baselines)
    assert _with_its_kernels(job, found, outcome, baselines) is outcome
    other = dataclasses.replace(outcome, facts={**outcome.facts, "attention_backends": ["eager"]})
    again = _with_its_kernels(job, found, other, baselines)
    assert again.name.startswith("resident store, ")
    assert again.ratio > 0
    assert again.facts["with_the_table's_kernels"] == outcome.ratio


def test_a_chunk_is_long_enough_to_hide_its_copies():
    big = GpuJob(CPU, GpuSizes(), print)
    big.rates = Rates(165e12, 800e9, 25e9, 25e9)
    assert big.chunk_tokens() == 2560  # 1.5 x 165e12 x 2 / (2 x 4 x 25e9) = 2,475
    assert big.flops(0, 1024) == pytest.approx(big.shape.prefill_flops(1024), rel=0.01)
    assert big.kv_bytes(1024 * 1024) == 128 << 30
    assert GpuJob(CPU, QUICK_GPU, print).shape.layers[0] == big.shape.layers[0]


@pytest.mark.parametrize(
    ("goal", "value", "reached"),
    [
        (">= 92", 92.0, True),
        (">= 92", 91.9, False),
        ("<= 1.03 x", 1.04, False),
        ("== 0", 0.0, True),
        ("> 1", 1.0, False),
        ("", 5.0, None),
    ],
)
def test_goals(goal, value, reached):
    assert goal_reached(goal, value) is reached


# -- results -----------------------------------------------------------------------------------------------------------


def test_json_and_markdown_contain_all_measurements(run, tmp_path):
    job, lines = run
    result = json.loads(result_json(job, lines, ["bench", "--device", "cuda", "my file"]))
    assert result["command"] == "headinfer bench --device cuda 'my file'"
    assert {"headinfer", "torch", "transformers", "cuda", "driver"} <= result["versions"].keys()
    assert result["device"]["total_bytes"] > 0
    assert result["host"]["cores"] == os.cpu_count()
    assert result["host"]["numa_nodes"] >= 1
    assert len(result["lines"]) == len(lines)
    assert {"gpu_memory_bytes", "model", "dtype", "weights_bytes", "rates"} <= result.keys()
    text = result_markdown(job, lines, ["bench"])
    assert max(map(len, text.splitlines())) <= 100
    sections = re.findall(r"^### (.*?)\n(.*?)(?=\n##|\Z)", text, flags=re.DOTALL | re.MULTILINE)
    assert len(sections) == len({(line.suite, line.point) for line in lines})
    assert {point for point, _ in sections} == {line.point for line in lines}
    rows = [[row for row in section.splitlines() if row.startswith("| ")] for _, section in sections]
    headers = [table[0] for table in rows if table]
    assert all(header.startswith("| way | measured") for header in headers)
    assert sum(map(len, rows)) - len(headers) == sum(line.value is not None for line in lines)
    assert {row.count("|") for table in rows for row in table} <= set(range(3, 9))
    assert all(len({row.count("|") for row in table}) <= 1 for table in rows)
    words = " ".join(text.split())
    assert all(" ".join(line.note.split()) in words for line in lines if line.value is None)
    goals = [line for line in lines if line.reached is not None]
    assert f"{sum(line.reached for line in goals)} of {len(goals)} goals are reached" in text
    assert result_paths(job, tmp_path / "x.json") == (tmp_path / "x.json", tmp_path / "x.md")
    small = GpuJob(CPU, SIZES, print, gpu_memory_bytes=24 * 10**9)
    assert result_paths(small, tmp_path)[0].name.endswith("-24gb.json")
    assert [shown(0.0123, "s/token"), shown(256 << 20, "bytes"), shown(None, "s")] == ["12.3 ms/token", "256 MiB", "-"]


def test_the_papers_tables_beside_what_was_measured(run, tmp_path):
    job, lines = run
    assert "There is no GPU measurement yet: `benchmarks/gpu.sh` makes one" in measured_section(tmp_path)
    at_1m = {"past_tokens": 1024 * 1024, "simulation": True, "peak_device_bytes": 17 << 30}
    ours = dataclasses.replace(of(lines, "decode", OURS)[0], value=2.75, device_kv_bytes=256 << 20, details=at_1m)
    theirs = dataclasses.replace(ours, who="paper's scheme", value=2.5, device_kv_bytes=1 << 30)
    whole = dataclasses.replace(ours, suite="prefill", unit="s", value=1.5, details={"is_whole": True, "tokens": 10240})
    (tmp_path / "gpu.json").write_text(result_json(job, [ours, theirs, whole], ["bench", "--device", "cuda"]))
    (tmp_path / "other.json").write_text("{}")
    text = measured_section(tmp_path)
    assert "no GPU measurement" not in text
    assert "| matrix product in bfloat16, TFLOP/s | 165, data sheet | " in text
    link = "[gpu](../benchmarks/results/gpu.json)"
    assert f"- {link}, by `headinfer bench --device cuda`. Versions: headinfer " in text
    assert f"| 10K | adaptive | 1.24 | headinfer | 1.5 | 0.83 | {link} |" in text
    assert f"| 1M (simulation) | 1 head | 6.51 | paper's scheme | 2.5 | 2.60 | {link} |" in text
    assert f"| 1M (simulation) | adaptive | 6.41 | headinfer | 2.75 | 2.33 | {link} |" in text
    assert "which were not measured here" in text
    assert "| head-wise (paper), 1M, the paper | 1 | 16.7 | 1 |" in text
    assert "| headinfer, 1M, measured | 0.25 | 17 | |" in text
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UsageError, match=r"bad\.json is not JSON"):
        measured_section(tmp_path)


def test_machine_names_its_gpus(monkeypatch, tmp_path):
    from headinfer import info

    found = info.gather_info() | {"cuda_devices": []}
    found["versions"] |= {"cuda": "13.0", "driver": "580.1"}
    monkeypatch.setattr(info, "gather_info", lambda: found)
    assert "CUDA" not in info.machine()
    found["cuda_devices"] = [{"name": "NVIDIA H200", "total_bytes": 140 << 30}]
    assert info.machine().startswith("NVIDIA H200 (140 GiB), ")
    assert info.machine().endswith("CUDA 13.0, driver 580.1")
    module = tmp_path / "version"
    module.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\n")
    assert info.driver_version(module) == "550.54.15"
    assert info.driver_version(tmp_path / "none") == "unknown"


# -- the commands ------------------------------------------------------------------------------------------------------


@pytest.fixture
def without_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


MISTAKES = {
    "no GPU": (["--device", "cuda"], "sees no CUDA device"),
    "no GPU, one suite": (["decode", "--device", "cuda:3", "--gpu-memory", "24GB"], "sees no CUDA device"),
    "no suite": (["speed", "--device", "cuda"], "there is no GPU suite 'speed'"),
    "no size": (["--device", "cuda", "--gpu-memory", "much"], "is not a size"),
    "no time": (["--device", "cuda", "--limit-s", "0"], "--limit-s is 0: it must be a number from 0.001"),
    "no place": (["--device", "cuda", "--output", f"{__file__}/results"], "cannot write results in"),
    "no tokens": (["--device", "cuda", "--tokens", "1K,many"], "--tokens"),
    "tokens of no tail": (["--device", "cuda", "--tokens", "1000"], "must be a multiple of 128"),
    "tokens beyond the model": (["--device", "cuda", "--offsets", "64K,8M"], "takes at most 4,194,304 (4M)"),
    "whole beyond the model": (["real", "--device", "cuda", "--whole", "5M"], "choose a shorter length"),
    "no baseline": (["--device", "cuda", "--baselines", "paper,best"], "there is no baseline 'best': choose among"),
    "none and more": (["--device", "cuda", "--baselines", "none,paper"], "or none alone"),
    "lengths of other suites": (["link", "--device", "cuda", "--tokens", "1K"], "--tokens is for the decode suite"),
    "no model": (["real", "--device", "cuda", "--model", "random:gpt-9"], "there is no built-in config 'gpt-9'"),
    "lengths for a CPU": (["--tokens", "1K", "--whole", "1K"], "--tokens and --whole are for the GPU suites"),
    "a card for a CPU": (["--gpu-memory", "24GB"], "give --device cuda as well"),
    "a disk for a GPU": (["--device", "cuda", "--folder", "/tmp"], "leave --device out"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_get_one_sentence_before_anything_is_made(without_cuda, monkeypatch, name):
    from headinfer.cli import bench as bench_cli

    monkeypatch.setattr(bench_run, "run_suites", lambda *_, **__: pytest.fail("it began"))
    import typer
    from typer.testing import CliRunner

    app = typer.Typer()
    app.command()(bench_cli.bench)
    arguments, says = MISTAKES[name]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, UsageError), result.output
    assert says in str(result.exception)
    assert "\n" not in str(result.exception)


M = 1 << 20


@pytest.mark.parametrize(
    ("suites", "given", "names", "changes"),
    [
        ([], {}, [], {}),
        ([], {"tokens": "1K, 4M,1K"}, ["decode"], {"decode_tokens": (1024, 4 * M)}),
        ([], {"offsets": "64K"}, ["prefill"], {"chunk_offsets": (65536,), "whole_tokens": ()}),
        ([], {"whole": "1000"}, ["prefill"], {"chunk_offsets": (), "whole_tokens": (1000,)}),
        (["real"], {"whole": "1000"}, ["real"], {"real_tokens": (1000,)}),
        (["real"], {"model": MODEL}, ["real"], {"real_model": MODEL}),
        ([], {"model": MODEL}, ["real"], {"real_model": MODEL}),
        ([], {"baselines": "free,paper"}, ["decode", "prefill"], {"baselines": ("free", "paper")}),
        (["link", "decode"], {"baselines": "none"}, ["link", "decode"], {"baselines": ()}),
        (
            [],
            {"tokens": "1M", "offsets": "1M", "whole": "2K"},
            ["decode", "prefill"],
            {"decode_tokens": (M,), "chunk_offsets": (M,), "whole_tokens": (2048,)},
        ),
    ],
)
def test_options_choose_suites_and_sizes(suites, given, names, changes):
    assert choose(suites, GpuSizes(), **given) == (names, dataclasses.replace(GpuSizes(), **changes))


def test_only_the_chosen_baselines_are_measured(job):
    other = GpuJob(job.device, dataclasses.replace(SIZES, decode_tokens=(512,), baselines=("layer-wise",)), print)
    whole = GpuJob(job.device, dataclasses.replace(SIZES, chunk_offsets=(), baselines=()), print)
    for one in (other, whole):
        one.__dict__["model"] = job.model
    lines = [line for found in run_suites(["decode"], other) for line in found]
    assert [line.who for line in of(lines, "decode")] == [OURS, f"{OURS}: streamed, of the pinned link", "layer-wise"]
    assert all(line.rounds == 1 for line in of(lines, "decode"))
    (lines,) = (found for found in run_suites(["prefill"], whole))
    ours, *pinning = of(lines, "prefill")
    assert ours.who == OURS
    assert [line.who for line in pinning] == ["pinning"] * job.is_cuda  # a CPU pins nothing
    for line in pinning:
        assert 0 < line.value < ours.value
        assert line.details["touched_bytes"] == line.details["registered_bytes"]
        assert "% of the time; touched at" in line.note


def test_a_result_is_written_to_the_named_folder_and_printed(run, monkeypatch, tmp_path):
    import typer
    from typer.testing import CliRunner

    from headinfer.cli import bench as bench_cli

    measured_lines = run[1]
    by_suite = [measured_lines[:3], measured_lines[3:]]
    monkeypatch.setattr(bench_run, "run_suites", lambda *_, **__: iter(by_suite))
    monkeypatch.setattr(bench_run, "check_device", lambda _: CPU)
    app = typer.Typer()
    app.command()(bench_cli.bench)
    result = CliRunner(env={"COLUMNS": "250"}).invoke(
        app, ["--device", "cuda", "--output", str(tmp_path / "new" / "results"), "--markdown"]
    )
    assert result.exit_code == 0, result.output
    (found,) = (tmp_path / "new" / "results").glob("*.json")
    assert found.with_suffix(".md").read_text() in result.output
    assert len(json.loads(found.read_text())["lines"]) == len(run[1])
    assert len(list(found.parent.iterdir())) == 2
    shown_table = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["--device", "cuda"]).output
    assert "decode" in shown_table
    assert max(len(line) for line in shown_table.splitlines() if "[" not in line) <= 80


def test_devices_that_do_not_exist(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert check_device("cuda") == torch.device("cuda", 0)
    for name in ("cuda:2", "cpu:0", "tpu", "cuda:x"):
        with pytest.raises(UsageError, match="choose cpu"):
            check_device(name)


SCRIPT = ROOT / "benchmarks" / "gpu.sh"


def script(*arguments, python=sys.executable, **more):
    environment = {**os.environ, "PYTHON": str(python), "CUDA_VISIBLE_DEVICES": "", **more}
    return subprocess.run(
        ["bash", str(SCRIPT), *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=HANG_S
    )


def test_the_script_refuses_in_one_sentence_if_there_is_no_gpu(tmp_path):
    assert subprocess.run(["bash", "-n", SCRIPT], check=False).returncode == 0
    assert os.access(SCRIPT, os.X_OK)
    done = script(tmp_path / "results")
    assert (done.returncode, done.stdout) == (2, "")
    assert "sees no CUDA device" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "results").exists()
    done = script(python=tmp_path / "python")
    assert done.returncode == 2
    assert "name a Python" in done.stderr
    done = script(STEPS="tests bnch")
    assert done.returncode == 2
    assert "choose among tests decode " in done.stderr
    done = script("4")
    assert done.returncode == 2
    assert "choose 1, 2 or 3" in done.stderr


def test_what_the_script_names_exists():
    """The script contains the name of a test as a string; it must exist."""
    text = SCRIPT.read_text()
    (one,) = (line.split("'")[1] for line in text.splitlines() if line.strip().startswith("local one="))
    assert pytest.main(["--collect-only", "--quiet", "--quiet", "-p", "no:cacheprovider", str(ROOT / one)]) == 0


def test_the_script_runs_three_parts_of_five_minutes(tmp_path):
    """With a program in place of Python that prints its arguments. All commands and their options must exist."""
    import typer

    from headinfer.cli.main import app

    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\nif [ $# = 1 ]; then cat > /dev/null; printf 'nvidia-x1\\n6\\n'; else echo \"$@\"; fi\n"
    )
    python.chmod(0o755)
    text = SCRIPT.read_text()
    limits = {name: int(seconds) for name, seconds in re.findall(r"\[(\w+)\]=(\d+)\b", text)}
    parts = re.search(r'parts=\(\[1\]="(.*?)" \[2\]="(.*?)" \[3\]="(.*?)"\)', text).groups()
    for number, steps in enumerate(parts, start=1):
        assert sum(limits[name] for name in steps.split()) <= 290
        done = script(number, tmp_path / "results", python=python)
        assert done.returncode == 0, done.stderr
        assert re.findall(r"^== (\w+): at most (\d+) s$", done.stderr, re.MULTILINE) == [
            (name, str(limits[name])) for name in steps.split()
        ]
    names = " ".join(parts).split()
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == sorted(f"{name}-gpu.txt" for name in names)
    group = typer.main.get_command(app)
    for name in names:
        arguments = (tmp_path / "results" / f"{name}-gpu.txt").read_text().splitlines()[1].split()
        if arguments[:2] != ["-m", "headinfer"]:
            assert name in ("tests", "embedded")
            continue
        command = group.commands[arguments[2]]
        given = command.make_context(arguments[2], arguments[3:]).params
        if arguments[2] == "bench":
            options = {one: given[one] for one in ("tokens", "offsets", "whole", "baselines", "model")}
            choose(given["suites"], GpuSizes(), **options)
            assert given["limit_s"] < limits[name]
            assert str(given["output"]).endswith(f"nvidia-x1-{name}.json")
