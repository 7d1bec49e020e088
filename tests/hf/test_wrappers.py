"""enable() serves the model in a wrapper, or its refusal names the wrapper."""

import pytest
import torch
from families import VOCAB, tiny_model

import headinfer
from headinfer.hf.compat import DynamicCache

pytestmark = pytest.mark.filterwarnings("ignore")  # those of peft and torch.compile()


def text(tokens=192):
    return torch.randint(1, VOCAB, (1, tokens), generator=torch.Generator().manual_seed(1))


def small():
    """A model of which torch.compile() traces few layers, read in chunks and questions of equal lengths."""
    return tiny_model("llama", num_hidden_layers=2)


def adapted(kind="LoraConfig", **options):
    peft = pytest.importorskip("peft")
    torch.manual_seed(7)
    return peft.get_peft_model(small(), getattr(peft, kind)(task_type="CAUSAL_LM", **options)).eval()


def lora():
    return adapted(target_modules=["q_proj", "v_proj"], init_lora_weights=False)


def compiled():
    torch.compiler.reset()
    return torch.compile(small(), backend="aot_eager")


@torch.no_grad()
@pytest.mark.parametrize("make", [lora, compiled, lambda: torch.compile(lora(), backend="eager")])
def test_a_wrapped_model_is_served(make, tmp_path):
    model = make()
    ids, question = text(), text(64)
    more = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(input_ids=ids, **more)
    whole = torch.cat([ids, question], dim=1)
    logits = model(input_ids=whole, past_key_values=DynamicCache(config=model.config)).logits[:, -64:]
    with headinfer.enable(model, chunk_tokens=64) as enabled:
        assert torch.equal(model.generate(input_ids=ids, **more), wanted)
        assert enabled.last_cache.stats().tokens == 197
        cache = enabled.new_cache()
        model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
        cache.save(tmp_path / "s", ids)
        for used in (cache, headinfer.HeadCache.load(tmp_path / "s", model)):
            found = model(input_ids=question, past_key_values=used).logits
            assert (found - logits).abs().max() < 5e-5 * logits.std()
        with pytest.raises(headinfer.StateError, match="already enabled"):
            headinfer.enable(enabled.model)
    assert torch.equal(model.generate(input_ids=ids, **more), wanted)
    torch.compiler.reset()


def test_adapters_count():
    model = lora()
    ids = text()
    more = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(input_ids=ids, **more)
    with model.disable_adapter():
        without = model.generate(input_ids=ids, **more)
    assert not torch.equal(wanted, without)
    with headinfer.enable(model, chunk_tokens=64):
        assert torch.equal(model.generate(input_ids=ids, **more), wanted)
        with model.disable_adapter():
            assert torch.equal(model.generate(input_ids=ids, **more), without)


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_virtual_tokens_are_refused(kind):
    with pytest.raises(headinfer.UnsupportedError, match=f"PeftModelForCausalLM adds virtual tokens .{kind}"):
        headinfer.enable(adapted(kind, num_virtual_tokens=4))


@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, torch.nn.Sequential, lambda model: "llama"])
def test_another_wrapper_is_named(wrap):
    wrapper = wrap(tiny_model("llama"))
    with pytest.raises(headinfer.UnsupportedError, match=f"{type(wrapper).__name__} is no model of transformers"):
        headinfer.enable(wrapper)


@torch.no_grad()
def test_a_cache_belongs_to_the_adapters_that_filled_it(tmp_path):
    model = lora()
    ids, question = text(), text(64)
    whole = torch.cat([ids, question], dim=1)
    with headinfer.enable(model, chunk_tokens=64) as enabled:
        cache = enabled.new_cache()
        with model.disable_adapter():
            model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
        match = "the cache was filled with no adapter active, and the model has the adapter default active now"
        with pytest.raises(headinfer.StateError, match=match):
            cache.save(tmp_path / "s", ids)
        with pytest.raises(headinfer.StateError, match=match):
            model.generate(input_ids=whole, past_key_values=cache, max_new_tokens=2, pad_token_id=0)
        assert cache.get_seq_length() == 192
        cache.reset()
        model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
        cache.save(tmp_path / "s", ids)
        for used in (cache, cache.fork(), headinfer.HeadCache.load(tmp_path / "s", model)):
            with model.disable_adapter(), pytest.raises(headinfer.StateError, match="with the adapter default active"):
                model(input_ids=question, past_key_values=used)
        model.add_adapter("other", model.peft_config["default"])
        model.set_adapter("other")
        with pytest.raises(headinfer.StateError, match="and the model has the adapter other active now"):
            model(input_ids=question, past_key_values=cache)
        model.set_adapter("default")
        found = model(input_ids=question, past_key_values=cache).logits
        assert torch.equal(found, model(input_ids=question, past_key_values=used).logits)
