"""Keys, hosts, origins and limits: who may use the server, and how much a request may send."""

import hmac
import json
import socket

import openai
import pytest
from live_server import BROWSER, live_server
from own_process import HANG_S
from scripted_service import ScriptedService

from headinfer.serve import access as rules
from headinfer.serve import web
from headinfer.serve.access import Access

KEY = "0123456789abcdef"
OTHER = "fedcba9876543210"
BODY = json.dumps({"messages": [{"role": "user", "content": "x"}]}).encode()


@pytest.fixture(scope="module")
def guarded():
    """A server with keys and small limits, and its address."""
    service = ScriptedService()
    limits = {"body_bytes": 4096, "file_bytes": 8192}
    with live_server(service, Access(keys=(KEY, OTHER), allowed_hosts=("my.example",), **limits)) as address:
        service.address = address
        yield service


@pytest.fixture(scope="module")
def hasty():
    """A server that soon gives clients up, and its address."""
    service = ScriptedService()
    with live_server(service, Access(grace_s=0.2, slowest_bytes_per_s=1e6, stall_s=0.5)) as address:
        service.address = address
        yield service


def head(guarded, **headers):
    headers = {"Authorization": f"Bearer {KEY}", **{name.replace("_", "-"): value for name, value in headers.items()}}
    return BROWSER.get(f"{guarded.address}/v1/models", headers=headers)


def test_every_path_but_the_pages_files_and_health_needs_a_key(guarded):
    for method, path in (
        ("GET", "/v1/models"),
        ("GET", "/v1/state"),
        ("GET", "/v1/files"),
        ("GET", "/v1/files/x/content"),
        ("DELETE", "/v1/files/x"),
        ("POST", "/v1/files"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/completions"),
        ("POST", "/v1/responses"),
        ("GET", "/metrics"),
        ("GET", "/nothing"),
        ("GET", "//v1/models"),
        ("GET", "/page/../v1/models"),
        ("GET", "/page"),
    ):
        answer = BROWSER.request(method, f"{guarded.address}{path}")
        assert answer.status_code == 401, path
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"
    assert BROWSER.get(f"{guarded.address}/health").status_code == 200
    assert BROWSER.get(f"{guarded.address}/page/missing.css").status_code == 404


def test_keys(guarded):
    for key in (KEY, OTHER):
        with openai.OpenAI(base_url=f"{guarded.address}/v1", api_key=key) as client:
            assert client.models.retrieve("tiny").id == "tiny"
    for key in (KEY[:-1], f"{KEY}x", "wrong", KEY.upper()):
        with (
            pytest.raises(openai.AuthenticationError, match="the API key is wrong"),
            openai.OpenAI(base_url=f"{guarded.address}/v1", api_key=key, max_retries=0) as client,
        ):
            client.models.list()
    for value in ("", KEY, f"Basic {KEY}", "Bearer", b"Bearer \xff\xfe"):
        answer = BROWSER.get(f"{guarded.address}/v1/models", headers={"Authorization": value})
        assert answer.status_code == 401


def test_keys_are_compared_in_constant_time(monkeypatch):
    """Every key is compared, as a whole, by hmac.compare_digest, which takes the same time for every text."""
    compared = []

    def compare(one, other):
        compared.append((len(one), len(other)))
        return hmac.compare_digest(one, other)

    monkeypatch.setattr(rules, "hmac", type("hmac", (), {"compare_digest": staticmethod(compare)}))
    access = Access(keys=(KEY, OTHER))
    assert [access.has_key(given) for given in (KEY, OTHER, "x", "")] == [True, True, False, False]
    assert compared == [(32, 32)] * 8


def test_hosts(guarded):
    port = guarded.address.rpartition(":")[2]
    for host in (
        f"127.0.0.1:{port}",
        f"localhost:{port}",
        "LOCALHOST",
        f"[::1]:{port}",
        "my.example",
        "My.Example:443",
    ):
        assert head(guarded, Host=host).status_code == 200, host
    for host in (
        f"evil.example:{port}",  # a name of the attacker that resolves to 127.0.0.1
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "evil.example@127.0.0.1",
        "my.example.evil.example",
        "10.0.0.7",
        "127.0.0.1:80:80",
        "127.0.0.1:x",
        "[::1",
        "[::1]x",
        "",
    ):
        answer = head(guarded, Host=host)
        assert answer.status_code == 403, host
        assert answer.json()["error"]["code"] == "host_not_allowed"
    assert BROWSER.get(f"{guarded.address}/health", headers={"Host": "evil.example"}).status_code == 403


def test_a_server_on_all_addresses_may_be_named_by_any_of_them():
    access = Access(host="0.0.0.0", keys=(KEY,), allowed_hosts=("box.local",))
    assert [access.allows_host(name) for name in ("10.0.0.7", "fe80::1", "box.local", "localhost")] == [True] * 4
    assert not access.allows_host("evil.example")
    assert not Access(host="10.0.0.7").allows_host("10.0.0.8")


def test_origins(guarded):
    own = guarded.address
    port = own.rpartition(":")[2]
    assert head(guarded, Origin=own).status_code == 200
    assert head(guarded, Host="my.example", Origin="https://my.example").status_code == 200  # behind a proxy with TLS
    others = ("http://evil.example", f"http://localhost:{port}", "http://127.0.0.1:3000")
    for origin in (*others, "null", "file://", "", "x"):
        answer = head(guarded, Origin=origin)
        assert answer.status_code == 403, origin
        assert answer.json()["error"]["code"] == "origin_not_allowed"
    assert head(guarded, Sec_Fetch_Site="same-origin").status_code == 200
    assert head(guarded, Sec_Fetch_Site="none").status_code == 200
    assert head(guarded, Sec_Fetch_Site="cross-site").status_code == 403
    assert head(guarded, Sec_Fetch_Site="same-site").status_code == 403
    link = BROWSER.get(f"{own}/page/missing.css", headers={"Sec-Fetch-Site": "cross-site"})
    assert link.status_code == 404  # a link of another page to this one


def test_another_site_can_send_no_form(guarded):
    """What a form of another site can send without asking is no JSON, and no other origin may read answers."""
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "text/plain"}
    answer = BROWSER.post(f"{guarded.address}/v1/chat/completions", content=BODY, headers=headers)
    assert answer.status_code == 415
    answer = BROWSER.options(f"{guarded.address}/v1/models", headers={"Authorization": f"Bearer {KEY}"})
    assert answer.status_code == 405
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_answers_tell_browsers_to_load_nothing_from_elsewhere(guarded):
    for path in ("/health", "/v1/models", "/page/missing.css"):
        headers = BROWSER.get(f"{guarded.address}{path}").headers
        assert headers["content-security-policy"].startswith("default-src 'self'")
        assert headers["x-content-type-options"] == "nosniff"
        assert "server" not in headers


def test_large_bodies(guarded):
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    url = f"{guarded.address}/v1/chat/completions"
    answer = BROWSER.post(url, content=b"x" * 4097, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")
    pieces = BROWSER.post(url, content=iter([b"x" * 1000] * 5), headers=headers)  # no Content-Length
    assert (pieces.status_code, pieces.json()["error"]["code"]) == (413, "too_large")
    key = {"Authorization": f"Bearer {KEY}"}
    file = {"file": ("a.txt", b"x" * 6000)}
    assert BROWSER.post(f"{guarded.address}/v1/files", files=file, headers=key).status_code == 200
    file = {"file": ("a.txt", b"x" * 9000)}
    assert BROWSER.post(f"{guarded.address}/v1/files", files=file, headers=key).status_code == 413
    assert len(guarded.stored) == 1


def connected(guarded, data):
    """A connection on which bytes were sent."""
    host, port = guarded.address.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=HANG_S)
    connection.sendall(data)
    return connection


def request_head(guarded, length):
    host = guarded.address.removeprefix("http://")
    lines = [
        "POST /v1/chat/completions HTTP/1.1",
        f"Host: {host}",
        f"Authorization: Bearer {KEY}",
        "Content-Type: application/json",
        f"Content-Length: {length}",
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def test_a_slow_body_is_given_up(hasty):
    with connected(hasty, request_head(hasty, 100) + b"{") as connection:
        answer = connection.recv(65536)
        assert answer.startswith(b"HTTP/1.1 408")
        assert b"comes too slowly" in answer or b"comes too slowly" in connection.recv(65536)
        assert ends(connection)


def test_a_slow_head_is_given_up(guarded, monkeypatch):
    monkeypatch.setattr(web, "HEAD_S", 0.2)
    with connected(guarded, b"") as connection:
        assert connection.recv(1) == b""
    with connected(guarded, b"GET /health HTTP/1.1\r\nHos") as connection:
        assert connection.recv(1) == b""


def test_a_head_with_a_body_in_pieces_is_served(guarded):
    with connected(guarded, request_head(guarded, len(BODY))[:40]) as connection:
        connection.sendall(request_head(guarded, len(BODY))[40:] + BODY[:5])
        connection.sendall(BODY[5:])
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",  # no Host
        b"GET /health HTTP/1.0\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil.example\r\n\r\n",
        b"POST /v1/files HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/files HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST /v1/files HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 99999999999999999999999\r\n\r\n",
        b"GET /" + b"a" * 70000 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"a" * 70000 + b"\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"nonsense\r\n\r\n",
    ],
    ids=["no-host", "http-1.0", "two-hosts", "negative", "two-lengths", "long", "path", "header", "tls", "nonsense"],
)
def test_broken_heads_are_refused(data, guarded):
    with connected(guarded, data) as connection:
        status = int(connection.recv(65536).split()[1])
        assert 400 <= status < 500


def test_a_client_that_does_not_read_its_answer_is_given_up(hasty):
    """The server does not wait for it for ever, and its work ends."""
    from headinfer.serve.events import Done, Text

    hasty.script = lambda ask: [*[Text("x" * 200_000)] * 100, Done("stop", 1, 0, 1)]
    body = b'{"messages": [{"role": "user", "content": "x"}], "stream": true}'
    with connected(hasty, request_head(hasty, len(body)) + body) as connection:
        connection.recv(10)
        work = hasty.works[-1]
        assert work.cancelled.wait(HANG_S)
        assert ends(connection)


def ends(connection):
    """Whether a connection ends, however."""
    try:
        while connection.recv(1 << 20):
            pass
    except ConnectionError:
        pass
    return True
