"""The API with OpenAI's client: chats, completions, responses, files, models, errors, progress."""

import errno
import json
from dataclasses import replace

import openai
import pytest
from live_server import BROWSER
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter
from scripted_service import PASSAGES, ROOT

from headinfer.engine.options import Options
from headinfer.errors import CapacityError, SessionError, UsageError
from headinfer.serve import files
from headinfer.serve.errors import NotFoundError, QueueFullError
from headinfer.serve.events import Done, Failed, Prefill, Queued, Reasoning, Text, ToolCall

HELLO = [{"role": "user", "content": "hello there"}]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
THINKS_AND_CALLS = [
    Reasoning("hm "),
    Reasoning("so"),
    Text("Well."),
    ToolCall("call-1", "look", '{"at": 1}'),
    ToolCall("call-2", "look", "{}"),
    Done("tool_calls", 5, 2, 9),
]


def test_chat(client, service):
    answer = client.chat.completions.create(model="tiny", messages=HELLO, temperature=0, top_p=1, max_tokens=5, seed=7)
    assert answer.choices[0].message.content == "hello there "
    assert answer.choices[0].finish_reason == "stop"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (2, 2, 4)
    assert answer.usage.prompt_tokens_details.cached_tokens == 1
    ask = service.asked[-1]
    assert ask.messages == [{"role": "user", "content": "hello there"}]
    assert (ask.client, ask.session, ask.max_new_tokens, ask.where) == ("127.0.0.1", None, 5, False)
    assert (ask.sampling.seed, ask.sampling.temperature, ask.sampling.top_p) == (7, 0, None)


def test_streamed_chat(client, service):
    stream = client.chat.completions.create(
        model="tiny", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "hello there "
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].usage.total_tokens == 4
    assert not chunks[-1].choices
    assert len({chunk.id for chunk in chunks}) == 1


def test_the_clients_own_accumulator_takes_a_stream(client, service):
    service.script = lambda ask: [Queued(2), Prefill(10, 20, 1.5), *THINKS_AND_CALLS]
    with client.chat.completions.stream(model="tiny", messages=HELLO, tools=[TOOL]) as stream:
        final = stream.get_final_completion()
    message = final.choices[0].message
    assert message.content == "Well."
    assert [call.function.arguments for call in message.tool_calls] == ['{"at": 1}', "{}"]
    assert final.choices[0].finish_reason == "tool_calls"


def test_progress_is_in_chunks_without_choices(client, service):
    service.script = lambda ask: [Queued(2), Prefill(10, 20, 1.5), Text("x"), Done("length", 20, 0, 1)]
    chunks = list(client.chat.completions.create(model="tiny", messages=HELLO, stream=True))
    assert chunks[1].model_extra["queue"] == {"position": 2}
    assert chunks[2].model_extra["prefill"] == {"tokens": 10, "of": 20, "eta_s": 1.5}
    assert not chunks[1].choices
    assert not chunks[2].choices
    assert chunks[-1].choices[0].finish_reason == "length"


def test_tools_and_reasoning(client, service):
    service.script = lambda ask: THINKS_AND_CALLS
    message = client.chat.completions.create(model="tiny", messages=HELLO, tools=[TOOL]).choices[0].message
    assert message.reasoning_content == "hm so"
    assert [(call.id, call.function.name, call.function.arguments) for call in message.tool_calls] == [
        ("call-1", "look", '{"at": 1}'),
        ("call-2", "look", "{}"),
    ]
    assert service.asked[-1].tools == [TOOL]
    results = [{"role": "tool", "tool_call_id": call.id, "content": "a tree"} for call in message.tool_calls]
    client.chat.completions.create(model="tiny", messages=[*HELLO, message, *results], tools=[TOOL], tool_choice="none")
    ask = service.asked[-1]
    assert ask.tools == []
    assert ask.messages[1]["tool_calls"][0] == {
        "id": "call-1",
        "type": "function",
        "function": {"name": "look", "arguments": {"at": 1}},
    }
    assert ask.messages[1]["reasoning_content"] == "hm so"
    assert ask.messages[2] == {"role": "tool", "tool_call_id": "call-1", "content": "a tree"}


def test_a_document_is_named_in_metadata_or_in_a_message(client, service):
    client.chat.completions.create(model="tiny", messages=HELLO, metadata={"session": "book", "mine": "x"})
    assert service.asked[-1].session == "book"
    texts = [{"type": "text", "text": text} for text in ("who", "?")]
    parts = [{"type": "file", "file": {"file_id": "book"}}, *texts]
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": parts}], extra_body={"where": True}
    )
    ask = service.asked[-1]
    assert (ask.session, ask.where) == ("book", True)
    assert ask.messages == [{"role": "user", "content": "who\n?"}]
    assert answer.where == [vars(PASSAGES[0])]
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=HELLO, stream=True, metadata={"session": "book"}, extra_body={"where": True}
        )
    )
    assert chunks[-1].where == [vars(PASSAGES[0])]
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_completions(client, service):
    answer = client.completions.create(model="tiny", prompt="one two", max_tokens=3, extra_body={"top_k": 5})
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("one two ", "stop")
    assert answer.usage.prompt_tokens == 2
    client.completions.create(model="tiny", prompt=[[1, 2]])
    assert service.asked[-1].prompt == [1, 2]
    service.script = lambda ask: [Prefill(1, 2, None), Text("a"), Text("b"), Done("length", 3, 0, 2)]
    chunks = list(client.completions.create(model="tiny", prompt=["x"], stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == "ab"
    assert chunks[-1].choices[0].finish_reason == "length"
    assert service.asked[-1].prompt == "x"


def test_responses(client, service):
    response = client.responses.create(model="tiny", input="hi you", instructions="be kind", max_output_tokens=9)
    assert response.output_text == "hi you "
    assert (response.status, response.usage.input_tokens) == ("completed", 2)
    assert service.asked[-1].messages == [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hi you"},
    ]
    service.script = lambda ask: THINKS_AND_CALLS
    flat = {"type": "function", **TOOL["function"]}
    response = client.responses.create(model="tiny", input="hi", tools=[flat])
    assert [item.type for item in response.output] == ["reasoning", "message", "function_call", "function_call"]
    assert service.asked[-1].tools == [TOOL]
    results = [
        {"type": "function_call_output", "call_id": item.call_id, "output": "a tree"}
        for item in response.output
        if item.type == "function_call"
    ]
    parts = [{"type": "input_text", "text": "hi"}, {"type": "input_file", "file_id": "b"}]
    question = {"role": "user", "content": parts}
    client.responses.create(model="tiny", input=[question, *response.output, *results], tools=[flat])
    ask = service.asked[-1]
    assert ask.session == "b"
    assert [message["role"] for message in ask.messages] == ["user", "assistant", "tool", "tool"]
    assert ask.messages[1]["reasoning_content"] == "hm so"
    assert ask.messages[1]["content"] == "Well."
    assert [call["id"] for call in ask.messages[1]["tool_calls"]] == ["call-1", "call-2"]


def test_streamed_responses_have_openais_events(service):
    service.script = lambda ask: [Prefill(1, 2, 0.5), *THINKS_AND_CALLS]
    body = {"input": "hi", "stream": True}
    text = BROWSER.post(f"{service.address}/v1/responses", json=body).text
    events = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]
    names = [line.removeprefix("event: ") for line in text.splitlines() if line.startswith("event: ")]
    assert names == [event["type"] for event in events]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    adapter = TypeAdapter(ResponseStreamEvent)
    for event in events:
        adapter.validate_python(event)
    assert events[2]["prefill"] == {"tokens": 1, "of": 2, "eta_s": 0.5}
    assert names[-1] == "response.completed"
    assert [item["type"] for item in events[-1]["response"]["output"]][:2] == ["reasoning", "message"]


def test_the_clients_response_stream(client, service):
    with client.responses.stream(model="tiny", input="a b") as stream:
        assert stream.get_final_response().output_text == "a b "
    service.script = lambda ask: [Text("x"), Failed(CapacityError("too long"))]
    events = list(client.responses.create(model="tiny", input="a", stream=True))
    assert events[-1].type == "response.failed"
    assert events[-1].response.error.message == "too long"
    service.script = lambda ask: [Text("x"), Done("length", 1, 0, 1)]
    assert client.responses.create(model="tiny", input="a").incomplete_details.reason == "max_output_tokens"


def test_files(client, service):
    added = client.files.create(file=("../../etc/book one.txt", b"a brave new world"), purpose="user_data")
    assert (added.filename, added.bytes, added.status) == ("book one.txt", 17, "processed")
    assert added.model_extra["headinfer"]["state"] == "ready"
    large = b"x" * (3 << 20)
    assert client.files.create(file=("large.txt", large), purpose="assistants").bytes == len(large)
    ids = [file.id for file in client.files.list(limit=1)]  # two pages
    assert len(ids) == 2
    assert [file.id for file in client.files.list(order="desc")] == ids[::-1]
    assert client.files.retrieve(added.id).filename == "book one.txt"
    assert client.files.content(added.id).text == "a brave new world"
    part = BROWSER.get(f"{service.address}/v1/files/{added.id}/content", params={"start": 2, "stop": 7})
    assert (part.text, part.headers["content-type"]) == ("brave", "text/plain; charset=utf-8")
    for file_id in ids:
        assert client.files.delete(file_id).deleted
    with pytest.raises(openai.NotFoundError, match=f"there is no session {ids[0]} in the folder of sessions"):
        client.files.retrieve(ids[0])
    with pytest.raises(openai.BadRequestError, match="is empty: add a file with text") as failed:
        client.files.create(file=("empty.txt", b""), purpose="user_data")
    assert str(ROOT) not in str(failed.value.body)


def test_a_full_disk_is_no_failure_of_the_server(service, monkeypatch):
    def copy(*_):
        raise OSError(errno.ENOSPC, "No space left on device", f"{ROOT}/x")

    monkeypatch.setattr(files.shutil, "copyfileobj", copy)
    answer = BROWSER.post(f"{service.address}/v1/files", files={"file": ("large.txt", b"x" * (2 << 20))})
    assert (answer.status_code, answer.headers["x-should-retry"]) == (507, "false")
    assert answer.json()["error"]["message"] == "the server's disk is full: send less, or free some of it"


def test_models(client, service):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    for wrong in (
        lambda: client.models.retrieve("org/other"),
        lambda: client.chat.completions.create(model="other", messages=HELLO),
        lambda: client.responses.create(model="other", input="x"),
    ):
        with pytest.raises(openai.NotFoundError, match="is not served here: use 'tiny'") as failed:
            wrong()
        assert failed.value.code == "model_not_found"


def test_state_and_metrics(service):
    state = BROWSER.get(f"{service.address}/v1/state").json()
    assert (state["model"], state["host_kv_bytes"]) == ("tiny", 7)
    metrics = BROWSER.get(f"{service.address}/metrics")
    assert metrics.headers["content-type"].startswith("text/plain")
    assert 'headinfer_kv_bytes{place="host"} 7.0' in metrics.text
    assert 'headinfer_tokens_total{kind="prompt"}' in metrics.text
    assert BROWSER.get(f"{service.address}/health").json() == {"status": "ok"}


def test_answers_with_approximate_kv_say_so(service, monkeypatch):
    monkeypatch.setattr(service, "settings", replace(service.settings, options=Options(kv_dtype="int8")))
    for path, body in (
        ("chat/completions", {"messages": HELLO}),
        ("completions", {"prompt": "hello"}),
        ("responses", {"input": "hello"}),
    ):
        whole = BROWSER.post(f"{service.address}/v1/{path}", json=body).json()
        assert "KV is stored in int8, which is approximate" in whole["approximation"]
        streamed = BROWSER.post(f"{service.address}/v1/{path}", json={**body, "stream": True}).text
        assert whole["approximation"] in streamed


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (UsageError(f"{ROOT}/book/x.bin is wrong: use /tmp/deep/other"), 400, "invalid_value"),
        (NotFoundError(f"there is no session in {ROOT}"), 404, "not_found"),
        (SessionError("another process writes it"), 409, "session_conflict"),
        (CapacityError("no memory"), 507, "capacity"),
        (QueueFullError("64 requests wait", 7), 429, "queue_full"),
        (RuntimeError(f"a bug in {ROOT}"), 500, "internal_error"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
@pytest.mark.parametrize("when", ["submit", "event"])
def test_errors(error, status, code, when, service):
    if when == "event" and status in (429, 500):
        return
    service.script = lambda ask: error if when == "submit" else [Text("x"), Failed(error)]
    answer = BROWSER.post(f"{service.address}/v1/chat/completions", json={"messages": HELLO})
    assert answer.status_code == status
    fields = answer.json()["error"]
    assert set(fields) == {"message", "type", "param", "code"}
    assert fields["code"] == code
    assert str(ROOT) not in answer.text
    assert "/tmp" not in answer.text
    assert "Traceback" not in answer.text
    if status == 429:
        assert answer.headers["retry-after"] == "7"
    if when == "event":
        with pytest.raises(openai.APIError), openai.OpenAI(base_url=f"{service.address}/v1", api_key="x") as client:
            list(client.chat.completions.create(model="tiny", messages=HELLO, stream=True))
