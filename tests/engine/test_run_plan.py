"""The plan of a run: the machine, the options that the engine gets, and the bits that they determine."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from families import VOCAB, tiny_model

import headinfer
from headinfer.bench import plan_check, probe, probe_cpu
from headinfer.cli import main as cli
from headinfer.engine import machine, run_plan
from headinfer.engine.options import Options
from headinfer.errors import CapacityError
from headinfer.hf import planning
from headinfer.jobs import generate as generation
from headinfer.plan.hardware import HARDWARE, Hardware, probe_path
from headinfer.plan.model_shape import ModelShape
from headinfer.plan.models import find_shape
from headinfer.plan.tiles import TileRates

CPU = torch.device("cpu")
GIB = 2**30
RATES = (TileRates(), TileRates(1e12, 1e11, 1e6, 1e-9, 1), TileRates(1e15, 1e13, 1e12, 1e-2, 200))


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture(autouse=True)
def whole_device(monkeypatch):
    def fraction(device):
        assert device.index is not None, "torch needs an index here"
        return 1.0

    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", fraction)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


@pytest.fixture
def small_probe(monkeypatch):
    sizes = {"_ROUNDS": 1, "_BUFFER_BYTES": 1 << 20, "_DISK_BYTES": 1 << 22, "_HIDDEN": 64, "_WIDTH": 96}
    for name, value in {**sizes, "_CHUNK_TOKENS": 32, "_PAST_TOKENS": 64, "_DIM": 16}.items():
        monkeypatch.setattr(probe, name, value)
    for name, value in {"_ROUNDS": 1, "_TOKENS": 64, "_DIM": 16}.items():
        monkeypatch.setattr(probe_cpu, name, value)


def text(tokens=600):
    return torch.randint(1, VOCAB, (1, tokens), generator=torch.Generator().manual_seed(1))


def test_a_probe_is_saved_and_used(small_probe, capsys):
    assert machine.this_machine(CPU).source == "guessed from the number of cores"
    monkey = ["probe", "--json"]
    cli.app(monkey, standalone_mode=False)
    found = Hardware.load(probe_path())
    assert dataclasses.asdict(found) == json.loads(capsys.readouterr().out)
    assert machine.this_machine(CPU) == found
    assert found.is_host
    for rates in (found.flops_per_s, found.attention_flops_per_s, found.weight_bytes_per_s):
        assert set(rates) == {"bfloat16", "float16", "float32"}
        assert min(rates.values()) > 0
    assert found.attained_kv_bytes_per_s == found.kv_bytes_per_s > 0
    assert found.attained_attention_flops_per_s("float32") == found.attention_flops_per_s["float32"]
    assert {"1", str(torch.get_num_threads())} <= found.cpu_kv_bytes_per_s["4"].keys()
    assert found.cpu_kv_bytes_per_s["16"].keys() == found.cpu_kv_bytes_per_s["4"].keys()
    assert not found.cpu_beside_link_bytes_per_s  # a CPU has no link
    cli.app(["plan", "llama-3-8b", "--context", "1K", "--ram", "64GiB"], standalone_mode=False)
    assert "this CPU" in capsys.readouterr().out
    other = dataclasses.replace(found, name="another machine's")
    other.save(probe_path())
    assert machine.this_machine(CPU).source.startswith("guessed")


def test_a_gpu_is_looked_up_by_name_or_guessed(monkeypatch):
    found = SimpleNamespace(total_memory=20 * GIB, multi_processor_count=46)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: found)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA GeForce RTX 4070")
    listed = machine.this_machine(torch.device("cuda"))
    assert (listed.source, listed.device_memory_bytes) == (HARDWARE["rtx4070"].source, 20 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA Something 9000")
    guessed = machine.this_machine(torch.device("cuda"))
    assert "guessed" in guessed.source
    assert guessed.flops_per_s["bfloat16"] == pytest.approx(46e12)
    assert not guessed.is_host


def plan_on_cuda(shape, tokens, *options, **more):
    request = run_plan.RunRequest(shape, torch.device("cuda"), torch.bfloat16, tokens, *options, **more)
    return run_plan.plan_run(request)


def test_a_run_on_a_gpu_is_planned_with_the_free_memory(monkeypatch):
    """The engine gets budgets and rates from the plan. The remaining memory is used for resident KV."""
    monkeypatch.setattr(run_plan, "this_machine", lambda _: HARDWARE["rtx4090"])
    monkeypatch.setattr(run_plan, "available_host_bytes", lambda: 256 * GIB)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (23 * GIB, 24 * GIB))
    shape = find_shape("llama-3-8b")
    runs = [plan_on_cuda(shape, tokens) for tokens in (2000, 10**5, 10**6)]
    plans = [run.plan for run in runs]
    for run in runs:
        plan = run.plan
        options = run.options
        assert plan.footprint.device_bytes <= 23 * GIB
        assert options.streaming_budget_bytes == plan.streaming_budget_bytes > 0
        assert options.device_kv_budget_bytes == plan.streaming_budget_bytes + plan.footprint.resident_bytes
        assert options.rates == HARDWARE["rtx4090"].tile_rates("bfloat16")
    assert len({(plan.chunk_tokens, plan.streaming_budget_bytes, plan.prefill) for plan in plans}) > 1, (
        "plans depend on the length"
    )
    assert [plan.is_all_resident for plan in plans] == [True, False, False]
    assert min(sum(plan.resident_tokens) for plan in plans) > 0
    mine = Options(device_kv_budget_bytes=99 * 2**20, heads_per_group=2, rates=RATES[1])
    run = plan_on_cuda(shape, 10**6, mine, 512)
    plan = run.plan
    assert (plan.chunk_tokens, plan.prefill.heads_per_group, plan.decode.heads_per_group) == (512, 2, 2)
    assert 0 < plan.streaming_budget_bytes <= plan.device_kv_budget_bytes <= 99 * 2**20
    assert run.options == dataclasses.replace(
        mine, device_kv_budget_bytes=plan.device_kv_budget_bytes, streaming_budget_bytes=plan.streaming_budget_bytes
    )
    half = Options(device_kv_budget_bytes=8 * GIB, streaming_budget_bytes=80 * 2**20)
    plan = plan_on_cuda(shape, 10**6, half).plan
    assert plan.streaming_budget_bytes == 80 * 2**20
    assert 0 < plan.footprint.resident_bytes <= 8 * GIB - 80 * 2**20
    loaded = plan_on_cuda(shape, 10**6, is_loaded=True).plan
    assert loaded.request.room_bytes > plan.request.room_bytes
    with pytest.raises(CapacityError, match="host RAM for KV; this machine has 62 GiB for it: at most"):
        plan_on_cuda(shape, 10**6, ranks_on_host=4)
    with pytest.raises(CapacityError, match=r"newest tokens of 5000 rows alone need .* use fewer"):
        plan_on_cuda(shape, 500, rows=5000)


def test_memory_of_torch_and_of_the_cache_counts_as_free_for_a_new_plan(monkeypatch):
    monkeypatch.setattr(run_plan, "this_machine", lambda _: HARDWARE["rtx4090"])
    monkeypatch.setattr(run_plan, "available_host_bytes", lambda: 256 * GIB)
    shape = find_shape("llama-3-8b")
    full = {"is_loaded": True, "options": Options(device_kv_budget_bytes=4 * GIB)}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (3 * GIB, 24 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 17 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 15 * GIB)
    before = plan_on_cuda(shape, 10**6, **full).plan
    assert before.request.room_bytes == 5 * GIB + before.footprint.weights_bytes, (
        "memory that torch reserves counts as free"
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (GIB, 24 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 17 * GIB)
    again = plan_on_cuda(shape, 10**6, held_device_bytes=4 * GIB, held_host_bytes=GIB, **full).plan
    assert dataclasses.replace(again, request=before.request) == before, "the cache's own KV counts as free"
    assert again.request.host_bytes == before.request.host_bytes + GIB


def test_generate_and_long_forward_passes_use_planned_chunks(monkeypatch):
    model = tiny_model("llama")
    sizes = []
    monkeypatch.setattr("headinfer.plan.fit.HOST_CHUNK_TOKENS", 256)
    with headinfer.enable(model, on_forward=lambda cache: sizes.append(cache.get_seq_length())) as enabled:
        model.generate(text(), max_new_tokens=2, do_sample=False, pad_token_id=0)
        assert sizes == [256, 512, 600, 601]
        assert enabled.plan.chunk_tokens == 256
        assert any("read in place" in line for line in enabled.plan.explain())
        sizes.clear()
        model(text(), past_key_values=enabled.new_cache(), logits_to_keep=1)
        assert sizes == [256, 512, 600]
    sizes.clear()
    with headinfer.enable(model, chunk_tokens=500, on_forward=lambda cache: sizes.append(cache.get_seq_length())):
        model.generate(text(), max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert sizes == [500, 600, 601]


def test_library_calls_run_even_if_no_plan_fits(monkeypatch):
    """max_new_tokens is often only an upper bound."""
    model = tiny_model("llama")
    monkeypatch.setattr(run_plan, "available_host_bytes", lambda: 1)
    with headinfer.enable(model) as enabled:
        model.generate(text(), max_new_tokens=2, do_sample=False, pad_token_id=0)
        assert enabled.plan is None


def test_generate_command_fails_before_loading_if_no_plan_fits(monkeypatch):
    monkeypatch.setattr(generation.ModelSource, "load", lambda *_, **__: pytest.fail("weights were loaded"))
    monkeypatch.setattr(run_plan, "check_host_memory", lambda *_, **__: None)
    monkeypatch.setattr(run_plan, "available_host_bytes", lambda: 280 * 2**20)
    with pytest.raises(CapacityError, match=r"host RAM for KV; this machine has .*: at most [0-9,]+ tokens fit"):
        generation.prepare(generation.Job("random:tiny-llama?context=100000000", prompt="x " * 100_000))


@torch.no_grad()
def test_same_options_give_the_same_bits_on_any_machine():
    """Rates determine tiles, and tiles the order of merging. The options record the rates."""
    model = tiny_model("llama")
    bits = []
    shapes = set()
    for rates in (*RATES, RATES[0]):
        options = Options(device_kv_budget_bytes=4 << 20, transport="eager", expected_tokens=3000, rates=rates)
        with headinfer.enable(model, chunk_tokens=400):
            cache = headinfer.HeadCache(model.config, **vars(options))
            logits = model(text(3000), past_key_values=cache, logits_to_keep=1).logits
        stats = cache.stats()
        shapes.add((stats.heads_per_group, stats.tile_tokens))
        bits.append(logits)
    assert len(shapes) > 1, "the test is meaningless if the rates make no difference"
    assert torch.equal(bits[0], bits[3])
    for other in bits[1:3]:
        assert torch.allclose(bits[0], other, atol=1e-4)
    saved = json.loads(json.dumps(dataclasses.asdict(options)))
    assert Options(**saved) == options, "options survive JSON"


def test_check_of_a_plan_compares_bytes_and_seconds(small_probe, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(plan_check, "_MODEL", "random:llama-3-8b?hidden=64&heads=4&kv_heads=2&intermediate=96")
    with pytest.raises(SystemExit) as stopped:
        cli.app(["bench", "--check-plan", "--quick", "--markdown", "--output", str(tmp_path / "check.json")])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert out.count("equal |") == 12
    assert "NOT EQUAL" not in out
    assert out.count("of measured |") == 2
    saved = json.loads(Path(tmp_path / "check.json").read_text())
    assert {one["unit"] for one in saved["lines"]} == {"bytes", "s"}
    wrong = plan_check.compared("case", "ring", predicted=1, measured=2, unit="bytes")
    assert wrong.reached is False
    assert (wrong.who, wrong.goal, wrong.note) == ("ring", "== 1 B", "2 B: NOT EQUAL")
    monkeypatch.setattr("headinfer.bench.run.run_check", lambda _: [wrong])
    with pytest.raises(SystemExit) as stopped:
        cli.app(["bench", "--check-plan"])
    assert stopped.value.code == 1


def test_costs_on_a_cpu_use_the_measured_rates():
    """Attention and weights have separate rates, and launches are not hidden."""
    shape = ModelShape.from_config(tiny_model("llama").config)
    base = dataclasses.replace(HARDWARE["laptop-cpu"], launch_s=1e-9)
    slow = {
        "attention": dataclasses.replace(base, attention_flops_per_s={"float32": 1e6}),
        "weights": dataclasses.replace(base, weight_bytes_per_s={"float32": 1e5}),
        "KV": dataclasses.replace(base, kv_bytes_per_s=1e5),
        "launches": dataclasses.replace(base, launch_s=1.0),
    }
    plain = {phase: _seconds(shape, base, phase) for phase in ("prefill", "decode")}
    assert _seconds(shape, slow["attention"], "prefill").attention_s > 100 * plain["prefill"].attention_s
    assert _seconds(shape, slow["weights"], "decode").linear_s > 100 * plain["decode"].linear_s
    assert _seconds(shape, slow["KV"], "decode").attention_s > 100 * plain["decode"].attention_s
    for phase in ("prefill", "decode"):
        assert _seconds(shape, slow["launches"], phase).exposed_launch_s > 100


def _seconds(shape, hardware, phase):
    from headinfer.plan.roofline import Schedule, decode_seconds, prefill_seconds

    cost = prefill_seconds if phase == "prefill" else decode_seconds
    return cost(shape, hardware, 4096, Schedule(chunk_tokens=512), "float32", 32)


def test_a_model_on_several_gpus_is_planned_for_the_smallest_free_memory(monkeypatch):
    planned_for = []

    def plan_run(request):
        planned_for.append(request.device)
        raise CapacityError("nothing fits")

    monkeypatch.setattr("headinfer.hf.planning.plan_run", plan_run)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: ((9, 3, 7)[device.index] * GIB, 24 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 0)
    model = tiny_model("llama")
    with headinfer.enable(model) as enabled:
        enabled.new_cache(100)
        model.hf_device_map = {
            "model.embed_tokens": 0,
            "model.layers.0": 2,
            "model.layers.1": "cuda:1",
            "lm_head": "disk",
        }
        enabled.new_cache(100)
    assert planned_for == [torch.device("cpu"), torch.device("cuda:1")]


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=str)
def test_generate_plans_once(monkeypatch, options):
    planned = []
    plan_run = planning.plan_run
    monkeypatch.setattr(planning, "plan_run", lambda request: planned.append(request) or plan_run(request))
    monkeypatch.setattr("headinfer.plan.fit.HOST_CHUNK_TOKENS", 128)
    model = tiny_model("llama")
    with headinfer.enable(model) as enabled:
        model.generate(text(), max_new_tokens=20, do_sample=False, pad_token_id=0, **options)
        assert len(planned) == 1
        cache = enabled.last_cache
        assert cache.run_plan.plan is enabled.plan
        if not options:  # a second turn that outgrows the first plan is planned again
            longer = torch.cat([text(), text(), text()], dim=1)
            model.generate(longer, past_key_values=cache, max_new_tokens=20, do_sample=False, pad_token_id=0)
            assert len(planned) == 2


def test_a_context_longer_than_the_model_was_made_for_gives_one_warning():
    model = tiny_model("llama", max_position_embeddings=200)
    ids = text()[:, :150]
    with headinfer.enable(model), torch.no_grad():
        model(ids, past_key_values=headinfer.HeadCache(model.config))
        with pytest.warns(headinfer.ContextLengthWarning, match="tokens exceed the 200 that this model was made for"):
            model.generate(ids, max_new_tokens=52, do_sample=False, pad_token_id=0)
        model.generate(ids, max_new_tokens=60, do_sample=False, pad_token_id=0)
    with headinfer.enable(model), torch.no_grad():
        cache = headinfer.HeadCache(model.config)
        model(ids, past_key_values=cache)
        with pytest.warns(headinfer.ContextLengthWarning, match="300 tokens exceed"):
            model(ids, past_key_values=cache)
