"""The disk tier: exact results, the host budget, and no files left behind."""

import errno
import gc
import itertools
import os

import pytest
import torch
from families import tiny_model
from generation import remembered
from hypothesis import given, settings
from hypothesis import strategies as st

import headinfer
from headinfer import CapacityError, HeadCache, UsageError
from headinfer.kv.disk_file import DiskFile
from headinfer.kv.read_ahead import READ_SLOTS, ReadAhead, read_slot_bytes
from headinfer.kv.slices import DiskLocation, DiskSlice

# Tiny models are made for 4,096 tokens; a disk tier wants more.
pytestmark = pytest.mark.filterwarnings("ignore::headinfer.ContextLengthWarning")

CHUNK = 256
BUDGET = 3 * 2**20 // 2


def forward(model, cache, ids):
    with torch.inference_mode():
        parts = ids.split(CHUNK, dim=1)
        return torch.cat([model(input_ids=ids, past_key_values=cache, use_cache=True).logits for ids in parts], dim=1)


def token_ids(tokens, rows=1, seed=0):
    return torch.randint(0, 90, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def read_and_write(model, ids, steps=4, **options):
    """Prefill, then decode some steps. Returns the logits of the last token and of each step, and the cache."""
    with headinfer.enable(model, chunk_tokens=CHUNK, **options) as enabled:
        cache = enabled.new_cache()
        found = [forward(model, cache, ids)[:, -1]]
        found += [forward(model, cache, ids[:, step : step + 1])[:, 0] for step in range(steps)]
    return torch.stack(found), cache


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def references():
    """Results with KV in memory, for remembered()."""
    return {}


# -- results and memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["auto", "eager", "lazy"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss", "falcon_h1", "mimo_v2_flash"])
def test_kv_on_disk_gives_the_same_logits(references, family, transport, tmp_path):
    model = tiny_model(family)
    ids = token_ids(5000)
    expected, plain = remembered(references, family, lambda: read_and_write(model, ids))
    budget = plain.stats().host_kv_bytes // 3
    found, cache = read_and_write(model, ids, transport=transport, host_kv_budget_bytes=budget, disk_tier=str(tmp_path))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)
    stats = cache.stats()
    assert stats.host_kv_peak_bytes <= budget
    assert stats.disk_kv_bytes > plain.stats().host_kv_bytes // 2
    assert stats.disk_to_host_bytes > 5 * stats.disk_kv_bytes, "each chunk and each token reads it again"


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    tokens=st.integers(1500, 2200),
    rows=st.integers(1, 2),
    heads=st.sampled_from([None, 1, 2]),
    tile=st.sampled_from([None, 33, 128, 250]),
    keep=st.integers(400, 1400),
)
def test_forks_crops_reordered_rows_and_uneven_tiles(model, tmp_path_factory, tokens, rows, heads, tile, keep):
    folder = tmp_path_factory.mktemp("tier")
    ids = token_ids(tokens, rows)
    more = token_ids(300, rows, seed=1)
    logits = []
    for options in (
        {},
        {
            "host_kv_budget_bytes": BUDGET * rows,
            "disk_tier": str(folder),
            "heads_per_group": heads,
            "tile_tokens": tile,
        },
    ):
        with headinfer.enable(model, chunk_tokens=CHUNK, transport="lazy", **options) as enabled:
            cache = enabled.new_cache()
            forward(model, cache, ids)
            assert (cache.stats().disk_kv_bytes > 0) == bool(options)
            fork = cache.fork()
            one = forward(model, fork, more)
            cache.crop(-keep)
            cache.reorder_cache(torch.arange(rows).flip(0))
            two = forward(model, cache, more)
            logits.append(torch.cat([one, two]))
    torch.testing.assert_close(logits[1], logits[0], atol=2e-5, rtol=2e-5)


def test_dense_kv_is_the_same(model, tmp_path):
    ids = token_ids(4000)
    _, plain = read_and_write(model, ids)
    _, cache = read_and_write(model, ids, host_kv_budget_bytes=BUDGET, disk_tier=str(tmp_path))
    for ours, theirs in zip(cache.head_layers, plain.head_layers, strict=True):
        for side, expected in zip(ours.layer_kv.dense(), theirs.layer_kv.dense(), strict=True):
            torch.testing.assert_close(side, expected, atol=1e-5, rtol=1e-5)


def test_sessions_with_a_disk_tier(model, tmp_path):
    ids = token_ids(4000)
    question = token_ids(20, seed=1)
    tier = {"host_kv_budget_bytes": BUDGET, "disk_tier": str(tmp_path / "tier")}
    expected = {}
    for transport in ("auto", "eager"):
        with headinfer.enable(model, chunk_tokens=CHUNK, transport=transport, **tier) as enabled:
            cache = enabled.new_cache()
            for part in ids.split(1000, dim=1):
                forward(model, cache, part)
                cache.save(tmp_path / transport, ids)
                assert cache.stats().host_kv_peak_bytes <= BUDGET
            expected[transport] = forward(model, cache, question)
            loaded = HeadCache.load(tmp_path / transport, model, **tier)
            found = forward(model, loaded, question)
            torch.testing.assert_close(found, expected[transport], atol=2e-5, rtol=2e-5)
            if transport == "eager":
                assert loaded.stats().disk_kv_bytes > 0
            assert loaded.stats().host_kv_peak_bytes <= BUDGET
            assert torch.equal(loaded.token_ids, ids)


def test_tiles_are_read_before_they_are_used(model, tmp_path, monkeypatch):
    """Each tile is read once, up to four tiles ahead. This includes the first tiles of the next layer and token."""
    events = []
    begin = ReadAhead._begin
    wait = ReadAhead.wait

    def note_begin(ring, pieces, after):
        is_on_disk = any(isinstance(piece, DiskSlice) for piece in pieces)
        if is_on_disk:
            events.append(1)
        tile = begin(ring, pieces, after)
        assert bool(tile.loads) == is_on_disk
        return tile

    def note_wait(ring, handle):
        if ring._tiles[handle].slot is not None:
            events.append(-1)
        return wait(ring, handle)

    monkeypatch.setattr(ReadAhead, "_begin", note_begin)
    monkeypatch.setattr(ReadAhead, "wait", note_wait)
    _, cache = read_and_write(model, token_ids(4000), 0, host_kv_budget_bytes=BUDGET, disk_tier=str(tmp_path))
    with headinfer.enable(model):
        forward(model, cache, token_ids(1))
        events.clear()
        for _ in range(5):
            forward(model, cache, token_ids(1))
    ahead = list(itertools.accumulate(events, initial=READ_SLOTS - 1))  # begun by the previous token
    assert max(ahead) <= READ_SLOTS
    assert min(ahead) >= 1, "reading begins before a tile is needed"
    assert events.count(1) == events.count(-1) > 50, "each tile that is read is used"


# -- the file --------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_slice_can_be_read_from_the_file(tmp_path_factory, data):
    heads = data.draw(st.integers(1, 4))
    tokens = data.draw(st.integers(1, 300))
    key_dim = data.draw(st.sampled_from([1, 3, 16, 64]))
    value_dim = data.draw(st.sampled_from([1, 8, 64]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    file = DiskFile(tmp_path_factory.mktemp("file"), data.draw(st.sampled_from([0, 10_000])))
    k = torch.rand(heads, tokens, key_dim).to(dtype)
    v = torch.rand(heads, tokens, value_dim).to(dtype)
    memory = torch.cat([k.flatten(1), v.flatten(1)], dim=1).contiguous()
    before = file.allocate(data.draw(st.sampled_from([1, 4096, 5000])))
    start = file.allocate(memory.numel() * dtype.itemsize)
    assert start > before
    file.write(start, [memory.view(torch.uint8).reshape(-1).numpy().data])
    location = DiskLocation(file, start, heads, tokens, key_dim * dtype.itemsize, value_dim * dtype.itemsize, dtype)
    first = data.draw(st.integers(0, heads - 1))
    last = data.draw(st.integers(first + 1, heads))
    begin = data.draw(st.integers(0, tokens - 1))
    stop = data.draw(st.integers(begin + 1, tokens))
    piece = DiskSlice(location, first, last, begin, stop)
    reads, (found_k, found_v) = piece.plan_reads(torch.zeros(piece.nbytes + 64, dtype=torch.uint8))
    file.read(reads)
    assert torch.equal(found_k, k[first:last, begin:stop])
    assert torch.equal(found_v, v[first:last, begin:stop])


def test_files_have_no_name_and_their_space_is_reused(model, tmp_path):
    _, cache = read_and_write(
        model, token_ids(4000), host_kv_budget_bytes=BUDGET, disk_tier=str(tmp_path / "new" / "tier")
    )
    assert list((tmp_path / "new" / "tier").iterdir()) == [], "a crash leaves nothing behind"
    file = cache.engine.disk.file
    used = file._used
    assert cache.stats().disk_kv_bytes > 0
    cache.reset()
    gc.collect()
    assert cache.stats().disk_kv_bytes == 0
    with headinfer.enable(model, chunk_tokens=CHUNK):
        forward(model, cache, token_ids(4000))
    assert cache.engine.disk.file is file
    assert file._used <= 1.1 * used


def test_space_is_reserved_before_the_first_token(model, tmp_path, monkeypatch):
    asked = []
    original = os.posix_fallocate

    def fallocate(descriptor, offset, length):
        asked.append(length)
        return original(descriptor, offset, length)

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    with headinfer.enable(model, chunk_tokens=CHUNK, host_kv_budget_bytes=BUDGET, disk_tier=str(tmp_path)) as enabled:
        cache = enabled.new_cache(expected_tokens=4000)
        forward(model, cache, token_ids(100))
        token_bytes = sum(2 * layer.layer_kv.heads * layer.layer_kv.key_dim * 4 for layer in cache.head_layers)
        assert asked == [4000 * token_bytes]
        forward(model, cache, token_ids(3900))
    assert len(asked) == 1, "the reserved space is sufficient"


def test_a_full_disk_is_reported_before_the_first_token(model, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with (
        headinfer.enable(model, chunk_tokens=CHUNK, host_kv_budget_bytes=BUDGET, disk_tier=str(tmp_path)) as enabled,
        pytest.raises(CapacityError, match=r"has no room for .* of KV \(No space left on device\): free some"),
    ):
        forward(model, enabled.new_cache(expected_tokens=10**6), token_ids(100))


@pytest.mark.parametrize("call", ["pwrite", "preadv"])
def test_errors_of_the_disk_are_reported(model, tmp_path, monkeypatch, call):
    ids = token_ids(4000)
    with headinfer.enable(model, chunk_tokens=CHUNK, host_kv_budget_bytes=BUDGET, disk_tier=str(tmp_path)) as enabled:
        cache = enabled.new_cache()
        forward(model, cache, ids)

        def fail(*_):
            raise OSError(errno.EIO, "Input/output error")

        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            with (
                pytest.raises(OSError, match="Input/output error")
                if call == "preadv"
                else pytest.raises(CapacityError, match="cannot write KV")
            ):
                for _ in range(20):
                    forward(model, cache, ids[:, :CHUNK])


def test_an_error_before_a_tile_is_loaded_leaves_its_slot_free(model, tmp_path, monkeypatch):
    ids = token_ids(3000)
    load_into = DiskSlice.load_into
    left = 0

    def fail_later(piece, memory):
        nonlocal left
        left -= 1
        if left == 0:
            raise RuntimeError("no memory for the reads")
        return load_into(piece, memory)

    monkeypatch.setattr(DiskSlice, "load_into", fail_later)
    with headinfer.enable(model, chunk_tokens=CHUNK, host_kv_budget_bytes=BUDGET, disk_tier=str(tmp_path)) as enabled:
        cache = enabled.new_cache()
        forward(model, cache, ids)
        fork = cache.fork()
        expected = forward(model, fork, token_ids(1))
        for number in range(READ_SLOTS + 1):
            left = 3 + number
            with pytest.raises(RuntimeError, match="no memory for the reads"):
                forward(model, cache, token_ids(1))
        assert torch.equal(forward(model, cache, token_ids(1)), expected)


def test_invalid_options(model, tmp_path):
    with pytest.raises(UsageError, match="host_kv_budget_bytes and disk_tier go together"):
        HeadCache(model.config, host_kv_budget_bytes=2**30)
    with pytest.raises(UsageError, match="host_kv_budget_bytes and disk_tier go together"):
        HeadCache(model.config, disk_tier=str(tmp_path))
    with pytest.raises(UsageError, match="host_kv_budget_bytes is 0"):
        HeadCache(model.config, host_kv_budget_bytes=0, disk_tier=str(tmp_path))
    (tmp_path / "file").write_text("")
    with headinfer.enable(model, host_kv_budget_bytes=2**18, disk_tier=str(tmp_path)) as enabled:
        with pytest.raises(CapacityError, match=r"a host KV budget of 0\.2 MiB is used up .*: raise it"):
            forward(model, enabled.new_cache(), token_ids(1000))
        nowhere = HeadCache(model.config, host_kv_budget_bytes=BUDGET, disk_tier=str(tmp_path / "file" / "x"))
        with pytest.raises(CapacityError, match="name another folder for the disk tier"):
            forward(model, nowhere, token_ids(1000))
    with (
        headinfer.enable(model, host_kv_budget_bytes=BUDGET, disk_tier=str(tmp_path / "file")) as enabled,
        pytest.raises(UsageError, match="is not a writable folder"),
    ):
        enabled.new_cache()


def test_read_slots_are_a_share_of_the_budget():
    assert read_slot_bytes(1) == 64 * 1024
    assert read_slot_bytes(32 * 2**20) == 2**20
    assert read_slot_bytes(2**40) == 32 * 2**20
