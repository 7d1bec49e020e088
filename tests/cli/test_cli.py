"""The command line: exit codes, stdout and stderr of whole commands."""

import json
import logging
import os
import signal
import subprocess
import sys
import time

import huggingface_hub
import pytest
import torch
import transformers
from own_process import HANG_S

from headinfer.attention import native, native_build
from headinfer.attention.backends import backend_names
from headinfer.errors import UsageError
from headinfer.utils.units import parse_bytes

MODEL = "random:tiny-llama?layers=2&hidden=64&intermediate=64&heads=4&kv_heads=2"


def run(*arguments):
    """Run a command in a process of its own."""
    command = [sys.executable, "-W", "error", "-m", "headinfer", *map(str, arguments)]
    environment = {**os.environ, "COLUMNS": "200"}
    return subprocess.run(command, capture_output=True, text=True, timeout=HANG_S, check=False, env=environment)


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "book.txt"
    path.write_text("It was a bright cold day in April.\n" * 60, encoding="utf-8")
    return path


def test_warnings_of_libraries_are_not_shown():
    from headinfer.cli import main as cli

    assert cli.app
    levels = [of._get_default_logging_level() for of in (transformers.utils.logging, huggingface_hub.utils.logging)]
    assert levels == [logging.ERROR, logging.ERROR]


def test_generate_prints_text_and_a_summary(book):
    done = run("generate", MODEL, "--file", book, "--prompt", "When?", "--max-new-tokens", 6, "--chunk-tokens", 512)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n")
    assert done.stdout.strip()
    for line in ("tokens read", "time to first token", "KV on the device, peak", "KV on the host", "heads per group"):
        assert line in done.stderr
    assert "reading" in done.stderr
    assert "writing" in done.stderr


def test_generate_says_why_the_kernel_could_not_be_built(run_command, book, monkeypatch):
    monkeypatch.setattr(native_build, "load", lambda dtype: (None, "no C compiler"))
    code, _, err = run_command("generate", MODEL, "--prompt", "When?", "--max-new-tokens", 1)
    assert code == 0, err
    (line,) = (line for line in err.splitlines() if "slower attention on the CPU" in line)
    assert "no C compiler" in line
    out = run_command("info", "--json")[1]
    assert json.loads(out)["native_kernel"] == "no C compiler"


def test_generate_json_counts_every_byte(run_command, book):
    code, out, err = run_command(
        "generate", MODEL, "--file", book, "--max-new-tokens", 5, "--json", "--dtype", "bfloat16"
    )
    assert code == 0, err
    result = json.loads(out)
    tokens = len(book.read_bytes())
    assert result["tokens_in"] == result["tokens_read"] == tokens
    assert result["tokens_out"] == len(result["token_ids"]) == 5
    stats = result["stats"]
    token_bytes = 2 * 2 * 2 * 16 * 2  # layers, K and V, KV heads, width, bfloat16
    assert stats["tokens"] == tokens + 4
    assert stats["host_kv_bytes"] >= (tokens - 256) * token_bytes
    assert stats["device_kv_peak_bytes"] == stats["device_tail_bytes"] == 256 * token_bytes
    assert result["first_token_s"] > 0
    assert result["kernel_failure"] == native.unavailable_reason(torch.bfloat16)
    assert not result["interrupted"]


def test_the_same_seed_gives_the_same_text_with_any_chunks_and_tiles(book, capsys, monkeypatch):
    from headinfer.cli import main as cli

    def result_of(*arguments):
        monkeypatch.setattr(sys, "argv", ["headinfer", "generate", MODEL, "--file", str(book), *map(str, arguments)])
        cli.app(standalone_mode=False)
        return json.loads(capsys.readouterr().out)

    options = ("--max-new-tokens", 12, "--temperature", 1.0, "--json", "--seed", 5)
    small = ("--transport", "lazy", "--device-kv-budget", "700KB", "--heads-per-group", 1, "--tile-tokens", 300)
    plain = result_of(*options)
    again = result_of(*options)
    cut = result_of(*options, *small, "--chunk-tokens", 200, "--cpu-share", 1)
    assert plain["token_ids"] == again["token_ids"] == cut["token_ids"]
    assert len(set(plain["token_ids"])) > 3
    assert cut["stats"]["heads_per_group"] == 1
    assert cut["stats"]["link_to_device_bytes"] > 0
    assert cut["options"]["cpu_share"] == cut["stats"]["cpu_share"] == 1
    assert cut["stats"]["cpu_attended_bytes"] > 0
    assert cut["cpu_attended_bytes_per_s"] > 0
    assert plain["cpu_attended_bytes_per_s"] is None
    assert cut["stats"]["device_kv_peak_bytes"] <= 700_000
    assert result_of(*options[:-1], 6)["token_ids"] != plain["token_ids"]


def test_a_prompt_beyond_the_context_of_the_model_gets_a_warning(run_command, book):
    code, _, err = run_command("generate", MODEL + "&context=1000", "--file", book, "--max-new-tokens", 2)
    assert code == 0
    assert "exceed the 1,000" in err


@pytest.mark.parametrize("forwards", [1, 30], ids=["while reading", "while writing"])
def test_ctrl_c_prints_the_summary_so_far(forwards, book, capsys, monkeypatch):
    from headinfer.cli import main as cli
    from headinfer.cli import report

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background of a shell ignore SIGINT
    calls = []

    def on_forward(self, cache):
        calls.append(cache)
        if len(calls) == forwards:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(report.GenerationProgress, "on_forward", on_forward)
    arguments = ["generate", MODEL, "--file", str(book), "--max-new-tokens", "5000", "--chunk-tokens", "200", "--json"]
    arguments += ["--guesses", "off"]  # each pass writes one token
    monkeypatch.setattr(sys, "argv", ["headinfer", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    signal.signal(signal.SIGINT, before)
    assert stopped.value.code == 130
    result = json.loads(capsys.readouterr().out)
    assert result["interrupted"]
    assert len(calls) == forwards
    tokens = len(book.read_bytes())
    assert result["tokens_read"] == (200 if forwards == 1 else tokens)
    assert result["tokens_out"] == max(forwards - -(-tokens // 200), 0)


@pytest.mark.parametrize("text", ["Grüße, 世界 🌍! " * 5, "plain words", "\x80 half"])
def test_the_streamer_prints_whole_characters_and_loses_none(text):
    from headinfer.hf.models import byte_tokenizer
    from headinfer.jobs.generate import Streamer, Summary

    pieces = []
    summary = Summary("m")
    streamer = Streamer(byte_tokenizer(), pieces.append, summary, time.perf_counter())
    streamer.put(torch.tensor([[1, 2, 3]]))
    for token in byte_tokenizer()(text).input_ids:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert "".join(pieces) == summary.text == text
    assert "\ufffd" not in summary.text
    assert summary.tokens_out == len(text.encode())


MISTAKES = {
    "missing file": (["--file", "/no/such/file", "--prompt", "x"], "cannot read /no/such/file"),
    "binary file": (["--file", sys.executable, "--prompt", "x"], "not UTF-8"),
    "no prompt": ([], "the prompt is empty"),
    "empty prompt": (["--prompt", "  "], "the prompt is empty"),
    "budget below a tile": (["--prompt", "x", "--device-kv-budget", "1KB"], "give at least"),
    "no size": (["--prompt", "x", "--device-kv-budget", "much"], "is not a size"),
    "too little host RAM": (["--prompt", "x", "--max-new-tokens", "9000000000"], "tokens fit"),
    "negative tokens": (["--prompt", "x", "--max-new-tokens", "-3"], "must be a positive number"),
    "zero chunk": (["--prompt", "x", "--chunk-tokens", "0"], "must be a positive number"),
    "negative heads": (["--prompt", "x", "--heads-per-group", "-1"], "must be a positive number"),
    "too many heads": (["--prompt", "x", "--heads-per-group", "3"], "1 to 2"),
    "no share": (["--prompt", "x", "--cpu-share", "half"], "--cpu-share is half: it must be auto or a number from 0"),
    "negative tile": (["--prompt", "x", "--tile-tokens", "-5"], "must be a positive number"),
    "unknown dtype": (["--prompt", "x", "--dtype", "int4"], "--dtype is int4: it must be one of auto"),
    "unknown device": (["--prompt", "x", "--device", "abacus"], "choose cpu"),
    "unknown backend": (["--prompt", "x", "--backend", "abacus"], "choose one of"),
    "top-k when greedy": (["--prompt", "x", "--top-k", "3"], "--temperature"),
}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_gets_one_sentence_and_loads_nothing(arguments, message, capsys, monkeypatch):
    refuses_in_process(["generate", MODEL, *arguments], message, capsys, monkeypatch)


@pytest.mark.parametrize(
    ("model", "message"),
    {
        "/no/such/folder": "there is no model",
        "no-such-model": "there is no model",
        "random:no-such": "no built-in config",
        "random:tiny-llama?layers=0": "must be positive",
        "random:tiny-llama?layers=two": "no whole number",
        "random:tiny-llama?wibble=2": "no field wibble",
        "random:tiny-llama?rms_norm_eps=1": "no field rms_norm_eps",
        "random:tiny-llama?heads=3": "multiple",
        "random:mistral-7b?sliding_window=512": "no full-attention layer",
    }.items(),
)
def test_an_unknown_model_gets_one_sentence(model, message, capsys, monkeypatch):
    refuses_in_process(["generate", model, "--prompt", "x"], message, capsys, monkeypatch)


def test_a_folder_without_config_and_an_unsupported_family(tmp_path, capsys, monkeypatch):
    refuses_in_process(["generate", str(tmp_path), "--prompt", "x"], "no config.json", capsys, monkeypatch)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bloom"}))
    refuses_in_process(["generate", str(tmp_path), "--prompt", "x"], "not verified", capsys, monkeypatch)


def refuses_in_process(arguments, message, capsys, monkeypatch):
    """Check that main() exits with 2 and one sentence, and that no weights are loaded."""
    from headinfer.cli import main as cli
    from headinfer.hf.models import ModelSource

    monkeypatch.setattr(ModelSource, "load", lambda *_, **__: pytest.fail("weights were loaded"))
    monkeypatch.setattr(sys, "argv", ["headinfer", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("headinfer: error: ")
    assert message in err
    assert err.count("\n") == 1


def test_a_mistake_in_a_real_process_prints_no_traceback():
    done = run("generate", MODEL, "--file", "/no/such/file")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "headinfer: error: cannot read /no/such/file: No such file or directory\n"


def test_help_and_unknown_commands(run_command):
    assert run_command("nonsense")[0] == 2
    assert "generate" in run_command("--help")[1]


def test_help_loads_no_heavy_library():
    """`headinfer --help` is quick: torch and transformers are imported by the commands that need them."""
    script = """
import sys
import headinfer.cli.main
assert not {"torch", "transformers", "matplotlib"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=HANG_S)
    assert done.returncode == 0, done.stderr


def test_info_lists_every_backend(run_command):
    found = json.loads(run_command("info", "--json")[1])
    names = [backend["name"] for backend in found["attention_backends"]]
    assert names == backend_names()
    assert found["memory"]["host_available_bytes"] > 0
    shown = run_command("info")[1]
    assert all(name in shown for name in names)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("256MiB", 2**28), ("1.5GB", 1_500_000_000), ("4096", 4096), ("1 KiB", 1024), ("2gib", 2**31), ("7B", 7)],
)
def test_sizes(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "MiB", "-1MB", "0", "1TBx", "nan", "inf", "1e400GB"])
def test_text_that_is_not_a_size(text):
    with pytest.raises(UsageError):
        parse_bytes(text)
