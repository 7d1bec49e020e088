"""Malformed requests: each is answered with one sentence that names the field, never with 500, a path or a trace."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from live_server import BROWSER
from scripted_service import ROOT

CHAT = "/v1/chat/completions"
USER = {"role": "user", "content": "x"}


def send(service, path, body, **headers):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", **headers}
    return BROWSER.post(f"{service.address}{path}", content=content, headers=headers)


def check_refused(answer):
    """Check that an answer is an error in one sentence, and return it."""
    assert 400 <= answer.status_code < 500, answer.text
    assert set(answer.json()) == {"error"}
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    message = error["message"]
    assert message
    assert "\n" not in message
    assert len(message) < 400
    for secret in (str(ROOT), "Traceback", "site-packages", ".py"):
        assert secret not in answer.text
    return error


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        (CHAT, b"", None, "the request is not JSON"),
        (CHAT, b"{", None, "the request is not JSON"),
        (CHAT, b"\xff\xfe", None, "the request is not JSON"),
        (CHAT, b"[" * 100_000, None, "the request is not JSON"),
        (CHAT, b'{"messages": [{"role": "user", "content": "\\ud800"}]}', None, "the request is not JSON"),
        (
            CHAT,
            b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
            None,
            "the request is not JSON",
        ),
        (CHAT, b'{"messages": [{"role": "user", "content": "x"}], "seed": 1' + b"0" * 5000 + b"}", None, "not JSON"),
        (CHAT, [], None, "the request is no JSON object: send one"),
        (CHAT, "text", None, "the request is no JSON object: send one"),
        (CHAT, None, None, "the request is no JSON object: send one"),
        (CHAT, {}, "messages", "messages is missing: give it"),
        (CHAT, {"messages": []}, "messages", "messages is []: it must be a list that is not empty"),
        (CHAT, {"messages": {}}, "messages", "messages is {}: it must be a list"),
        (CHAT, {"messages": [5]}, "messages[0]", "messages[0] is 5: it must be an object"),
        (CHAT, {"messages": [{}]}, "messages[0]", "messages[0] has no role: give it"),
        (CHAT, {"messages": [{"role": "boss", "content": "x"}]}, "messages[0]", "is boss: it must be one of 'system'"),
        (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content", "messages[0].content is missing: give it"),
        (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "must be a text or a list"),
        (CHAT, {"messages": [{"role": "user", "content": []}]}, "messages[0].content", "a list that is not empty"),
        (CHAT, {"messages": [{"role": "user", "content": [{}]}]}, "messages[0].content[0]", "has no type: give it"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0]",
            "is image_url: it must be one of 'text', 'file'",
        ),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "file", "file": {"file_data": "x", "file_id": "a"}}]}]},
            "messages[0].content[0].file.file_data",
            "is unknown or not supported: leave it out",
        ),
        (
            CHAT,
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "a", "type": "function", "function": {}}]}]},
            "messages[0].tool_calls[0].function.name",
            "is missing: give it",
        ),
        (
            CHAT,
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [
                            {"id": "a", "type": "function", "function": {"name": "f", "arguments": "[1"}},
                        ],
                    }
                ]
            },
            "messages[0].tool_calls",
            "the arguments of 'f' are no JSON object: send one",
        ),
        (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id", "is missing"),
        (CHAT, {"messages": [{**USER, "extra": 1}]}, "messages[0].extra", "is unknown or not supported: leave it out"),
        (CHAT, {"messages": [USER], "sesion": "x"}, "sesion", "sesion is unknown or not supported: leave it out"),
        (CHAT, {"messages": [USER], "logit_bias": {}}, "logit_bias", "is unknown or not supported: leave it out"),
        (CHAT, {"messages": [USER], "n": 2}, "n", "n is 2: it must be 1"),
        (CHAT, {"messages": [USER], "logprobs": True}, "logprobs", "logprobs is True: it must be False"),
        (CHAT, {"messages": [USER], "stream": "yes"}, "stream", "stream is yes: it must be true or false"),
        (CHAT, {"messages": [USER], "stream_options": {"x": 1}}, "stream_options.x", "is unknown"),
        (CHAT, {"messages": [USER], "temperature": "hot"}, "temperature", "temperature is hot: it must be a number"),
        (
            CHAT,
            {"messages": [USER], "temperature": -1},
            "temperature",
            "is -1: it must be 0, or from 0.001",
        ),
        (CHAT, {"messages": [USER], "temperature": True}, "temperature", "temperature is True: it must be a number"),
        (CHAT, {"messages": [USER], "top_p": 0}, "top_p", "top_p is 0: it must be above 0"),
        (CHAT, {"messages": [USER], "top_p": 1.5}, "top_p", "top_p is 1.5: it must be at most 1"),
        (CHAT, {"messages": [USER], "top_k": 0}, "top_k", "top_k is 0: it must be at least 1"),
        (CHAT, {"messages": [USER], "top_k": 1.5}, "top_k", "it must be a whole number"),
        (CHAT, {"messages": [USER], "max_tokens": 0}, "max_tokens", "max_tokens is 0: it must be at least 1"),
        (CHAT, {"messages": [USER], "max_completion_tokens": "4K"}, "max_completion_tokens", "must be a whole number"),
        (CHAT, {"messages": [USER], "seed": -1}, "seed", "seed is -1: it must be at least 0"),
        (CHAT, {"messages": [USER], "stop": ["", "x"]}, "stop", "stop has an empty text: give the text that ends"),
        (CHAT, {"messages": [USER], "stop": ["x"] * 17}, "stop", "it must be of at most 16 entries"),
        (CHAT, {"messages": [USER], "stop": [1]}, "stop[0]", "stop[0] is 1: it must be a text"),
        (CHAT, {"messages": [USER], "presence_penalty": 0.5}, "presence_penalty", "it must be at most 0"),
        (CHAT, {"messages": [USER], "response_format": {"type": "json_object"}}, "response_format.type", "be 'text'"),
        (CHAT, {"messages": [USER], "metadata": {"session": 5}}, "metadata.session", "is 5: it must be a text"),
        (CHAT, {"messages": [USER], "tools": [{"type": "web_search"}]}, "tools[0].type", "it must be 'function'"),
        (CHAT, {"messages": [USER], "tool_choice": "required"}, "tool_choice", "it must be 'auto' or 'none'"),
        (CHAT, {"messages": [USER], "where": True}, "where", "where needs a document"),
        (CHAT, {"messages": [USER], "model": "/etc/passwd"}, "model", "is not served here: use 'tiny'"),
        (
            CHAT,
            {
                "messages": [{"role": "user", "content": [{"type": "file", "file": {"file_id": "a"}}]}],
                "metadata": {"session": "b"},
            },
            None,
            "the request names several documents",
        ),
        ("/v1/completions", {}, "prompt", "prompt is missing: give it"),
        ("/v1/completions", {"prompt": ["a", "b"]}, "prompt", "prompt has 2 entries: send one prompt in a request"),
        ("/v1/completions", {"prompt": []}, "prompt", "prompt has 0 entries"),
        ("/v1/completions", {"prompt": [-1]}, "prompt[0]", "prompt[0] is -1"),
        ("/v1/completions", {"prompt": "x", "echo": True}, "echo", "echo is True: it must be False"),
        ("/v1/completions", {"prompt": "x", "suffix": "y"}, "suffix", "suffix is y: it must be null"),
        ("/v1/completions", {"prompt": "x", "best_of": 4}, "best_of", "best_of is 4: it must be 1"),
        ("/v1/responses", {"input": []}, "input", "input is []: it must be a list that is not empty"),
        ("/v1/responses", {"input": [{"type": "computer_call"}]}, "input[0]", "it must be one of"),
        ("/v1/responses", {"input": "x", "previous_response_id": "r"}, "previous_response_id", "it must be null"),
        ("/v1/responses", {"input": "x", "background": True}, "background", "it must be False"),
        ("/v1/responses", {"input": "x", "tools": [{"type": "web_search"}]}, "tools[0].type", "it must be 'function'"),
        ("/v1/responses", {"input": "x", "text": {"format": {"type": "json_schema"}}}, "text.format.type", "be 'text'"),
    ],
)
def test_mistakes_are_named(path, body, param, message, service):
    error = check_refused(send(service, path, body))
    assert error["param"] == param
    assert message in error["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/files/..%2F..%2Fetc%2Fpasswd", 404),
        ("GET", "/v1/files/../../etc/passwd", 404),
        ("GET", "/v1/files/%2e%2e", 404),
        ("DELETE", "/v1/files/..%2fother", 404),
        ("DELETE", "/v1/files/.uploads", 404),
        ("GET", "/v1/files/x%00y", 404),
        ("GET", "/v1/files/%F0%9F%92%A9/content", 404),
        ("GET", "/v1/files/x/content?start=-1", 400),
        ("GET", "/v1/files/x/content?start=many", 400),
        ("GET", "/v1/files/x/content?stop=1e9", 400),
        ("GET", "/v1/files?limit=0", 400),
        ("GET", "/v1/files?order=odd", 400),
        ("GET", "/v1/models/..%2f..%2fetc%2fpasswd", 404),
        ("GET", "/page/..%2f..%2fapp.py", 404),
        ("GET", "/page/%2e%2e/app.py", 404),
        ("GET", "/page//etc/passwd", 404),
        ("GET", "/docs", 404),
        ("GET", "/openapi.json", 404),
        ("GET", "/v1", 404),
        ("PUT", "/v1/files", 405),
        ("GET", CHAT, 405),
        ("TRACE", "/v1/models", 405),
        ("POST", "/v1/files", 415),
    ],
)
def test_paths_that_lead_nowhere(method, path, status, service):
    answer = BROWSER.request(method, f"{service.address}{path}")
    assert answer.status_code == status, answer.text
    check_refused(answer)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "multipart/form-data"),
        (b"", "multipart/form-data; boundary=x"),
        (b"--x\r\n", "multipart/form-data; boundary=x"),
        (b"nonsense", "multipart/form-data; boundary=x"),
        (b"--x\r\nContent-Disposition: form-data\r\n\r\ny\r\n--x--\r\n", "multipart/form-data; boundary=x"),
        (
            b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\nno file\r\n--x--\r\n',
            "multipart/form-data; boundary=x",
        ),
        (
            b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nno end',
            "multipart/form-data; boundary=x",
        ),
        (b"file=a", "application/x-www-form-urlencoded"),
        (b"{}", "application/json"),
        (b"x", "multipart/form-data; boundary=" + "x" * 5000),
    ],
    ids=range(10),
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # starlette leaves a file open
def test_broken_forms(content, kind, service):
    answer = BROWSER.post(f"{service.address}/v1/files", content=content, headers={"Content-Type": kind})
    check_refused(answer)
    assert not service.stored


def test_forms_with_more_than_a_file(service):
    two = [("file", ("a.txt", b"x")), ("file", ("b.txt", b"y"))]
    check_refused(BROWSER.post(f"{service.address}/v1/files", files=two))
    file = {"file": ("a.txt", b"x")}
    error = check_refused(BROWSER.post(f"{service.address}/v1/files", files=file, data={"expires": "1"}))
    assert error["param"] == "expires"
    assert check_refused(BROWSER.post(f"{service.address}/v1/files", files=file, data={"purpose": "fine-tune"}))
    many = {f"field{index}": "x" for index in range(50)}
    check_refused(BROWSER.post(f"{service.address}/v1/files", files=file, data=many))
    assert not service.stored


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=8), values, max_size=3),
    max_leaves=6,
)
VALID = {
    CHAT: {
        "model": "tiny",
        "messages": [
            USER,
            {"role": "assistant", "content": "y"},
            {"role": "user", "content": [{"type": "text", "text": "z"}]},
        ],
        "temperature": 0.5,
        "stop": ["a"],
        "stream": False,
        "metadata": {"session": "b"},
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    },
    "/v1/completions": {"prompt": [1, 2], "max_tokens": 3, "stream_options": {"include_usage": True}},
    "/v1/responses": {
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "x"}]},
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "y"},
        ],
        "max_output_tokens": 3,
    },
}


def places(value, path=()):
    """Yield the paths of all values in a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, one in items:
        yield from places(one, (*path, name))


def replaced(value, path, new):
    """A JSON value with another value at a path."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


@st.composite
def mutations(draw):
    """A path, and a valid body in which one value is another one, or a field was added."""
    path = draw(st.sampled_from(sorted(VALID)))
    place = draw(st.sampled_from(list(places(VALID[path]))))
    body = replaced(VALID[path], place, draw(JSON))
    if isinstance(body, dict) and draw(st.booleans()):
        body[draw(st.text(max_size=8))] = draw(JSON)
    return path, body


@settings(
    derandomize=True,
    max_examples=120,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(mutation=mutations())
def test_mutated_requests(mutation, service):
    """Each is answered, or refused with one sentence."""
    path, body = mutation
    answer = send(service, path, body)
    if answer.status_code != 200:
        check_refused(answer)


@settings(
    derandomize=True,
    max_examples=50,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(content=st.binary(max_size=60), path=st.sampled_from([*VALID, "/v1/files"]))
def test_random_bytes(content, path, service):
    check_refused(send(service, path, content))
