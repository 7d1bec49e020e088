"""Exactness on a CUDA device, and on a CPU with LazyStreams, which tests these tests without a GPU.

`pytest -m gpu` runs only the tests on a CUDA device. All references are computed on the CPU, in float64 or by
transformers.
"""

import collections
import gc
import warnings

import pytest
import torch
from engine_runs import attend_all, host_tokens_of, step
from generation import generate, make_model, padded, prompt
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

import headinfer
from headinfer.engine.engine import Engine
from headinfer.engine.layer_pass import AttentionSpec
from headinfer.engine.options import Options
from headinfer.hf.cache import HeadCache
from headinfer.hf.models import resolve
from headinfer.kv import host_memory
from headinfer.kv.byte_counter import ByteCounter
from headinfer.kv.streams import CudaStreams

TOKEN_BYTES = 2 * 4 * 16 * 4  # one layer of make_model(): K and V of 4 heads of width 16 in float32
LAYERS = 4
STREAMING = 5 << 20
on_devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
RESIDENT = [0, 256, 4096]


def options_on(device, resident_tokens=0, **more):
    return {
        "device_kv_budget_bytes": STREAMING + LAYERS * resident_tokens * TOKEN_BYTES,
        "streaming_budget_bytes": STREAMING,
        "transport": "lazy" if device == "cpu" else "auto",
        "tile_tokens": 90,
        "heads_per_group": 2,
    } | more


def to(device, inputs):
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


@pytest.fixture(scope="module")
def llama():
    return make_model("llama")


@on_devices
@pytest.mark.parametrize("resident_tokens", RESIDENT)
@pytest.mark.parametrize("inputs", [prompt(tokens=450), padded(tokens=450), prompt() | {"num_beams": 3}])
def test_generate_gives_the_tokens_of_transformers(llama, device, resident_tokens, inputs):
    tokens, logits = generate(llama, inputs, max_new_tokens=10)
    model = make_model("llama").to(device)
    with headinfer.enable(model, chunk_tokens=96, **options_on(device, resident_tokens)) as active:
        found = generate(model, to(device, inputs), max_new_tokens=10)
    assert torch.equal(found[0].cpu(), tokens)
    assert (found[1].cpu() - logits).abs().max() < 1e-3 * logits.std()
    stats = active.last_cache.stats()
    assert stats.device_kv_peak_bytes <= STREAMING + LAYERS * resident_tokens * TOKEN_BYTES
    assert stats.link_to_host_bytes > 0


@on_devices
@pytest.mark.parametrize("family", ["gemma3_text", "qwen3", "gemma2", "gpt_oss"])
def test_models_with_windows_soft_caps_and_sinks(device, family):
    from families import tiny_model

    model = tiny_model(family)
    ids = torch.randint(0, model.config.vocab_size, (1, 700), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model(ids).logits[:, -20:]
        model = model.to(device)
        with headinfer.enable(model, **options_on(device, transport="lazy" if device == "cpu" else "auto")):
            cache = HeadCache(model.config, **options_on(device))
            for chunk in ids.to(device).split(250, dim=1):
                found = model(chunk, past_key_values=cache).logits[:, -20:]
    assert (found.cpu() - wanted).abs().max() < 2e-3 * wanted.std()


@on_devices
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2**-7), (torch.float16, 2**-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("share", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("dims", [(128, 128), (64, 32), (256, 256)])
def test_engine_against_float64(device, dtype, bound, share, dims):
    token_bytes = 2 * sum(dims) * dtype.itemsize
    streaming = 8 * 256 * token_bytes
    options = Options(
        device_kv_budget_bytes=streaming + int(share * 1500) * token_bytes * 2,
        streaming_budget_bytes=streaming,
        transport="lazy" if device == "cpu" else "auto",
        tile_tokens=160,
    )
    errors, engine, _ = attend_all(device, dtype, [300, 700, 1, 1, 500, 2], options, dims)
    assert max(errors) < bound
    stats = engine.counters[0]
    assert stats.device_peak_bytes <= options.device_kv_budget_bytes
    assert (stats.host_to_device_bytes == 0) == (share == 2.0)


@on_devices
@pytest.mark.parametrize(
    ("dtype", "bound", "cpu_share"),
    [(torch.bfloat16, 2**-7, 0.4), (torch.float32, 1e-5, 0.4), (torch.float32, 1e-5, 1)],
)
def test_the_host_attends_to_a_share_in_decode(device, dtype, bound, cpu_share, monkeypatch):
    unit = 64
    monkeypatch.setattr("headinfer.plan.cpu_share.CPU_UNIT_TOKENS", unit)
    dim = 64
    budget = 3 << 20
    options = Options(
        device_kv_budget_bytes=budget,
        streaming_budget_bytes=budget,
        transport="lazy" if device == "cpu" else "auto",
        tile_tokens=160,
        cpu_share=cpu_share,
    )
    errors, engine, layer_kvs = attend_all(device, dtype, [300, 700, 1, 16, 130, 1], options, (dim, dim))
    assert max(errors) < bound
    token_bytes = 2 * 2 * 2 * dim * dtype.itemsize  # K and V of two layers with two heads
    for tokens in (16, 1):
        step(engine, layer_kvs, tokens)
        on_host, streamed = host_tokens_of(layer_kvs[0], cpu_share, unit)
        assert on_host > 0
        assert (streamed > 0) == (cpu_share < 1)
        _, moved = step(engine, layer_kvs, tokens)
        results_bytes = 2 * 8 * tokens * (dim + 1) * 4
        assert moved["cpu_attended_bytes"] == on_host * token_bytes
        assert moved["host_to_device_bytes"] == streamed * token_bytes + results_bytes
        assert moved["device_to_host_bytes"] == 2 * 8 * tokens * dim * dtype.itemsize, "only queries"
    assert engine.counter.device_peak_bytes <= budget
    if device == "cuda":
        assert any(name.startswith("cpu-") for name in engine.backends_used)


@on_devices
@pytest.mark.parametrize("cpu_share", [None, 0.5])
def test_same_options_give_the_same_bits(device, cpu_share, monkeypatch):
    monkeypatch.setattr("headinfer.plan.cpu_share.CPU_UNIT_TOKENS", 64)
    transport = "lazy" if device == "cpu" else "auto"
    options = Options(device_kv_budget_bytes=4 << 20, transport=transport, cpu_share=cpu_share)

    def run():
        torch.manual_seed(0)
        engine = Engine(options, 1)
        rng = torch.Generator().manual_seed(3)
        found = []
        for tokens in (400, 900, 1, 1):
            q, k, v = (torch.randn(1, h, tokens, 64, generator=rng).to(device, torch.bfloat16) for h in (8, 2, 2))
            if not engine.devices:
                layer_kv = engine.new_layer_kv(k, v)
            engine.begin(layer_kv, 8, tokens)
            found.append(engine.attend(q, k, v, layer_kv, AttentionSpec(0.1)).cpu())
            layer_kv.append(k, v)
        return found

    assert all(map(torch.equal, run(), run()))


@on_devices
def test_a_loaded_session_gives_the_same_bits(llama, device, tmp_path):
    model = make_model("llama").to(device)
    ids, question = (prompt(tokens=tokens, seed=tokens)["input_ids"].to(device) for tokens in (700, 6))
    with headinfer.enable(model), torch.no_grad():
        cache = HeadCache(model.config, **options_on(device, 256))
        model(ids, past_key_values=cache)
        cache.save(tmp_path / "s", ids)
        loaded = HeadCache.load(tmp_path / "s", model)
        found = [model(question, past_key_values=one).logits for one in (cache, loaded)]
    assert torch.equal(*found)


@on_devices
def test_memory_that_cannot_be_pinned_is_used_too(llama, device, monkeypatch):
    if device == "cuda":
        monkeypatch.setattr(host_memory, "register", lambda address, nbytes, device: "refused, on purpose")
    inputs = prompt(tokens=600)
    wanted = generate(llama, inputs, max_new_tokens=8)[0]
    model = make_model("llama").to(device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with headinfer.enable(model, chunk_tokens=96, **options_on(device)):
            found = generate(model, to(device, inputs), max_new_tokens=8)[0]
    assert torch.equal(found.cpu(), wanted)


@pytest.mark.gpu
def test_a_failed_registration_leaves_no_cuda_error():
    device = torch.device("cuda", torch.cuda.current_device())
    memory = host_memory.HostTier(ByteCounter(), device=device).allocate((1 << 20,), torch.uint8)
    assert memory.is_pinned()
    assert "refused" in host_memory.register(memory.data_ptr(), memory.numel(), device), "the memory is already pinned"
    assert float(torch.ones(3, device=device).sum()) == 3.0


@on_devices
def test_host_memory_is_pinned_exactly_and_freed(device):
    errors, engine, layer_kvs = attend_all(
        device, torch.float32, [900, 300], Options(transport="lazy" if device == "cpu" else "auto")
    )
    assert max(errors) < 1e-5
    segments = {part.segment for layer_kv in layer_kvs for table in layer_kv._tables for part in table}
    assert engine.counter.host_bytes == sum(len(segment.bytes()) for segment in segments)
    assert not any(segment.is_pageable for segment in segments)
    if device == "cuda":
        assert all(segment.k.is_pinned() for segment in segments)
    engine.settle()
    for layer_kv in layer_kvs:
        layer_kv.close()
    engine.drop_prefetched()
    del segments, layer_kv
    gc.collect()
    assert engine.counter.host_bytes == 0


@pytest.mark.gpu
@pytest.mark.parametrize("cpu_share", [None, 0.5])
def test_the_host_does_not_wait_for_the_device_in_the_loop(cpu_share, monkeypatch):
    """With a share of its own it waits for the queries, once in a layer of a decode step."""
    monkeypatch.setattr("headinfer.plan.cpu_share.CPU_UNIT_TOKENS", 64)
    budget = {"device_kv_budget_bytes": 64 << 20, "streaming_budget_bytes": 64 << 20}
    options = Options(**budget, tile_tokens=500, cpu_share=cpu_share)
    _, engine, layer_kvs = attend_all("cuda", torch.bfloat16, [1300, 1], options)
    waits = []
    finish = CudaStreams.finish
    monkeypatch.setattr(CudaStreams, "finish", lambda streams, event: (waits.append(event), finish(streams, event)))
    chunks = [[torch.randn(1, h, t, 128, device="cuda", dtype=torch.bfloat16) for h in (8, 2, 2)] for t in (1, 64, 1)]
    try:
        with warnings.catch_warnings():  # torch warns that the mode is a prototype
            warnings.filterwarnings("ignore", message="Synchronization debug mode")
            torch.cuda.set_sync_debug_mode("error")
        for q, k, v in chunks:
            for layer_kv in layer_kvs:
                if layer_kv is layer_kvs[0]:
                    engine.begin(layer_kv, 8, q.shape[2])
                engine.attend(q, k, v, layer_kv, AttentionSpec(0.1))
                layer_kv.append(k, v)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waits) == (0 if cpu_share is None else 2 * len(layer_kvs))


@pytest.mark.gpu
def test_device_memory_does_not_grow_with_the_context():
    options = Options(device_kv_budget_bytes=64 << 20, streaming_budget_bytes=64 << 20)

    def held_after(past):
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        engine = Engine(options, 1)
        rng = torch.Generator("cuda").manual_seed(0)
        k, v = (torch.randn(1, 2, 4096, 128, device="cuda", dtype=torch.bfloat16, generator=rng) for _ in range(2))
        layer_kv = engine.new_layer_kv(k, v)
        for _ in range(past // 4096):
            layer_kv.append(k, v)
        for tokens in (1, 1):
            q = torch.randn(1, 8, tokens, 128, device="cuda", dtype=torch.bfloat16, generator=rng)
            engine.begin(layer_kv, 8, tokens)
            engine.attend(q, k[:, :, :1], v[:, :, :1], layer_kv, AttentionSpec(0.1))
        return engine.counter.device_peak_bytes, torch.cuda.max_memory_allocated() - before

    held = [held_after(past) for past in (4096, 65_536)]
    assert held[0][0] == held[1][0] <= 64 << 20
    assert abs(held[0][1] - held[1][1]) < 4 << 20  # kernels of longer tiles need some more memory


@pytest.mark.gpu
def test_a_pass_that_runs_out_of_memory_gives_back_resident_kv():
    """The limit leaves less memory than the activations need, so resident KV is dropped and chunks are shortened."""
    sizes = {"hidden_size": 32, "intermediate_size": 16_384, "num_hidden_layers": 2}
    model = make_model("llama", head_dim=128, num_key_value_heads=8, **sizes)
    ids = prompt(tokens=1200)["input_ids"]
    with torch.no_grad():
        wanted = model(ids).logits[:, -1]
        model = model.to("cuda")
        budget = {"device_kv_budget_bytes": 128 << 20, "streaming_budget_bytes": 32 << 20}
        with headinfer.enable(model, chunk_tokens=600, **budget):
            cache = HeadCache(model.config, expected_tokens=1200, **budget)
            model(ids[:, :600].to("cuda"), past_key_values=cache, logits_to_keep=1)
            resident_bytes = cache.stats().device_resident_bytes
            gc.collect()
            torch.cuda.empty_cache()
            total_bytes = torch.cuda.get_device_properties("cuda").total_memory
            try:
                limit_bytes = torch.cuda.memory_reserved() + (64 << 20)
                torch.cuda.set_per_process_memory_fraction(limit_bytes / total_bytes)
                with pytest.warns(UserWarning, match="a device ran out of memory in a forward pass"):
                    found = model(ids[:, 600:].to("cuda"), past_key_values=cache, logits_to_keep=1).logits[:, -1]
            finally:
                torch.cuda.set_per_process_memory_fraction(1.0)
    stats = cache.stats()
    assert stats.tokens == 1200
    assert stats.oom_retries > 0
    assert 0 < stats.oom_given_back_bytes <= resident_bytes
    assert (found.cpu() - wanted).abs().max() < 1e-3 * wanted.std()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_model_on_two_devices(llama):
    from accelerate import dispatch_model

    tokens, _ = generate(llama, prompt(tokens=700))
    model = make_model("llama")
    devices = {"model.embed_tokens": 0, "model.norm": 1, "model.rotary_emb": 0, "lm_head": 1}
    devices |= {f"model.layers.{index}": index // 2 for index in range(LAYERS)}
    devices = {name: f"cuda:{index}" for name, index in devices.items()}
    model = dispatch_model(model, devices)
    with headinfer.enable(model, chunk_tokens=96, **options_on("cuda", 128)) as active:
        found = generate(model, to("cuda:0", prompt(tokens=700)))[0]
    assert torch.equal(found.cpu(), tokens)
    assert len(active.last_cache.engine.devices) == 2


@on_devices
@pytest.mark.parametrize(
    "spec",
    [
        "embedded",
        "random:qwen2-7b?layers=2&hidden=112&intermediate=32",
        "random:gemma-3-4b?layers=6&hidden=64&intermediate=32",
    ],
)
def test_models_are_made_on_their_device(device, spec):
    """Random weights are drawn there, and stored ones are read there. Buffers are those of a model on the CPU."""
    model = resolve(spec).load(dtype=torch.bfloat16, device=device, seed=3)
    same = resolve(spec).load(dtype=torch.bfloat16, device=device, seed=3)
    on_cpu = resolve(spec).load(dtype=torch.bfloat16, device="cpu", seed=3)
    in_host_memory = resolve(spec).load(dtype=torch.bfloat16, device="cpu", seed=3, drawn_on=device)
    wanted = dict(on_cpu.named_parameters())
    found = dict(model.named_parameters())
    assert found.keys() == wanted.keys()  # tied weights are one parameter
    for name, weight in found.items():
        assert (weight.device.type, weight.dtype) == (device, torch.bfloat16)
        assert torch.equal(weight.cpu(), same.get_parameter(name).cpu())
        assert torch.equal(weight.cpu(), in_host_memory.get_parameter(name)), "what ranks load their shards from"
        assert spec != "embedded" or torch.equal(weight.cpu(), wanted[name])
        assert weight.float().std().item() == pytest.approx(wanted[name].float().std().item(), rel=0.1)
    buffers = dict(on_cpu.named_buffers())
    for name, buffer in model.named_buffers():
        assert (buffer.device.type, buffer.dtype) == (device, buffers[name].dtype)
        torch.testing.assert_close(buffer.cpu(), buffers[name], rtol=1e-6, atol=0)


# -- calls of a decode step ----------------------------------------------------------------------------------------


NO_KERNEL = ("empty", "unsafe_view", "prim::")


class Kernels(TorchDispatchMode):
    """Counts operations that compute or copy."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, func, kinds, args=(), kwargs=None):
        if not func.is_view and not any(part in func.name() for part in NO_KERNEL):
            self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


class Calls(TorchFunctionMode):
    """Counts functions of torch that Python calls, views included."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_function__(self, func, kinds, args=(), kwargs=None):
        if func.__name__ != "__get__":
            self.counts[func.__name__] += 1
        return func(*args, **(kwargs or {}))


def calls_of_a_step(device, layers, options):
    """The numbers of kernels and of calls in a decode step after 600 tokens; None stands for a DynamicCache."""
    model = make_model("llama", num_hidden_layers=layers).to(device, torch.bfloat16)
    cache = DynamicCache(config=model.config)
    if options is not None:
        cache = headinfer.enable(model, **options).new_cache()
    ids = prompt(tokens=600)["input_ids"].to(device)
    with torch.no_grad():
        for part in (ids, ids[:, :1], ids[:, :1], ids[:, :1]):
            with Kernels() as kernels, Calls() as calls:
                model(part, past_key_values=cache)
    return kernels.counts.total(), calls.counts.total()


@on_devices
def test_calls_of_a_decode_step(device):
    """How many calls a layer makes more than with transformers' DynamicCache, if its KV is resident or one tile."""

    def of_a_layer(options=None):
        pairs = zip(calls_of_a_step(device, 4, options), calls_of_a_step(device, 2, options), strict=True)
        return [(four - two) / 2 for four, two in pairs]

    kernels, calls = of_a_layer()
    resident_kernels, resident_calls = of_a_layer(options_on(device, 4096))
    assert resident_kernels <= kernels
    assert resident_calls <= calls + 2
    tile_kernels, tile_calls = of_a_layer(options_on(device, tile_tokens=None, heads_per_group=None))
    assert tile_kernels <= kernels + 12  # copies of the tile, attention to it, and a merge without Triton
    assert tile_calls <= calls + 85
