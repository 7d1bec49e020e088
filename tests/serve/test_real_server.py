"""The whole server over the model that ships: one service behind one web server, asked by OpenAI's client."""

import random
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote

import openai
import pytest
import torch
from live_server import BROWSER, live_server
from openai import OpenAI
from transformers import AutoModelForCausalLM, AutoTokenizer

from headinfer.embedded import embedded_model, embedded_text
from headinfer.evals.needles import build_haystack, random_needles
from headinfer.serve.service import Service
from headinfer.serve.settings import ServeSettings

NEEDLES = random_needles(5, random.Random(1), held_out=True)
BOOK = build_haystack(embedded_text()[5000:9000], NEEDLES, [0.1, 0.3, 0.5, 0.7, 0.9])
CHUNK = 256


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A service that is served, with its address and a document that is read."""
    root = tmp_path_factory.mktemp("sessions")
    settings = ServeSettings(model="embedded", root=root, device="cpu", chunk_tokens=CHUNK)
    with (
        Service(settings) as service,
        live_server(service) as address,
        OpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0) as client,
    ):
        service.address = address
        service.client = client
        book = client.files.create(file=("book.txt", BOOK.encode()), purpose="user_data")
        service.book = client.files.wait_for_processing(book.id, poll_interval=0.05).id
        yield service


def ask(real, needle, **more):
    body = {"prompt": needle.question + needle.lead, "max_tokens": 16, "stop": ["."], **more}
    return real.client.completions.create(model="embedded", extra_body={"metadata": {"session": real.book}}, **body)


def test_a_completion_is_transformers_own(real):
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    model = AutoModelForCausalLM.from_pretrained(embedded_model())
    inputs = tokenizer(BOOK[:600], return_tensors="pt")
    with torch.inference_mode():
        expected = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs.input_ids.shape[1] :]
    answer = real.client.completions.create(model="embedded", prompt=BOOK[:600], max_tokens=8)
    assert answer.choices[0].text == tokenizer.decode(expected)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (inputs.input_ids.shape[1], 8)
    assert answer.choices[0].finish_reason == "length"


def test_a_document_is_read_once_and_asked(real):
    file = real.client.files.retrieve(real.book)
    facts = file.model_extra["headinfer"]
    assert (file.filename, file.bytes, file.status, facts["state"]) == (
        "book.txt",
        len(BOOK.encode()),
        "processed",
        "ready",
    )
    assert facts["characters"] == len(BOOK)
    assert real.client.files.content(real.book).text == BOOK
    for needle in NEEDLES:
        answer = ask(real, needle)
        assert needle.number in answer.choices[0].text
        assert answer.usage.prompt_tokens_details.cached_tokens >= facts["tokens"] - 1
    again = real.client.files.create(file=("book.txt", BOOK.encode()), purpose="user_data")
    assert again.id == real.book  # the same document


def test_a_streamed_chat_and_its_next_turn(real):
    messages = [{"role": "user", "content": NEEDLES[0].question.strip()}]
    body = {"model": "embedded", "metadata": {"session": real.book}, "max_tokens": 20}
    chunks = list(
        real.client.chat.completions.create(
            messages=messages, stream=True, stream_options={"include_usage": True}, **body
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert NEEDLES[0].number in text
    assert any("prefill" in chunk.model_extra for chunk in chunks)
    usage = chunks[-1].usage
    messages += [{"role": "assistant", "content": text}, {"role": "user", "content": NEEDLES[1].question.strip()}]
    answer = real.client.chat.completions.create(messages=messages, **body)
    assert answer.usage.prompt_tokens_details.cached_tokens >= usage.prompt_tokens
    response = real.client.responses.create(
        model="embedded", input=NEEDLES[0].question.strip(), metadata={"session": real.book}, max_output_tokens=20
    )
    assert response.output_text == text


def test_a_client_that_leaves_while_its_prompt_is_read_frees_its_work(real):
    prompt = embedded_text()[20_000:28_000]  # more than ten chunks
    body = {"prompt": prompt, "max_tokens": 1, "stream": True}
    with BROWSER.stream("POST", f"{real.address}/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        assert any('"prefill"' in line for line in lines)
        assert any('"prefill"' in line for line in lines)  # the first chunk is read
    idle_state(real)
    usage = real.client.completions.create(model="embedded", prompt=prompt, max_tokens=1).usage
    assert CHUNK <= usage.prompt_tokens_details.cached_tokens < usage.prompt_tokens - CHUNK  # what was read is kept


def test_clients_that_leave_the_queue_or_an_answer_free_their_work(real):
    before = idle_state(real)["completion_tokens_total"]
    body = {"prompt": "The", "max_tokens": 10_000, "ignore_eos": True, "stream": True}
    url = f"{real.address}/v1/completions"
    with BROWSER.stream("POST", url, json=body) as first:
        assert any('"text"' in line for line in first.iter_lines())  # which ends the connection
    with BROWSER.stream("POST", url, json=body) as first, BROWSER.stream("POST", url, json=body) as second:
        lines = second.iter_lines()
        assert any('"queue"' in line for line in lines)
        assert not first.is_closed
    assert idle_state(real)["completion_tokens_total"] - before < 10_000


def idle_state(real):
    """The state of the service as soon as it has no work."""
    while (state := BROWSER.get(f"{real.address}/v1/state").json())["running"] or state["waiting"]:
        time.sleep(0.05)
    return state


def test_fifty_clients_at_once_get_the_answers_that_they_get_alone(real):
    alone = [ask(real, needle).choices[0].text for needle in NEEDLES]
    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda index: ask(real, NEEDLES[index % 5]).choices[0].text, range(50)))
    assert answers == alone * 10


@pytest.mark.parametrize(
    "body",
    [
        {"session": "../sessions"},
        {"session": "/etc"},
        {"session": ".uploads"},
        {"session": ""},
        {"session": "x" * 500},
        {"session": "missing"},
        {"session": "a\0b"},
        {"prompt": ""},
        {"prompt": [10**6]},
        {"max_tokens": 10**9},
        {"temperature": 0.5, "top_k": 10**9},
        {"stop": ["x" * 10_000]},
    ],
    ids=range(12),
)
def test_wrong_requests_never_fail_the_server(body, real):
    session = body.pop("session", None)
    request = {"prompt": "The", "max_tokens": 1, **body}
    if session is not None:
        request["metadata"] = {"session": session}
    answer = BROWSER.post(f"{real.address}/v1/completions", json=request)
    assert answer.status_code < 500, answer.text
    assert str(real.settings.root) not in answer.text
    if session is not None:
        assert answer.status_code in (400, 404)
        found = BROWSER.get(f"{real.address}/v1/files/{quote(session, safe='')}", follow_redirects=True)
        assert found.status_code in (200, 400, 404)


def test_documents_that_cannot_be_read_are_refused_or_have_failed(real):
    with pytest.raises(openai.BadRequestError):
        real.client.files.create(file=("empty.txt", b""), purpose="user_data")
    file = real.client.files.create(file=("../../x.pdf", b"%PDF-1.4 broken"), purpose="user_data")
    file = real.client.files.wait_for_processing(file.id, poll_interval=0.05)
    assert file.status == "error"
    assert file.status_details
    assert str(real.settings.root) not in file.status_details
    messages = [{"role": "user", "content": "x"}]
    with pytest.raises(openai.APIStatusError) as failed:
        real.client.chat.completions.create(model="embedded", messages=messages, metadata={"session": file.id})
    assert failed.value.status_code in (400, 409)
    real.client.files.delete(file.id)
    assert file.id not in [one.id for one in real.client.files.list()]
