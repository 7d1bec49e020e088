"""Rotary frequencies that depend on the length of the context. The oracle is the whole prompt in one uncut pass."""

import warnings

import pytest
import torch
import transformers
from packaging.version import Version
from rotary_models import DEFAULT, LONGROPE, MODELS, VOCAB, tiny
from transformers import AutoConfig

import headinfer
from headinfer.errors import StateError, UnsupportedError
from headinfer.hf.rotary import MIXED, RotaryLengths

LONGROPE_MODELS = [name for name in MODELS if "dynamic" not in name]

# Before 5.20, transformers reads only the newest token again if Phi-3 crosses its original length.
transformers_rereads = pytest.mark.skipif(Version(transformers.__version__) < Version("5.20"), reason="a wrong oracle")

pytestmark = [
    pytest.mark.filterwarnings("ignore::headinfer.ContextLengthWarning"),
    pytest.mark.filterwarnings("ignore::headinfer.RereadWarning"),
]


def ids(tokens, seed=1, rows=1):
    return torch.randint(3, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def greedy(model, prompt, new_tokens=16, **options):
    torch.manual_seed(5)
    defaults = {"do_sample": False, "attention_mask": torch.ones_like(prompt)}
    return model.generate(prompt, max_new_tokens=new_tokens, **defaults | options)


@torch.no_grad()
def one_uncut_pass_a_token(name, prompt, new_tokens=16):
    """Generate without any cache: all tokens are read in one uncut pass for each new one."""
    model = tiny(name)
    for _ in range(new_tokens):
        logits = model(prompt, use_cache=False).logits
        prompt = torch.cat([prompt, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return prompt


@pytest.mark.parametrize("tokens", [600, 257, 256, 250, 100])
@pytest.mark.parametrize("chunk_tokens", [64, 4096])
@pytest.mark.parametrize("name", MODELS)
def test_tokens_do_not_depend_on_the_chunks(name, chunk_tokens, tokens):
    expected = greedy(tiny(name), ids(tokens)) if "dynamic" in name else one_uncut_pass_a_token(name, ids(tokens))
    model = tiny(name)
    with headinfer.enable(model, chunk_tokens=chunk_tokens):
        cache = headinfer.HeadCache(model.config)
        found = greedy(model, ids(tokens), past_key_values=cache, prefill_chunk_size=50)
    assert torch.equal(found, expected)
    assert cache.get_seq_length() == found.shape[1] - 1
    assert cache.stats().device_kv_bytes > 0


@transformers_rereads
def test_the_oracle_of_phi3_is_what_transformers_generates():
    assert torch.equal(one_uncut_pass_a_token("phi3", ids(250)), greedy(tiny("phi3"), ids(250)))


@pytest.mark.parametrize("name", MODELS)
def test_chunks_of_a_forward_pass(name):
    prompt = ids(600)
    with torch.no_grad():
        expected = tiny(name)(prompt, use_cache=False).logits[:, -5:]
        model = tiny(name)
        with headinfer.enable(model, chunk_tokens=64):
            cache = headinfer.HeadCache(model.config)
            found = model(prompt, past_key_values=cache, logits_to_keep=5).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_expected_tokens_fixes_the_frequencies(name):
    prompt = ids(600)
    with torch.no_grad():
        expected = tiny(name)(prompt, use_cache=False).logits[:, -5:]
        model = tiny(name)
        with headinfer.enable(model, chunk_tokens=64):
            cache = headinfer.HeadCache(model.config, expected_tokens=600)
            for part in prompt.split([200, 100, 299, 1], dim=1):
                found = model(part, past_key_values=cache).logits
    torch.testing.assert_close(found[:, -1], expected[:, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_expected_tokens_of_enable_count_in_generate(name):
    options = {"new_tokens": 24, "return_dict_in_generate": True, "output_logits": True}
    model = tiny(name)
    with headinfer.enable(model, chunk_tokens=64, expected_tokens=700), warnings.catch_warnings():
        warnings.simplefilter("error", headinfer.RereadWarning)
        found = greedy(model, ids(240), **options).logits
    shorter = greedy(tiny(name), ids(240), **options).logits
    assert (found[0] - shorter[0]).abs().max() > 0.01
    with torch.no_grad():
        whole = tiny(name)(torch.cat([ids(240), ids(460, seed=2)], dim=1), use_cache=False).logits
    torch.testing.assert_close(found[0], whole[:, 239], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_new_cache_has_the_expected_tokens_of_enable(name):
    prompt = ids(400)
    model = tiny(name)
    with torch.no_grad(), headinfer.enable(model, chunk_tokens=64, expected_tokens=400) as enabled:
        expected = tiny(name)(prompt, use_cache=False).logits[:, -1]
        cache = enabled.new_cache()
        model(prompt[:, :200], past_key_values=cache)
        found = model(prompt[:, 200:], past_key_values=cache).logits[:, -1]
        with_cache = greedy(model, prompt[:, :240], past_key_values=enabled.new_cache())
        assert torch.equal(with_cache, greedy(model, prompt[:, :240]))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_a_forward_pass_that_needs_other_frequencies_is_refused(name):
    model = tiny(name)
    with headinfer.enable(model, chunk_tokens=64), torch.no_grad():
        cache = headinfer.HeadCache(model.config)
        model(ids(250), past_key_values=cache, logits_to_keep=1)
        with pytest.raises(StateError, match="expected_tokens=260 or more"):
            model(ids(10, seed=2), past_key_values=cache)
        assert cache.get_seq_length() == 250
        expected = tiny(name)(torch.cat([ids(250), ids(6, seed=2)], dim=1), use_cache=False).logits[:, -1]
        found = model(ids(6, seed=2), past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_a_second_turn_reads_the_first_one_again_if_it_needs_other_frequencies(name):
    model = tiny(name)
    with headinfer.enable(model, chunk_tokens=64):
        cache = headinfer.HeadCache(model.config)
        first = greedy(model, ids(200), past_key_values=cache)
        prompt = torch.cat([first, ids(100, seed=2)], dim=1)
        with pytest.warns(headinfer.RereadWarning, match=r"215 tokens are read again, .* 316 tokens now") as caught:
            found = greedy(model, prompt, past_key_values=cache)
    assert caught[0].filename == __file__
    assert torch.equal(found, greedy(tiny(name), prompt))


@pytest.mark.parametrize("name", MODELS)
def test_a_second_turn_with_the_same_frequencies_reads_nothing_again(name):
    model = tiny(name)
    chunks = []
    with headinfer.enable(model, chunk_tokens=64, on_forward=lambda cache: chunks.append(cache.get_seq_length())):
        cache = headinfer.HeadCache(model.config)
        start = 300 if "dynamic" not in name else 150
        first = greedy(model, ids(start), new_tokens=8, past_key_values=cache)
        prompt = torch.cat([first, ids(60, seed=2)], dim=1)
        chunks.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("error", headinfer.RereadWarning)
            found = greedy(model, prompt, new_tokens=8, past_key_values=cache)
    assert chunks[0] > start
    assert torch.equal(found, greedy(tiny(name), prompt, new_tokens=8))


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 0.7},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
    ],
)
@pytest.mark.parametrize("tokens", [300, pytest.param(250, marks=transformers_rereads)])
def test_modes_of_generate_across_the_original_length(tokens, options):
    expected = greedy(tiny("phi3"), ids(tokens), **options)
    model = tiny("phi3")
    with headinfer.enable(model, chunk_tokens=64):
        assert torch.equal(greedy(model, ids(tokens), **options), expected)


@pytest.mark.parametrize("name", ["phi3", "llama, dynamic"])
@pytest.mark.parametrize("tokens", [300, pytest.param(250, marks=transformers_rereads)])
def test_padded_batches(name, tokens):
    prompt = ids(tokens, rows=3)
    mask = torch.ones_like(prompt)
    mask[1, :40] = 0
    mask[2, : tokens // 2] = 0
    expected = greedy(tiny(name), prompt, attention_mask=mask)
    model = tiny(name)
    with headinfer.enable(model, chunk_tokens=64):
        assert torch.equal(greedy(model, prompt, attention_mask=mask), expected)


def test_padding_in_all_rows_does_not_count():
    prompt = ids(280)
    mask = torch.ones_like(prompt)
    mask[:, :30] = 0
    model = tiny("phi3")
    with headinfer.enable(model, chunk_tokens=64):
        found = greedy(model, prompt, attention_mask=mask, new_tokens=12)
        alone = greedy(model, prompt[:, 30:], new_tokens=12)
    assert torch.equal(found[:, 30:], alone)
    assert torch.equal(alone, one_uncut_pass_a_token("phi3", prompt[:, 30:], 12))


@pytest.mark.parametrize("name", ["phi3", "llama, dynamic"])
def test_guesses_across_a_change_are_refused_before_anything_is_read(name):
    model = tiny(name)
    lookup = {"prompt_lookup_num_tokens": 3}
    with headinfer.enable(model, chunk_tokens=64):
        cache = headinfer.HeadCache(model.config)
        with pytest.raises(UnsupportedError, match=r"stay within 256 tokens, or give .* expected_tokens=267"):
            greedy(model, ids(250), past_key_values=cache, **lookup)
        assert cache.get_seq_length() == 0
        found = greedy(model, ids(200), **lookup)
    assert torch.equal(found, greedy(tiny(name), ids(200)))


def test_guesses_beyond_the_original_length():
    expected = greedy(tiny("phi3"), ids(300))
    model = tiny("phi3")
    draft = tiny("phi3", seed=7)
    with headinfer.enable(model, chunk_tokens=64), headinfer.enable(draft, chunk_tokens=64):
        assert torch.equal(greedy(model, ids(300), prompt_lookup_num_tokens=3), expected)
        assert torch.equal(greedy(model, ids(300), assistant_model=draft), expected)


def test_a_draft_model_crosses_its_original_length(monkeypatch):
    monkeypatch.setitem(MODELS, "llama", ("llama", {"rope_parameters": DEFAULT}))
    expected = greedy(tiny("llama"), ids(245), new_tokens=30)
    model = tiny("llama")
    draft = tiny("phi3", seed=7)
    with headinfer.enable(model, chunk_tokens=64), headinfer.enable(draft, chunk_tokens=64):
        assert torch.equal(greedy(model, ids(245), new_tokens=30, assistant_model=draft), expected)


@pytest.mark.parametrize("name", LONGROPE_MODELS)
def test_ids_that_are_missing_are_asked_for_before_anything_is_read(name):
    model = tiny(name)
    with headinfer.enable(model, chunk_tokens=64):
        embeds = model.get_input_embeddings()(ids(250)).detach()
        with pytest.raises(UnsupportedError, match="it was not given the ids of all tokens"):
            model.generate(inputs_embeds=embeds, max_new_tokens=16)
        found = model.generate(inputs_embeds=embeds[:, :200], max_new_tokens=16, do_sample=False)
        assert torch.equal(found, greedy(tiny(name), ids(250)[:, :200])[:, 200:])


@pytest.mark.parametrize("name", MODELS)
def test_a_cache_is_as_before_after_an_error_while_it_is_read_again(name):
    model = tiny(name)
    fails = False

    def on_forward(cache):
        if fails and cache.get_seq_length() == 128:
            raise KeyboardInterrupt

    with headinfer.enable(model, chunk_tokens=64, on_forward=on_forward):
        cache = headinfer.HeadCache(model.config)
        first = greedy(model, ids(200), past_key_values=cache)
        fails = True
        with pytest.raises(KeyboardInterrupt):
            greedy(model, torch.cat([first, ids(100, seed=2)], dim=1), past_key_values=cache)
        fails = False
        assert cache.get_seq_length() == 215
        prompt = torch.cat([first, ids(20, seed=2)], dim=1)
        found = greedy(model, prompt, new_tokens=8, past_key_values=cache)
    assert torch.equal(found, greedy(tiny(name), prompt, new_tokens=8))


def test_dynamic_ntk_does_not_remember_earlier_contexts():
    model = tiny("llama, dynamic")
    with headinfer.enable(model, chunk_tokens=64):
        greedy(model, ids(900))
        found = greedy(model, ids(400))
        plain = model(ids(300), use_cache=False).logits
    assert torch.equal(found, greedy(tiny("llama, dynamic"), ids(400)))
    assert torch.equal(plain, tiny("llama, dynamic")(ids(300), use_cache=False).logits)


@pytest.mark.parametrize("name", MODELS)
def test_disable_removes_everything(name):
    model = tiny(name)
    own = model.prepare_inputs_for_generation
    model.prepare_inputs_for_generation = lambda *args, **kwargs: own(*args, **kwargs)  # as some wrappers do
    before = dict(model.__dict__)
    with headinfer.enable(model):
        greedy(model, ids(300))
    assert model.__dict__ == before
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert torch.equal(greedy(model, ids(250)), greedy(tiny(name), ids(250)))


@pytest.mark.parametrize("name", MODELS)
def test_sessions_keep_the_length(name, tmp_path):
    model = tiny(name)
    prompt = torch.cat([ids(200), ids(30, seed=2), ids(60, seed=3)], dim=1)
    with headinfer.enable(model, chunk_tokens=64), torch.no_grad():
        cache = headinfer.HeadCache(model.config, expected_tokens=290)
        model(prompt[:, :200], past_key_values=cache, logits_to_keep=1)
        cache.save(tmp_path / "session", prompt[:, :200])
        loaded = headinfer.HeadCache.load(tmp_path / "session", model)
        model(prompt[:, 200:230], past_key_values=loaded.fork(), logits_to_keep=1)
        found = model(prompt[:, 200:], past_key_values=loaded, logits_to_keep=1).logits
        expected = tiny(name)(prompt, use_cache=False).logits[:, -1:]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_a_cache_without_a_note_is_read_again_if_it_may_have_other_frequencies(name):
    model = tiny(name)
    with headinfer.enable(model, chunk_tokens=64), torch.no_grad():
        cache = headinfer.HeadCache(model.config)
        model(ids(300), past_key_values=cache, logits_to_keep=1)
        cache.head_layers[0].rotary_tokens = 0  # as in a session of an earlier version
        with pytest.raises(StateError, match="expected_tokens=305 or more"):
            model(ids(5), past_key_values=cache)
        with pytest.warns(headinfer.RereadWarning):
            found = greedy(model, ids(305), past_key_values=cache)
    assert torch.equal(found, greedy(tiny(name), ids(305)))


def test_a_crop_by_a_tensor_leaves_numbers():
    model = tiny("phi3")
    with headinfer.enable(model, chunk_tokens=64), torch.no_grad():
        cache = headinfer.HeadCache(model.config)
        model(ids(100), past_key_values=cache)
        cache.crop(torch.tensor(90))
        assert type(cache.get_seq_length()) is int
        cache.crop(torch.tensor(-5))
        assert cache.get_seq_length() == 85


def test_lengths():
    phi3 = RotaryLengths.from_config(tiny("phi3").config)
    assert [phi3.normalized(tokens) for tokens in (1, 256, 257, 9000)] == [1, 1, 257, 257]
    assert [phi3.limit(tokens) for tokens in (1, 256, 257)] == [256, 256, None]
    assert [phi3.held(0, 256), phi3.held(0, 257), phi3.held(257, 3)] == [1, MIXED, 257]
    dynamic = RotaryLengths.from_config(tiny("llama, dynamic").config)
    assert [dynamic.normalized(tokens) for tokens in (1, 256, 257, 9000)] == [1, 1, 257, 9000]
    by_kind = AutoConfig.for_model(
        "gemma3_text", rope_parameters={"full_attention": LONGROPE, "sliding_attention": DEFAULT}
    )
    assert RotaryLengths.from_config(by_kind) == RotaryLengths(steps=(256,))
    assert not RotaryLengths.from_config(AutoConfig.for_model("llama"))
