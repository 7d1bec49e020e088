"""A checkpoint's configs do not turn the cache off or ask for outputs; a call can."""

import copy
import json

import pytest
import torch
from families import VOCAB, tiny_model
from transformers import AutoModelForCausalLM

import headinfer
from headinfer.hf.models import byte_tokenizer
from headinfer.jobs.ask import AskJob, ask, prepare_ask
from headinfer.jobs.generate import Job, prepare, run
from headinfer.jobs.read import ReadJob, prepare_read, read

FLAGS = {"use_cache": False, "output_hidden_states": True, "output_router_logits": True, "output_attentions": True}


def text(tokens=300):
    return torch.randint(1, VOCAB, (1, tokens), generator=torch.Generator().manual_seed(1))


def stored(model, folder, where, **flags):
    """Save a model with flags in its config.json or generation_config.json."""
    model.save_pretrained(folder)
    for name in where:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | flags))
    return folder


FILES = [("config.json",), ("generation_config.json",), ("config.json", "generation_config.json")]


@torch.no_grad()
@pytest.mark.parametrize("files", FILES, ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3_next", "gpt2"])
def test_use_cache_false_of_a_checkpoint_does_not_count(family, files, tmp_path):
    plain = tiny_model(family)
    ids = text()
    more = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    wanted = plain.generate(ids, **more)
    model = AutoModelForCausalLM.from_pretrained(stored(plain, tmp_path / "m", files, use_cache=False)).eval()
    before = model.config.use_cache, model.generation_config.use_cache
    with headinfer.enable(model, chunk_tokens=64) as enabled:
        assert torch.equal(model.generate(ids, **more), wanted)
        assert enabled.last_cache.stats().tokens == 305
        cache = enabled.new_cache()
        assert torch.equal(model.generate(ids, past_key_values=cache, **more), wanted)
        assert cache.get_seq_length() == 305
        given = model(ids, past_key_values=enabled.new_cache())
        assert isinstance(given.past_key_values, headinfer.HeadCache)
    assert (model.config.use_cache, model.generation_config.use_cache) == before


def test_use_cache_false_of_a_call_counts():
    model = tiny_model("llama")
    ids = text(40)
    more = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(ids, **more)
    own = copy.deepcopy(model.generation_config)
    own.update(use_cache=False, **more)
    with headinfer.enable(model) as enabled:
        assert torch.equal(model.generate(ids, use_cache=False, **more), wanted)
        with pytest.warns(UserWarning, match="use_cache=False"):
            assert torch.equal(model.generate(ids, generation_config=own), wanted)
        assert enabled.last_cache is None
        for given in ({"use_cache": False, **more}, {"generation_config": own}):
            with pytest.raises(headinfer.UsageError, match="contradicts"):
                model.generate(ids, past_key_values=enabled.new_cache(), **given)


@pytest.mark.parametrize("files", FILES, ids=str)
def test_commands_give_the_same_answers_whatever_the_checkpoint_says(files, tmp_path):
    model = tiny_model("qwen3_moe", vocab_size=len(byte_tokenizer()))
    held = []
    for name, flags in (("plain", {}), ("flagged", FLAGS)):
        if "generation_config.json" in files:
            flags = {key: value for key, value in flags.items() if key != "output_router_logits"}
        folder = stored(model, tmp_path / name, files, **flags)
        byte_tokenizer().save_pretrained(folder)
        document = "It was a bright cold day in April. " * 20
        job = Job(str(folder), document=document, prompt="Why?", max_new_tokens=8, chunk_tokens=300)
        answer = run(prepare(job), on_text=lambda text: None)
        read(prepare_read(ReadJob(str(folder), document, name, tmp_path / "sessions", chunk_tokens=300)))
        asked = ask(
            prepare_ask(AskJob(name, tmp_path / "sessions", ["Why?"], max_new_tokens=8)), on_text=lambda text: None
        )
        held.append((answer.token_ids, asked[0].token_ids, answer.stats.tokens, answer.stats.host_kv_peak_bytes))
    assert held[0] == held[1]
    assert held[0][0] == held[0][1]
