"""The embedded model: its files, its accuracy, and the demo."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch

import headinfer.embedded
from headinfer import embedded
from headinfer.embedded import embedded_model, embedded_text
from headinfer.errors import UsageError
from headinfer.evals.demo import Demo, DemoResult, largest_demo
from headinfer.evals.needles import random_words
from headinfer.evals.niah import niah_document
from headinfer.evals.reader import HEAD_WISE, Answer, Reader
from headinfer.hf.models import resolve
from headinfer.plan.models import find_shape

FOLDER = Path(headinfer.embedded.__file__).parent


@pytest.fixture(scope="module")
def reader():
    source = resolve("embedded")
    return Reader(source.load(dtype=torch.float32, device="cpu", seed=0), source.tokenizer())


def test_files_and_tokenizer():
    config = resolve("embedded").config
    assert config.num_key_value_heads == 8
    assert config.num_attention_heads == 16
    assert (FOLDER / "model.safetensors").stat().st_size <= 6_000_000
    assert {path.name for path in FOLDER.glob("*.md")} == {"MODEL_CARD.md", "TEXT.md"}
    assert len(embedded_text()) > 500_000
    assert find_shape("embedded").kv_bytes_per_token(4) == 2 * 2 * 8 * 16 * 4, (
        "only two layers have KV that grows with the context"
    )
    tokenizer = resolve("embedded").tokenizer()
    assert tokenizer.tokenize(" 4711") == ["Ġ", "4", "7", "1", "1"]
    assert tokenizer.decode(tokenizer("Any text — even “this”.").input_ids) == "Any text — even “this”."
    words = random_words(500, random.Random(0), held_out=True)
    assert sum(len(tokenizer.tokenize(f" {word}")) == 3 for word in words) >= 495


@pytest.mark.parametrize(("tokens", "texts", "floor"), [(1024, 8, 0.98), (4096, 5, 0.97)])
def test_model_finds_held_out_needles(reader, tokens, texts, floor):
    depths = [0, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 1]
    scores = []
    for sample in range(texts):
        document = niah_document(tokens, depths, sample, embedded_text(), reader.count, seed=7)
        answers = reader.read(document, HEAD_WISE).answers
        pairs = zip(document.questions, answers, strict=True)
        scores += [question.score(answer.text, question.references) for question, answer in pairs]
    assert sum(scores) / len(scores) >= floor


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "text.txt.xz", "SHA256.json"])
def test_errors_name_missing_and_changed_files(tmp_path, monkeypatch, name):
    folder = tmp_path / "embedded"
    shutil.copytree(FOLDER, folder)
    monkeypatch.setattr(embedded, "_FOLDER", folder)
    embedded_model()
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(UsageError, match="install headinfer again"):
        embedded_model()
    (folder / name).unlink()
    with pytest.raises(UsageError, match=rf"is not complete .*{name}.*: install headinfer again"):
        embedded_text()


def test_demo_end_to_end(run_command):
    code, out, err = run_command("demo", "--context", "4K")
    assert code == 0, err
    assert out.count("What is the magic number for") == 4
    assert "tokens are identical; all answers are right" in out
    assert "reading, head-wise cache" in err
    result = json.loads(run_command("demo", "--context", "1K", "--json", "--questions", "2")[1])
    assert result["identical"] and result["right"]  # noqa: PT018
    standard, head_wise = result["runs"]
    assert standard["token_ids"] == head_wise["token_ids"]
    assert len(standard["answers"]) == 2
    assert head_wise["host_kv_bytes"] > 0
    assert standard["device_kv_bytes"] > result["tokens_in"] * 2048


def test_demo_fails_if_an_answer_is_wrong_or_tokens_differ(run_command, monkeypatch):
    for name, message in (("right", "AN ANSWER IS WRONG"), ("identical", "THE TOKENS DIFFER")):
        with monkeypatch.context() as patch:
            patch.setattr(DemoResult, name, False)
            code, out, _ = run_command("demo", "--context", "1K", "--questions", "1")
        assert code == 1
        assert message in out
    code, _, err = run_command("demo", "--context", "40")
    assert code == 2
    assert "40 tokens cannot hold 4 needles" in err


def test_result_detects_wrong_and_different_answers():
    demo = Demo("cpu")
    document = demo.document(700, 2, seed=0)
    good = demo.read(document, HEAD_WISE)
    other = demo.read(document, HEAD_WISE)
    assert DemoResult(document, good, other).identical
    other.answers[1] = Answer("no number", [1, 2, 3], 0.0)
    assert not DemoResult(document, good, other).identical
    assert not DemoResult(document, other, good).right


def test_demo_size_depends_on_the_speed_of_the_machine(monkeypatch):
    demo = Demo("cpu")
    seconds = iter([0.0, 1.0, 0.0, 100.0])
    monkeypatch.setattr("headinfer.evals.demo.time.perf_counter", lambda: next(seconds))
    monkeypatch.setattr(Demo, "read", lambda *_: None)
    fast = largest_demo(demo, 75.0)
    assert demo.shape.prefill_flops(fast) <= 75 * demo.shape.prefill_flops(8192) < demo.shape.prefill_flops(2 * fast)
    assert largest_demo(demo, 75.0) == 16_384, "the smallest demo on a slow machine"
