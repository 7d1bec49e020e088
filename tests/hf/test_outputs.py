"""Every output of a forward pass is that of transformers on the uncut prompt, or it is refused."""

import pytest
import torch
from families import VOCAB, present, tiny_model

import headinfer
from headinfer.hf.compat import DynamicCache

CHUNK_TOKENS = 40
FAMILIES = ["llama", "gpt2", "gemma3_text", "lfm2", "qwen3_moe", "gpt_oss", "qwen3_next", "falcon_h1"]
pytestmark = pytest.mark.filterwarnings("ignore:.*lru_cache.*", "ignore::DeprecationWarning")


def text(rows=1, tokens=130, seed=1):
    return torch.randint(1, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def flat(value):
    """All tensors of an output, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for item in value for tensor in flat(item)] if isinstance(value, tuple | list) else []


def assert_close(found, wanted):
    assert len(found) == len(wanted) > 0
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.shape == theirs.shape
        finite = theirs[theirs.isfinite()]
        scale = float(finite.abs().max()) if finite.numel() else 1.0
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * max(scale, 1e-3))


def in_config(model, name):
    """Set a flag in the model's config, where checkpoints set it."""
    setattr(model.config, name, True)
    return {}


ASKED = {
    "hidden states": {"output_hidden_states": True, "logits_to_keep": 1},
    "some hidden states": {"output_hidden_states": [0, -1], "logits_to_keep": 1},
    "router logits": {"output_router_logits": True, "logits_to_keep": 1},
    "loss": {"labels": text()},
    "all logits": {},
    "some logits": {"logits_to_keep": torch.tensor([3, 70, 129])},
    "last logits": {"logits_to_keep": 50},
    "hidden states by the config": {"logits_to_keep": 1},
    "router logits by the config": {"logits_to_keep": 1},
}


@torch.no_grad()
@pytest.mark.parametrize("what", ASKED)
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_of_a_forward_pass_are_those_of_the_whole_prompt(family, what):
    model = tiny_model(family)
    ids = text()
    asked = ASKED[what]
    if "by the config" in what:
        in_config(model, "output_router_logits" if "router" in what else "output_hidden_states")
    for as_dict in (True, False):
        wanted = model(ids, past_key_values=DynamicCache(config=model.config), return_dict=as_dict, **asked)
        with headinfer.enable(model, chunk_tokens=CHUNK_TOKENS) as enabled:
            found = model(ids, past_key_values=enabled.new_cache(), return_dict=as_dict, **asked)
        if as_dict:
            assert list(found) == list(wanted)
            found = [value for key, value in found.items() if key != "past_key_values"]
            wanted = [value for key, value in wanted.items() if key != "past_key_values"]
        assert_close(flat(found), flat(wanted))


@pytest.mark.parametrize("where", ["call", "generation config", "config"])
@pytest.mark.parametrize("mode", ["greedy", "beams", "returned", "prompt lookup", "user's chunks"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_outputs_of_generate_are_those_of_the_whole_prompt(family, mode, where):
    model = tiny_model(family)
    ids = text(rows=2 if mode in ("greedy", "beams") else 1)
    modes = {
        "beams": {"num_beams": 3}, "returned": {"do_sample": True, "num_return_sequences": 3},
        "prompt lookup": {"prompt_lookup_num_tokens": 4},
    }  # fmt: skip
    asked = {}
    if where == "call":
        asked["output_hidden_states"] = True
    elif where == "generation config":
        model.generation_config.output_hidden_states = True
    else:
        in_config(model, "output_hidden_states")

    def generate(**more):
        torch.manual_seed(3)
        return model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, pad_token_id=0, **asked, **more,
            **{"do_sample": False, **modes.get(mode, {})}, return_dict_in_generate=True, output_scores=True,
            output_logits=True,
        )  # fmt: skip

    wanted = generate()
    own = {"prefill_chunk_size": CHUNK_TOKENS} if mode == "user's chunks" else {}
    with headinfer.enable(model, chunk_tokens=CHUNK_TOKENS):
        found = generate(**own)
    assert torch.equal(found.sequences, wanted.sequences)
    assert list(found) == list(wanted)
    for key in ("scores", "logits", "hidden_states"):
        if key in wanted:
            assert_close(flat(found[key]), flat(wanted[key]))
    assert ("hidden_states" in wanted) == (where != "config")


@torch.no_grad()
@pytest.mark.parametrize("family", present())
def test_attention_weights_are_refused(family):
    model = tiny_model(family)
    ids = text(tokens=9)
    with headinfer.enable(model) as enabled:
        for cache in (None, enabled.new_cache()):
            with pytest.raises(headinfer.UnsupportedError, match="whole attention matrix"):
                model(ids, past_key_values=cache, output_attentions=True)
        with pytest.raises(headinfer.UnsupportedError, match="whole attention matrix"):
            model.generate(ids, max_new_tokens=2, pad_token_id=0, output_attentions=True, return_dict_in_generate=True)
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    with headinfer.enable(model) as enabled:
        with pytest.raises(headinfer.UnsupportedError, match="config"):
            model(ids)
        model(ids, output_attentions=False, past_key_values=enabled.new_cache())


@torch.no_grad()
def test_copied_rows_and_tuples():
    """Beam search leaves a cache whose rows are copies. A later pass may ask for a tuple or a loss."""
    model = tiny_model("llama")
    ids = text(tokens=60)
    wanted = model(torch.cat([ids, ids[:, :4]], dim=1).repeat(3, 1)).logits[:, -4:]
    with headinfer.enable(model) as enabled:
        for asked in ({"return_dict": False}, {"labels": ids[:, :4].repeat(3, 1)}, {"output_hidden_states": True}):
            cache = enabled.new_cache()
            more = {"do_sample": True, "top_k": 1, "num_return_sequences": 3, "pad_token_id": 0}
            model.generate(ids, past_key_values=cache, max_new_tokens=1, **more)
            assert cache.copies == 3
            found = model(ids[:, :4].repeat(3, 1), past_key_values=cache, **asked)
            assert_close([found[0] if "return_dict" in asked else found.logits], [wanted])
