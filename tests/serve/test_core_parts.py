"""The parts of the server's core that need no model, and a service whose caches can be cut anywhere."""

import json
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import rotary_models
import torch
from core_client import Asked, counted_tokens
from families import tiny_model

from headinfer.errors import CapacityError, UnsupportedError, UsageError
from headinfer.hf.compat import has_response_template, response_parser
from headinfer.hf.models import byte_tokenizer
from headinfer.jobs import generate
from headinfer.jobs.conversation import Conversation, Turn
from headinfer.jobs.prompts import chat_texts, question_ids
from headinfer.serve.events import Failed, Reasoning, Text, ToolCall
from headinfer.serve.messages import chat_ids
from headinfer.serve.meter import Pace
from headinfer.serve.parsing import AnswerStream
from headinfer.serve.service import Service
from headinfer.serve.settings import ServeSettings
from headinfer.serve.turns import Turns
from headinfer.serve.uploads import Upload, Uploads, clean_filename, session_name

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} {{ c.function.arguments.city }}{% endfor %}"
    "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WITH_TOOLS = "{% for t in tools or [] %}<tool>{{ t.function.name }}\n{% endfor %}" + TEMPLATE
LISTS_ONLY = "{% for m in messages %}<|{{ m.role }}|>{{ m.content[0].text }}\n{% endfor %}<|assistant|>"
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {}}}
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}


# -- turns -------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Fake:
    client: str
    name: str
    kind: str = "answer"
    is_cancelled: bool = False


def run(turns, steps):
    """The names of the tasks whose turn it was, if each task takes as many steps as `steps` says."""
    order = []
    while (task := turns.next()) is not None:
        order.append(task.name)
        steps[task.name] -= 1
        if not steps[task.name]:
            turns.remove(task)
    return order


def test_clients_take_turns_and_the_tasks_of_each_come_in_order():
    turns = Turns({"answer": 4, "read": 1})
    for task in (
        Fake("a", "a1"),
        Fake("a", "a2"),
        Fake("b", "b1"),
        Fake("a", "book", "read"),
        Fake("b", "text", "read"),
    ):
        turns.add(task)
    assert [task.name for task in turns.waiting()] == ["a1", "a2", "b1", "book", "text"]
    order = run(turns, {"a1": 3, "a2": 1, "b1": 2, "book": 3, "text": 1})
    assert order == ["a1", "b1", "book", "a1", "b1", "book", "a1", "book", "text", "a2"]
    assert not turns.tasks()
    assert not turns.begun()


def test_no_more_tasks_are_under_way_than_there_is_memory_for():
    turns = Turns({"answer": 2, "read": 1})
    tasks = [Fake(client, client) for client in "abc"]
    for task in tasks:
        turns.add(task)
    assert [turns.next().name for _ in range(4)] == ["a", "b", "a", "b"]
    tasks[2].is_cancelled = True  # it ends at once
    assert turns.next().name == "c"
    turns.remove(tasks[2])
    turns.put_back(tasks[0])
    assert turns.waiting() == [tasks[0]]


def test_the_estimate_grows_with_the_context():
    pace = Pace()
    assert pace.eta_s(0, 100) is None
    for start in range(0, 1000, 100):  # a token takes 1 ms and 10 us for each token before it
        pace.note(start, start + 100, sum(0.001 + 1e-5 * at for at in range(start, start + 100)))
    expected = sum(0.001 + 1e-5 * at for at in range(1000, 5000))
    assert pace.eta_s(1000, 5000) == pytest.approx(expected, rel=0.02)


# -- uploads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "filename", "name"),
    [
        ("My Book.pdf", "My Book.pdf", "My-Book"),
        ("../../etc/passwd", "passwd", "passwd"),
        ("C:\\files\\a\u00e9.txt", "a\u00e9.txt", "ae"),
        ("\u4e66.txt", "\u4e66.txt", "document"),
        ("line\nbreak\0.txt", "linebreak.txt", "linebreak"),
        ("", "document", "document"),
        (".hidden", ".hidden", "hidden"),
        ("a" * 500, "a" * 200, "a" * 80),
    ],
)
def test_names_of_files_and_sessions(given, filename, name):
    assert clean_filename(given) == filename
    assert session_name(filename) == name


def test_an_upload_is_whole_or_not_there(tmp_path, monkeypatch):
    uploads = Uploads(tmp_path)
    first = Upload("book", "book.txt", "a client", 3, "00", 2.0)
    uploads.store(first, b"abc")
    (tmp_path / "given").write_bytes(b"def")
    second = Upload("other", "other.txt", "a client", 3, "01", 1.0)
    uploads.store(second, tmp_path / "given")
    assert uploads.all() == [second, first]
    assert (uploads.data(first), uploads.data(second)) == (b"abc", b"def")
    facts = tmp_path / ".uploads" / "book" / "upload.json"
    facts.write_text(json.dumps(json.loads(facts.read_text()) | {"unknown": 1}))
    assert uploads.all() == [second]
    uploads.remove("other")
    uploads.remove("other")
    assert [path.name for path in (tmp_path / ".uploads").iterdir()] == [".server"]
    with pytest.raises(UsageError, match="another server uses the sessions"):
        Uploads(tmp_path)
    uploads.close()
    Uploads(tmp_path).close()


# -- messages ----------------------------------------------------------------------------------------------------------


def templated(template=TEMPLATE):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def text_of(tokenizer, *arguments):
    return tokenizer.decode(chat_ids(tokenizer, *arguments))


def user(text):
    return {"role": "user", "content": text}


def test_the_template_writes_all_messages():
    messages = [
        {"role": "developer", "content": "Be brief."},
        user([{"type": "text", "text": "Hi"}, {"type": "text", "text": "!"}]),
    ]
    assert text_of(templated(), messages, [], None) == "<|system|>Be brief.\n<|user|>Hi!\n<|assistant|>"
    assert text_of(templated(LISTS_ONLY), messages, [], None) == "<|system|>Be brief.\n<|user|>Hi!\n<|assistant|>"


def test_tools_and_their_calls():
    messages = [user("Rain?"), {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "yes"}]
    text = text_of(templated(WITH_TOOLS), messages, [WEATHER], None)
    assert text == "<tool>weather\n<|user|>Rain?\n<|assistant|><call>weather Oslo\n<|tool|>yes\n<|assistant|>"
    with pytest.raises(UnsupportedError, match="takes no tools"):
        text_of(templated(), messages, [WEATHER], None)
    with pytest.raises(UnsupportedError, match="no chat template"):
        text_of(byte_tokenizer(), messages, [], None)
    broken = {**CALL, "function": {"name": "weather", "arguments": "{"}}
    with pytest.raises(UsageError, match="not JSON"):
        text_of(templated(), [{"role": "assistant", "tool_calls": [broken]}], [], None)


@pytest.mark.parametrize("template", [TEMPLATE, LISTS_ONLY, None], ids=["template", "lists only", "no template"])
@pytest.mark.parametrize("answers", [0, 2])
def test_messages_after_a_session_are_those_of_ask_and_chat(template, answers):
    tokenizer = templated(template)
    chat = chat_texts(tokenizer, is_raw=False)
    about = {"answers": answers}
    if not answers:
        assert chat_ids(tokenizer, [user("Who? ")], [], about) == question_ids(tokenizer, "Who? ", chat)
    conversation = Conversation("answer" if answers else "document", is_raw=False, turns=(Turn("Who?", "He."),))
    messages = [user("Who?"), {"role": "assistant", "content": "He."}, user("Why?")]
    prompt = conversation.prompt(tokenizer, "Why?")
    assert chat_ids(tokenizer, messages, [], about) == prompt.ids
    assert chat_ids(tokenizer, messages, [], about | {"raw": True}) == chat_ids(byte_tokenizer(), messages, [], about)


def test_the_system_prompt_of_a_session_stays():
    tokenizer = templated()
    about = {"system": "Be brief."}
    system = {"role": "system", "content": "Be brief."}
    assert text_of(tokenizer, [user("Who?")], [], about) == "\n\nWho?\n<|assistant|>"
    assert text_of(tokenizer, [system, user("Who?")], [], about) == "\n\nWho?\n<|assistant|>"
    for other in ({}, {"system": "Be long."}):
        with pytest.raises(UsageError, match="leave the system message out"):
            text_of(tokenizer, [system, user("Who?")], [], other)
    with pytest.raises(UsageError, match="one of the role user"):
        text_of(tokenizer, [system], [], about)
    with pytest.raises(UsageError, match="precedes the question"):
        text_of(tokenizer, [{"role": "assistant", "content": "Hi"}, user("Who?")], [], about)


def test_a_template_that_refuses_the_messages():
    tokenizer = templated("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UsageError, match="cannot write these messages: roles must alternate"):
        text_of(tokenizer, [user("Who?")], [], None)
    with pytest.raises(UsageError, match="cannot write these messages: it does not write each message"):
        text_of(templated("<|user|>{{ messages[0].content | upper }}"), [user("Who?")], [], None)


# -- answers -----------------------------------------------------------------------------------------------------------


def told(text):
    """The events of an answer of a model of the family qwen2, whose answers transformers can parse."""
    tokenizer = byte_tokenizer()
    model = SimpleNamespace(config=SimpleNamespace(model_type="qwen2"))
    assert has_response_template(tokenizer, model)
    events = []
    ids = tokenizer("<|im_start|>assistant\n").input_ids
    stream = AnswerStream(tokenizer, (), events.append, response_parser(tokenizer, model, ids, []))
    stream.put(torch.tensor([ids]))
    for token in tokenizer(text).input_ids:
        stream.put(torch.tensor([token]))
    stream.end()
    stream.end()
    kinds = (Text, Reasoning)
    joined = ["".join(event.text for event in events if isinstance(event, kind)) for kind in kinds]
    return (*joined, [(one.name, json.loads(one.arguments)) for one in events if isinstance(one, ToolCall)])


def test_reasoning_and_tool_calls_are_told_apart():
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
    assert told(f"<think>Why?</think>Wait.{call}") == ("Wait.", "Why?", [("weather", {"city": "Oslo"})])
    assert told("Only \u00e9 text") == ("Only \u00e9 text", "", [])
    assert told(f"{call}{call}")[2] == [("weather", {"city": "Oslo"})] * 2


@pytest.mark.parametrize("call", ["{broken", '{"no": "name"}', "[1]", ""])
def test_a_tool_call_that_is_none_ends_no_request(call):
    text, _, calls = told(f"Wait.<tool_call>{call}</tool_call> Done.")
    assert text.startswith("Wait.")
    assert not calls


# -- a model whose layers can be cut -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    settings = ServeSettings(
        "random:tiny-llama?layers=1&hidden=64&intermediate=64",
        tmp_path_factory.mktemp("sessions"),
        device="cpu",
        chunk_tokens=64,
        max_new_tokens=4,
        caches_kept=2,
    )
    with Service(settings) as service:
        yield service


def test_a_prompt_begins_with_the_longest_common_beginning(service):
    text = "It was a dark and stormy night; " * 8
    first = Asked(service, prompt=f"{text}A")
    assert first.last.cached_tokens == 0
    with counted_tokens(service) as read:
        changed = Asked(service, prompt=f"{text}BC", max_new_tokens=1)
        assert changed.last.cached_tokens == len(text)
    assert read == [2]
    assert Asked(service, prompt=f"{text}A").text == first.text
    service._caches.clear()
    assert Asked(service, prompt=f"{text}BC", max_new_tokens=1).text == changed.text


@pytest.mark.parametrize("when", ["in the answer", "after the answer"])
def test_an_error_in_an_answer_leaves_the_caches_right(service, monkeypatch, when):
    text = f"It was the best of times, {when}; " * 6
    service._caches.clear()
    expected = Asked(service, prompt=text, max_new_tokens=8)
    asked_on = Asked(service, prompt=f"{text}{expected.text}!", max_new_tokens=8)
    assert asked_on.text
    service._caches.clear()
    with monkeypatch.context() as patch:
        if when == "in the answer":
            patch.setattr(service._answerer, "_note_tokens", _fail_at_the_third_token())
        else:
            patch.setattr(service._answerer, "_end", _fail)
        assert isinstance(Asked(service, prompt=text, max_new_tokens=8).last, Failed)
    assert len({id(kept.cache) for kept in service._caches._kept}) == len(service._caches)
    assert all(kept.tokens == kept.cache.get_seq_length() for kept in service._caches._kept)
    assert Asked(service, prompt=f"{text}{expected.text}!", max_new_tokens=8).text == asked_on.text
    assert Asked(service, prompt=text, max_new_tokens=8).text == expected.text


def _fail(*_):
    raise ZeroDivisionError("a bug")


def _fail_at_the_third_token():
    seen = []

    def note(tokens):
        seen.append(tokens)
        if len(seen) == 3:
            _fail()

    return note


def test_memory_that_does_not_suffice_frees_old_caches_first(service, monkeypatch):
    for text in ("one ", "two "):
        Asked(service, prompt=text * 20).until(object)
        assert Asked(service, prompt=text * 20).text
    assert len(service._caches) == 2
    checked = service._served.enabled.planning.checked

    def full(tokens, rows, cache=None):
        if len(service._caches) > 1 or tokens > 100:
            raise CapacityError("no memory")
        return checked(tokens, rows, cache)

    monkeypatch.setattr(service._served.enabled.planning, "checked", full)
    assert Asked(service, prompt="two " * 20).last.cached_tokens > 0
    failed = Asked(service, prompt="three " * 40).last
    assert "no memory" in str(failed.error)
    assert Asked(service, prompt="four").text


@pytest.mark.filterwarnings("ignore:.*reference PyTorch implementation:UserWarning")
@pytest.mark.parametrize("family", ["lfm2", "phi3", "llama, dynamic"])
def test_layers_that_cannot_be_cut_and_frequencies_that_change(tmp_path, family):
    """A convolution's state cannot be cut. The frequencies of the others change after 256 tokens."""
    tokenizer = byte_tokenizer()
    model = tiny_model(family, vocab_size=259) if family == "lfm2" else rotary_models.tiny(family, vocab_size=259)
    for one in (model, tokenizer):
        one.save_pretrained(tmp_path / "model")
    common = {"device": "cpu", "dtype": "float32", "chunk_tokens": 64, "max_new_tokens": 6}
    text = "It was a bright cold day in April, and the clocks were striking thirteen. " * 4
    with Service(ServeSettings(str(tmp_path / "model"), tmp_path / "sessions", **common)) as service:
        cached = []
        for prompt in (text[:200], text[:190] + " Another end.", text[:290], text[:290]):
            job = generate.Job(str(tmp_path / "model"), [], prompt, raw=True, **common)
            found = Asked(service, prompt=prompt)
            assert found.text == generate.run(generate.prepare(job), on_text=lambda text: None).text
            cached.append(found.last.cached_tokens)
    assert cached == {"lfm2": [0, 0, 192, 256], "phi3": [0, 191, 0, 289]}.get(family, [0, 191, 0, 0])
