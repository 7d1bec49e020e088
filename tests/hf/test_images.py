"""Models that take images are served with text only: images are refused before anything is computed."""

import pytest
import torch
from families import tiny_config, tiny_model
from transformers import AutoConfig, AutoModelForImageTextToText

import headinfer
from headinfer.hf.compat import DynamicCache

IMAGE_ID = 120
VISION = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14, "depth": 1, "num_heads": 2, "out_hidden_size": 64, "vision_output_dim": 64,
    "projector_input_dim": 64, "projector_output_dim": 64, "num_position_embeddings": 16,
}  # fmt: skip
FAMILIES = ["gemma3", "gemma4", "llama4", "qwen3_5"]


def make(family):
    torch.manual_seed(0)
    parts = {"text_config": tiny_config(f"{family}_text").to_dict()}
    if family != "gemma4":
        kind = type(AutoConfig.for_model(family).vision_config)
        known = kind().to_dict()
        parts["vision_config"] = {name: value for name, value in VISION.items() if name in known}
    config = AutoConfig.for_model(family, image_token_id=IMAGE_ID, mm_tokens_per_image=4, **parts)
    return AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()


def text(rows=2, tokens=300):
    return torch.randint(1, 100, (rows, tokens), generator=torch.Generator().manual_seed(1))


def options(**more):
    return {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, **more}


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_text_is_served_also_with_token_types(family):
    model = make(family)
    ids = text()
    types = {"mm_token_type_ids" if family in ("gemma4", "qwen3_5") else "token_type_ids": torch.zeros_like(ids)}
    types = {} if family == "llama4" else types
    logits = model(ids, past_key_values=DynamicCache(config=model.config)).logits
    for mode in ({}, {"num_beams": 2}):
        wanted = model.generate(ids, **options(**mode))
        with headinfer.enable(model, chunk_tokens=40) as enabled:
            for given in ({}, types):
                assert torch.equal(model.generate(ids, **given, **options(**mode)), wanted)
            assert enabled.last_cache.stats().host_kv_bytes > 0
            found = model(ids, past_key_values=enabled.new_cache(), **types).logits
        assert (found - logits).abs().max() < 5e-5 * logits.std()


@torch.no_grad()
@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}])
@pytest.mark.parametrize("family", FAMILIES)
def test_images_are_refused_before_anything_is_computed(family, mode):
    model = make(family)
    ids = text(rows=1)
    ids[:, 20:24] = IMAGE_ID
    marks = torch.zeros_like(ids)
    marks[:, 20:24] = 1
    given = [{"pixel_values": torch.zeros(1, 3, 28, 28)}]
    if family != "llama4":
        given.append({"token_type_ids" if family == "gemma3" else "mm_token_type_ids": marks})
    computed = []
    for module in model.modules():
        module.register_forward_hook(lambda *_: computed.append(1))
    with headinfer.enable(model) as enabled:
        for images in given:
            with pytest.raises(headinfer.UnsupportedError, match="images, videos or audio"):
                model.generate(ids, **images, **options(**mode))
            with pytest.raises(headinfer.UnsupportedError, match="images, videos or audio"):
                model(ids, past_key_values=enabled.new_cache(), **images)
    assert not computed


@torch.no_grad()
def test_images_with_a_cache_of_transformers_are_exact():
    """Without a HeadCache attention is dense, with any mask."""
    model = make("gemma3")
    ids = text(rows=1)
    ids[:, 20:24] = IMAGE_ID
    images = {"pixel_values": torch.randn(1, 3, 28, 28), "token_type_ids": (ids == IMAGE_ID).long()}
    wanted = model(ids, **images).logits
    cached = model.generate(ids, past_key_values=DynamicCache(config=model.config), **images, **options())
    with headinfer.enable(model):
        assert (model(ids, **images).logits - wanted).abs().max() < 5e-5 * wanted.std()
        found = model.generate(ids, past_key_values=DynamicCache(config=model.config), **images, **options())
    assert torch.equal(found, cached)


@torch.no_grad()
def test_token_types_of_gpt2_are_no_images():
    """GPT-2 adds an embedding for each token type."""
    model = tiny_model("gpt2")
    ids = text(rows=1)
    types = (ids > 50).long()
    wanted = model(ids, token_type_ids=types, logits_to_keep=1).logits
    assert not torch.equal(wanted, model(ids, logits_to_keep=1).logits)
    with headinfer.enable(model, chunk_tokens=40) as enabled:
        found = model(ids, token_type_ids=types, past_key_values=enabled.new_cache(), logits_to_keep=1).logits
    assert (found - wanted).abs().max() < 5e-5 * wanted.std()
