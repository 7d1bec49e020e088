"""`headinfer serve`: everything is checked before the model is loaded, and Ctrl-C ends it cleanly."""

import signal
import socket
import threading

import httpx2
import pytest
from own_process import HANG_S
from scripted_service import ScriptedService

from headinfer.errors import UsageError
from headinfer.serve import listen, service, web

KEY = "0123456789abcdef"


@pytest.fixture
def loaded(monkeypatch):
    """The services that the command loads, which are scripted, and free of what is in the environment."""
    services = []

    class Service(ScriptedService):
        def __init__(self, settings):
            super().__init__()
            services.append(settings)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            services.append("closed")

    monkeypatch.setattr(service, "Service", Service)
    monkeypatch.delenv(listen.KEY_VARIABLE, raising=False)
    return services


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "--host is 0.0.0.0, which other machines can reach: give --api-key-file or set"),
        (["--host", "::"], "which other machines can reach"),
        (["--host", "a..b"], "there is no such address or name, use 127.0.0.1"),
        (["--host", "192.0.2.1", "--api-key-file", "keys"], "which is no address of this machine"),
        (["--port", "65536"], "--port is 65536: it must be at most 65,535"),
        (["--api-key-file", "missing"], "cannot read missing: No such file or directory"),
        (
            ["--api-key-file", "short"],
            "a key of short is not usable: it must have at least 16 visible",
        ),
        (["--api-key-file", "empty"], "empty has no key"),
        (["--stop", ""], "--stop is empty"),
        (["--device-kv-budget", "many"], "--device-kv-budget"),
        (["--kv-dtype", "int3"], "--kv-dtype is int3: it must be one of auto, int8, int4"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes_are_found_before_the_model_is_loaded(arguments, message, loaded, run_command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "keys").write_text(f"{KEY}\n")
    (tmp_path / "short").write_text("secret\n")
    (tmp_path / "empty").write_text("\n")
    code, out, err = run_command("serve", "embedded", *arguments)
    assert (code, out, loaded) == (2, "", [])
    assert message in err
    assert len(err.splitlines()) == 1


def test_a_port_in_use_is_named_before_the_model_is_loaded(loaded, run_command):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, err = run_command("serve", "embedded", "--port", port)
    assert (code, loaded) == (2, [])
    assert f"--port is {port}, and another program uses it: choose another port" in err


def test_a_missing_library_is_named(loaded, run_command, monkeypatch):
    monkeypatch.setattr(listen, "find_spec", lambda name: None if name == "uvicorn" else object())
    code, _, err = run_command("serve", "embedded")
    assert (code, loaded) == (2, [])
    assert "the server needs uvicorn: install it with pip install 'headinfer[serve]'" in err


def test_keys_are_in_a_file_or_in_the_environment(tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"{KEY}\n\n  {KEY}2  \n")
    assert listen.read_keys(file, {}) == (KEY, f"{KEY}2")
    assert listen.read_keys(None, {listen.KEY_VARIABLE: KEY}) == (KEY,)
    assert listen.read_keys(None, {}) == ()
    with pytest.raises(UsageError, match="are both given: give one of them"):
        listen.read_keys(file, {listen.KEY_VARIABLE: KEY})
    for wrong in ("", "x" * 15, "pass word pass word", "schlüssel-schlüssel"):
        with pytest.raises(UsageError):
            listen.read_keys(None, {listen.KEY_VARIABLE: wrong})


@pytest.fixture
def takes_ctrl_c():
    """Python's own handler of SIGINT, which background jobs of a shell ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("takes_ctrl_c")
@pytest.mark.parametrize(("stop", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_server_cleanly(stop, exit_code, loaded, run_command, monkeypatch, tmp_path):
    """The command serves, and after Ctrl-C or SIGTERM closes the service and its port."""
    answers = []
    original = web.web_server

    def served(app, on_end):
        server = original(app, on_end)

        def ask():
            answers.append(httpx2.get(f"{address[0]}/health", timeout=HANG_S).json())
            signal.raise_signal(stop)

        threading.Thread(target=ask).start()
        return server

    address = []
    monkeypatch.setattr(web, "web_server", served)
    monkeypatch.setattr(listen, "address_of", lambda listener, host: address.append(_url(listener)) or address[0])
    options = ("--port", 0, "--sessions", tmp_path, "--temperature", 0.5, "--queue", 9, "--kv-dtype", "int8")
    code, _, err = run_command("serve", "embedded", *options)
    assert code == exit_code
    assert answers == [{"status": "ok"}]
    assert loaded[-1] == "closed"
    assert (loaded[0].model, loaded[0].root, loaded[0].queue_limit) == ("embedded", tmp_path, 9)
    assert loaded[0].sampling.temperature == 0.5
    assert loaded[0].options.kv_dtype == "int8"
    assert "KV is stored in int8, which is approximate" in err
    assert f"the page is at {address[0]}/ and the API at {address[0]}/v1; Ctrl-C ends it" in err
    assert "Traceback" not in err


def _url(listener):
    return f"http://127.0.0.1:{listener.getsockname()[1]}"
