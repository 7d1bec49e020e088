"""The commands `headinfer read`, `ask` and `session`. All answers are compared with those of `headinfer generate`."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from families import tiny_model

from headinfer import enable
from headinfer.errors import SessionError
from headinfer.hf.enable import Enabled
from headinfer.hf.models import byte_tokenizer, resolve
from headinfer.sessions.manifest import Manifest

MODEL = "random:tiny-llama?layers=2&hidden=64&intermediate=64&heads=4&kv_heads=2"
WINDOWED = "random:gemma-3-4b?layers=6&hidden=64&intermediate=64&heads=4&kv_heads=2&head_dim=16&sliding_window=64"
CHUNK = 300
WORDS = "It was a bright cold day in April, and the clocks were striking thirteen.\n"


@pytest.fixture
def headinfer(run_command, monkeypatch, tmp_path):
    """The fixture `run_command`, with a folder of sessions of its own."""
    monkeypatch.setenv("HEADINFER_SESSIONS", str(tmp_path / "sessions"))
    return run_command


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(WORDS * 20, encoding="utf-8")
    return path


def read(headinfer, book, *more, model=MODEL, name="mybook"):
    code, out, err = headinfer("read", model, "--file", book, "--session", name, "--json", *more)
    assert code == 0, err
    return json.loads(out), err


def ask(headinfer, *questions, name="mybook", more=()):
    code, out, err = headinfer("ask", "--session", name, "--max-new-tokens", 8, "--json", *more, "--", *questions)
    assert code == 0, err
    return json.loads(out)["answers"]


def generate(headinfer, book, question, model=MODEL, more=()):
    arguments = ("--file", book, "--prompt", question, "--max-new-tokens", 8, "--json", *more)
    code, out, err = headinfer("generate", model, *arguments)
    assert code == 0, err
    return json.loads(out)


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_answers_agree_with_generate(headinfer, book, tmp_path):
    result, _ = read(headinfer, book, "--chunk-tokens", CHUNK)
    assert result["tokens"] == result["document_tokens"] == len(book.read_bytes())
    assert result["disk_bytes"] > result["tokens"] * 2 * 2 * 2 * 16 * 4
    before = files_of(tmp_path / "sessions" / "mybook")
    questions = ["When?", "And where was it?", "When?"]
    answers = ask(headinfer, *questions)
    expected = [generate(headinfer, book, question)["token_ids"] for question in questions]
    assert [answer["token_ids"] for answer in answers] == expected
    assert files_of(tmp_path / "sessions" / "mybook") == before  # questions do not change the session
    placed = ("--host-kv-budget", "4MiB", "--disk-tier", tmp_path / "tier")
    assert ask(headinfer, questions[1], more=placed)[0]["token_ids"] == expected[1]


def test_a_document_larger_than_the_memory_budget(headinfer, tmp_path):
    book = tmp_path / "long.txt"
    book.write_text(WORDS * 200, encoding="utf-8")
    budget = 4 * 2**20
    tier = ("--host-kv-budget", "4MiB", "--disk-tier", tmp_path / "tier")
    plain = generate(headinfer, book, "When?")
    assert plain["stats"]["host_kv_peak_bytes"] > budget
    for transport in ("auto", "eager"):
        tiered = generate(headinfer, book, "When?", more=(*tier, "--chunk-tokens", "1024", "--transport", transport))
        assert tiered["token_ids"] == plain["token_ids"]
        assert tiered["stats"]["host_kv_peak_bytes"] <= budget
        assert tiered["stats"]["disk_kv_bytes"] > 0
        assert tiered["stats"]["disk_to_host_bytes"] > tiered["stats"]["disk_kv_bytes"]
    read(headinfer, book, *tier, "--chunk-tokens", "1024")
    (answer,) = ask(headinfer, "When?", more=tier)
    assert answer["token_ids"] == plain["token_ids"]
    assert not list((tmp_path / "tier").iterdir())


def test_text_is_streamed_and_each_question_is_timed(headinfer, book):
    read(headinfer, book)
    code, out, err = headinfer("ask", "--session", "mybook", "--max-new-tokens", 4, "When?", "Where?")
    assert code == 0
    assert out.count("\n") >= 2
    assert "first token" in err
    assert f"{len(book.read_bytes()):,} tokens are read" in err


def test_kept_questions_precede_the_next_ones(headinfer, book, tmp_path):
    read(headinfer, book)
    first = ask(headinfer, "When?", more=["--keep"])[0]
    second = ask(headinfer, "And where?", more=["--keep"])[0]
    model = resolve(MODEL).load(dtype=torch.float32, device="cpu", seed=0)
    ids_of = byte_tokenizer()
    talk = [*ids_of(book.read_text() + "\n\nWhen?").input_ids, *first["token_ids"], *ids_of("\nAnd where?").input_ids]
    ids = torch.tensor([talk])
    with enable(model, chunk_tokens=CHUNK):
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    assert second["token_ids"] == expected[0, len(talk) :].tolist()
    assert "2 answers kept" in headinfer("session", "list")[1]
    code, _, err = headinfer("read", MODEL, "--file", book, "--session", "mybook")
    assert code == 2
    assert "choose another name" in err
    assert "headinfer session undo" in err


class CtrlC:
    """Presses Ctrl-C in a forward pass of a model, and counts the passes from there on."""

    def __init__(self, monkeypatch, in_pass):
        self.passes = 0
        before = Enabled._one_chunk

        def one_chunk(enabled, *arguments):
            self.passes += 1
            if self.passes == in_pass:
                signal.raise_signal(signal.SIGINT)
            return before(enabled, *arguments)

        monkeypatch.setattr(Enabled, "_one_chunk", one_chunk)


@pytest.fixture
def sigint():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore SIGINT
    yield
    signal.signal(signal.SIGINT, before)


LONG_QUESTION = WORDS * 15 + "When?"


@pytest.mark.parametrize("in_pass", [1, 3, 7])  # in the first and third chunk of the question, and in the answer
@pytest.mark.parametrize("keep", [True, False])
def test_ctrl_c_in_ask_stops_within_one_chunk(headinfer, book, tmp_path, monkeypatch, sigint, keep, in_pass):
    read(headinfer, book, "--chunk-tokens", CHUNK)
    more = ["--keep"] if keep else []
    ask(headinfer, "When?", more=more)
    before = files_of(tmp_path / "sessions" / "mybook")
    expected = ask(headinfer, LONG_QUESTION)[0]["token_ids"]
    with monkeypatch.context() as patched:
        pressed = CtrlC(patched, in_pass)
        arguments = ["ask", "--session", "mybook", "--max-new-tokens", 8, "--guesses", "off", "--json", *more]
        code, out, err = headinfer(*arguments, "--", LONG_QUESTION, "Another?")
    assert code == 130
    assert pressed.passes == in_pass
    answers = json.loads(out)["answers"]
    assert [answer["interrupted"] for answer in answers] == ([True] if keep else [True, True])
    assert ("this question is not kept" in err) == keep
    assert files_of(tmp_path / "sessions" / "mybook") == before
    assert ask(headinfer, LONG_QUESTION)[0]["token_ids"] == expected


@pytest.mark.parametrize("in_pass", [1, 3])
def test_ctrl_c_in_generate_stops_within_one_chunk(headinfer, book, monkeypatch, sigint, in_pass):
    pressed = CtrlC(monkeypatch, in_pass)
    arguments = ("--file", book, "--prompt", "When?", "--chunk-tokens", CHUNK, "--json")
    code, out, _ = headinfer("generate", MODEL, *arguments)
    assert code == 130
    assert pressed.passes == in_pass
    stopped = json.loads(out)
    assert stopped["interrupted"]
    assert stopped["tokens_read"] == (in_pass - 1) * CHUNK


def state_of(folder):
    """All data files of a session, and its manifest without what says when it was written."""
    files = {name: data for name, data in files_of(folder).items() if name != "manifest.json"}
    manifest = json.loads((folder / "manifest.json").read_text())
    return files, {name: value for name, value in manifest.items() if name not in ("generation", "checksum")}


def hybrid_model(folder):
    """A model with linear attention, whose state cannot be cropped."""
    tiny_model("qwen3_next", vocab_size=len(byte_tokenizer())).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["full attention", "windows", "linear attention"])
def test_undo_returns_to_the_state_before_each_kept_answer(headinfer, book, tmp_path, kind):
    model = {"full attention": MODEL, "windows": WINDOWED, "linear attention": None}[kind]
    model = model or hybrid_model(tmp_path / "hybrid")
    read(headinfer, book, "--chunk-tokens", CHUNK, model=model)
    folder = tmp_path / "sessions" / "mybook"
    questions = ["When?", WORDS * 5 + "And where?", "Why?"]
    states = []
    answers = []
    for question in questions:
        states.append(state_of(folder))
        answers.append(ask(headinfer, question, more=["--keep"])[0]["token_ids"])
    assert "3 answers kept" in headinfer("session", "list")[1]
    assert headinfer("session", "verify", "mybook")[0] == 0
    for question, state, answer in reversed(list(zip(questions, states, answers, strict=True))):
        code, _, err = headinfer("session", "undo", "mybook")
        assert (code, "removed the last question and answer" in err) == (0, True)
        assert state_of(folder) == state
        assert headinfer("session", "verify", "mybook")[0] == 0
        assert ask(headinfer, question)[0]["token_ids"] == answer
    code, _, err = headinfer("session", "undo", "mybook")
    assert code == 2
    assert "holds no kept answer" in err
    assert state_of(folder) == states[0]
    for question, answer in zip(questions, answers, strict=True):
        assert ask(headinfer, question, more=["--keep"])[0]["token_ids"] == answer
    if kind == "full attention":
        assert read(headinfer, book, name="another")[0]["resumed_at"] > 0  # it shares the document's files


def test_undo_of_an_exported_session(headinfer, book, tmp_path):
    read(headinfer, book, "--chunk-tokens", CHUNK)
    folder = tmp_path / "sessions" / "mybook"
    before = state_of(folder)
    ask(headinfer, "When?", "Where?", more=["--keep"])
    archive = tmp_path / "mybook.tar"
    assert headinfer("session", "export", "mybook", archive)[0] == 0
    assert headinfer("session", "rm", "mybook")[0] == 0
    subprocess.run(["tar", "xf", archive, "-C", tmp_path / "sessions"], check=True)
    facts = json.loads(headinfer("session", "undo", "mybook", "--json")[1])
    assert facts["state"] == "1 answer kept"
    assert headinfer("session", "undo", "mybook")[0] == 0
    files, manifest = state_of(folder)
    assert files | {"lock": b""} == before[0] | {"lock": b""}
    assert manifest == before[1]


def test_what_cannot_be_undone_is_refused_in_one_sentence(headinfer, book, tmp_path):
    code, _, err = headinfer("session", "undo", "nobody")
    assert (code, "is not a session" in err) == (2, True)
    assert not (tmp_path / "sessions").exists()
    read(headinfer, book, "--chunk-tokens", CHUNK)
    ask(headinfer, "When?", more=["--keep"])
    folder = tmp_path / "sessions" / "mybook"
    kept = Manifest.read(folder)
    (earlier,) = kept.earlier
    dataclasses.replace(kept, earlier=[]).write(folder)  # as headinfer 0.1.0 writes it
    before = files_of(folder)
    code, _, err = headinfer("session", "undo", "mybook")
    assert (code, "does not hold the state before its last answer" in err) == (2, True)
    assert files_of(folder) == before
    assert ask(headinfer, "Where?")
    kept.write(folder)
    (folder / earlier.end.name).write_bytes(b"damaged")
    before = files_of(folder)
    code, _, err = headinfer("session", "undo", "mybook")
    assert (code, "it is damaged" in err) == (2, True)
    assert files_of(folder) == before


@pytest.mark.parametrize("after_chunks", [1, 3])
def test_ctrl_c_loses_at_most_one_chunk(headinfer, book, after_chunks, monkeypatch):
    from headinfer.cli import report

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore SIGINT
    calls = []

    def on_forward(self, cache):
        calls.append(cache)
        if len(calls) == after_chunks:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(report.GenerationProgress, "on_forward", on_forward)
    arguments = ("read", MODEL, "--file", book, "--session", "mybook", "--chunk-tokens", CHUNK, "--json")
    code, out, err = headinfer(*arguments)
    signal.signal(signal.SIGINT, before)
    assert code == 130
    stopped = json.loads(out)
    assert stopped["interrupted"]
    assert stopped["tokens"] == after_chunks * CHUNK
    assert "run the same command again to resume" in err
    code, _, err = headinfer("ask", "--session", "mybook", "When?")
    assert code == 2
    assert "run the same `headinfer read` again" in err
    code, out, err = headinfer(*arguments)
    assert code == 0
    assert f"{after_chunks * CHUNK:,} tokens are stored already" in err
    resumed = json.loads(out)
    assert resumed["resumed_at"] == after_chunks * CHUNK
    assert resumed["tokens"] == len(book.read_bytes())
    assert ask(headinfer, "When?")[0]["token_ids"] == generate(headinfer, book, "When?")["token_ids"]


KILLED = """
import os, signal, sys, time
from pathlib import Path
from headinfer.cli.main import main
from headinfer.hf.enable import Enabled

manifest = Path(sys.argv.pop(1))
one_chunk = Enabled._one_chunk
passes = []


def killed_in_the_tenth(self, *arguments):
    passes.append(arguments)
    if len(passes) == 10:
        while not manifest.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    return one_chunk(self, *arguments)


Enabled._one_chunk = killed_in_the_tenth
main()
"""


def test_a_kill_while_a_checkpoint_is_written_keeps_a_checkpoint(headinfer, tmp_path):
    """The process ends in its tenth chunk, while another thread writes the checkpoint of an earlier one."""
    book = tmp_path / "long.txt"
    book.write_text(WORDS * 50, encoding="utf-8")
    root = tmp_path / "sessions"
    manifest = root / "mybook" / "manifest.json"
    arguments = ("read", MODEL, "--file", book, "--session", "mybook", "--chunk-tokens", "256", "--sessions", root)
    command = [sys.executable, "-c", KILLED, manifest, *map(str, arguments)]
    assert subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == -signal.SIGKILL
    kept = json.loads(manifest.read_text())["tokens"]
    assert 0 < kept < len(book.read_bytes())
    assert headinfer("session", "verify", "mybook")[0] == 0
    resumed, err = read(headinfer, book, "--chunk-tokens", 256)
    assert resumed["resumed_at"] == kept
    assert f"{kept:,} tokens are stored already (of this session)" in err
    assert ask(headinfer, "When?")[0]["token_ids"] == generate(headinfer, book, "When?")["token_ids"]


def test_a_longer_document_continues_the_session_of_a_shorter_one(headinfer, book, tmp_path):
    read(headinfer, book, "--chunk-tokens", CHUNK)
    tokens = len(book.read_bytes())
    book.write_text(book.read_text() + "The end is new.\n" * 30, encoding="utf-8")
    again, err = read(headinfer, book)
    assert again["resumed_at"] == tokens
    assert "of this session" in err
    assert ask(headinfer, "When?")[0]["token_ids"] == generate(headinfer, book, "When?")["token_ids"]


def test_a_common_prefix_is_taken_from_another_session(headinfer, book, tmp_path):
    read(headinfer, book, "--chunk-tokens", CHUNK, name="first")
    tokens = len(book.read_bytes())
    other = tmp_path / "other.txt"
    other.write_text(book.read_text()[:1200] + "From here on it is another book.\n" * 20, encoding="utf-8")
    result, err = read(headinfer, other, name="second")
    assert 0 < result["resumed_at"] <= 1200
    assert "of the session first" in err
    answer = ask(headinfer, "When?", name="second")[0]["token_ids"]
    assert answer == generate(headinfer, other, "When?")["token_ids"]
    whole = tmp_path / "whole.txt"
    whole.write_text(book.read_text() + "And on it goes.\n", encoding="utf-8")
    assert read(headinfer, whole, name="third")[0]["resumed_at"] == tokens  # the end of a session is shared as well
    headinfer("session", "rm", "first")
    for name in ("second", "third"):
        assert headinfer("session", "verify", name)[0] == 0
    assert ask(headinfer, "When?", name="second")[0]["token_ids"] == answer


def test_a_model_with_windows_shares_only_whole_sessions(headinfer, book, tmp_path):
    model = WINDOWED
    read(headinfer, book, "--chunk-tokens", CHUNK, model=model, name="first")
    other = tmp_path / "other.txt"
    other.write_text(book.read_text()[:1200] + "From here on it is another book.\n", encoding="utf-8")
    assert read(headinfer, other, model=model, name="second")[0]["resumed_at"] == 0
    other.write_text(book.read_text() + "And on it goes.\n", encoding="utf-8")
    assert read(headinfer, other, model=model, name="third")[0]["resumed_at"] == len(book.read_bytes())
    assert (
        ask(headinfer, "When?", name="third")[0]["token_ids"]
        == generate(headinfer, other, "When?", model=model)["token_ids"]
    )


def test_session_commands(headinfer, book, tmp_path):
    assert "no sessions" in headinfer("session", "list")[2]
    read(headinfer, book, "--chunk-tokens", CHUNK)
    folder = tmp_path / "sessions" / "mybook"
    listed = json.loads(headinfer("session", "list", "--json")[1])
    assert [one["name"] for one in listed] == ["mybook"]
    tokens = len(book.read_bytes())
    assert listed[0]["tokens"] == tokens
    assert f"{tokens:,}" in headinfer("session", "list")[1]
    facts = json.loads(headinfer("session", "info", "mybook", "--json")[1])
    assert facts["arithmetic"]["chunk_tokens"] == CHUNK
    assert facts["model_config"]["num_hidden_layers"] == 2
    assert "document tokens" in headinfer("session", "info", "mybook")[1]
    code, out, _ = headinfer("session", "verify", "mybook")
    assert (code, "nothing wrong" in out) == (0, True)

    archive = tmp_path / "mybook.tar"
    assert headinfer("session", "export", "mybook", archive)[0] == 0
    answer = ask(headinfer, "When?")
    assert headinfer("session", "rm", "mybook")[0] == 0
    assert not folder.exists()
    subprocess.run(["tar", "xf", archive, "-C", tmp_path / "sessions"], check=True)
    assert ask(headinfer, "When?")[0]["token_ids"] == answer[0]["token_ids"]

    block = sorted(folder.glob("block-*"))[0]
    damaged = bytearray(block.read_bytes())
    damaged[-5] ^= 16
    block.write_bytes(damaged)
    code, out, _ = headinfer("session", "verify", "mybook")
    assert code == 1
    assert "1 wrong" in out
    assert block.name in out
    code, _, err = headinfer("ask", "--session", "mybook", "When?")
    assert code == 2
    assert "is not as it was written" in err
    (folder / "manifest.json").write_text("{}")
    assert "damaged" in headinfer("session", "list")[1]


def test_the_advice_about_a_damaged_session_works(headinfer, book, tmp_path):
    """Also if another session shares the damaged file."""
    read(headinfer, book, "--chunk-tokens", CHUNK)
    read(headinfer, book, "--chunk-tokens", CHUNK, name="another")
    answer = ask(headinfer, "When?")[0]["token_ids"]
    folder = tmp_path / "sessions" / "mybook"
    block = sorted(folder.glob("block-*"))[0]
    assert os.path.samefile(block, tmp_path / "sessions" / "another" / block.name)
    with open(block, "r+b") as file:
        file.seek(-5, os.SEEK_END)
        file.write(b"?")
    arguments = ("read", MODEL, "--file", book, "--session", "mybook")
    book.write_text(book.read_text() + "And it goes on.", encoding="utf-8")
    for command in (arguments, ("ask", "--session", "mybook", "When?")):
        code, _, err = headinfer(*command)
        assert code == 2
        assert "remove the session with `headinfer session rm`, then read the document again" in err
    headinfer("session", "rm", "mybook")
    book.write_text(book.read_text().removesuffix("And it goes on."), encoding="utf-8")
    assert read(headinfer, book, "--chunk-tokens", CHUNK)[0]["resumed_at"] == 0
    assert ask(headinfer, "When?")[0]["token_ids"] == answer
    assert headinfer("session", "verify", "mybook")[0] == 0


MISTAKES = {
    "no such session": (["ask", "--session", "nobody", "When?"], "is not a session"),
    "a name that leads elsewhere": (["ask", "--session", "../mybook", "When?"], "is not a valid session name"),
    "an empty question": (["ask", "--session", "mybook", " "], "the question is empty"),
    "no new tokens": (["ask", "--session", "mybook", "--max-new-tokens", "0", "When?"], "must be a positive number"),
    "another model": (
        ["ask", "--session", "mybook", "--model", MODEL + "&max_position_embeddings=999", "When?"],
        "another model",
    ),
    "another shape": (["ask", "--session", "mybook", "--model", "random:tiny-llama", "When?"], "another model"),
    "half a tier": (["ask", "--session", "mybook", "--host-kv-budget", "4MiB", "When?"], "go together"),
    "a tier that is no folder": (
        ["ask", "--session", "mybook", "--host-kv-budget", "4MiB", "--disk-tier", "BOOK", "When?"],
        "cannot keep KV in",
    ),
    "a tier that is no folder, reading": (
        ["read", MODEL, "--file", "BOOK", "--session", "n", "--host-kv-budget", "4MiB", "--disk-tier", "BOOK"],
        "cannot keep KV in",
    ),
    "another chunk": (["read", MODEL, "--file", "BOOK", "--session", "mybook", "--chunk-tokens", "77"], "goes on with"),
    "another dtype": (["read", MODEL, "--file", "BOOK", "--session", "mybook", "--dtype", "float16"], "goes on with"),
    "another text": (["read", MODEL, "--file", "OTHER", "--session", "mybook"], "holds another text"),
    "no text": (["read", MODEL, "--file", "EMPTY", "--session", "new"], "the document is empty"),
    "zero chunk": (["read", MODEL, "--file", "BOOK", "--session", "new", "--chunk-tokens", "0"], "positive number"),
    "nothing to remove": (["session", "rm", "nobody"], "there is no session"),
    "nothing to verify": (["session", "verify", "nobody"], "is not a session"),
    "no folder for an archive": (["session", "export", "mybook", "/no/such/folder/x.tar"], "cannot write"),
    "sessions in a file": (
        ["read", MODEL, "--file", "BOOK", "--session", "new", "--sessions", "BOOK"],
        "is not a writable folder",
    ),
}


def test_mistakes_are_reported_in_one_sentence_before_loading(headinfer, book, tmp_path, monkeypatch):
    from headinfer.hf.models import ModelSource

    read(headinfer, book, "--chunk-tokens", CHUNK)
    paths = {name: tmp_path / f"{name}.txt" for name in ("OTHER", "EMPTY")} | {"BOOK": book}
    paths["OTHER"].write_text("Another text. " * 10)
    paths["EMPTY"].write_text("  \n")
    before = files_of(tmp_path / "sessions" / "mybook")
    monkeypatch.setattr(ModelSource, "load", lambda *_, **__: pytest.fail("weights were loaded first"))
    for name, (arguments, says) in MISTAKES.items():
        code, out, err = headinfer(*(paths.get(argument, argument) for argument in arguments))
        assert (code, out) == (2, ""), name
        assert err.startswith("headinfer: error: "), name
        assert says in err, name
        assert err.count("\n") == 1, name
    assert files_of(tmp_path / "sessions" / "mybook") == before
    assert [path.name for path in (tmp_path / "sessions").iterdir()] == ["mybook"]


def test_another_tokenizer_is_an_error(headinfer, book, tmp_path):
    folder = tmp_path / "model"
    source = resolve(MODEL)
    source.load(dtype=torch.float32, device="cpu", seed=0).save_pretrained(folder)
    tokenizer = source.tokenizer()
    tokenizer.save_pretrained(folder)
    read(headinfer, book, model=folder)
    answer = ask(headinfer, "When?")[0]["token_ids"]
    assert answer == generate(headinfer, book, "When?")["token_ids"]
    moved = tmp_path / "moved"
    folder.rename(moved)
    code, _, err = headinfer("ask", "--session", "mybook", "When?")
    assert (code, "there is no model" in err) == (2, True)
    assert ask(headinfer, "When?", more=["--model", moved])[0]["token_ids"] == answer
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(moved)
    for arguments in (["ask", "When?", "--model", moved], ["read", moved, "--file", book]):
        code, _, err = headinfer(*arguments, "--session", "mybook")
        assert code == 2
        assert "another tokenizer" in err


def saved_model(folder, **changes):
    source = resolve(MODEL)
    source.load(dtype=torch.float32, device="cpu", seed=0).save_pretrained(folder)
    source.tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def test_a_relative_model_folder_is_found_from_anywhere(headinfer, book, tmp_path, monkeypatch):
    saved_model(tmp_path / "models" / "tiny")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    read(headinfer, book, model="models/tiny")
    answer = ask(headinfer, "When?")[0]["token_ids"]
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert ask(headinfer, "When?")[0]["token_ids"] == answer
    folder = tmp_path / "sessions" / "mybook"
    manifest = Manifest.read(folder)
    dataclasses.replace(manifest, about=manifest.about | {"model": "models/tiny"}).write(folder)  # an earlier version
    for name in ("models/tiny", str(tmp_path / "models" / "gone")):
        manifest = Manifest.read(folder)
        dataclasses.replace(manifest, about=manifest.about | {"model": name}).write(folder)
        code, out, err = headinfer("ask", "--session", "mybook", "When?")
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert f"was read with the model {name}, and there is no model" in err
        assert "--model" in err
    assert ask(headinfer, "When?", more=["--model", tmp_path / "models" / "tiny"])[0]["token_ids"] == answer


CODE = {"AutoConfig": "configuration_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}


@pytest.mark.parametrize("command", ["generate", "read"])
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "own", "auto_map": CODE}, "headinfer does not run such code"),
        ({"model_type": "own"}, "model type `own`"),
    ],
)
def test_a_model_with_code_of_its_own_is_refused_in_one_sentence(headinfer, book, tmp_path, command, changes, says):
    folder = saved_model(tmp_path / "model", **changes)
    more = ["--session", "mybook"] if command == "read" else []
    code, out, err = headinfer(command, folder, "--file", book, *more)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert says in err


def test_a_tokenizer_with_code_of_its_own_is_refused_in_one_sentence(headinfer, book, tmp_path):
    folder = saved_model(tmp_path / "model")
    path = folder / "tokenizer_config.json"
    facts = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))
    code, out, err = headinfer("generate", folder, "--file", book)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "headinfer does not run such code" in err


def test_a_date_in_the_chat_template_is_kept_with_the_session(headinfer, book, tmp_path, monkeypatch):
    """An interrupted reading goes on another day, and is asked on a third day."""
    folder = saved_model(tmp_path / "model")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "Today is {{ strftime_now('%d %B') }}.{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    )
    tokenizer.save_pretrained(folder)
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Day("1 May"))
    expected = generate(headinfer, book, "When?", model=folder)
    text = book.read_text()
    book.write_text(text[:700], encoding="utf-8")
    read(headinfer, book, model=folder)
    book.write_text(text, encoding="utf-8")
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Day("22 September"))
    assert generate(headinfer, book, "When?", model=folder)["tokens_in"] > expected["tokens_in"]
    resumed = read(headinfer, book, model=folder)[0]
    assert resumed["resumed_at"] > 700
    answer = ask(headinfer, "When?")[0]
    assert resumed["tokens"] + answer["tokens_in"] == expected["tokens_in"]
    assert answer["token_ids"] == expected["token_ids"]


class Day:
    """In place of the class datetime: now() is a day that the test chooses."""

    def __init__(self, text):
        self.text = text

    def now(self):
        return self

    def strftime(self, _):
        return self.text


def test_stop_strings_of_the_generation_config_end_an_answer(headinfer, book, tmp_path):
    folder = saved_model(tmp_path / "model")
    read(headinfer, book, model=folder)
    whole = generate(headinfer, book, "When?", model=folder)["token_ids"]
    stop = next(token for token in whole[2:] if token < 94)  # of one byte, so that it is a text
    stop_at = whole.index(stop) + 1
    path = folder / "generation_config.json"
    path.write_text(json.dumps({"stop_strings": [byte_tokenizer().decode([stop])]}))
    assert generate(headinfer, book, "When?", model=folder)["token_ids"] == whole[:stop_at]
    assert ask(headinfer, "When?")[0]["token_ids"] == whole[:stop_at]
    kept = ask(headinfer, "When?", "Where?", more=["--keep"])
    assert kept[0]["token_ids"] == whole[:stop_at]


def test_the_commands_decode_one_text_whatever_the_generation_config_says(headinfer, book, tmp_path):
    folder = saved_model(tmp_path / "model")
    read(headinfer, book, model=folder)
    expected = generate(headinfer, book, "When?", model=folder)["token_ids"]
    ways = [
        {"num_beams": 3},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"dola_layers": "low"},
        {"prompt_lookup_num_tokens": 3},
        {"cache_implementation": "static"},
        {"assistant_early_exit": 1},
    ]
    for way in ways:
        (folder / "generation_config.json").write_text(json.dumps(way))
        assert generate(headinfer, book, "When?", model=folder)["token_ids"] == expected, way
        assert ask(headinfer, "When?")[0]["token_ids"] == expected, way


def test_a_document_longer_than_the_models_context_is_read_with_a_warning(headinfer, book):
    model = MODEL + "&context=1000"
    code, _, err = headinfer("read", model, "--file", book, "--session", "mybook", "--chunk-tokens", CHUNK)
    assert code == 0
    assert "tokens exceed the 1,000 that this model was made for" in err
    code, _, err = headinfer("ask", "--session", "mybook", "--max-new-tokens", 2, "When?")
    assert code == 0
    assert "tokens exceed the 1,000 that this model was made for" in err


def test_other_weights_are_an_error_after_loading(headinfer, book):
    read(headinfer, book)
    code, _, err = headinfer("read", MODEL, "--file", book, "--session", "mybook", "--seed", 3)
    assert code == 0  # the document has been read already
    book.write_text(book.read_text() + "more", encoding="utf-8")
    code, _, err = headinfer("read", MODEL, "--file", book, "--session", "mybook", "--seed", 3)
    assert code == 2
    assert "other weights" in err


def test_slow_reading_is_announced(headinfer, book, monkeypatch):
    from headinfer.engine import run_plan
    from headinfer.jobs import ask as asking

    read(headinfer, book)
    machine = asking.this_machine

    def slow(device):
        import dataclasses

        return dataclasses.replace(machine(device), disk_read_bytes_per_s=1e5)

    monkeypatch.setattr(asking, "this_machine", slow)
    monkeypatch.setattr(run_plan, "available_host_bytes", lambda: 700_000)
    code, _, err = headinfer("ask", "--session", "mybook", "--max-new-tokens", 2, "When?")
    assert code == 0
    assert "the first token waits for" in err
    assert "each token reads" in err
    assert "a token" in err


def test_a_reader_retries_if_a_writer_replaces_the_session(headinfer, book, tmp_path, monkeypatch):
    """Another process replaces the manifest and its files after the reader has read the manifest."""
    from headinfer.kv.tensor_file import TensorFile

    read(headinfer, book)
    folder = tmp_path / "sessions" / "mybook"
    newer = tmp_path / "newer"
    shutil.copytree(folder, newer)
    book.write_text(book.read_text() + "The end is new.\n", encoding="utf-8")
    read(headinfer, book)
    # `folder` now contains the newer session. Restore the older one, and replace it when its last file is opened.
    older = newer
    folder_now = tmp_path / "now"
    folder.rename(folder_now)
    older.rename(folder)
    opened = TensorFile.__init__

    def meanwhile(self, where, entry):
        if entry.name.startswith("end-") and (folder_now).exists():
            shutil.rmtree(folder)
            folder_now.rename(folder)
        opened(self, where, entry)

    monkeypatch.setattr(TensorFile, "__init__", meanwhile)
    from headinfer.sessions.folder import read_consistently
    from headinfer.sessions.loader import saved_ids

    assert read_consistently(folder, lambda found: saved_ids(folder, found)).shape[1] == len(book.read_bytes())
    next(folder.glob("end-*")).unlink()
    with pytest.raises(SessionError, match="cannot open"):
        read_consistently(folder, lambda found: saved_ids(folder, found))
