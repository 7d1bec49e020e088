"""Options of decoding: stop strings, system prompts, ignored end tokens, seeds. The same in generate and ask."""

import json
from itertools import pairwise

import pytest
import torch
from families import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from test_prompts import AS_TEXT, GENERATION, TEMPLATES, tokenizer_of

from headinfer import enable
from headinfer.errors import UnsupportedError, UsageError
from headinfer.hf.models import byte_tokenizer, resolve
from headinfer.jobs.answer_text import AnswerText, StopCriterion
from headinfer.jobs.prompts import chat_texts, prompt_ids
from headinfer.jobs.sampling import Sampling

MODEL = "random:tiny-llama?layers=2&hidden=64&intermediate=64&heads=4&kv_heads=2"
WORDS = "It was a bright cold day in April, and the clocks were striking thirteen.\n"
TOKENIZER = tokenizer_of("byte-level")  # whose tokens are words and parts of words


# -- the text of an answer ---------------------------------------------------------------------------------------------


def first_stop(text, stop):
    """The stop string that a text completes first, and where it begins; oracle, character by character."""
    for end in range(1, len(text) + 1):
        found = [one for one in stop if text[:end].endswith(one)]
        if found:
            longest = max(found, key=len)
            return longest, end - len(longest)
    return None, len(text)


@settings(max_examples=150, deadline=None)
@given(
    words=st.lists(
        st.sampled_from(["thirteen", " clock", "s", " was", "é", "🌍", "\n", "st", "ri", "</s>"]), max_size=9
    ),
    stop=st.lists(
        st.sampled_from(["clocks", "s w", "thirteen thir", "\n\n", "ée", "🌍", "rist", "st", "s"]), max_size=3
    ),
    cuts=st.lists(st.integers(0, 40), max_size=5),
)
def test_an_answer_ends_before_the_first_stop_string_however_its_tokens_arrive(words, stop, cuts):
    ids = TOKENIZER("".join(words), add_special_tokens=False).input_ids
    whole = TOKENIZER.decode(ids, skip_special_tokens=True)
    stopped_by, length = first_stop(whole, stop)
    parts = []
    answer = AnswerText(TOKENIZER, stop, parts.append)
    bounds = sorted({0, len(ids), *(cut for cut in cuts if cut < len(ids))})
    for start, end in pairwise(bounds):
        answer.put(ids[start:end])
        assert whole[:length].startswith("".join(parts))  # nothing is shown that must be taken back
    answer.end()
    assert "".join(parts) == answer.text == whole[:length]
    assert answer.stopped_by == stopped_by
    assert answer.token_ids == ids[: len(answer.token_ids)]
    kept, rest = answer.kept()
    assert TOKENIZER.decode(kept, skip_special_tokens=True) + rest == answer.text
    alone = AnswerText(TOKENIZER, stop)
    for token in ids:
        alone.put([token])
    assert alone.token_ids == answer.token_ids
    assert (alone.stopped_by is None) == (stopped_by is None)


def test_the_rest_of_a_token_that_a_stop_string_cuts_is_text():
    ids = TOKENIZER("the clocks were", add_special_tokens=False).input_ids
    answer = AnswerText(TOKENIZER, ["ocks"])
    answer.put(ids)
    assert answer.text == "the cl"
    kept, rest = answer.kept()
    assert TOKENIZER.decode(kept) + rest == "the cl"
    assert len(answer.token_ids) < len(ids)


def test_a_special_token_can_be_a_stop_string():
    ids = TOKENIZER("the clocks<|user|> were", add_special_tokens=False).input_ids
    answer = AnswerText(TOKENIZER, ["<|user|>"])
    answer.put(ids)
    assert answer.text == "the clocks"
    assert answer.stopped_by == "<|user|>"
    assert answer.kept() == (ids[: len(answer.token_ids) - 1], "")


def test_each_row_of_a_batch_ends_alone_also_within_several_new_tokens():
    texts = ["xx one stop", "xx one two.", "xx stop two"]
    rows = torch.tensor([byte_tokenizer()(text).input_ids for text in texts])
    criterion = StopCriterion(byte_tokenizer(), ["stop", "e t"], prompt_tokens=3)
    assert criterion(rows[:, :4], None).tolist() == [False, False, False]
    assert criterion(rows[:, :8], None).tolist() == [False, True, True]
    assert criterion(rows, None).tolist() == [True, True, True]


# -- the commands ------------------------------------------------------------------------------------------------------


@pytest.fixture
def headinfer(run_command, monkeypatch, tmp_path):
    """A function that runs a command and returns its JSON, with a folder of sessions of its own."""
    monkeypatch.setenv("HEADINFER_SESSIONS", str(tmp_path / "sessions"))

    def run(*arguments, words=()):
        more = ("--max-new-tokens", 10) if arguments[0] != "read" else ()
        code, out, err = run_command(*arguments, *more, "--json", *(("--", *words) if words else ()))
        assert code == 0, err
        found = json.loads(out)
        return found["answers"] if arguments[0] == "ask" else found

    return run


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(WORDS * 8, encoding="utf-8")
    return path


def visible(tokens):
    """A tokens' text that occurs in an answer for the first time, to stop at: not the first one."""
    text = byte_tokenizer().decode(tokens)
    return next(text[at] for at in range(3, len(text)) if text[at].isprintable() and text[at] not in text[:at])


def test_generate_and_ask_stop_alike(headinfer, book):
    headinfer("read", MODEL, "--file", book, "--session", "s")
    whole = headinfer("generate", MODEL, "--file", book, "--prompt", "When?")
    stop = visible(whole["token_ids"])
    options = ("--stop", "never", "--stop", stop)
    found = headinfer("generate", MODEL, "--file", book, "--prompt", "When?", *options)
    (asked,) = headinfer("ask", "--session", "s", *options, words=["When?"])
    for answer in (found, asked):
        assert answer["text"] == whole["text"][: whole["text"].index(stop)]
        assert answer["stopped_by"] == stop
        assert answer["token_ids"] == whole["token_ids"][: answer["tokens_out"]]
        assert answer["tokens_out"] < whole["tokens_out"]
    assert whole["stopped_by"] is None


@pytest.mark.parametrize("kind", ["full attention", "linear attention"])
def test_a_kept_answer_is_what_was_shown(headinfer, book, tmp_path, kind):
    """The tokens of a stop string are not in the session, also if a layer cannot remove its newest tokens."""
    folder = MODEL
    if kind == "linear attention":
        folder = tmp_path / "hybrid"
        tiny_model("qwen3_next", vocab_size=len(byte_tokenizer())).save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
    headinfer("read", folder, "--file", book, "--session", "s")
    (whole,) = headinfer("ask", "--session", "s", words=["When?"])
    stop = visible(whole["token_ids"])
    (first,) = headinfer("ask", "--session", "s", "--keep", "--stop", stop, words=["When?"])
    assert stop not in first["text"]
    (second,) = headinfer("ask", "--session", "s", words=["Where?"])
    ids_of = byte_tokenizer()
    text = book.read_text() + "\n\nWhen?"
    talk = [*ids_of(text).input_ids, *first["token_ids"][:-1], *ids_of("\nWhere?").input_ids]
    ids = torch.tensor([talk])
    model = resolve(str(folder)).load(dtype=torch.float32, device="cpu", seed=0)
    with enable(model):
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False)
    assert second["token_ids"] == expected[0, len(talk) :].tolist()


def test_the_same_seed_gives_the_same_answer_in_generate_and_ask(headinfer, book):
    headinfer("read", MODEL, "--file", book, "--session", "s")
    options = ("--temperature", 3, "--min-p", 0.001, "--top-k", 100, "--top-p", 0.99, "--seed", 7)
    # The weights of a random model have the seed too, so the ones of the session are not those of seed 7.
    headinfer("read", MODEL, "--file", book, "--session", "seven", "--seed", 7)
    found = headinfer("generate", MODEL, "--file", book, "--prompt", "When?", *options)
    first, second = headinfer("ask", "--session", "seven", *options, words=["When?", "When?"])
    assert found["token_ids"] == first["token_ids"] == second["token_ids"]
    assert len(set(found["token_ids"])) > 4
    other = headinfer("ask", "--session", "seven", *options[:-1], 8, words=["When?"])[0]
    assert other["token_ids"] != first["token_ids"]
    greedy, likeliest = (
        headinfer("ask", "--session", "s", *more, words=["When?"])[0]
        for more in ((), ("--temperature", 3, "--min-p", 1))
    )
    assert likeliest["token_ids"] == greedy["token_ids"]


def test_ignored_end_tokens_are_never_chosen(headinfer, book, tmp_path):
    model = resolve(MODEL).load(dtype=torch.float32, device="cpu", seed=0)
    whole = headinfer("generate", MODEL, "--file", book, "--prompt", "When?")["token_ids"]
    end = whole[4]
    model.generation_config.eos_token_id = [end]
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    arguments = ("generate", tmp_path / "model", "--file", book, "--prompt", "When?")
    assert headinfer(*arguments)["token_ids"] == whole[: whole.index(end) + 1]
    found = headinfer(*arguments, "--ignore-eos")["token_ids"]
    assert len(found) == 10
    assert end not in found


# -- system prompts ----------------------------------------------------------------------------------------------------

SYSTEM = "Answer in one word."
REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"


@pytest.mark.parametrize("template", ["plain", "strips", "list only", "date", "system prompt"])
def test_the_chat_template_writes_the_system_prompt(template):
    tokenizer = tokenizer_of("byte-level", TEMPLATES[template])
    ids = prompt_ids(tokenizer, WORDS, "When?", is_raw=False, system=SYSTEM)
    text = tokenizer.decode(ids)
    assert text.index(SYSTEM) < text.index(WORDS.strip())
    assert ids != prompt_ids(tokenizer, WORDS, "When?", is_raw=False)
    if template in ("plain", "date"):
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": f"{WORDS}\n\nWhen?"}]
        expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert ids == tokenizer(expected, add_special_tokens=False).input_ids


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (REFUSES + AS_TEXT + GENERATION, "System role not supported"),
        ("{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}", "does not write a system prompt"),
    ],
)
def test_a_template_without_a_system_prompt_is_refused_in_one_sentence(template, reason):
    tokenizer = tokenizer_of("byte-level", template)
    assert chat_texts(tokenizer, is_raw=False) is not None
    with pytest.raises(UnsupportedError, match=reason) as raised:
        chat_texts(tokenizer, is_raw=False, system=SYSTEM)
    assert "takes no system prompt" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("is_raw", [True, False])
def test_a_system_prompt_needs_a_template(is_raw):
    tokenizer = tokenizer_of("byte-level", TEMPLATES["plain"] if is_raw else None)
    with pytest.raises(UsageError, match="--raw leaves out" if is_raw else "no chat template"):
        chat_texts(tokenizer, is_raw=is_raw, system=SYSTEM)


def test_a_session_has_one_system_prompt(headinfer, run_command, book, tmp_path):
    folder = tmp_path / "model"
    resolve(MODEL).load(dtype=torch.float32, device="cpu", seed=0).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}<assistant>"
    tokenizer.save_pretrained(folder)
    whole = headinfer("generate", folder, "--file", book, "--prompt", "When?", "--system", SYSTEM)
    assert (
        len(SYSTEM)
        < whole["tokens_in"] - headinfer("generate", folder, "--file", book, "--prompt", "When?")["tokens_in"]
    )
    read = ("read", folder, "--file", book, "--session", "s")
    headinfer(*read, "--system", SYSTEM)
    for more in ((), ("--system", SYSTEM)):
        assert headinfer("ask", "--session", "s", *more, words=["When?"])[0]["token_ids"] == whole["token_ids"]
    assert headinfer(*read, "--system", SYSTEM)["resumed_at"] > 0
    code, _, err = run_command("ask", "--session", "s", "--system", "Be brief.", "When?")
    assert code == 2
    assert "was read without this system prompt" in err
    code, _, err = run_command(*read)
    assert code == 2
    assert f"was begun with the system prompt '{SYSTEM}'" in err


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (Sampling(top_k=3), "--top-k chooses among samples: give --temperature above 0"),
        (Sampling(top_p=0.5, min_p=0.1), "--top-p and --min-p choose among samples"),
        (Sampling(stop=("a", "")), "--stop is empty"),
    ],
)
def test_options_that_have_no_effect_are_refused(sampling, message):
    with pytest.raises(UsageError, match=message):
        sampling.check()
