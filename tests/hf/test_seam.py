"""generate() gives the same tokens with and without headinfer, for several families, modes and transports."""

import copy

import pytest
import torch
from generation import generate, make_model, padded, prompt, remembered
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache

import headinfer
from headinfer.errors import CapacityError, StateError, UnsupportedError, UsageError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
TRANSPORTS = ("auto", "eager", "lazy")


def options_of(transport):
    """Options with a budget so small that the past of a layer consists of many tiles of two heads."""
    if transport == "auto":
        return {"chunk_tokens": 96}
    return {
        "chunk_tokens": 96,
        "transport": transport,
        "device_kv_budget_bytes": 5 << 20,
        "heads_per_group": 2,
        "tile_tokens": 90,
    }


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return make_model(request.param)


@pytest.fixture(scope="module")
def references(model):
    """Results of the model without headinfer, for remembered()."""
    return {}


@pytest.fixture(scope="module")
def llama():
    return make_model("llama")


def assert_same(model, enabled, expected, found):
    tokens, logits = expected
    assert torch.equal(tokens, found[0])
    written = tokens[:, -24:]
    assert len(written.unique()) > 8, "a reference that repeats itself proves little"
    assert (logits - found[1]).abs().max() < 1e-4 * logits.std()
    assert_offloaded(model, enabled)


def assert_offloaded(model, enabled):
    stats = enabled.last_cache.stats()
    assert stats.layers_offloaded == (2 if model.config.model_type == "gemma3_text" else 4)
    assert stats.layers_offloaded + stats.layers_left_to_transformers == 4
    assert stats.host_kv_bytes > 0
    if enabled.options.transport != "auto":
        assert stats.link_to_device_bytes > stats.host_kv_bytes
        assert stats.device_kv_peak_bytes <= enabled.options.device_kv_budget_bytes
        assert stats.heads_per_group == 2


MODES = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 0.9, "top_k": 50},
    "beams": {"num_beams": 3},
    "several returned": {"do_sample": True, "num_return_sequences": 3},
}


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("mode", MODES)
def test_generate_gives_the_same_tokens(model, references, mode, transport):
    inputs = prompt(1 if mode == "greedy" else 2)
    expected = remembered(references, mode, lambda: generate(model, inputs, **MODES[mode]))
    with headinfer.enable(model, **options_of(transport)) as enabled:
        found = generate(model, inputs, **MODES[mode])
    if mode == "beams":  # beam search returns fewer rows of logits than tokens, so only tokens are compared
        assert torch.equal(expected[0], found[0])
        assert_offloaded(model, enabled)
    else:
        assert_same(model, enabled, expected, found)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_left_padding_of_different_lengths(model, references, transport):
    expected = remembered(references, "padded", lambda: generate(model, padded()))
    with headinfer.enable(model, **options_of(transport)) as enabled:
        assert_same(model, enabled, expected, generate(model, padded()))


@pytest.mark.parametrize("chunk_tokens", [1000, 40, 7])
def test_chunk_sizes_do_not_change_the_tokens(model, references, chunk_tokens):
    expected = remembered(references, "padded", lambda: generate(model, padded()))
    with headinfer.enable(model, **options_of("lazy") | {"chunk_tokens": chunk_tokens}) as enabled:
        assert_same(model, enabled, expected, generate(model, padded()))


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("full_ids", [True, False], ids=["full ids", "new ids"])
def test_several_turns_with_one_cache(model, references, transport, full_ids):
    first = prompt(2, 400)
    second = prompt(2, 150, seed=2)

    def turns(cache):
        said = model.generate(**first, past_key_values=cache, max_new_tokens=20, do_sample=False, pad_token_id=0)
        both = torch.cat([said, second["input_ids"]], dim=1)
        mask = torch.ones_like(both)
        ids = both if full_ids else both[:, cache.get_seq_length() :]
        return generate(model, {"input_ids": ids, "attention_mask": mask}, past_key_values=cache)

    expected = remembered(references, ("turns", full_ids), lambda: turns(DynamicCache(config=model.config)))
    with headinfer.enable(model, **options_of(transport)) as enabled:
        cache = enabled.new_cache()
        found = turns(cache)
        assert enabled.last_cache is cache
        assert_same(model, enabled, expected, found)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("removed", [3, 200, 450])
@pytest.mark.parametrize("model", [family for family in FAMILIES if family != "gemma3_text"], indirect=True)
def test_crop_and_continue(model, transport, removed):
    ids = prompt(2)["input_ids"]
    following = prompt(2, 130, seed=5)["input_ids"]
    with torch.no_grad():
        kept = torch.cat([ids[:, : 500 - removed], following], dim=1)
        expected = model(kept).logits[:, -130:]
        with headinfer.enable(model, **options_of(transport)) as enabled:
            cache = enabled.new_cache()
            for chunk in ids.split(96, dim=1):
                model(chunk, past_key_values=cache)
            cache.crop(-removed)
            assert cache.get_seq_length() == 500 - removed
            found = model(following, past_key_values=cache).logits
    assert (expected - found).abs().max() < 1e-4 * expected.std()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_crop_with_sliding_windows_that_recorded_their_past(transport):
    model = make_model("gemma3_text")
    ids, rejected, following = (prompt(2, tokens, seed)["input_ids"] for tokens, seed in ((500, 1), (60, 2), (130, 3)))
    with torch.no_grad():
        expected = model(torch.cat([ids, following], dim=1)).logits[:, -130:]
        with headinfer.enable(model, **options_of(transport)) as enabled:
            cache = enabled.new_cache()
            for chunk in ids.split(96, dim=1):
                model(chunk, past_key_values=cache)
            cache.activate_past_recording()
            model(rejected, past_key_values=cache)
            cache.crop(-60)
            assert {layer.get_seq_length() for layer in cache.layers} == {500}
            found = model(following, past_key_values=cache).logits
    assert (expected - found).abs().max() < 1e-4 * expected.std()


def test_cropping_a_window_is_an_error_that_changes_nothing():
    model = make_model("gemma3_text")
    with torch.no_grad(), headinfer.enable(model) as enabled:
        cache = enabled.new_cache()
        model(prompt()["input_ids"], past_key_values=cache)
        with pytest.raises(StateError, match="sliding-window"):
            cache.crop(-5)
        assert {layer.get_seq_length() for layer in cache.layers} == {500}


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_during_a_forward_pass_changes_nothing(model, transport, error):
    first = prompt(2, 400)["input_ids"]
    second = prompt(2, 300, seed=2)["input_ids"]

    def fail(*_):
        raise error("in the middle")

    with torch.no_grad(), headinfer.enable(model, **options_of(transport)) as enabled:
        plain = enabled.new_cache()
        hurt = enabled.new_cache()
        for cache in (plain, hurt):
            model(first, past_key_values=cache)
        hook = model.model.layers[2].mlp.register_forward_hook(fail)
        with pytest.raises(error):
            model(second, past_key_values=hurt)
        hook.remove()
        assert {layer.get_seq_length() for layer in hurt.layers} == {400}
        expected, found = (model(second, past_key_values=cache).logits for cache in (plain, hurt))
    assert (expected - found).abs().max() < 1e-4 * expected.std()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_forks_are_independent(llama, transport):
    ids, one, two = prompt(1, 600)["input_ids"], *(prompt(1, 300, seed=s)["input_ids"] for s in (5, 6))
    with torch.no_grad():
        expected = [llama(torch.cat([ids, tail], dim=1)).logits[:, -300:] for tail in (one, two)]
        with headinfer.enable(llama, **options_of(transport)) as enabled:
            cache = enabled.new_cache()
            llama(ids, past_key_values=cache)
            fork = cache.fork()
            found = [llama(tail, past_key_values=c).logits for tail, c in ((one, cache), (two, fork))]
            assert cache.get_seq_length() == fork.get_seq_length() == 900
    for wanted, got in zip(expected, found, strict=True):
        assert (wanted - got).abs().max() < 1e-4 * wanted.std()


def test_prompt_lookup(llama):
    inputs = prompt(1, 60)
    inputs = {name: tensor.repeat(1, 8) for name, tensor in inputs.items()}  # a repetition for prompt lookup
    expected = llama.generate(**inputs, max_new_tokens=30, do_sample=False, prompt_lookup_num_tokens=4)
    with headinfer.enable(llama) as enabled:
        found = llama.generate(**inputs, max_new_tokens=30, do_sample=False, prompt_lookup_num_tokens=4)
    assert torch.equal(expected, found)
    assert_offloaded(llama, enabled)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_exact_as_sdpa(llama, dtype):
    half = copy.deepcopy(llama).to(dtype)
    exact = copy.deepcopy(llama).to(dtype).double()
    ids = prompt(2, 700)["input_ids"]
    with torch.no_grad():
        reference = exact(ids).logits
        sdpa = half(ids).logits
        with headinfer.enable(half, transport="eager", tile_tokens=100) as enabled:
            cache = enabled.new_cache()
            ours = torch.cat([half(chunk, past_key_values=cache).logits for chunk in ids.split(150, dim=1)], dim=1)
    assert reference.numel() >= 10_000
    error, allowed = ((logits - reference).norm() / reference.norm() for logits in (ours, sdpa))
    assert error <= 1.5 * allowed


def test_beams_do_not_copy_segments(llama):
    inputs = prompt(1, 900)
    with headinfer.enable(llama) as enabled:
        llama.generate(**inputs, num_beams=4, max_new_tokens=30, do_sample=False, pad_token_id=0)
        before = enabled.last_cache.stats()
        cache = enabled.last_cache
        cache.reorder_cache(torch.tensor([1, 1, 0, 2]))
    after = cache.stats()
    assert after.host_kv_bytes <= before.host_kv_bytes
    token_bytes = 4 * 4 * 2 * 16 * 4  # layers, heads, K and V, width, float32
    tail = cache.head_layers[0].layer_kv.tail_tokens
    assert after.tail_moved_bytes - before.tail_moved_bytes == 4 * tail * token_bytes


def test_device_bytes_do_not_grow_with_the_context(llama):
    held = {}
    for tokens in (1000, 9000):
        with torch.no_grad(), headinfer.enable(llama, **options_of("eager")) as enabled:
            cache = enabled.new_cache()
            noise = torch.randn(1, 4, tokens, 16)
            for layer in cache.head_layers:
                layer.lazy_initialization(noise, noise)
                layer.layer_kv.append(noise, noise)
            before = cache.stats()
            llama(torch.tensor([[5]]), past_key_values=cache)
            stats = cache.stats()
        held[tokens] = stats.device_kv_peak_bytes
        assert stats.device_kv_bytes == stats.device_ring_bytes + stats.device_tail_bytes + stats.device_staging_bytes
        assert stats.device_kv_peak_bytes <= enabled.options.device_kv_budget_bytes
        host_tokens = cache.head_layers[0].layer_kv.host_tokens
        crossed = stats.link_to_device_bytes - before.link_to_device_bytes
        assert crossed == host_tokens * 4 * 4 * 2 * 16 * 4, "each past byte crosses the link once"
        assert stats.link_to_host_bytes == host_tokens * 4 * 4 * 2 * 16 * 4, "each new byte is written back once"
    assert held[1000] == held[9000]


def test_disabling_restores_the_model(llama):
    before = dict(llama.__dict__)
    attention = llama.config._attn_implementation
    method = type(llama)._prepare_cache_for_generation
    expected = generate(llama, prompt())
    for _ in range(2):
        with headinfer.enable(llama):
            assert llama.config._attn_implementation == "headinfer"
            with pytest.raises(StateError, match="already enabled"):
                headinfer.enable(llama)
        assert llama.__dict__ == before
        assert llama.config._attn_implementation == attention
        assert type(llama)._prepare_cache_for_generation is method
    assert torch.equal(expected[0], generate(llama, prompt())[0])


def test_a_cache_for_a_model_that_is_not_enabled_is_an_error(llama):
    cache = headinfer.HeadCache(llama.config)
    with pytest.raises(StateError, match="enable"), torch.no_grad():
        llama(prompt()["input_ids"], past_key_values=cache)


def test_other_caches_are_exact_or_errors(llama):
    expected = generate(llama, padded())
    with headinfer.enable(llama):
        found = generate(llama, padded(), past_key_values=DynamicCache(config=llama.config))
        assert torch.equal(expected[0], found[0])
        assert torch.equal(expected[0], generate(llama, padded(), use_cache=False)[0])
        static = StaticCache(config=llama.config, max_cache_len=600)
        with pytest.raises(UnsupportedError, match="StaticCache"):
            generate(llama, prompt(), past_key_values=static)
        with pytest.raises(UnsupportedError, match="StaticCache"):
            llama(prompt()["input_ids"], past_key_values=static)
        for name in ("static", "quantized", "offloaded"):
            with pytest.raises(UnsupportedError, match=name):
                generate(llama, prompt(), cache_implementation=name)


@pytest.mark.parametrize(
    ("call", "says"),
    {
        "4D mask": ({"attention_mask": torch.ones(1, 1, 20, 20, dtype=torch.bool)}, "mask of shape"),
        "short mask": ({"attention_mask": torch.zeros(1, 15, dtype=torch.long)}, "covers 15 tokens"),
        "weights": ({"output_attentions": True}, "attention matrix"),
    }.values(),
)
def test_unsupported_calls_are_errors(llama, call, says):
    with torch.no_grad(), headinfer.enable(llama) as enabled, pytest.raises(headinfer.HeadinferError, match=says):
        llama(prompt(1, 20)["input_ids"], past_key_values=enabled.new_cache(), **call)


def test_training_mode_is_an_error():
    model = make_model("llama").train()
    with headinfer.enable(model) as enabled, pytest.raises(UnsupportedError, match="eval"):
        model(prompt(1, 20)["input_ids"], past_key_values=enabled.new_cache())


@pytest.mark.parametrize("clones", [("k",), ("k", "v")])
def test_changing_k_or_v_between_cache_and_attention_is_an_error(llama, clones, monkeypatch):
    update = headinfer.HeadCache.update

    def changed(self, key_states, value_states, *args, **kwargs):
        k, v = update(self, key_states, value_states, *args, **kwargs)
        return k.clone() if "k" in clones else k, v.clone() if "v" in clones else v

    monkeypatch.setattr(headinfer.HeadCache, "update", changed)
    with torch.no_grad(), headinfer.enable(llama) as enabled:
        cache = enabled.new_cache()
        with pytest.raises((UnsupportedError, StateError), match=r"changes\s+K"):
            llama(prompt(1, 20)["input_ids"], past_key_values=cache)
        assert cache.get_seq_length() == 0


UNSERVED = {
    "no interface": ("bloom", {"n_layer": 1, "hidden_size": 32, "n_head": 4, "vocab_size": 50}, "interface"),
    "not verified": ("youtu", {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "vocab_size": 50,
                               "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 8,
                               "q_lora_rank": 8}, "not verified"),
    "windows only": ("mistral", {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32,
                                 "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50}, "nothing to"),
}  # fmt: skip


@pytest.mark.parametrize(("family", "fields", "says"), UNSERVED.values(), ids=UNSERVED)
def test_unsupported_models_are_errors_that_change_nothing(family, fields, says):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields))
    before = dict(model.__dict__)
    attention = model.config._attn_implementation
    with pytest.raises(UnsupportedError, match=says):
        headinfer.enable(model)
    assert model.__dict__ == before
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize(
    "options",
    [
        {"device_kv_budget_bytes": 0}, {"heads_per_group": -1}, {"tile_tokens": 0}, {"backend": "abacus"},
        {"transport": "sometimes"}, {"chunk_tokens": 0}, {"expected_tokens": -1},
    ],
    ids=str,
)  # fmt: skip
def test_invalid_options_are_errors_that_change_nothing(llama, options):
    before = dict(llama.__dict__)
    with pytest.raises(UsageError):
        headinfer.enable(llama, **options)
    assert llama.__dict__ == before


def test_too_many_heads_per_group_is_an_error(llama):
    with headinfer.enable(llama, heads_per_group=5) as enabled, pytest.raises(UsageError, match="1 to 4"):
        enabled.new_cache()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"transport": "eager", "device_kv_budget_bytes": 100_000}, CapacityError),
        (
            {"transport": "eager", "device_kv_budget_bytes": 4 << 20, "tile_tokens": 10_000, "heads_per_group": 4},
            CapacityError,
        ),
    ],
    ids=str,
)
def test_a_tile_that_does_not_fit_is_an_error_that_changes_nothing(llama, options, error):
    with torch.no_grad(), headinfer.enable(llama, **options) as enabled:
        cache = enabled.new_cache()
        if "tile_tokens" in options:  # a tile is never larger than the past, so the past has to be long
            noise = torch.randn(1, 4, 12_000, 16)
            for layer in cache.head_layers:
                layer.lazy_initialization(noise, noise)
                layer.layer_kv.append(noise, noise)
        length = cache.get_seq_length()
        with pytest.raises(error):
            llama(prompt(1, 600)["input_ids"], past_key_values=cache)
        assert {layer.get_seq_length() for layer in cache.layers} == {length}
