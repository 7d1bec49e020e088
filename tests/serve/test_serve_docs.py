"""The examples of docs/serve.md run, against a server with a scripted service."""

import re
import shlex
from pathlib import Path

import pytest
from live_server import BROWSER
from scripted_service import repeat

from headinfer.serve.events import Prefill

TEXT = (Path(__file__).parents[2] / "docs" / "serve.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:8000"


def curl_commands():
    """The words of each curl command, without `curl`."""
    lines = re.findall(r"^    (.*)$", TEXT.replace("\\\n", " "), flags=re.MULTILINE)
    return [shlex.split(line)[1:] for line in lines if line.startswith("curl ")]


def run_curl(words, address):
    """Send what a curl command with -H, -d and -F sends."""
    headers, fields, files, content = {}, {}, {}, None
    words = list(words)
    url = words.pop(0).replace(ADDRESS, address)
    while words:
        option, value = words.pop(0), words.pop(0)
        if option == "-H":
            name, _, text = value.partition(": ")
            headers[name] = text
        elif option == "-d":
            content = value.encode()
        elif option == "-F":
            name, _, text = value.partition("=")
            if text.startswith("@"):
                files[name] = (text[1:], Path(text[1:]).read_bytes())
            else:
                fields[name] = text
    if content is None and not files:
        return BROWSER.get(url, headers=headers)
    return BROWSER.post(url, headers=headers, content=content, data=fields or None, files=files or None)


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    (tmp_path / "book.txt").write_text("a brave new world")
    monkeypatch.chdir(tmp_path)


def test_the_curl_commands_are_answered(service, in_folder):
    commands = curl_commands()
    assert len(commands) >= 8
    for words in commands:
        answer = run_curl(words, service.address)
        assert answer.status_code == 200, (words, answer.text)


@pytest.mark.filterwarnings("ignore:unclosed file")
def test_the_programs_run(service, in_folder, capsys):
    service.script = lambda ask: [Prefill(40960, 1000000, 1.0), *repeat(ask)]
    first, second = re.findall(r"^```python\n(.*?)^```$", TEXT, flags=re.DOTALL | re.MULTILINE)
    names = {}
    exec(compile(first.replace(ADDRESS, service.address), "docs/serve.md", "exec"), names)
    exec(compile(second, "docs/serve.md", "exec"), names)
    names["client"].close()
    assert service.asked[-1].session == names["book"].id
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].strip() == "Who did it?"
    assert lines[1] == "40,960 of 1,000,000 tokens are read"
    assert lines[2].strip() == "Who did it?"
    assert lines[3] == "75% from characters 4 to 9: brave"


def test_the_limits_are_those_of_the_code():
    from headinfer.serve import access, web
    from headinfer.serve.settings import Limits, ServeSettings

    limits = access.Access()
    words = " ".join(TEXT.split())
    assert limits.body_bytes == 64 << 20
    assert "A file has at most 1 GiB, another request 64 MiB, and its head 32 KiB" in words
    assert (limits.file_bytes >> 30, Limits().document_bytes >> 30, access.HEAD_BYTES) == (1, 1, 32 << 10)
    assert f"A head must come within {web.HEAD_S:g} seconds" in words
    assert f"within {limits.grace_s:g} seconds and {limits.slowest_bytes_per_s / 1024:g} KiB a second" in words
    assert f"within {limits.stall_s / 60:g} minutes" in words
    assert f"{web.CONNECTIONS:,} connections, and {ServeSettings.queue_limit} requests" in words
    assert f"{Limits().messages:,} messages, and an answer {Limits().new_tokens:,} tokens" in words
