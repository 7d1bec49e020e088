"""Contexts longer than a table of positions are refused before a model reads them."""

import pytest
import torch
from families import VOCAB, present, tiny_model

import headinfer
from headinfer.errors import UsageError
from headinfer.hf.models import byte_tokenizer
from headinfer.jobs.ask import AskJob, ask, prepare_ask
from headinfer.jobs.generate import Job, prepare
from headinfer.jobs.read import ReadJob, prepare_read, read
from headinfer.plan.model_shape import ModelShape

MOST = 64
TABLES = ["biogpt", "gpt2", "gpt_bigcode", "opt"]
pytestmark = pytest.mark.filterwarnings("ignore:.*lru_cache.*", "ignore::DeprecationWarning")


def text(tokens, rows=1):
    return torch.randint(1, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("family", present())
def test_the_families_with_tables_are_those_that_read_no_longer_context(family):
    model = tiny_model(family, max_position_embeddings=MOST)
    model(text(MOST))
    try:
        model(text(MOST + 1))
        has_table = False
    except IndexError:
        has_table = True
    shape = ModelShape.from_config(model.config)
    assert shape.has_position_table == has_table == (family in TABLES)
    assert not has_table or shape.max_context_tokens == MOST


@torch.no_grad()
@pytest.mark.parametrize("family", TABLES)
def test_forward_passes(family):
    model = tiny_model(family, max_position_embeddings=MOST)
    read_tokens = []
    model.get_input_embeddings().register_forward_pre_hook(lambda module, args: read_tokens.append(args[0].shape[1]))
    with headinfer.enable(model, chunk_tokens=20) as enabled:
        for cache in (None, enabled.new_cache()):
            with pytest.raises(UsageError, match="65 tokens of prompt and answer exceed the 64 positions"):
                model(text(MOST + 1), past_key_values=cache, logits_to_keep=1)
        assert not read_tokens, "nothing is computed"
        model(text(MOST - 1), past_key_values=cache, logits_to_keep=1)
        model(text(1), past_key_values=cache)
        with pytest.raises(UsageError, match="65 tokens"):
            model(text(1), past_key_values=cache)
        assert cache.get_seq_length() == MOST
        cache.crop(-10)
        model(text(10), past_key_values=cache)


@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 8}, {"do_sample": True}])
@pytest.mark.parametrize("family", TABLES)
def test_generate(family, mode):
    model = tiny_model(family, max_position_embeddings=MOST)
    rows = 1 if "prompt_lookup_num_tokens" in mode else 2
    ids = text(50, rows)
    ids[:, 25:] = ids[:, :25]
    mask = torch.ones_like(ids)
    more = {"attention_mask": mask, "do_sample": False, "pad_token_id": 0, **mode}
    most = 8 if "prompt_lookup_num_tokens" in mode else 15  # the last token is not read; guesses are read beyond it
    written = []
    torch.manual_seed(0)
    wanted = model.generate(ids, max_new_tokens=most, **more)
    with headinfer.enable(model, chunk_tokens=20, on_forward=written.append):
        with pytest.raises(UsageError, match="65 tokens of prompt and answer exceed the 64 positions"):
            model.generate(ids, max_new_tokens=most + 1, **more)
        assert not written
        torch.manual_seed(0)
        assert torch.equal(model.generate(ids, max_new_tokens=most, **more), wanted)
        embeds = model.get_input_embeddings()(ids).detach()
        with pytest.raises(UsageError, match="65 tokens"):
            model.generate(inputs_embeds=embeds, max_new_tokens=most + 1, **more)


def test_a_draft_model_with_a_shorter_table_is_refused_before_anything_is_read():
    model = tiny_model("llama")
    draft = tiny_model("gpt2", max_position_embeddings=MOST)
    read_tokens = []
    options = {"do_sample": False, "pad_token_id": 0, "assistant_model": draft}

    def on_forward(cache):
        read_tokens.append(cache.get_seq_length())

    with headinfer.enable(model, on_forward=on_forward), headinfer.enable(draft):
        with pytest.raises(UsageError, match="exceed the 64 positions that this gpt2 has learned"):
            model.generate(text(60), max_new_tokens=8, **options)
        assert read_tokens == []
        found = model.generate(text(40), max_new_tokens=8, **options)
    assert torch.equal(found, model.generate(text(40), max_new_tokens=8, do_sample=False, pad_token_id=0))


@pytest.mark.parametrize("family", TABLES)
def test_padding_needs_no_positions(family):
    model = tiny_model(family, max_position_embeddings=MOST)
    ids = text(50, rows=2)
    mask = torch.ones_like(ids)
    mask[0, :10] = 0
    mask[1, :7] = 0
    more = {"attention_mask": mask, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(ids, max_new_tokens=22, **more)
    with headinfer.enable(model, chunk_tokens=20):
        assert torch.equal(model.generate(ids, max_new_tokens=22, **more), wanted)
        with pytest.raises(UsageError, match="65 tokens"):
            model.generate(ids, max_new_tokens=23, **more)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_jobs_refuse_before_the_weights_are_loaded(family, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    tiny_model(family, max_position_embeddings=MOST, vocab_size=len(byte_tokenizer())).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    for prompt, new_tokens in (("a" * 60, 10), ("a" * 70, 1)):
        with pytest.raises(UsageError, match="exceed the 64 positions"):
            prepare(Job(str(folder), prompt=prompt, max_new_tokens=new_tokens))
    root = tmp_path / "sessions"
    with pytest.raises(UsageError, match="exceed the 64 positions"):
        prepare_read(ReadJob(str(folder), "a" * 65, "long", root))
    read(prepare_read(ReadJob(str(folder), "a" * 40, "s", root)))
    for questions, new_tokens, keep in ((["a" * 16], 8, False), (["a"], 30, False), (["a" * 6, "b" * 6], 6, True)):
        with pytest.raises(UsageError, match="exceed the 64 positions"):
            prepare_ask(AskJob("s", root, questions, max_new_tokens=new_tokens, keep=keep))
    questions = ["a" * 6, "b" * 6]
    answers = ask(prepare_ask(AskJob("s", root, questions, max_new_tokens=4)), on_text=lambda text: None)
    assert [answer.tokens_out for answer in answers] == [4, 4]
