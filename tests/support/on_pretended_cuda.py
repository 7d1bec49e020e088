"""Tests of the simulated devices in pretend_cuda.py, and of commands without --device.

test_pretend_cuda.py runs them in a separate process.
"""

import dataclasses
import json
import sys
import warnings

import pretend_cuda
import pytest
import torch
from core_client import Asked
from engine_runs import attend_all

from headinfer.bench import probe_cpu
from headinfer.cli import main as cli
from headinfer.cli.report import hardware_table
from headinfer.engine import host_attention
from headinfer.engine.machine import device_name
from headinfer.engine.options import Options
from headinfer.hf.enable import enable
from headinfer.hf.models import resolve
from headinfer.kv.streams import CudaStreams
from headinfer.plan.hardware import HARDWARE, probe_path
from headinfer.serve.service import Service
from headinfer.serve.settings import ServeSettings

CUDA = torch.device("cuda", 0)
OPTIONS = Options(device_kv_budget_bytes=4 << 20, streaming_budget_bytes=4 << 20, tile_tokens=160)
LENGTHS = [300, 700, 1, 130, 1]


def worst_error(options=OPTIONS):
    return max(attend_all("cuda", torch.float32, LENGTHS, options)[0], key=lambda error: (error != error, error))


def test_the_engine_is_exact():
    assert worst_error() < 1e-5


@pytest.mark.parametrize(("kv_dtype", "bound"), [("int8", 0.02)])
def test_kv_in_fewer_bits_has_the_error_of_its_format(kv_dtype, bound):
    assert bound / 10 < worst_error(dataclasses.replace(OPTIONS, kv_dtype=kv_dtype, tile_tokens=128)) < bound


@pytest.mark.parametrize(("queue", "what"), [("compute", "a tile"), ("fetch", "a write-back")])
def test_a_missing_wait_is_detected(monkeypatch, queue, what):
    wait = CudaStreams.wait
    monkeypatch.setattr(CudaStreams, "wait", lambda self, event, of: wait(self, event, of) if of != queue else None)
    error = worst_error()
    assert not error < 1e-2, what


def test_a_buffer_that_is_reused_too_early_is_detected(monkeypatch):
    wait = CudaStreams.wait

    def wait_except_for_buffers(self, event, queue):
        if queue != "compute" or event.stream is not self._own["back"]:
            wait(self, event, queue)

    monkeypatch.setattr(CudaStreams, "wait", wait_except_for_buffers)
    assert not worst_error() < 1e-2


HOST_FAULTS = {
    "queries that have not arrived": lambda wait, finish: (wait, lambda self, event: None),
    "results that have not arrived": lambda wait, finish: (without(wait, "compute", "host"), finish),
    "KV that is being written back": lambda wait, finish: (without(wait, "host", "back"), finish),
}


def without(wait, waiting, other):
    """A wait() with which one queue does not wait for the events of another."""

    def some(self, event, queue):
        if queue != waiting or event.stream is not self._own[other]:
            wait(self, event, queue)

    return some


@pytest.mark.parametrize("fault", [None, *HOST_FAULTS])
def test_faults_of_the_exchange_with_the_host_are_detected(monkeypatch, fault):
    options = dataclasses.replace(OPTIONS, cpu_share=1.0)
    if fault is not None:
        wait, finish = HOST_FAULTS[fault](CudaStreams.wait, CudaStreams.finish)
        monkeypatch.setattr(CudaStreams, "wait", wait)
        monkeypatch.setattr(CudaStreams, "finish", finish)
    assert (worst_error(options) < 1e-5) == (fault is None)


def test_operands_on_different_devices_are_errors():
    here = torch.ones(3, device="cuda:0")
    for other in (torch.ones(3), torch.ones(3, device="cuda:1")):
        with pytest.raises(RuntimeError, match="same device"):
            here + other
    assert (here + torch.tensor(2.0)).tolist() == [3.0] * 3
    assert here[torch.tensor([0, 2])].shape == (2,)


def test_synchronizing_calls_are_errors_in_debug_mode():
    x = torch.ones(3, device="cuda")
    host = torch.ones(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
    try:
        for call in (x.sum().item, x.nonzero, x.cpu, lambda: x[x > 0], lambda: x.copy_(host), lambda: x[host.long()]):
            with pytest.raises(RuntimeError, match="synchronizing"):
                call()
        x.copy_(host.pin_memory(), non_blocking=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert x.tolist() == [1.0] * 3


def test_streams_copy_only_equal_layouts_and_only_after_a_wait():
    x = torch.zeros(4, 4, device="cuda")
    host = torch.ones(4, 4).pin_memory()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        with pytest.raises(AssertionError, match="layouts"):
            x.copy_(host.T, non_blocking=True)
        x.copy_(host, non_blocking=True)
    assert x.isnan().all()
    torch.cuda.current_stream().wait_stream(stream)
    assert (x == 1).all()


def test_memory_is_counted_and_freed():
    before = torch.cuda.memory_allocated(CUDA)
    x = torch.zeros(1 << 20, device="cuda")
    view = x[10:]
    assert torch.cuda.memory_allocated(CUDA) - before == 4 << 20
    del x
    assert torch.cuda.memory_allocated(CUDA) - before == 4 << 20
    del view
    assert torch.cuda.memory_allocated(CUDA) == before
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(pretend_cuda.TOTAL_BYTES + 1, dtype=torch.uint8, device="cuda")


@pytest.mark.filterwarnings("default")
def test_commands_use_the_gpu_by_default(monkeypatch, tmp_path, capsys):
    """The commands have no --device option."""
    for name in ("XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    book = tmp_path / "book.txt"
    book.write_text("It was a dark night. The magic number for lodata is 31313. All slept. " * 20)
    question = "What is the magic number for lodata?"
    found = []
    for command in (
        ["info"],
        ["generate", "embedded", "--file", book, "--prompt", question, "--max-new-tokens", 16],
        ["read", "embedded", "--file", book, "--session", "night"],
        ["ask", "--session", "night", question, "--max-new-tokens", 16, "--where"],
    ):
        monkeypatch.setattr(sys, "argv", ["headinfer", *map(str, command)])
        try:
            cli.main()
        except SystemExit as ended:
            assert ended.code in (0, None), capsys.readouterr().err  # noqa: PT017
        found.append(capsys.readouterr().out)
    assert "a simulated GPU" in found[0]
    assert all("31313" in found[at] for at in (1, 3))
    assert "book.txt, characters 0 to" in found[3]


def test_resident_tokens_return_to_the_device_after_parking():
    model = resolve("random:tiny-llama?layers=2").load(dtype=torch.float32, device="cuda", seed=0)
    ids = torch.arange(700, device="cuda")[None] % 250
    found = []
    with torch.inference_mode(), enable(model, guesses="off") as enabled:
        for is_parked in (False, True):
            cache = enabled.new_cache(800)
            model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
            held = cache.stats()
            assert held.device_resident_bytes > 0
            if is_parked:
                cache.park()
                parked = cache.stats()
                assert parked.device_resident_bytes == parked.device_ring_bytes == 0
                assert 0 < parked.device_kv_bytes < held.device_kv_bytes
            found.append(model(input_ids=ids[:, :3], past_key_values=cache, logits_to_keep=1).logits.cpu())
            assert cache.stats().device_resident_bytes == held.device_resident_bytes
    assert torch.equal(*found)


@pytest.mark.filterwarnings("default")
def test_a_cache_that_is_not_used_leaves_the_device(monkeypatch, tmp_path):
    """The server parks its caches. Their next pass computes what it would have computed."""
    work = Service._work

    def work_on_devices(self):
        torch._C._set_only_lift_cpu_tensors(True)  # as pretend_cuda does in the thread that imports it
        with pretend_cuda.Mode():
            work(self)

    monkeypatch.setattr(Service, "_work", work_on_devices)
    with Service(ServeSettings("embedded", tmp_path, chunk_tokens=128, max_new_tokens=16)) as service:
        text = "It was a dark night. The magic number for lodata is 31313. All slept. " * 20
        name = service.add_document("night.txt", text.encode(), "a client").name
        messages = [{"role": "user", "content": "What is the magic number for lodata?"}]
        first = Asked(service, messages=messages, session=name)
        assert "31313" in first.text
        assert [kv.ring for kept in service._caches._kept for kv in kept.cache.engine.devices.values()] == [None, None]
        held = {
            use: sum(kept.cache.engine.counter.device_bytes[use] for kept in service._caches._kept)
            for use in ("ring", "tail", "resident")
        }
        assert held["tail"] > held["ring"] == held["resident"] == 0
        messages += [{"role": "assistant", "content": first.text}, *messages]
        second = Asked(service, messages=messages, session=name)
        assert "31313" in second.text
        assert second.last.cached_tokens > first.last.prompt_tokens
        assert Asked(service, prompt=text).text
        assert service.state().link_bytes_total > 0


def test_a_probe_measures_the_cpu_alone_and_beside_the_link(monkeypatch):
    sizes = {"_ROUNDS": 2, "_TOKENS": 64, "_DIM": 16, "_COPY_BYTES": 1 << 16}
    for name, value in sizes.items():
        monkeypatch.setattr(probe_cpu, name, value)
    stages = []
    found = probe_cpu.cpu_rates(CUDA, 1e9, stages.append)
    assert len(stages) == 4
    for rates in (found["cpu_beside_link_bytes_per_s"], found["link_beside_cpu_bytes_per_s"]):
        assert rates.keys() == {"4", "16"}
        assert min(rates.values()) > 0
    assert 1 <= found["cpu_threads_beside_link"] <= torch.get_num_threads()
    made = dataclasses.replace(HARDWARE["h100"], **found)  # its checks
    assert made.cpu_kv_bytes_per_s["4"].keys() >= {"1", str(torch.get_num_threads())}
    shown = hardware_table(made)
    assert shown.row_count >= 8


@pytest.mark.filterwarnings("default")
def test_a_run_uses_the_share_that_was_measured(monkeypatch, tmp_path, capsys):
    """The rates of the probe are those of a very slow link, so that a share pays for a short text."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    book = tmp_path / "book.txt"
    book.write_text("It was a dark night. " * 115)
    model = "random:tiny-llama?layers=1&hidden=64&intermediate=64&heads=4&kv_heads=2"

    def answer(*more):
        arguments = ["generate", model, "--file", book, "--max-new-tokens", 2, "--json", "--dtype", "float32"]
        arguments += ["--device-kv-budget", "1MiB", *more]
        monkeypatch.setattr(sys, "argv", ["headinfer", *map(str, arguments)])
        cli.app(standalone_mode=False)
        return json.loads(capsys.readouterr().out)

    plain = answer()
    rates = {"link_bytes_per_s": 1e5, "link_share": 1.0, "name": device_name(CUDA), "source": "headinfer probe"}
    rates |= {"cpu_beside_link_bytes_per_s": {"4": 1e5}, "link_beside_cpu_bytes_per_s": {"4": 1e5}}
    threads = torch.get_num_threads() + 1
    dataclasses.replace(HARDWARE["h100"], cpu_threads_beside_link=threads, **rates).save(probe_path())
    attend = host_attention._attend
    counts: set[int] = set()

    def note(*of_part):
        counts.add(torch.get_num_threads())
        return attend(*of_part)

    monkeypatch.setattr(host_attention, "_attend", note)
    shared = answer()
    assert counts == {threads}
    assert plain["options"]["cpu_share"] is None
    assert plain["stats"]["cpu_attended_bytes"] == 0
    assert shared["plan"]["cpu_share"] == shared["options"]["cpu_share"] == shared["stats"]["cpu_share"] > 0.4
    assert shared["stats"]["cpu_attended_bytes"] > 0
    assert shared["token_ids"] == plain["token_ids"]
    assert shared["stats"]["device_kv_peak_bytes"] <= 1 << 20
