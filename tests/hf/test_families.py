"""Every supported family against transformers, with prompts in chunks, token by token, and without a cache."""

import itertools
from pathlib import Path

import pytest
import torch
from families import (
    CHANGES,
    COMMON,
    REFUSED,
    VOCAB,
    beyond_original_length,
    full_layers,
    models_table,
    present,
    tiny_config,
    tiny_model,
)
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import headinfer
from headinfer.plan.families import SUPPORTED_FAMILIES
from headinfer.plan.model_shape import ModelShape

TOKENS = 300
CHUNK_TOKENS = 40
STEPS = 5
# A share of the standard deviation of the logits. Within transformers, chunked and whole prompts differ by up to 2e-5.
BOUND = 5e-5
STATEFUL = ("falcon_h1", "granitemoehybrid", "lfm2", "nemotron_h", "olmo_hybrid", "qwen3_5_text", "qwen3_next")
SMALL_TILES = {"device_kv_budget_bytes": 4 << 20, "heads_per_group": 1, "tile_tokens": 30}

every_family = pytest.mark.parametrize("family", present())
pytestmark = pytest.mark.filterwarnings("ignore:.*lru_cache.*", "ignore::DeprecationWarning")


def text(rows=2, tokens=TOKENS):
    return torch.randint(1, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def read(model, ids, cache):
    """Compute the logits of all tokens, in chunks and for the last tokens one by one."""
    edges = [*range(0, TOKENS - STEPS, CHUNK_TOKENS), *range(TOKENS - STEPS, TOKENS + 1)]
    pairs = itertools.pairwise(edges)
    return torch.cat([model(ids[:, a:b], past_key_values=cache, use_cache=True).logits for a, b in pairs], dim=1)


def difference(found, wanted):
    return float((found - wanted).abs().max() / wanted.std())


@every_family
def test_logits_agree_with_transformers(family):
    model = tiny_model(family)
    ids = text()
    chunked = read(model, ids, DynamicCache(config=model.config))
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        changed = model(torch.where(torch.arange(TOKENS) < 20, 1 + ids % (VOCAB - 1), ids), use_cache=False).logits
    assert difference(changed[:, -1], whole[:, -1]) > 0.02, "the last token must depend on the first ones"
    for options in ({}, {"transport": "eager", **SMALL_TILES}, {"transport": "lazy", **SMALL_TILES}):
        with headinfer.enable(model):
            cache = headinfer.HeadCache(model.config, **options)
            found = read(model, ids, cache)
        assert difference(found, chunked) < BOUND
        assert difference(found, whole) < BOUND
        stats = cache.stats()
        assert stats.layers_offloaded == full_layers(model.config) > 0
        assert stats.host_kv_bytes > 0
        held = sum(
            layer.layer_kv.heads * (layer.layer_kv.key_dim + layer.layer_kv.value_dim) * 4
            for layer in cache.head_layers
        )
        assert ModelShape.from_config(model.config).kv_bytes_per_token(4) == held, (
            "the check before loading uses the right size"
        )
        assert (stats.link_to_device_bytes > stats.host_kv_bytes) == bool(options)


ORIGINAL = 64
LEARNED_POSITIONS = ("biogpt", "gpt2", "gpt_bigcode", "opt")  # a table of positions ends where the model ends


@pytest.mark.filterwarnings("ignore::headinfer.ContextLengthWarning")
@pytest.mark.parametrize("family", sorted(set(present()) - set(LEARNED_POSITIONS)))
def test_chunks_beyond_the_original_length(family):
    ids = text(rows=1, tokens=150)
    for kind, changes in beyond_original_length(family, ORIGINAL).items():
        with torch.no_grad():
            whole = tiny_model(family, **changes)(ids, use_cache=False).logits[:, -STEPS:]
            model = tiny_model(family, **changes)
            with headinfer.enable(model, chunk_tokens=CHUNK_TOKENS):
                cache = headinfer.HeadCache(model.config)
                found = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=STEPS).logits[:, -STEPS:]
        assert difference(found, whole) < BOUND, kind
        assert cache.get_seq_length() == 150


@every_family
def test_generation_with_left_padding_gives_the_same_tokens(family, monkeypatch):
    """The host attends to nothing, and then to half of the past."""
    monkeypatch.setattr("headinfer.plan.cpu_share.CPU_UNIT_TOKENS", 16)
    model = tiny_model(family)
    ids = text(tokens=300)
    mask = torch.ones_like(ids)
    mask[1, :70] = 0
    tokens = assert_generates_the_same(model, ids, attention_mask=mask)
    with headinfer.enable(model, transport="lazy", device_kv_budget_bytes=4 << 20, cpu_share=0.5) as enabled:
        found = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0, attention_mask=mask)
    assert torch.equal(found, tokens[:, :304])
    assert enabled.last_cache.stats().cpu_attended_bytes > 0


@pytest.mark.parametrize("family", ["gemma3n_text", "gemma4_text", *STATEFUL])
def test_beams_reorder_layers_of_transformers_too(family):
    model = tiny_model(family)
    ids = text(tokens=200)
    assert_generates_the_same(model, ids, attention_mask=torch.ones_like(ids), num_beams=3, num_return_sequences=2)


def assert_generates_the_same(model, ids, **options):
    def generate():
        found = model.generate(
            ids, max_new_tokens=12, do_sample=False, pad_token_id=0, return_dict_in_generate=True, output_logits=True,
            **options,
        )  # fmt: skip
        return found.sequences, torch.stack(found.logits)

    tokens, logits = generate()
    with headinfer.enable(model, chunk_tokens=64) as enabled:
        found_tokens, found_logits = generate()
    assert torch.equal(tokens, found_tokens)
    assert difference(found_logits, logits) < BOUND
    assert enabled.last_cache.stats().layers_offloaded > 0
    return tokens


@pytest.mark.parametrize("family", STATEFUL)
def test_an_error_in_a_forward_pass_restores_linear_states(family):
    model = tiny_model(family)
    ids = text(rows=1, tokens=120)
    with torch.no_grad(), headinfer.enable(model) as enabled:
        cache = enabled.new_cache()
        oracle = enabled.new_cache()
        for each in (cache, oracle):
            model(ids[:, :80], past_key_values=each)
        broken = model.get_submodule("lm_head").register_forward_hook(lambda *_: (_ for _ in ()).throw(OSError("no")))
        with pytest.raises(OSError, match="no"):
            model(ids[:, 80:100], past_key_values=cache)
        broken.remove()
        assert cache.get_seq_length() == 80
        found = model(ids[:, 80:], past_key_values=cache).logits
        assert torch.equal(found, model(ids[:, 80:], past_key_values=oracle).logits)


@pytest.mark.parametrize("family", ["gemma3n_text", *STATEFUL])
def test_forks_are_independent(family):
    model = tiny_model(family)
    ids = text(rows=1, tokens=130)
    with torch.no_grad(), headinfer.enable(model) as enabled:
        cache = enabled.new_cache()
        model(ids[:, :80], past_key_values=cache)
        fork = cache.fork()
        model(ids[:, 100:], past_key_values=fork)
        found = model(ids[:, 80:100], past_key_values=cache).logits
        oracle = enabled.new_cache()
        model(ids[:, :80], past_key_values=oracle)
        assert torch.equal(found, model(ids[:, 80:100], past_key_values=oracle).logits)


@pytest.mark.parametrize("family", ["falcon_h1", "lfm2", "qwen3_next"])
def test_cropping_linear_states_is_an_error_that_changes_nothing(family):
    model = tiny_model(family)
    with torch.no_grad(), headinfer.enable(model) as enabled:
        cache = enabled.new_cache()
        model(text(rows=1, tokens=50), past_key_values=cache)
        with pytest.raises(headinfer.StateError, match="cannot crop"):
            cache.crop(-3)
        assert all(layer.layer_kv.tokens == 50 for layer in cache.head_layers)


@pytest.mark.parametrize("repeats", [1, 3])
def test_rows_of_a_hybrid_layer_are_repeated_with_their_states(repeats):
    model = tiny_model("falcon_h1")
    ids = text(tokens=60)
    with torch.no_grad(), headinfer.enable(model) as enabled:
        cache = enabled.new_cache()
        oracle = enabled.new_cache()
        model(ids[:, :50], past_key_values=cache)
        cache.batch_repeat_interleave(repeats)
        cache.batch_select_indices(torch.arange(repeats, 2 * repeats))
        model(ids[1:, :50].repeat(repeats, 1), past_key_values=oracle)
        step = ids[1:, 50:].repeat(repeats, 1)
        wanted = model(step, past_key_values=oracle).logits
        assert difference(model(step, past_key_values=cache).logits, wanted) < BOUND


@pytest.mark.parametrize(("family", "part"), [("gemma3", "gemma3_text"), ("gemma4", "gemma4_text")])
def test_models_with_images_work_with_text(family, part):
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
              "num_key_value_heads": 2, "head_dim": 16, "image_size": 28, "patch_size": 14}  # fmt: skip
    special = {"image_token_id": 100, "boi_token_id": 101, "eoi_token_id": 102, "audio_token_id": 103}
    config = AutoConfig.for_model(
        family, text_config={**COMMON, **CHANGES[part], "model_type": part}, vision_config=vision,
        bos_token_id=None, eos_token_id=None, pad_token_id=0, mm_tokens_per_image=4, **special,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = text(tokens=150) % 99 + 1
    assert_generates_the_same(model, ids, attention_mask=torch.ones_like(ids))


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_unsupported_families_are_errors_that_change_nothing(family):
    model = AutoModelForCausalLM.from_config(tiny_config(family))
    before = dict(model.__dict__), model.config._attn_implementation
    with pytest.raises(headinfer.UnsupportedError, match="served"):
        headinfer.enable(model)
    assert (model.__dict__, model.config._attn_implementation) == before


def test_tested_families_are_those_of_the_list_and_of_the_document():
    assert sorted(CHANGES) == sorted(SUPPORTED_FAMILIES)
    if present() != sorted(CHANGES):
        pytest.skip("the document is generated with a transformers that has all families")
    docs = Path(__file__).parents[2] / "docs" / "models.md"
    assert docs.read_text(encoding="utf-8") == models_table(), "run: python tests/support/families.py > docs/models.md"
