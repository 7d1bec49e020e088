"""Clients that leave, wait, or come at once: a client that leaves frees its work, at each stage of a request."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest
from live_server import BROWSER
from openai import OpenAI
from own_process import HANG_S

from headinfer.errors import CapacityError
from headinfer.serve import sse
from headinfer.serve.events import Done, Failed, Prefill, Queued, Text

LONG_S = 60.0  # no test waits for it
STAGES = {
    "queued": [Queued(3), LONG_S],
    "prefill": [Queued(0), Prefill(10, 100, 9.0), LONG_S],
    "decode": [Prefill(100, 100, 0.0), Text("a"), LONG_S],
}
BODIES = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
    "/v1/completions": {"prompt": "x"},
    "/v1/responses": {"input": "x"},
}


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("stage", STAGES)
def test_work_ends_if_the_client_of_a_stream_leaves(path, stage, service):
    service.script = lambda ask: [*STAGES[stage], Done("stop", 1, 0, 1)]
    marks = {"queued": '"queue"', "prefill": '"prefill"', "decode": '"a"'}
    with BROWSER.stream("POST", f"{service.address}{path}", json={**BODIES[path], "stream": True}) as answer:
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert answer.headers["cache-control"] == "no-store"
        lines = answer.iter_lines()
        assert any(marks[stage] in line for line in lines)
        work = service.works[-1]
        assert not work.cancelled.is_set()
    assert work.ended.wait(HANG_S)
    assert work.cancelled.is_set()


@pytest.mark.parametrize("path", BODIES)
def test_work_ends_if_a_client_that_waits_for_the_whole_answer_leaves(path, service):
    service.script = lambda ask: [*STAGES["prefill"], Done("stop", 1, 0, 1)]
    before = len(service.works)
    with pytest.raises(httpx2.ReadTimeout):
        BROWSER.post(f"{service.address}{path}", json=BODIES[path], timeout=httpx2.Timeout(HANG_S, read=0.2))
    while len(service.works) == before:
        time.sleep(0.01)
    assert service.works[-1].ended.wait(HANG_S)


def test_a_client_that_leaves_within_its_body_begins_no_work(service):
    before = len(service.asked)

    def body():
        yield b'{"messages": '
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        BROWSER.post(f"{service.address}/v1/chat/completions", content=body())
    assert BROWSER.get(f"{service.address}/health").status_code == 200
    assert len(service.asked) == before


def test_comments_are_sent_while_there_is_nothing_to_say(service, monkeypatch):
    monkeypatch.setattr(sse, "SILENCE_S", 0.05)
    service.script = lambda ask: [Queued(0), 0.3, Text("x"), Done("stop", 1, 0, 1)]
    body = {**BODIES["/v1/chat/completions"], "stream": True}
    lines = BROWSER.post(f"{service.address}/v1/chat/completions", json=body).text.splitlines()
    assert lines.count(": waiting") >= 1
    assert lines[-2] == "data: [DONE]"
    with OpenAI(base_url=f"{service.address}/v1", api_key="x") as client:  # ignores them
        chunks = list(client.chat.completions.create(model="tiny", **body))
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_texts_cannot_end_an_event(service):
    """Line breaks of every kind are escaped, so that a document's text cannot be taken for an event."""
    text = "a\n\ndata: [DONE]\r\n\u2028\u0085\x00\x1b[31m</script>"
    service.script = lambda ask: [Text(text), Done("stop", 1, 0, 1)]
    with OpenAI(base_url=f"{service.address}/v1", api_key="x") as client:
        for path, create in (("chat", client.chat.completions.create), ("text", client.completions.create)):
            body = BODIES["/v1/chat/completions"] if path == "chat" else BODIES["/v1/completions"]
            chunks = [chunk.choices[0] for chunk in create(model="tiny", stream=True, **body)]
            parts = [(choice.delta.content if path == "chat" else choice.text) or "" for choice in chunks]
            assert "".join(parts) == text


def test_fifty_clients_at_once(service):
    """Each gets its own answer, streamed or not, while others leave."""

    def ask(number):
        text = f"{number} of fifty"
        if number % 3 == 0:
            body = {"messages": [{"role": "user", "content": text}], "stream": True}
            with BROWSER.stream("POST", f"{service.address}/v1/chat/completions", json=body) as answer:
                if number % 2:
                    return text  # leaves
                data = [line[6:] for line in answer.iter_lines() if line.startswith("data: {")]
            parts = [json.loads(one)["choices"][0]["delta"].get("content", "") for one in data]
            return "".join(parts).strip()
        if number % 3 == 1:
            answer = BROWSER.post(f"{service.address}/v1/completions", json={"prompt": text})
            return answer.json()["choices"][0]["text"].strip()
        answer = BROWSER.post(f"{service.address}/v1/responses", json={"input": text})
        return answer.json()["output"][0]["content"][0]["text"].strip()

    before = len(service.works)
    with ThreadPoolExecutor(50) as pool:
        assert list(pool.map(ask, range(50))) == [f"{number} of fifty" for number in range(50)]
    assert len(service.works) == before + 50
    assert all(work.ended.wait(HANG_S) for work in service.works[before:])


def test_the_end_of_the_service_ends_every_answer_with_an_error(service):
    """After Ctrl-C the service cancels its work, and clients that are being answered are told so."""
    service.script = lambda ask: [Text("x"), LONG_S]
    body = BODIES["/v1/chat/completions"]
    url = f"{service.address}/v1/chat/completions"
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(BROWSER.post, url, json=body)
        with BROWSER.stream("POST", url, json={**body, "stream": True}) as answer:
            lines = answer.iter_lines()
            assert any('"x"' in line for line in lines)
            while len(service.works) < 2 or not all(work.thread.is_alive() for work in service.works[-2:]):
                assert not waiting.done()
                time.sleep(0.01)
            service.close()
            assert any("the server is being shut down: try again later" in line for line in lines)
        assert waiting.result().status_code == 503


def test_an_error_within_a_stream_is_its_last_event(service):
    service.script = lambda ask: [Text("x"), Failed(CapacityError("no memory: send less"))]
    body = {**BODIES["/v1/chat/completions"], "stream": True}
    lines = BROWSER.post(f"{service.address}/v1/chat/completions", json=body).text.splitlines()
    last = [line for line in lines if line.startswith("data: ")][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["message"] == "no memory: send less"
