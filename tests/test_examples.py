"""Each script of examples/ answers as transformers alone does, on the model that ships and with its defaults."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from own_process import HANG_S
from transformers import AutoModelForCausalLM, AutoTokenizer

EXAMPLES = Path(__file__).parents[1] / "examples"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.fixture
def run(monkeypatch, capsys):
    """A function from the name of an example and its arguments to the lines that it prints on a CPU."""

    def lines(name, *arguments):
        path = EXAMPLES / f"{name}.py"
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        runpy.run_path(str(path), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return lines


def run_ranks(name):
    """The lines that an example prints with two processes of torchrun on a CPU, without a network."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *TORCHRUN, str(EXAMPLES / f"{name}.py")],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=HANG_S,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def plain_answers():
    """A function from the name of an example to the answers of transformers' own cache to its questions."""

    def answers(name):
        example = runpy.run_path(str(EXAMPLES / f"{name}.py"))
        tokenizer = AutoTokenizer.from_pretrained(example["MODEL"])
        model = AutoModelForCausalLM.from_pretrained(example["MODEL"], dtype="auto")
        texts = []
        for question in example.get("QUESTIONS") or [example["QUESTION"]]:
            inputs = tokenizer(f"{example['DOCUMENT']}\n{question}", return_tensors="pt")
            with torch.inference_mode():
                output = model.generate(**inputs, max_new_tokens=32, do_sample=False)
            texts.append(tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True).strip())
        return texts

    return answers


def test_every_example_is_tested():
    tested = {"enable", "questions", "sessions", "disk_tier", "tensor_parallel"}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == tested


def test_enable(run, plain_answers):
    answer, facts = run("enable")
    assert [answer.strip()] == plain_answers("enable") == ["The magic number for bazuko is 40817."]
    tokens, host, device = map(int, re.findall(r"\d+", facts))
    assert host > tokens * 1024, "1 KiB a token in bfloat16"
    assert 0 < device < host


def test_questions(run, plain_answers):
    answers = run("questions")
    assert answers == plain_answers("questions")
    assert [answer[-6:] for answer in answers] == ["40817.", "93265.", "57140."]


def test_sessions(run, plain_answers, tmp_path):
    reading, answer = run("sessions", "--session", tmp_path / "book")
    assert "Reading the document" in reading
    assert [answer] == plain_answers("sessions") == ["The magic number for bazuko is 40817."]
    assert run("sessions", "--session", tmp_path / "book") == [answer], "the document is not read again"


def test_disk_tier(run, plain_answers, tmp_path):
    answer, facts = run("disk_tier", "--disk-tier", tmp_path, "--host-kv-mib", 4)
    assert [answer.strip()] == plain_answers("disk_tier") == ["The magic number for bazuko is 40817."]
    host, disk = map(int, re.findall(r"\d+", facts))
    assert 0 < host <= 4 * 2**20
    assert disk > 2**20


def test_tensor_parallel(plain_answers):
    answer, facts = run_ranks("tensor_parallel")
    assert [answer.strip()] == plain_answers("tensor_parallel") == ["The magic number for bazuko is 40817."]
    first, second = map(int, re.findall(r"\d+", facts))
    assert first == second > 0
