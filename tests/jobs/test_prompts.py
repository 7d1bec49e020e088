"""The ids of prompts, over kinds of tokenizers and their settings. `generate`, and `read` with `ask`, give the same."""

import dataclasses
import re
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from headinfer.errors import HeadinferError
from headinfer.jobs import ask, generate, prompts, read

DOCUMENT = "    It was a bright cold day in April,\n\tand the clocks were striking thirteen.\nThey struck again. "
QUESTION = "When was it?"
# No token has a line break and another character, as in the tokenizers of large models.
LINES = [*DOCUMENT.splitlines(), QUESTION, "user assistant system: You are a helpful model. Today is the 24 of May."]
SPECIALS = ["<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>"]


def byte_level(add_prefix_space):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return tokenizer, trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIALS, initial_alphabet=alphabet)


def metaspace(scheme):
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return tokenizer, trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIALS, initial_alphabet=list("a0.\n\t"))


def legacy_llama():
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return tokenizer, trainers.BpeTrainer(vocab_size=200, special_tokens=SPECIALS, initial_alphabet=list("a0.\n\t "))


def word_piece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer, trainers.WordPieceTrainer(vocab_size=400, special_tokens=SPECIALS)


KINDS = {
    "byte-level": lambda: byte_level(add_prefix_space=False),
    "byte-level with a prefix space": lambda: byte_level(add_prefix_space=True),
    "Metaspace, always": lambda: metaspace("always"),
    "Metaspace, first": lambda: metaspace("first"),
    "Llama, legacy": legacy_llama,
    "WordPiece": word_piece,
}


def turns(text):
    """A template of all messages; `text` is what it writes for the content of one."""
    return "{% for m in messages %}<|{{ m.role }}|>\n" + text + "</s>\n{% endfor %}"


GENERATION = "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
AS_TEXT = turns("{{ m.content }}")
TEMPLATES = {
    "none": None,
    "plain": AS_TEXT + GENERATION,
    "with a beginning": "<s>" + AS_TEXT + GENERATION,
    "strips": turns("{{ m.content | trim }}") + GENERATION,
    "list only": turns("{{ m.content[0].text }}") + GENERATION,
    "list or nothing": turns("{% for p in m.content %}{{ p.text }}{% endfor %}") + GENERATION,
    "date": "Today is {{ strftime_now('%d %B %Y') }}.\n" + AS_TEXT + GENERATION,
    "system prompt": "{% if messages[0].role != 'system' %}You are a helpful model.\n{% endif %}"
    + AS_TEXT
    + GENERATION,
    "no generation prompt": AS_TEXT,
    "in brackets": "{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}",
}
BROKEN_TEMPLATES = {
    "raises": ("{{ raise_exception('a system message is needed') }}", "a system message is needed"),
    "drops the message": ("<|user|>\n<|assistant|>\n", "does not write each message once"),
    "writes it twice": (AS_TEXT + AS_TEXT, "does not write each message once"),
    "changes it": (turns("{{ m.content | upper }}"), "does not write each message once"),
    "is no template": ("{% for m in messages %}", "Unexpected end of template"),
    "fails in Python": (turns("{{ m.content + 1 }}"), "concatenate"),
}


def tokenizer_of(kind, template=None, begins=False, ends=False):
    tokenizer, trainer = KINDS[kind]()
    tokenizer.train_from_iterator(LINES * 3, trainer)
    single = ("<s> " if begins else "") + "$A" + (" </s>" if ends else "")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("<s>", "</s>")]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    fast.chat_template = template
    return fast


def ids_both_ways(tokenizer, document=DOCUMENT, question=QUESTION, raw=False):
    """Return the ids that `generate` gives the model, those of `read`, and those of `ask`."""
    job = generate.Job("model", document, question, raw=raw)
    whole = generate._encode(job, tokenizer)[0]
    document_ids, about, _ = read._encode(read.ReadJob("model", document, "name", None, raw=raw), tokenizer, None)
    asked = ask._question_ids(ask.AskJob("name", None, [question]), tokenizer, {"raw": raw, **about})
    return whole, document_ids[0].tolist(), asked[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_both_ways_give_the_same_ids(kind, template):
    for begins in (False, True):
        for ends in (False, True):
            tokenizer = tokenizer_of(kind, TEMPLATES[template], begins, ends)
            whole, read_ids, asked_ids = ids_both_ways(tokenizer)
            assert whole == read_ids + asked_ids
            assert read_ids[-1] != tokenizer.eos_token_id
            if template == "none":
                assert (whole[0] == tokenizer.bos_token_id) == begins
                assert tokenizer.eos_token_id not in whole
            alone = ids_both_ways(tokenizer, document="")[0] if template != "none" else []
            if template not in ("none", "list only", "list or nothing"):
                message = [{"role": "user", "content": QUESTION}]
                text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
                assert alone == tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_the_ids_are_those_of_the_text(kind, template):
    """No token is added between document and question, and the first line keeps its indentation."""
    tokenizer = tokenizer_of(kind, TEMPLATES[template])
    whole = ids_both_ways(tokenizer)[0]
    chat = prompts.chat_texts(tokenizer, is_raw=False)
    before, after = (chat.before, chat.after) if chat is not None else ("", "")
    text = before + DOCUMENT + "\n\n" + QUESTION + after
    expected = tokenizer(text, add_special_tokens=False).input_ids
    assert whole == expected


@pytest.mark.parametrize("template", ["strips", "plain"])
def test_blanks_around_a_question_are_treated_as_the_template_does(template):
    tokenizer = tokenizer_of("byte-level", TEMPLATES[template])
    blank = ids_both_ways(tokenizer, question=f" {QUESTION}\n")[0]
    assert tokenizer.decode(blank).endswith(f"{QUESTION}{'' if template == 'strips' else chr(10)}</s>\n<|assistant|>\n")
    message = [{"role": "user", "content": f" {QUESTION}\n"}]
    text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    alone = ids_both_ways(tokenizer, document="", question=f" {QUESTION}\n")[0]
    assert alone == tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("name", BROKEN_TEMPLATES)
def test_a_template_that_fails_or_drops_the_document_is_refused_in_one_sentence(name):
    template, says = BROKEN_TEMPLATES[name]
    tokenizer = tokenizer_of("byte-level", template)
    for run in (
        lambda: prompts.prompt_ids(tokenizer, DOCUMENT, QUESTION, is_raw=False),
        lambda: prompts.prompt_ids(tokenizer, "", QUESTION, is_raw=False),
        lambda: read._encode(read.ReadJob("model", DOCUMENT, "name", None), tokenizer, None),
        lambda: ask._question_ids(ask.AskJob("name", None, [QUESTION]), tokenizer, {}),
    ):
        with pytest.raises(HeadinferError, match=re.escape(says)) as raised:
            run()
        assert "--raw" in str(raised.value)
        assert "\n" not in str(raised.value)
    assert ids_both_ways(tokenizer, raw=True)[0]


def test_a_template_for_one_question_alone_serves_one_question():
    template = "{% if messages | length > 1 %}{{ raise_exception('one turn') }}{% endif %}" + AS_TEXT + GENERATION
    tokenizer = tokenizer_of("byte-level", template)
    assert ids_both_ways(tokenizer)[0]
    kept = ask.AskJob("name", None, [QUESTION, QUESTION], keep=True)
    with pytest.raises(HeadinferError, match="without --keep"):
        ask._question_ids(kept, tokenizer, {})
    assert len(ask._question_ids(dataclasses.replace(kept, keep=False), tokenizer, {})) == 2


@pytest.mark.parametrize("template", ["plain", "list only", "strips"])
def test_a_later_question_follows_an_answer(template):
    tokenizer = tokenizer_of("Llama, legacy", TEMPLATES[template])
    job = ask.AskJob("name", None, [QUESTION, QUESTION], keep=True)
    second = ask._question_ids(job, tokenizer, {})[1]
    text = f"</s>\n<|user|>\n{QUESTION}</s>\n<|assistant|>\n"
    assert second == tokenizer("0" + text, add_special_tokens=False).input_ids[-len(second) :]
    assert second[0] == tokenizer.eos_token_id


def test_a_session_keeps_the_texts_of_its_template():
    """A template writes the date: a reading that goes on another day, and a question, use the date of the first day."""
    today, tomorrow = (turns("Today is " + day + ". {{ m.content }}") + GENERATION for day in ("May 1", "May 2"))
    tokenizer = tokenizer_of("byte-level", today)
    job = read.ReadJob("model", DOCUMENT, "name", None)
    ids, about, _ = read._encode(job, tokenizer, None)
    tokenizer.chat_template = tomorrow
    assert not torch.equal(read._encode(job, tokenizer, None)[0], ids)
    resumed_ids, resumed_about, _ = read._encode(job, tokenizer, SimpleNamespace(about=about))
    assert torch.equal(resumed_ids, ids)
    assert resumed_about == about
    asked = ask._question_ids(ask.AskJob("name", None, [QUESTION]), tokenizer, about)[0]
    tokenizer.chat_template = today
    assert ids[0].tolist() + asked == prompts.prompt_ids(tokenizer, DOCUMENT, QUESTION, is_raw=False)


def test_sessions_of_earlier_versions_go_on_and_are_asked():
    """headinfer 0.1.0 kept no texts of the template, and stripped the document."""
    tokenizer = tokenizer_of("byte-level", TEMPLATES["plain"])
    old = SimpleNamespace(about={"raw": False})
    ids, about, _ = read._encode(read.ReadJob("model", DOCUMENT, "name", None), tokenizer, old)
    assert tokenizer.decode(ids[0]) == "<|user|>\n" + DOCUMENT.lstrip()
    assert about == {}  # so that the session is recognized again
    asked = ask._question_ids(ask.AskJob("name", None, [QUESTION]), tokenizer, old.about)[0]
    assert tokenizer.decode(asked) == f"\n\n{QUESTION}</s>\n<|assistant|>\n"
