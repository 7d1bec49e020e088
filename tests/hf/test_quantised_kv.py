"""kv_dtype against transformers over K and V that were quantised at the same positions, and what exact code refuses.

The oracle is tests/support/quantised_cache.py. Results differ from it by the rounding of the CPU's integer kernel; in
chunks, which are computed with decoded K and V, by float32 rounding only.
"""

import pytest
import torch
from generation import generate, make_model, padded, prompt
from quantised_cache import forward, quantised_cache
from transformers import DynamicCache

import headinfer
from headinfer.attention import native
from headinfer.errors import ApproximationWarning, UnsupportedError, UsageError

CHUNK = 192
BITS = {"int8": 8, "int4": 4}
CHUNK_ERROR = 3e-4  # of logits up to 0.7: what float32 rounding changes, and the roundings to the next number
DECODE_ERROR = {"int8": 3e-4, "int4": 3e-2}  # the kernel rounds query rows to 15 or 8 bits
of_dtypes = pytest.mark.parametrize("kv_dtype", ["int8", "int4"])
RING = {"device_kv_budget_bytes": 3 * 2**20, "streaming_budget_bytes": 3 * 2**20}


@pytest.fixture(scope="module")
def llama():
    return make_model("llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def ids():
    return prompt(rows=2, tokens=720)["input_ids"]


@pytest.fixture(scope="module")
def oracle(llama, ids):
    """The logits of 700 tokens in chunks and of 20 tokens one by one, by kv_dtype."""
    found = {}
    for kv_dtype, cache in (
        ("auto", DynamicCache(config=llama.config)),
        *((name, quantised_cache(llama.config, bits)) for name, bits in BITS.items()),
    ):
        found[kv_dtype] = forward(llama, cache, ids[:, :700], CHUNK), forward(llama, cache, ids[:, 700:], 1)
    return found


def error(found, wanted):
    return float((found - wanted).abs().max())


def read(model, ids, **options):
    """Return the cache after all tokens, with the logits of chunks and of single tokens."""
    with headinfer.enable(model, chunk_tokens=CHUNK, **options) as enabled:
        cache = enabled.new_cache()
        return cache, forward(model, cache, ids[:, :700], CHUNK), forward(model, cache, ids[:, 700:], 1)


@of_dtypes
@pytest.mark.parametrize("transport", ["auto", "eager", "lazy", "cpu share"])
def test_logits_are_those_of_quantised_kv(llama, ids, oracle, kv_dtype, transport):
    """In place, through the ring, and with the share of the CPU."""
    options = {"auto": {}, "eager": RING, "lazy": RING}.get(transport, {})
    if transport in ("eager", "lazy"):
        options = {**options, "transport": transport}
    if transport == "cpu share":
        options = {"transport": "lazy", "cpu_share": 1.0, **RING}
    cache, chunks, single = read(llama, ids, kv_dtype=kv_dtype, **options)
    assert error(chunks, oracle[kv_dtype][0]) < CHUNK_ERROR
    assert error(single, oracle[kv_dtype][1]) < DECODE_ERROR[kv_dtype]
    assert 0 < error(chunks, oracle["auto"][0]) < {"int8": 0.01, "int4": 0.15}[kv_dtype]
    stats = cache.stats()
    assert stats.kv_dtype == kv_dtype
    assert bool(stats.cpu_attended_bytes) == (transport == "cpu share")
    exact = 2 * 2 * 4 * 32 * 4  # float32 bytes of a token: rows, layers, heads, K and V
    assert stats.host_kv_bytes < 1024 * exact * {"int8": 0.45, "int4": 0.3}[kv_dtype]


def test_a_disk_tier_changes_nothing(llama, tmp_path):
    long = prompt(tokens=3600)["input_ids"]
    found = []
    disk = {"host_kv_budget_bytes": 1000 * 1024, "disk_tier": tmp_path}
    for options in ({}, disk):
        with headinfer.enable(
            llama, chunk_tokens=CHUNK, kv_dtype="int8", transport="lazy", **RING, **options
        ) as enabled:
            cache = enabled.new_cache()
            found.append(forward(llama, cache, long, CHUNK))
        assert bool(cache.stats().disk_kv_bytes) == bool(options)
    assert error(*found) < CHUNK_ERROR


@of_dtypes
def test_the_native_kernel_and_decoding_agree(llama, ids, oracle, kv_dtype, monkeypatch):
    monkeypatch.setattr(native, "quantised_refusal", lambda bits: "not here")
    _, chunks, single = read(llama, ids, kv_dtype=kv_dtype)
    assert error(chunks, oracle[kv_dtype][0]) < CHUNK_ERROR
    assert error(single, oracle[kv_dtype][1]) < CHUNK_ERROR


def test_padding_that_cuts_blocks_changes_nothing(llama):
    """Rows begin at tokens 0, 37 and 290, in the middle of a block. Each row gives the tokens that it gives alone."""
    inputs = padded(tokens=700)
    for options in ({}, {"transport": "lazy", **RING}, {"transport": "lazy", "cpu_share": 1.0, **RING}):
        with headinfer.enable(llama, chunk_tokens=CHUNK, kv_dtype="int8", **options):
            _, together = generate(llama, inputs, max_new_tokens=4)
        with torch.inference_mode():
            positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
            cache = quantised_cache(llama.config, 8)
            mask = inputs["attention_mask"]
            for start in range(0, 700, CHUNK):
                part = slice(start, start + CHUNK)
                found = llama(
                    inputs["input_ids"][:, part],
                    attention_mask=mask[:, : start + CHUNK],
                    position_ids=positions[:, part],
                    past_key_values=cache,
                )
        assert error(together[0], found.logits[:, -1]) < CHUNK_ERROR


@of_dtypes
def test_forks_crops_and_reordered_rows(llama, ids, oracle, kv_dtype):
    with headinfer.enable(llama, chunk_tokens=CHUNK, kv_dtype=kv_dtype) as enabled:
        cache = enabled.new_cache()
        forward(llama, cache, ids[:, :700], CHUNK)
        fork = cache.fork()
        forward(llama, cache, ids[:, 700:], 1)
        cache.crop(700)  # within the tail: exact as before
        again = forward(llama, cache, ids[:, 700:], 1)
        assert error(again, oracle[kv_dtype][1]) < DECODE_ERROR[kv_dtype]
        fork.reorder_cache(torch.tensor([1, 0]))
        swapped = forward(llama, fork, ids.flip(0)[:, 700:], 1)
        assert error(swapped.flip(0), oracle[kv_dtype][1]) < DECODE_ERROR[kv_dtype]
        fork.crop(333)  # within a block on the host, whose first tokens become the tail
        assert [layer.layer_kv.host_tokens for layer in fork.head_layers] == [320, 320]
        rest = forward(llama, fork, ids.flip(0)[:, 333:700], CHUNK).flip(0)
        assert error(rest, oracle["auto"][0][:, 333:]) < {"int8": 0.01, "int4": 0.15}[kv_dtype]


def test_beams_and_guesses(llama):
    inputs = prompt(tokens=700)
    inputs["input_ids"][:, 400:] = inputs["input_ids"][:, 100:400]
    for more in ({"num_beams": 3}, {"prompt_lookup_num_tokens": 4}):
        with headinfer.enable(llama, chunk_tokens=CHUNK, kv_dtype="int8"):
            found = llama.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=0, **more)
        assert found.shape[1] == 706
    with headinfer.enable(llama, chunk_tokens=CHUNK, kv_dtype="int8"):
        plain = llama.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(found, plain)


def test_saved_sessions_say_that_they_are_approximate(llama, ids, tmp_path):
    cache, _, _ = read(llama, ids, kv_dtype="int8")
    cache.save(tmp_path / "one", ids)
    with pytest.warns(ApproximationWarning, match="stored in int8, which is approximate"):
        headinfer.HeadCache.load(tmp_path / "one", llama)
    with pytest.raises(UsageError, match="holds its KV in int8, which is approximate"):
        headinfer.HeadCache.load(tmp_path / "one", llama, kv_dtype="auto")
    with headinfer.enable(llama, chunk_tokens=CHUNK):
        more = prompt(rows=2, tokens=300, seed=5)["input_ids"]
        resident = {"transport": "lazy", "device_kv_budget_bytes": 4 * 2**20, "streaming_budget_bytes": 3 * 2**20}
        for options in ({}, {"transport": "lazy", **RING}, resident):
            loaded = headinfer.HeadCache.load(tmp_path / "one", llama, kv_dtype="int8", **options)
            assert loaded.stats().kv_dtype == "int8"
            found = forward(llama, loaded, more, CHUNK)
            wanted = forward(llama, cache.fork(), more, CHUNK)
            assert error(found, wanted) < CHUNK_ERROR
            assert bool(loaded.stats().device_resident_bytes) == (options is resident)
            if not options:
                assert torch.equal(found, wanted)
    exact, _, _ = read(llama, ids)
    exact.save(tmp_path / "two", ids)
    with pytest.raises(UsageError, match="holds its KV exactly"):
        headinfer.HeadCache.load(tmp_path / "two", llama, kv_dtype="int8")


def test_what_is_refused(llama):
    narrow = make_model("llama", head_dim=24, num_hidden_layers=1)
    with pytest.raises(UnsupportedError, match="head dims are 24 for K and 24 for V"):
        headinfer.enable(narrow, kv_dtype="int8")
    with pytest.raises(UnsupportedError, match="head dims are 24"):
        headinfer.HeadCache(narrow.config, kv_dtype="int4")
    with pytest.raises(UsageError, match="kv_dtype is int2: it must be one of auto, int8, int4"):
        headinfer.enable(llama, kv_dtype="int2")
    with pytest.raises(UsageError, match="tile_tokens is 100: with kv_dtype int8 it must be a multiple of 64"):
        headinfer.enable(llama, kv_dtype="int8", tile_tokens=100)


def test_the_plan_counts_the_bytes_of_the_engine(llama, ids):
    with headinfer.enable(llama, kv_dtype="int4") as enabled:
        llama.generate(ids[:1], max_new_tokens=8, do_sample=False, pad_token_id=0)
        assert enabled.plan is not None
        assert enabled.plan.as_dict()["approximate"]
        cache = enabled.last_cache
        assert cache is not None
        stats = cache.stats()
    assert stats.host_kv_bytes == enabled.plan.footprint.host_kv_bytes
