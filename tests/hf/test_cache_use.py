"""A HeadCache is used within enable(), goes on from what it holds, and is copied. Anything else is refused."""

import copy
import pickle

import pytest
import torch
from families import VOCAB, tiny_model

import headinfer
from headinfer.engine import run_plan as planning
from headinfer.errors import CapacityError, StateError, UnsupportedError, UsageError
from headinfer.hf import planning as hf_planning
from headinfer.hf.compat import DynamicSlidingWindowLayer

CHUNK_TOKENS = 64
ONE_FULL_LAYER = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}


def text(tokens=300, rows=1, seed=1):
    return torch.randint(1, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def assert_close(found, wanted):
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() < 5e-5 * wanted.std()


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


# -- outside of enable() ---------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize(
    ("family", "changes"),
    [("llama", {}), ("llama", {"num_hidden_layers": 1}), ("gemma3_text", ONE_FULL_LAYER), ("lfm2", {}),
     ("qwen3_next", {}), ("falcon_h1", {}), ("gemma3n_text", {}), ("gpt2", {})],
)  # fmt: skip
def test_a_cache_outside_of_enable_is_refused_and_unchanged(family, changes, tokens):
    model = tiny_model(family, **changes)
    ids, question = text(), text(tokens, seed=2)
    wanted = model(torch.cat([ids, question], dim=1)).logits[:, -tokens:]
    with headinfer.enable(model, chunk_tokens=CHUNK_TOKENS) as enabled:
        cache = enabled.new_cache()
        model(ids, past_key_values=cache, logits_to_keep=1)
    for _ in range(2):
        with pytest.raises(StateError, match="enable"):
            model(question, past_key_values=cache)
    with pytest.raises(StateError, match="enable"):
        model.generate(torch.cat([ids, question], dim=1), past_key_values=cache, max_new_tokens=2, pad_token_id=0)
    with pytest.raises(StateError, match="enable"):
        model(question, past_key_values=headinfer.HeadCache(model.config))
    with headinfer.enable(model):
        assert_close(model(question, past_key_values=cache).logits, wanted)


@torch.no_grad()
def test_a_fork_made_during_a_pass_is_refused_outside_of_enable_too(llama):
    forks = []
    with headinfer.enable(llama, on_forward=lambda cache: forks.append(cache.fork())) as enabled:
        llama(text(), past_key_values=enabled.new_cache())
    with pytest.raises(StateError, match="enable"):
        llama(text(1), past_key_values=forks[0])


# -- assistants ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("family", ["gemma3_text", "lfm2", "llama", "gpt_oss"])
def test_an_assistant_that_is_enabled_too(family, sample):
    model = tiny_model(family)
    kinds = getattr(model.config, "layer_types", None)
    fewer = {"num_hidden_layers": 2, "layer_types": kinds[:2] if kinds else None}
    draft = tiny_model(family, **fewer)  # its first layers are the same, so that some guesses are right
    ids = text()

    def generate():
        torch.manual_seed(5)
        return model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, pad_token_id=0, do_sample=sample,
            assistant_model=draft,
        )  # fmt: skip

    longest = []
    wanted = generate()

    def note(cache):
        windows = [layer for layer in cache.layers if isinstance(layer, DynamicSlidingWindowLayer)]
        longest.extend(window.keys.shape[2] for window in windows)

    with headinfer.enable(model, chunk_tokens=CHUNK_TOKENS) as enabled:
        with headinfer.enable(draft, chunk_tokens=CHUNK_TOKENS, on_forward=note) as enabled_draft:
            found = generate()
        assert enabled_draft.last_cache.stats().host_kv_bytes > 0
    assert torch.equal(found, wanted)
    assert enabled.last_cache.stats().host_kv_bytes > 0
    assert max(longest, default=0) < 2 * CHUNK_TOKENS, "windows are cut between the chunks of a prompt"


# -- generate() with a cache that is not empty -----------------------------------------------------------------


def options(ids, **more):
    return {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **more}


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("by_embeds", [False, True])
def test_a_cache_that_holds_the_whole_prompt_goes_on_from_its_last_token(llama, rows, by_embeds, with_mask):
    ids = text(rows=rows)
    mask = torch.ones_like(ids)
    if rows > 1 and with_mask:
        mask[1, :40] = 0
    given = {"inputs_embeds": llama.get_input_embeddings()(ids).detach()} if by_embeds else {"input_ids": ids}
    if with_mask:
        given["attention_mask"] = mask
    wanted = llama.generate(**given, **options(ids))
    with headinfer.enable(llama, chunk_tokens=CHUNK_TOKENS) as enabled:
        cache = enabled.new_cache()
        with torch.no_grad():
            llama(ids, attention_mask=mask if with_mask else None, past_key_values=cache, logits_to_keep=1)
        with pytest.raises(ValueError, match="max_new_token"):
            llama.generate(**given, past_key_values=cache, max_new_token=3, pad_token_id=0)
        assert cache.get_seq_length() == 300, "an argument that transformers refuses changes nothing"
        found = llama.generate(**given, past_key_values=cache, **options(ids))
        assert torch.equal(found, wanted)
        assert cache.get_seq_length() == 305


@pytest.mark.parametrize("mode", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}])
def test_beams_go_on_from_a_cache_that_an_earlier_call_left(llama, mode):
    ids = text()
    more = {**options(ids), **mode}
    torch.manual_seed(1)
    wanted = llama.generate(ids, **more)
    with headinfer.enable(llama, chunk_tokens=CHUNK_TOKENS) as enabled:
        cache = enabled.new_cache()
        with torch.no_grad():
            llama(ids, past_key_values=cache, logits_to_keep=1)
        cache.batch_repeat_interleave(3 if "num_beams" in mode else 2)
        torch.manual_seed(1)
        assert torch.equal(llama.generate(ids, past_key_values=cache, **more), wanted)


def test_a_prompt_that_is_shorter_than_the_cache_is_refused(llama):
    ids = text()
    embeds = llama.get_input_embeddings()(ids).detach()
    with headinfer.enable(llama) as enabled:
        cache = enabled.new_cache()
        llama.generate(ids, past_key_values=cache, **options(ids))
        length = cache.get_seq_length()
        for given in ({"input_ids": ids}, {"inputs": ids}, {"inputs_embeds": embeds}):
            with pytest.raises(UsageError, match="holds 305 tokens and the prompt has only 300"):
                llama.generate(**given, past_key_values=cache, **options(ids))
        with pytest.raises(UsageError, match="holds 305 tokens and the prompt has only 300"):
            llama.generate(ids, past_key_values=cache, **options(ids))
        mask = torch.ones(1, length + 300)
        with pytest.raises(UsageError, match="embeddings of all tokens"):
            llama.generate(inputs_embeds=embeds, attention_mask=mask, past_key_values=cache, **options(ids))
        assert cache.get_seq_length() == length
        llama.generate(ids, attention_mask=mask, past_key_values=cache, **options(ids))  # only new tokens, as before


@torch.no_grad()
@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"input_ids": [[1, 2, 3]]}, r"input_ids is .*: it must be a tensor \[rows, tokens\]"),
        ({"input_ids": torch.ones(5, dtype=torch.long)}, r"input_ids has shape \[5\]: it must be a tensor"),
        ({"inputs_embeds": torch.ones(5, 64)}, r"inputs_embeds has shape \[5, 64\]: .*\[rows, tokens, hidden size\]"),
    ],
    ids=str,
)
def test_prompts_of_another_type_or_shape_are_refused(llama, given, says):
    with headinfer.enable(llama) as enabled:
        with pytest.raises(UsageError, match=says):
            llama.generate(**given, max_new_tokens=2)
        if "input_ids" in given:
            with pytest.raises(UsageError, match=says):
                llama.generate(given["input_ids"], max_new_tokens=2)
        for tokens in (0, 5):
            cache = enabled.new_cache()
            if tokens:
                llama(text(tokens), past_key_values=cache)
            with pytest.raises(UsageError, match=says):
                llama.generate(**given, past_key_values=cache, max_new_tokens=2)
            with pytest.raises(UsageError, match=says):
                llama(**given, past_key_values=cache)
            assert cache.get_seq_length() == tokens


@pytest.mark.parametrize("family", ["gemma3_text", "lfm2", "qwen3_next"])
def test_a_last_token_that_cannot_be_removed_is_an_error_that_changes_nothing(family):
    model = tiny_model(family)
    ids = text()
    with headinfer.enable(model) as enabled:
        cache = enabled.new_cache()
        with torch.no_grad():
            model(ids, past_key_values=cache)
        with pytest.raises(UnsupportedError, match="all 300 tokens"):
            model.generate(ids, past_key_values=cache, **options(ids))
        assert cache.get_seq_length() == 300
        longer = torch.cat([ids, text(1, seed=4)], dim=1)
        found = model.generate(longer, past_key_values=cache, **options(ids))
    assert torch.equal(found, model.generate(longer, **options(ids)))


def test_a_loaded_cache_of_other_tokens_is_refused(llama, tmp_path):
    ids = text(rows=2)
    more = torch.cat([ids, text(20, rows=2, seed=3)], dim=1)
    with headinfer.enable(llama):
        cache = headinfer.HeadCache(llama.config)
        with torch.no_grad():
            llama(ids, past_key_values=cache)
        cache.save(tmp_path / "s", ids)
        other = more.clone()
        other[1, 200] = 1 + other[1, 200] % (VOCAB - 1)
        wanted = llama.generate(more, **options(more))
        loaded = headinfer.HeadCache.load(tmp_path / "s", llama)
        with pytest.raises(UsageError, match="other tokens than the prompt begins with, from token 200"):
            llama.generate(other, past_key_values=loaded, **options(more))
        assert torch.equal(llama.generate(more, past_key_values=loaded.fork(), **options(more)), wanted)
        loaded.crop(150)
        assert torch.equal(loaded.token_ids, ids[:, :150])
        wanted = llama.generate(other, **options(more))
        assert torch.equal(llama.generate(other, past_key_values=loaded, **options(more)), wanted)
        loaded.reorder_cache(torch.tensor([1, 1]))
        assert torch.equal(loaded.token_ids, ids[[1, 1], :150])
        loaded.batch_select_indices(torch.tensor([True, False]))
        loaded.batch_repeat_interleave(3)
        assert torch.equal(loaded.token_ids, ids[[1, 1, 1], :150])
        loaded.reset()
        assert loaded.token_ids is None


@torch.no_grad()
def test_a_mask_of_the_new_tokens_alone_is_refused(llama):
    """Someone who passes all tokens again passes a mask that covers them only once."""
    with headinfer.enable(llama) as enabled:
        cache = enabled.new_cache()
        llama(text(), past_key_values=cache)
        for value in (0, 1):
            mask = torch.ones(1, 320, dtype=torch.long)
            mask[:, :10] = value
            with pytest.raises(StateError, match="covers 320 tokens, but the cache and the input have 620"):
                llama(text(320), attention_mask=mask, past_key_values=cache)
        assert cache.get_seq_length() == 300


# -- copies ----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda cache: copy.deepcopy({"in": [cache]})["in"][0]])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_next", "falcon_h1"])
@pytest.mark.parametrize("is_loaded", [False, True])
def test_copies_of_a_cache_are_forks(family, is_loaded, copied, tmp_path):
    model = tiny_model(family)
    ids, one, two = text(), text(30, seed=2), text(40, seed=3)
    wanted = [model(torch.cat([ids, tail], dim=1)).logits[:, -tail.shape[1] :] for tail in (one, two)]
    with headinfer.enable(model):
        cache = headinfer.HeadCache(model.config)
        model(ids, past_key_values=cache)
        if is_loaded:
            cache.save(tmp_path / "s", ids)
            cache = headinfer.HeadCache.load(tmp_path / "s", model)
        twin = copied(cache)
        assert twin is not cache
        assert type(twin) is headinfer.HeadCache
        for tail, used, logits in ((one, cache, wanted[0]), (two, twin, wanted[1])):
            assert_close(model(tail, past_key_values=used).logits, logits)


# -- plans -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_context_for_which_no_plan_fits_is_planned_once(llama, monkeypatch):
    asked = []

    def none_fits(request):
        asked.append(request.context_tokens)
        raise CapacityError("nothing fits")

    monkeypatch.setattr(hf_planning, "plan_run", none_fits)
    with headinfer.enable(llama) as enabled:
        cache = enabled.new_cache(expected_tokens=2000)
        for _ in range(4):
            llama(text(300), past_key_values=cache, logits_to_keep=1)
        assert asked == [2000, 300], "the whole context, and its beginning, which is shorter"
        monkeypatch.setattr(hf_planning, "plan_run", planning.plan_run)
        llama(text(50), past_key_values=enabled.new_cache(expected_tokens=50), logits_to_keep=1)
        assert enabled.plan is not None


def test_pickling_a_cache_names_what_to_use(llama):
    with pytest.raises(UnsupportedError, match=r"use its save\(\)"):
        pickle.dumps(headinfer.HeadCache(llama.config))
