"""HeadCache as a transformers Cache: rows move, lengths go back, errors leave nothing behind, every byte is counted.

The oracle is transformers' DynamicCache under sdpa, on the same model, through the same calls.
"""

import functools

import pytest
import torch
from hf_models import (
    BUDGET,
    FAMILIES,
    KV_HEADS,
    LAYERS,
    STAGINGS,
    TOKEN_BYTES,
    WINDOW,
    assert_same,
    close,
    config_of,
    device_figures,
    generate,
    ids_of,
    make,
    options_of,
    prompt,
    shared,
)
from transformers import DynamicCache

import headinfer
from headinfer.errors import CapacityError, StateError
from headinfer.kv.tiers import HostTier
from headinfer.kv.transfer import EarlyRing


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(params=STAGINGS)
def staging(request):
    return request.param


@pytest.fixture(params=["early", "late"])
def ring(request):
    return request.param


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def lengths(cache):
    return {layer.get_seq_length() for layer in cache.layers}


def both(model, staging, steps):
    """steps(cache) gives logits; under sdpa with a DynamicCache and under headinfer. Returns cache and logits."""
    expected = steps(DynamicCache(config=model.config))
    with headinfer.enable(model, **options_of(staging)) as enabled:
        cache = enabled.new_cache()
        found = steps(cache)
    return cache, found, expected


# -- what generate() asks a cache ------------------------------------------------------------------------------


def test_lengths_and_mask_sizes_are_those_of_a_dynamic_cache(family):
    model = shared(family)

    def says(cache):
        return [
            [
                cache.get_seq_length(index),
                cache.get_max_length(index),
                cache.is_sliding[index],
                *(cache.get_mask_sizes(queries, index) for queries in (1, 3, 50)),
            ]
            for index in range(LAYERS)
        ] + [cache.get_seq_length(), cache.get_max_length(), cache.is_croppable, cache.is_compileable, len(cache)]

    def story(cache):
        told = [says(cache)]
        for chunk in ids_of(2, 300).split([20, 12, 1, 267], dim=1):
            model(chunk, past_key_values=cache)
            told.append(says(cache))
        return told

    _, found, expected = both(model, "auto", story)
    assert found == expected
    assert found[-1][-5] == 300


def test_the_output_carries_the_cache_that_was_passed():
    model = shared("llama")
    with headinfer.enable(model) as enabled:
        cache = enabled.new_cache()
        assert model(ids_of(1, 5), past_key_values=cache).past_key_values is cache
        assert generate(model, prompt(), past_key_values=enabled.new_cache()).past_key_values is enabled.last_cache


# -- memory ----------------------------------------------------------------------------------------------------


def segments(cache):
    found = {}
    for layer in cache.head_layers:
        for lane in layer.store.lanes():
            found |= {id(span.segment): span.segment for span in lane.spans}
    return found.values()


def test_host_bytes_are_those_of_the_segments_and_exact_where_the_length_is_known():
    model = shared("llama")
    with headinfer.enable(model) as enabled:
        cache, known = enabled.new_cache(), enabled.new_cache(expected_tokens=1280)
        for held in (cache, known):
            for chunk in ids_of(2, 1300).split(99, dim=1):
                model(chunk, past_key_values=held)
            assert held.stats().host_kv_bytes == sum(
                side.numel() * side.element_size() for segment in segments(held) for side in (segment.k, segment.v)
            )
            store = held.head_layers[0].store
            written = store.host_tokens * TOKEN_BYTES * LAYERS * 2
            assert written <= held.stats().host_kv_bytes <= written + 256 * TOKEN_BYTES * LAYERS * 2
        assert known.stats().host_kv_bytes == 1280 * TOKEN_BYTES * LAYERS * 2


def test_generate_knows_the_final_length():
    """One segment for a prompt and its answer: nothing is allocated beyond them."""
    model = shared("llama")
    with headinfer.enable(model) as enabled:
        generate(model, prompt(1, 1500), max_new_tokens=36)
    stats = enabled.last_cache.stats()
    assert stats.tokens == 1535
    assert stats.host_kv_bytes == 1536 * TOKEN_BYTES * LAYERS
    assert stats.host_kv_peak_bytes == stats.host_kv_bytes


def test_reset_gives_memory_back_and_the_cache_serves_again(family, staging):
    model = shared(family)
    inputs = prompt(3, 350, starts=(0, 9, 200))
    expected = generate(model, inputs)
    with headinfer.enable(model, **options_of(staging)) as enabled:
        cache = enabled.new_cache()
        model(ids_of(1, 700), past_key_values=cache)  # another batch, other words
        cache.reset()
        stats = cache.stats()
        assert lengths(cache) == {0}
        assert stats.host_kv_bytes == stats.device_tail_bytes == stats.tokens == 0
        assert stats.host_kv_peak_bytes > 0
        found = generate(model, inputs, past_key_values=cache)
    assert_same(found, expected)


def test_a_cache_that_is_let_go_gives_everything_back():
    model = shared("llama")
    with headinfer.enable(model) as enabled:
        cache = enabled.new_cache()
        model(ids_of(2, 700), past_key_values=cache)
        twin = cache.fork()
        ledger = cache.engine.ledger
        before = ledger.host_bytes
        tail = ledger.device_bytes["tail"]
        assert before == 2 * 512 * TOKEN_BYTES * LAYERS + 0 * tail or before > 0
        del twin
        assert (ledger.host_bytes, ledger.device_bytes["tail"]) == (before, tail // 2)
        del cache
        enabled.last_cache = None
        assert (ledger.host_bytes, ledger.device_bytes["tail"]) == (0, 0)


def filled(enabled, rows, tokens, dtype=torch.float32):
    """A cache with noise in it, as after a prefill of so many tokens."""
    cache = enabled.new_cache()
    for layer in cache.head_layers:
        noise = torch.randn(rows, KV_HEADS, tokens, 16, dtype=dtype)
        layer.lazy_initialization(noise, noise)
        for chunk in noise.split(1000, dim=2):
            layer.store.append(chunk, chunk.roll(1, dims=2))
    return cache


@pytest.mark.parametrize("rows", [1, 3])
def test_device_bytes_are_the_same_at_1k_and_8k_tokens(ring, rows):
    model, held = shared("llama"), []
    for tokens in (1024, 8192):
        with headinfer.enable(model, **options_of(ring, heads_per_group=None, tile_tokens=None)) as enabled:
            cache = filled(enabled, rows, tokens)
            for queries in (1, 64):
                model(ids_of(rows, queries), past_key_values=cache)
        stats, engine = cache.stats(), cache.engine
        held.append(device_figures(stats))
        assert stats.device_ring_bytes == sum(slot.numel() for slot in engine._ring._slots.memory)
        assert stats.device_staging_bytes == sum(buffer.numel() for buffer in engine._write._buffers)
        assert stats.device_tail_bytes == LAYERS * rows * 256 * TOKEN_BYTES
        assert (
            stats.device_kv_bytes
            == stats.device_ring_bytes + stats.device_tail_bytes + stats.device_staging_bytes
            <= stats.device_kv_peak_bytes
            <= BUDGET
        )
        assert stats.device_kv_bytes > BUDGET - 2 * 512, "what is left of the budget is the ring's"
    assert held[0] == held[1]


@pytest.mark.parametrize("tile", [{}, {"heads_per_group": 1, "tile_tokens": 64}, {"heads_per_group": 3}], ids=str)
def test_each_byte_crosses_the_link_once(ring, tile):
    model, rows, tokens = shared("llama"), 2, 3000
    with headinfer.enable(model, staging=ring, device_kv_budget=BUDGET, **tile) as enabled:
        cache = filled(enabled, rows, tokens)
        filling = cache.stats()
        assert filling.link_to_device_bytes == 0
        for queries in (1, 1, 300, 1):
            store, before = cache.head_layers[0].store, cache.stats()
            past, gone = store.host_tokens, store.tokens
            model(ids_of(rows, queries), past_key_values=cache)
            after = cache.stats()
            crossed = after.link_to_device_bytes - before.link_to_device_bytes
            assert crossed == past * rows * TOKEN_BYTES * LAYERS
            back = after.link_to_host_bytes - before.link_to_host_bytes
            assert back == (store.host_tokens - past) * rows * TOKEN_BYTES * LAYERS
            assert store.tokens == gone + queries
        assert after.link_to_host_bytes == store.host_tokens * rows * TOKEN_BYTES * LAYERS


def test_rows_that_share_their_past_share_its_way_over_the_link(ring):
    model = shared("llama")
    with headinfer.enable(model, staging=ring, device_kv_budget=BUDGET) as enabled:
        cache = filled(enabled, 1, 2000)
        past = cache.head_layers[0].store.host_tokens
        cache.batch_repeat_interleave(4)
        before = cache.stats()
        model(ids_of(4, 1), past_key_values=cache)
        after = cache.stats()
    assert after.link_to_device_bytes - before.link_to_device_bytes == past * TOKEN_BYTES * LAYERS
    assert after.host_kv_bytes == before.host_kv_bytes


# -- rows ------------------------------------------------------------------------------------------------------

MOVES = {
    "a new order": lambda cache: cache.reorder_cache(torch.tensor([2, 0, 1])),
    "one row thrice": lambda cache: cache.reorder_cache(torch.tensor([1, 1, 1])),
    "two of three": lambda cache: cache.reorder_cache(torch.tensor([2, 0, 2])),
    "each twice": lambda cache: cache.batch_repeat_interleave(2),
    "by index": lambda cache: cache.batch_select_indices(torch.tensor([2, 0])),
    "by mask": lambda cache: cache.batch_select_indices(torch.tensor([False, True, True])),
}


@pytest.mark.parametrize("move", MOVES)
def test_rows_move_as_in_a_dynamic_cache(family, staging, move):
    """The rows go on with different words, across flushes of the tail, and then move again."""
    model = shared(family)

    def steps(cache):
        model(ids_of(3, 330), past_key_values=cache)
        MOVES[move](cache)
        rows = {"each twice": 6, "by index": 2, "by mask": 2}.get(move, 3)
        logits = [model(chunk, past_key_values=cache).logits for chunk in ids_of(rows, 290, seed=2).split(145, dim=1)]
        cache.reorder_cache(torch.arange(rows - 1, -1, -1))
        return torch.cat([*logits, model(ids_of(rows, 2, seed=3), past_key_values=cache).logits], dim=1)

    cache, found, expected = both(model, staging, steps)
    assert close(found, expected)
    assert lengths(cache) == {622}


def test_reordering_moves_table_entries_and_counts_the_tails(staging):
    model = shared("llama")
    with headinfer.enable(model, **options_of(staging)) as enabled:
        cache = enabled.new_cache()
        model(ids_of(4, 700), past_key_values=cache)
        before, tail = cache.stats(), cache.head_layers[0].store.tail_tokens
        kept = {id(segment) for segment in segments(cache)}
        cache.reorder_cache(torch.tensor([3, 2, 1, 0]))
    after = cache.stats()
    assert {id(segment) for segment in segments(cache)} == kept
    assert after.host_kv_bytes == before.host_kv_bytes > 0
    assert after.tail_moved_bytes - before.tail_moved_bytes == 4 * tail * TOKEN_BYTES * LAYERS > 0
    assert after.link_to_device_bytes == before.link_to_device_bytes
    assert after.link_to_host_bytes == before.link_to_host_bytes
    assert device_figures(after) == device_figures(before)


def test_rows_that_nobody_sees_any_more_give_their_memory_back():
    model = shared("llama")
    with headinfer.enable(model) as enabled:
        cache = enabled.new_cache()
        model(ids_of(4, 700), past_key_values=cache)
        whole = cache.stats()
        cache.batch_repeat_interleave(2)
        assert cache.stats().host_kv_bytes == whole.host_kv_bytes
        assert cache.stats().device_tail_bytes == 2 * whole.device_tail_bytes
        cache.batch_select_indices(torch.tensor([5]))
    assert cache.stats().host_kv_bytes == whole.host_kv_bytes // 4
    assert cache.stats().device_tail_bytes == whole.device_tail_bytes // 4


def test_a_fork_and_its_origin_go_their_own_ways(family, staging):
    """In turns, so that neither may touch what the other reads."""
    model = shared(family)
    start, one, two = ids_of(1, 500), ids_of(1, 290, seed=2), ids_of(1, 290, seed=3)
    expected = [model(torch.cat([start, own], dim=1)).logits[:, -290:] for own in (one, two)]
    with headinfer.enable(model, **options_of(staging)) as enabled:
        cache = enabled.new_cache()
        model(start, past_key_values=cache)
        before = cache.stats().host_kv_bytes
        twin = cache.fork()
        assert cache.stats().host_kv_bytes == before
        found = [
            [model(ids, past_key_values=held).logits for held, ids in zip((cache, twin), pair, strict=True)]
            for pair in zip(one.split(58, dim=1), two.split(58, dim=1), strict=True)
        ]
        assert lengths(cache) == lengths(twin) == {790}
        if staging != "auto":
            assert cache.stats().device_kv_peak_bytes <= BUDGET
    for ours, theirs in zip(zip(*found, strict=True), expected, strict=True):
        assert close(torch.cat(ours, dim=1), theirs)


def test_a_crop_of_a_fork_leaves_the_origin_alone(family):
    model = shared(family)
    start, new = ids_of(1, 500), ids_of(1, 200, seed=2)
    expected = [model(torch.cat([start[:, :length], new], dim=1)).logits[:, -200:] for length in (500, 100)]
    with headinfer.enable(model) as enabled:
        cache = enabled.new_cache()
        cache.activate_past_recording()
        model(start, past_key_values=cache)
        twin = cache.fork()
        twin.crop(-400)
        found = [model(new, past_key_values=held).logits for held in (cache, twin)]
    for ours, theirs in zip(found, expected, strict=True):
        assert close(ours, theirs)


# -- going back ------------------------------------------------------------------------------------------------


def test_a_window_that_has_dropped_tokens_refuses_a_crop_before_it_starts():
    model, ids = shared("gemma3_text"), ids_of(2, 400)
    with headinfer.enable(model) as enabled:
        cache, plain = enabled.new_cache(), enabled.new_cache()
        for held in (cache, plain):
            model(ids, past_key_values=held)
        before = [dict(layer.__dict__) for layer in cache.layers]
        with pytest.raises(StateError, match="activate_past_recording"):
            cache.crop(-5)
        assert lengths(cache) == {400}
        for layer, kept in zip(cache.layers, before, strict=True):
            assert layer.__dict__.keys() == kept.keys()
            assert all(layer.__dict__[name] is value for name, value in kept.items())
        found, expected = (model(ids_of(2, 9, seed=2), past_key_values=held).logits for held in (cache, plain))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("removed", [1, 20, 31, 32, 33, 200, 389, 400])
@pytest.mark.parametrize("full_first", [False, True])
def test_a_window_that_records_its_past_can_go_back(removed, full_first):
    kinds = ["full_attention", "sliding_attention"]
    model = make("gemma3_text", layer_types=(kinds if full_first else kinds[::-1]) * 2)
    ids, new = ids_of(2, 400), ids_of(2, 50, seed=2)
    expected = model(torch.cat([ids[:, : 400 - removed], new], dim=1)).logits[:, -50:]
    with headinfer.enable(model) as enabled:
        cache = enabled.new_cache()
        cache.activate_past_recording()
        for chunk in ids.split(150, dim=1):
            model(chunk, past_key_values=cache)
        cache.crop(-removed)
        assert lengths(cache) == {400 - removed}
        assert close(model(new, past_key_values=cache).logits, expected)


CROPS = {
    "to a length": lambda cache: cache.crop(50),
    "further than it is long": lambda cache: cache.crop(-1000),
    "recorded too late": lambda cache: (cache.activate_past_recording(), cache.crop(-5)),
    "twice": lambda cache: (cache.activate_past_recording(), record(cache), cache.crop(-5), cache.crop(-5)),
    "nothing": lambda cache: cache.crop(0),
}


def record(cache):
    shared("gemma3_text")(ids_of(1, 60), past_key_values=cache)


@pytest.mark.parametrize("recording", [False, True], ids=["", "recording"])
@pytest.mark.parametrize("full_first", [False, True])
@pytest.mark.parametrize("crop", ["to a length", "further than it is long", "recorded too late", "twice", "nothing"])
def test_a_crop_is_done_in_all_layers_or_refused_and_never_wrong(crop, full_first, recording):
    """Whatever the crop does, the layers agree afterwards, and what follows is what a new cache would say."""
    kinds = ["full_attention", "sliding_attention"]
    model = make("gemma3_text", layer_types=(kinds if full_first else kinds[::-1]) * 2)
    ids, new = ids_of(1, 400), ids_of(1, 7, seed=2)
    with headinfer.enable(model) as enabled:
        cache = enabled.new_cache()
        if recording:
            cache.activate_past_recording()
        model(ids, past_key_values=cache)
        if crop == "recorded too late":
            cache.activate_past_recording()
        amounts = {"to a length": [50], "further than it is long": [-1000], "twice": [-5, -5], "nothing": [0]}
        for amount in amounts.get(crop, [-5]):
            before = cache.get_seq_length()
            try:
                cache.crop(amount)
            except headinfer.HeadinferError:
                assert lengths(cache) == {before}, "a refused crop changes nothing"
            assert len(lengths(cache)) == 1
        kept = cache.get_seq_length()
        found = model(new, past_key_values=cache).logits
    assert close(found, model(torch.cat([ids[:, :kept], new], dim=1)).logits[:, -7:])


@pytest.mark.parametrize("amount", [0, -1, -300, -400, -1000])
def test_a_crop_of_full_attention_layers(amount):
    model, ids, new = shared("qwen2"), ids_of(2, 400), ids_of(2, 60, seed=2)
    kept = max(400 + amount, 0)
    with headinfer.enable(model) as enabled:
        cache = enabled.new_cache()
        model(ids, past_key_values=cache)
        cache.crop(amount)
        assert lengths(cache) == {kept}
        found = model(new, past_key_values=cache).logits
    assert close(found, model(torch.cat([ids[:, :kept], new], dim=1)).logits[:, -60:])


# -- errors ----------------------------------------------------------------------------------------------------


def fail_in_mlp(model, monkeypatch, error):
    def fail(*_):
        handle.remove()
        raise error

    handle = model.model.layers[2].mlp.register_forward_hook(fail)


def fail_in_attention(model, monkeypatch, error):
    """After the update of layer 1, before its attention."""

    def fail(module, inputs, output):
        handle.remove()
        raise error

    attention = model.model.layers[1].self_attn
    handle = attention.v_proj.register_forward_hook(fail)


def fail_in_output(model, monkeypatch, error):
    """After the attention of the last layer."""

    def fail(*_):
        handle.remove()
        raise error

    handle = model.lm_head.register_forward_hook(fail)


def fail_in_host_memory(model, monkeypatch, error):
    """While a middle layer's chunk is written to the host: the seventh segment from now."""
    allocate, calls = HostTier.allocate, []

    def failing(self, *args):
        calls.append(1)
        if len(calls) == 3:
            raise error
        return allocate(self, *args)

    monkeypatch.setattr(HostTier, "allocate", failing)


PLACES = {
    "mlp": fail_in_mlp,
    "attention": fail_in_attention,
    "output": fail_in_output,
    "host memory": fail_in_host_memory,
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("error", [RuntimeError("once"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_an_error_in_a_forward_leaves_the_cache_as_it_was(family, staging, place, error, monkeypatch):
    """Then generation goes on with the tokens that there would have been."""
    model, first, second = shared(family), prompt(2, 390, starts=(0, 40)), ids_of(2, 330, seed=2)

    def whole_of(said):
        ids = torch.cat([said, second], dim=1)
        mask = torch.cat([first["attention_mask"], torch.ones(2, ids.shape[1] - 390, dtype=torch.long)], dim=1)
        return {"input_ids": ids, "attention_mask": mask}

    with headinfer.enable(model, **options_of(staging, chunk_tokens=1000)) as enabled:
        plain, hurt = enabled.new_cache(), enabled.new_cache()
        said = [generate(model, first, past_key_values=cache).sequences for cache in (plain, hurt)]
        expected = generate(model, whole_of(said[0]), past_key_values=plain)
        before = hurt.stats()
        with monkeypatch.context() as patch:
            PLACES[place](model, patch, error)
            with pytest.raises(type(error)):
                generate(model, whole_of(said[1]), past_key_values=hurt)
        assert lengths(hurt) == {401}
        assert not any(layer.pending for layer in hurt.head_layers)
        assert device_figures(hurt.stats()) == device_figures(before)
        found = generate(model, whole_of(said[1]), past_key_values=hurt)
    assert_same(found, expected, tolerance=1e-6)
    assert lengths(hurt) == {390 + 12 + 330 + 11}


@pytest.mark.parametrize("error", [RuntimeError("once"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("method", ["fetch", "wait", "release"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_an_error_while_tiles_are_under_way(family, method, error, monkeypatch):
    model, ids, new = shared(family), ids_of(2, 500), ids_of(2, 20, seed=2)
    original, calls = getattr(EarlyRing, method), []

    def failing(self, *args):
        calls.append(1)
        if len(calls) == 21:
            raise error
        return original(self, *args)

    with headinfer.enable(model, **options_of("early")) as enabled:
        plain, hurt = enabled.new_cache(), enabled.new_cache()
        for cache in (plain, hurt):
            model(ids, past_key_values=cache)
        expected = model(new, past_key_values=plain).logits
        with monkeypatch.context() as patch:
            patch.setattr(EarlyRing, method, failing)
            with pytest.raises(type(error)):
                model(new, past_key_values=hurt)
        assert len(calls) == 21
        assert lengths(hurt) == {500}
        assert torch.equal(model(new, past_key_values=hurt).logits, expected)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_an_error_in_the_first_forward_leaves_an_empty_cache(family, staging, monkeypatch):
    """One that takes any batch."""
    model = shared(family)
    with headinfer.enable(model, **options_of(staging)) as enabled:
        cache = enabled.new_cache()
        fail_in_mlp(model, monkeypatch, RuntimeError("once"))
        with pytest.raises(RuntimeError, match="once"):
            model(ids_of(3, 300), past_key_values=cache)
        assert lengths(cache) == {0}
        assert cache.stats().device_tail_bytes == cache.stats().host_kv_bytes == 0
        found = model(ids_of(2, 300), past_key_values=cache).logits
    assert close(found, model(ids_of(2, 300)).logits)


def test_an_error_where_the_cache_was_passed_by_position(monkeypatch):
    model, ids = shared("llama"), ids_of(1, 300)
    with headinfer.enable(model) as enabled:
        cache = enabled.new_cache()
        model(ids, None, None, cache)
        assert enabled.last_cache is cache
        fail_in_mlp(model, monkeypatch, RuntimeError("once"))
        with pytest.raises(RuntimeError, match="once"):
            model(ids, None, None, cache)
        assert lengths(cache) == {300}


def test_a_budget_that_does_not_do_leaves_the_cache_as_it_was():
    """Noticed in the middle of generation: more rows need more tail."""
    model = shared("llama")
    with headinfer.enable(model, staging="early", device_kv_budget=3 << 20) as enabled:
        cache = enabled.new_cache()
        model(ids_of(1, 300), past_key_values=cache)
        cache.batch_repeat_interleave(8)
        with pytest.raises(CapacityError, match="budget"):
            model(ids_of(8, 1), past_key_values=cache)
        assert lengths(cache) == {300}
        cache.batch_select_indices(torch.tensor([0]))
        new = ids_of(1, 1, seed=2)
        found = model(new, past_key_values=cache).logits
    assert close(found, model(torch.cat([ids_of(1, 300), new], dim=1)).logits[:, -1:])


def test_another_batch_than_the_cache_has_is_refused():
    model = shared("llama")
    with headinfer.enable(model) as enabled:
        cache = enabled.new_cache()
        model(ids_of(2, 30), past_key_values=cache)
        with pytest.raises(StateError, match="2 rows"):
            model(ids_of(3, 1), past_key_values=cache)
        assert lengths(cache) == {30}


# -- enable and disable ----------------------------------------------------------------------------------------


def state_of(model):
    return dict(model.__dict__), model.config.to_dict(), model.config._attn_implementation, model.generation_config


def test_enabling_twice_raises_and_the_first_goes_on():
    model, inputs = shared("llama"), prompt(1, 300)
    expected = generate(model, inputs)
    with headinfer.enable(model) as enabled:
        before = state_of(model)
        with pytest.raises(StateError, match="already enabled"):
            headinfer.enable(model)
        assert state_of(model) == before
        assert_same(generate(model, inputs), expected)
        assert enabled.last_cache.get_seq_length() == 311


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_disabling_restores_the_model_exactly(family, attention):
    model, inputs = make(family), prompt(2, 120, starts=(0, 15))
    model.set_attn_implementation(attention)
    before, methods, expected = state_of(model), dict(type(model).__dict__), generate(model, inputs)
    caches = []
    for _ in range(3):
        enabled = headinfer.enable(model)
        assert model.config._attn_implementation == "headinfer"
        generate(model, inputs)
        caches.append(enabled.last_cache)
        enabled.disable()
        enabled.disable()  # harmless
        assert state_of(model) == before
        assert dict(type(model).__dict__) == methods
        found = generate(model, inputs)
        assert isinstance(found.past_key_values, DynamicCache)
        assert torch.equal(found.sequences, expected.sequences)
        assert torch.equal(torch.stack(found.logits), torch.stack(expected.logits))
    assert len({id(cache) for cache in caches}) == 3


def test_what_others_put_on_the_model_comes_back():
    """accelerate, for one, puts its own forward on the instance."""
    model, seen = make("llama"), []
    forward, prepare = model.forward, model._prepare_cache_for_generation

    def hooked(*args, **kwargs):
        seen.append("forward")
        return forward(*args, **kwargs)

    def prepared(*args, **kwargs):
        seen.append("prepare")
        return prepare(*args, **kwargs)

    model.forward, model._prepare_cache_for_generation = functools.wraps(forward)(hooked), prepared
    before = state_of(model)
    with headinfer.enable(model) as enabled:
        generate(model, prompt(1, 100), max_new_tokens=2)
        assert enabled.last_cache.get_seq_length() == 101
        assert seen.count("forward") == 2
    assert state_of(model) == before


def test_an_error_in_the_block_restores_the_model():
    model = shared("llama")
    before = state_of(model)
    with pytest.raises(KeyboardInterrupt), headinfer.enable(model):
        raise KeyboardInterrupt
    assert state_of(model) == before


def test_two_models_are_enabled_on_their_own():
    one, two = shared("llama"), shared("qwen3")
    expected = generate(two, prompt())
    with headinfer.enable(one), headinfer.enable(two) as enabled:
        pass
    with headinfer.enable(one):
        assert_same(generate(two, prompt()), expected)
        assert isinstance(generate(two, prompt()).past_key_values, DynamicCache)
    assert enabled.last_cache is None


# -- a HeadCache where it does not belong ----------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 2, 4])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_model_that_is_not_enabled_never_answers_from_a_head_cache(family, attention, layers):
    """Not with an empty cache, and not with one that was filled while the model was enabled."""
    if family == "gemma3_text" and layers == 1:
        pytest.skip("its first layer is a window: nothing to offload")
    model = make(family, num_hidden_layers=layers)
    model.set_attn_implementation(attention)
    with headinfer.enable(model) as enabled:
        cache = enabled.new_cache()
        model(ids_of(1, 300), past_key_values=cache)
    for held in (headinfer.HeadCache(model.config), cache):
        for queries in (1, 20):
            with pytest.raises(StateError, match="enable"):
                model(ids_of(1, queries), past_key_values=held)
        with pytest.raises(StateError, match="enable"):
            generate(model, prompt(1, 310), past_key_values=held)


def test_a_cache_that_was_refused_serves_once_the_model_is_enabled():
    model, ids = shared("llama"), ids_of(1, 300)
    cache = headinfer.HeadCache(model.config)
    with pytest.raises(StateError, match="enable"):
        model(ids, past_key_values=cache)
    with headinfer.enable(model):
        found = model(ids, past_key_values=cache).logits
    assert lengths(cache) == {300}
    assert close(found, model(ids).logits)


def test_a_cache_of_another_model_is_refused_or_right():
    """Fewer layers than the model has: never a wrong answer."""
    model, ids = shared("llama"), ids_of(1, 20)
    cache = headinfer.HeadCache(config_of("llama", num_hidden_layers=LAYERS - 1))
    with headinfer.enable(model), pytest.raises((headinfer.HeadinferError, IndexError)):
        model(ids, past_key_values=cache)
    assert lengths(cache) == {0}


def test_the_window_of_the_test_models_is_shorter_than_their_prompts():
    """Or the sliding layers would be tested as full ones."""
    with headinfer.enable(shared("gemma3_text")) as enabled:
        cache = enabled.new_cache()
        shared("gemma3_text")(ids_of(1, 100), past_key_values=cache)
    assert [layer.keys.shape[2] for layer in cache.layers if layer.is_sliding] == [WINDOW - 1] * 2
    assert cache.stats().layers_left_to_transformers == 2
