"""The KV of one device: resident tokens, streamed tiles, and one budget for both. The queues are simulated on a CPU."""

import gc
import warnings
from pathlib import Path

import pytest
import torch
from generation import generate, make_model, padded, prompt, remembered

import headinfer
from headinfer.attention.reference import attend_reference, causal_mask
from headinfer.engine import device_kv
from headinfer.engine.engine import Engine
from headinfer.engine.layer_pass import AttentionSpec
from headinfer.engine.options import Options
from headinfer.errors import CapacityError
from headinfer.hf.cache import HeadCache
from headinfer.kv import host_memory, numa
from headinfer.kv.byte_counter import ByteCounter
from headinfer.kv.read_ahead import ReadAhead
from headinfer.kv.transfer import SlotRing

TOKEN_BYTES = 2 * 4 * 16 * 4  # one layer of make_model(): K and V of 4 heads of width 16 in float32
LAYERS = 4
STREAMING = 5 << 20
both_streams = pytest.mark.parametrize("transport", ["eager", "lazy"])


@pytest.fixture(scope="module")
def llama():
    return make_model("llama")


@pytest.fixture(scope="module")
def references():
    """Results of the model without headinfer, for remembered()."""
    return {}


def enabled(model, transport, resident_tokens, **options):
    """Enable a model with a budget for `resident_tokens` tokens of one row in each layer."""
    budget = STREAMING + LAYERS * resident_tokens * TOKEN_BYTES
    sizes = {
        "device_kv_budget_bytes": budget,
        "streaming_budget_bytes": STREAMING,
        "heads_per_group": 1,
        "tile_tokens": 90,
    }
    return headinfer.enable(model, chunk_tokens=96, transport=transport, **sizes | options)


# -- resident tokens -------------------------------------------------------------------------------------------


@both_streams
@pytest.mark.parametrize("resident_tokens", [0, 128, 384, 512, 4096])
@pytest.mark.parametrize("kind", ["one row", "padded rows", "beams"])
def test_resident_tokens_do_not_change_the_output(llama, references, transport, resident_tokens, kind):
    inputs = padded(tokens=800) if kind == "padded rows" else prompt(tokens=800)
    if kind == "beams":
        inputs["num_beams"] = 3
    wanted = remembered(references, kind, lambda: generate(llama, inputs)[0])
    with enabled(llama, transport, resident_tokens) as active:
        found = generate(llama, inputs)[0]
    assert torch.equal(found, wanted)
    stats = active.last_cache.stats()
    assert stats.device_kv_peak_bytes <= STREAMING + LAYERS * resident_tokens * TOKEN_BYTES
    assert stats.device_resident_bytes <= LAYERS * resident_tokens * TOKEN_BYTES
    assert (stats.device_resident_bytes > 0) == (resident_tokens // len(inputs["input_ids"]) >= 128)
    if resident_tokens == 4096:
        assert stats.device_ring_bytes == stats.link_to_device_bytes == 0, "without streaming there is no ring"
    else:
        assert stats.link_to_device_bytes > 0
    assert stats.link_to_host_bytes > 0, "resident tokens are on the host as well"


def test_number_of_resident_bytes(llama):
    with enabled(llama, "eager", 384) as active:
        generate(llama, prompt())
    assert active.last_cache.stats().device_resident_bytes == LAYERS * 384 * TOKEN_BYTES


@both_streams
def test_a_context_larger_than_the_device_budget_is_streamed(llama, transport):
    """At first the whole budget holds resident tokens. They are removed when a ring is needed."""
    budget = 10 * 256 * TOKEN_BYTES + 40 * 128 * TOKEN_BYTES
    options = {
        "transport": transport,
        "device_kv_budget_bytes": budget,
        "streaming_budget_bytes": 6 * 256 * TOKEN_BYTES,
    }
    ids = prompt(tokens=3000)["input_ids"]
    with torch.no_grad():
        wanted = llama(ids).logits[:, -1]
    with headinfer.enable(llama), torch.no_grad():
        cache = HeadCache(llama.config, **options)
        was_resident = 0
        for chunk in ids.split(200, dim=1):
            found = llama(chunk, past_key_values=cache).logits[:, -1]
            stats = cache.stats()
            assert stats.device_kv_peak_bytes <= budget
            was_resident = max(was_resident, stats.device_resident_bytes)
    assert was_resident > 0
    assert stats.device_ring_bytes > 0
    torch.testing.assert_close(found, wanted, atol=2e-4, rtol=2e-4)


def test_a_budget_too_small_for_a_ring_is_an_error(llama):
    small = headinfer.enable(llama, transport="eager", device_kv_budget_bytes=5 * 256 * TOKEN_BYTES, chunk_tokens=96)
    with small, pytest.raises(CapacityError, match="give at least"):
        generate(llama, prompt())


@both_streams
def test_a_loaded_session_becomes_resident_again(llama, transport, tmp_path):
    ids = prompt(tokens=700)["input_ids"]
    question = prompt(tokens=5, seed=2)["input_ids"]
    with torch.no_grad():
        wanted = llama(torch.cat([ids, question], dim=1)).logits[:, -1]
    budget = STREAMING + LAYERS * 512 * TOKEN_BYTES
    options = {"transport": transport, "device_kv_budget_bytes": budget, "streaming_budget_bytes": STREAMING}
    with headinfer.enable(llama), torch.no_grad():
        cache = HeadCache(llama.config, **options)
        llama(ids, past_key_values=cache)
        cache.save(tmp_path / "s", ids)
        loaded = HeadCache.load(tmp_path / "s", llama)
        assert loaded.stats().device_resident_bytes == 0, "nothing is resident before the first forward pass"
        found = [llama(question, past_key_values=one).logits[:, -1] for one in (cache, loaded.fork(), loaded)]
    assert loaded.stats().device_resident_bytes == cache.stats().device_resident_bytes > 0
    assert torch.equal(found[0], found[2])
    for one in found:
        torch.testing.assert_close(one, wanted, atol=2e-4, rtol=2e-4)


# -- prefetched tiles ------------------------------------------------------------------------------------------


@both_streams
def test_prefetched_tiles_are_dropped_when_their_tokens_change(llama, transport):
    """After decoding, the ring holds the first tile for the next token. Then its tokens are replaced."""
    first, other = (prompt(tokens=700, seed=seed)["input_ids"] for seed in (1, 5))
    with headinfer.enable(llama), torch.no_grad():
        cache = HeadCache(
            llama.config, transport=transport, device_kv_budget_bytes=STREAMING, tile_tokens=90, heads_per_group=1
        )
        llama(first, past_key_values=cache)
        for token in (3, 4):
            llama(torch.tensor([[token]]), past_key_values=cache)
        ring = next(iter(cache.engine.devices.values())).ring
        assert isinstance(ring, SlotRing)
        assert len(ring._prefetched) == 1
        cache.crop(-702 + 20)
        llama(other[:, 20:], past_key_values=cache)
        found = llama(torch.tensor([[5]]), past_key_values=cache).logits[:, -1]
        wanted = llama(torch.cat([first[:, :20], other[:, 20:], torch.tensor([[5]])], dim=1)).logits[:, -1]
    torch.testing.assert_close(found, wanted, atol=2e-4, rtol=2e-4)


@both_streams
def test_decoding_fetches_each_byte_once_per_token(llama, transport):
    with headinfer.enable(llama), torch.no_grad():
        cache = HeadCache(
            llama.config, transport=transport, device_kv_budget_bytes=STREAMING, tile_tokens=90, heads_per_group=1
        )
        llama(prompt(tokens=600)["input_ids"], past_key_values=cache)
        llama(torch.tensor([[3]]), past_key_values=cache)
        for _ in range(3):
            before = cache.stats().link_to_device_bytes
            llama(torch.tensor([[3]]), past_key_values=cache)
            on_host = cache.head_layers[0].layer_kv.host_tokens
            assert cache.stats().link_to_device_bytes - before == LAYERS * on_host * TOKEN_BYTES


def test_reset_frees_prefetched_tiles(llama):
    with headinfer.enable(llama), torch.no_grad():
        cache = HeadCache(llama.config, transport="eager", device_kv_budget_bytes=STREAMING, tile_tokens=90)
        llama(prompt(tokens=600)["input_ids"], past_key_values=cache)
        for _ in range(2):
            llama(torch.tensor([[3]]), past_key_values=cache)
        cache.reset()
    gc.collect()
    assert cache.stats().host_kv_bytes == 0


@pytest.mark.parametrize("transport", ["in_place", "eager", "lazy"])
def test_a_cache_filled_in_inference_mode_can_be_used_without_it(llama, transport):
    ids = prompt(tokens=900)["input_ids"]
    with headinfer.enable(llama, chunk_tokens=300), torch.no_grad():
        wanted = llama(ids).logits[:, -1:]
        cache = HeadCache(
            llama.config, transport=transport, device_kv_budget_bytes=8 << 20, streaming_budget_bytes=6 << 20
        )
        with torch.inference_mode():
            llama(ids[:, :500], past_key_values=cache)
        found = llama(ids[:, 500:], past_key_values=cache, logits_to_keep=1).logits
        assert not any(tensor.is_inference() for layer in cache.head_layers for tensor in layer.layer_kv.tails())
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4)


# -- memory that cannot be pinned ------------------------------------------------------------------------------


def pageable(monkeypatch, allowed):
    """Simulate a device and a system that pins only the first `allowed` allocations."""
    count = [0]

    def register(address, nbytes, device):
        count[0] += 1
        return "" if count[0] <= allowed else "the limit on locked memory is reached"

    monkeypatch.setattr(host_memory, "register", register)
    monkeypatch.setattr(host_memory, "_unpin", lambda pinned, address, device: pinned.discard(address))
    make = device_kv.HostTier
    monkeypatch.setattr(device_kv, "HostTier", lambda counter, **_: make(counter, device=torch.device("cpu"), node=0))


@both_streams
@pytest.mark.parametrize("allowed", [0, 2, 10_000])
def test_pageable_memory_is_copied_through_pinned_buffers(llama, transport, allowed, monkeypatch):
    wanted = generate(llama, prompt(tokens=900))[0]
    pageable(monkeypatch, allowed)
    with warnings.catch_warnings(record=True) as said, enabled(llama, transport, 0) as active:
        warnings.simplefilter("always")
        with torch.inference_mode(transport == "lazy"):  # in which the commands run
            found = generate(llama, prompt(tokens=900))[0]
    assert torch.equal(found, wanted)
    kv = next(iter(active.last_cache.engine.devices.values()))
    messages = [str(one.message) for one in said if "pageable" in str(one.message)]
    assert isinstance(kv.ring, ReadAhead) == (allowed < 10_000)
    assert messages == (["host memory stays pageable, transfers will be slower: the limit on locked memory is reached"]
                        if allowed < 10_000 else [])  # fmt: skip


def test_pages_are_unmapped_after_they_are_unpinned(monkeypatch):
    """A device may still copy from pinned pages, and the system may reuse the addresses of unmapped pages."""
    gc.collect()
    host_memory.finish_release()  # of other tests
    pageable(monkeypatch, 1)
    maps = Path("/proc/self/maps")
    mapped = []
    if not maps.is_file():
        pytest.skip("this system does not list its mappings")

    def is_mapped(address):
        ranges = (line.split(maxsplit=1)[0].split("-") for line in maps.read_text().splitlines())
        return any(int(start, 16) <= address < int(stop, 16) for start, stop in ranges)

    monkeypatch.setattr(host_memory, "_unpin", lambda pinned, address, device: mapped.append(is_mapped(address)))
    tier = host_memory.HostTier(ByteCounter(), device=torch.device("cpu"))
    tensor = tier.allocate((1 << 20,), torch.uint8)
    address = tensor.data_ptr()
    view = tensor[5:]
    assert is_mapped(address)
    del tensor
    assert not mapped, "a view still uses them"
    del view
    gc.collect()
    host_memory.finish_release()
    assert mapped == [True]
    assert not is_mapped(address)


def test_a_tier_reports_what_is_not_pinned(monkeypatch):
    pageable(monkeypatch, 1)
    counter = ByteCounter()
    tier = host_memory.HostTier(counter, device=torch.device("cpu"))
    first = tier.allocate((3, 5), torch.float32)
    with pytest.warns(UserWarning, match="stays pageable"):
        second = tier.allocate((7,), torch.bfloat16)
    assert not tier.is_pageable(first)
    assert tier.is_pageable(second)
    assert not host_memory.HostTier(counter).is_pageable(second)
    del first, second
    gc.collect()
    assert counter.host_bytes == 0
    host_memory.finish_release()
    assert not tier._pinned


def test_host_memory_is_interleaved_among_the_numa_nodes_if_the_cpu_computes(tmp_path, monkeypatch):
    for text, nodes, words in (
        ("0-1,4\n", [0, 1, 4], "3: the pages of KV are interleaved among them"),
        ("0,2-3\n", [0, 2, 3], "3: the pages of KV are interleaved among them"),
        ("0\n", [0], "1"),
        ("\n", [], "1"),
        ("what\n", [], "1"),
    ):
        (tmp_path / "has_memory").write_text(text)
        assert numa.memory_nodes(tmp_path) == nodes
        assert numa.placement(nodes, has_gpu=False) == words
    assert numa.memory_nodes(tmp_path / "none") == []
    assert numa.placement([0, 1], has_gpu=True) == "2: KV is placed on the node of the GPU"
    calls = []
    monkeypatch.setattr(host_memory, "interleave", lambda address, nbytes, nodes: calls.append((nbytes, nodes)))
    for nodes, device in (([0, 1], None), ([0], None), ([0, 1], torch.device("cpu"))):
        monkeypatch.setattr(host_memory, "memory_nodes", lambda nodes=nodes: nodes)
        tier = host_memory.HostTier(ByteCounter(), device=device)
        tier.pin_refusal = "not in this test"
        tier.allocate((1024,), torch.float32)
    assert calls == [(4096, [0, 1])]


def test_memory_is_requested_on_the_preferred_numa_node(tmp_path, monkeypatch):
    import mmap

    pages = mmap.mmap(-1, 1 << 20)
    address = torch.frombuffer(pages, dtype=torch.uint8).data_ptr()
    assert numa.prefer(address, 1 << 20, 0) in (
        True,
        False,
    )  # depends on the system; the memory is usable in either case
    assert not numa.prefer(address, 1 << 20, 100_000)
    assert not numa.prefer(address, 1 << 20, -1)
    assert numa.interleave(address, 1 << 20, [0]) in (True, False)
    assert not numa.interleave(address, 1 << 20, [0, 100_000])

    class Found:
        pci_domain_id = 0
        pci_bus_id = 0x41
        pci_device_id = 3

    folder = tmp_path / "0000:41:03.0"
    folder.mkdir()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Found())
    for text, node in (("1\n", 1), ("-1\n", None), ("", None)):
        (folder / "numa_node").write_text(text)
        assert numa.node_of(torch.device("cuda"), tmp_path) == node
    assert numa.node_of(torch.device("cuda"), tmp_path / "nowhere") is None
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: object())
    assert numa.node_of(torch.device("cuda"), tmp_path) is None


def test_memory_for_a_known_length_is_allocated_with_the_first_tokens(llama, monkeypatch):
    """This is done on CUDA devices, because pinning memory makes the device wait."""
    make = device_kv.LayerKV
    monkeypatch.setattr(device_kv, "LayerKV", lambda *both, **options: make(*both, **options | {"reserves": True}))
    ids = prompt(tokens=900)["input_ids"]
    with torch.no_grad():
        wanted = llama(ids).logits[:, -1]
    with headinfer.enable(llama), torch.no_grad():
        cache = HeadCache(llama.config, transport="lazy", device_kv_budget_bytes=STREAMING, expected_tokens=900)
        held = []
        for chunk in ids.split(300, dim=1):
            found = llama(chunk, past_key_values=cache).logits[:, -1]
            held.append(cache.stats().host_kv_bytes)
    assert held[0] == held[-1] == LAYERS * 1024 * TOKEN_BYTES
    torch.testing.assert_close(found, wanted, atol=2e-4, rtol=2e-4)


# -- several devices -------------------------------------------------------------------------------------------


class Spread(Engine):
    """An engine that believes that its layers are on several devices."""

    def _device_of(self, what):
        return what.where


@both_streams
@pytest.mark.parametrize("cpu_share", [None, 0.4])
def test_each_device_has_its_own_ring_and_budget(transport, cpu_share, monkeypatch):
    monkeypatch.setattr("headinfer.plan.cpu_share.CPU_UNIT_TOKENS", 64)
    layers = 4
    rng = torch.Generator().manual_seed(0)
    options = Options(transport=transport, device_kv_budget_bytes=700_000, tile_tokens=100, cpu_share=cpu_share)
    engine = Spread(options, layers)
    engine.layers_on = {torch.device("cpu", 0): 2, torch.device("cpu", 1): 2}
    layer_kvs = []
    appended = [[] for _ in range(layers)]
    for tokens in (300, 400, 1, 5, 1):
        for layer in range(layers):
            q, k, v = (torch.randn(1, heads, tokens, 16, generator=rng) for heads in (4, 2, 2))
            k.where = torch.device("cpu", layer // 2)
            if len(layer_kvs) == layer:
                layer_kvs.append(engine.new_layer_kv(k, v))
                layer_kvs[layer].where = k.where
            if layer == 0:
                engine.begin(layer_kvs[0], 4, tokens)
            appended[layer].append((k, v))
            out = engine.attend(q, k, v, layer_kvs[layer], AttentionSpec(0.25))
            layer_kvs[layer].append(k, v)
            all_k, all_v = (torch.cat(sides, dim=2) for sides in zip(*appended[layer], strict=True))
            mask = causal_mask(tokens, all_k.shape[2])
            wanted = attend_reference(q, all_k, all_v, scale=0.25, mask=mask).out.transpose(1, 2)
            torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)
    assert len(engine.devices) == len(engine.counters) == 2
    rings = {id(kv.ring) for kv in engine.devices.values()}
    assert len(rings) == 2
    assert [kv.layers for kv in engine.devices.values()] == [2, 2]
    assert all(kv.ring._prefetched for kv in engine.devices.values()), (
        "each ring prefetches the first layer of its device"
    )
    for counter in engine.counters:
        assert counter.host_to_device_bytes > 0
        assert (counter.cpu_attended_bytes > 0) == (cpu_share is not None)
        assert 0 < counter.device_peak_bytes <= 700_000
    assert engine.counters[0].host_bytes > 0
    assert engine.counters[1].host_bytes == 0, "host memory is counted only once"


# -- headinfer info --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("allowed", "expected"), [(9, "yes"), (0, "no, KV goes to the device through a few buffers")])
def test_info_reports_whether_host_memory_is_pinned(monkeypatch, allowed, expected):
    from typer.testing import CliRunner

    from headinfer import info
    from headinfer.cli import main as cli

    pageable(monkeypatch, allowed)

    class Card:
        name = "a card"
        total_memory = 24 << 30
        major = 8
        minor = 9
        pci_domain_id = 0
        pci_bus_id = 1
        pci_device_id = 0

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Card())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1 << 30, 24 << 30))
    assert info.gather_info()["cuda_devices"][0]["pinned_host_memory"].startswith(expected)
    printed = CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, ["info"]).output
    assert expected in " ".join(printed.split())
