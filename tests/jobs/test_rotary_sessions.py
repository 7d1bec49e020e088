"""Sessions of models whose rotary frequencies depend on the length. The oracle is transformers on the whole prompt."""

import json

import pytest
import torch
import transformers
from packaging.version import Version
from rotary_models import tiny
from transformers import AutoModelForCausalLM

from headinfer.hf.models import byte_tokenizer
from headinfer.jobs.prompts import later_question_ids, prompt_ids
from headinfer.sessions.loader import saved_ids
from headinfer.sessions.manifest import Manifest
from headinfer.sessions.ownership import write_manifest

WORDS = "It was a bright cold day in April, and the clocks were striking thirteen. "
QUESTION = "Where was it, and at what time of the day?"
NAMES = {"longrope": "phi3", "dynamic": "llama, dynamic"}


pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.20"), reason="transformers reads only the newest token again"
)


@pytest.fixture
def command(run_command, monkeypatch, tmp_path):
    """Run a command in this process, with the sessions in a temporary folder."""
    monkeypatch.setenv("HEADINFER_SESSIONS", str(tmp_path / "sessions"))
    return run_command


@pytest.fixture(params=NAMES)
def kind(request):
    return request.param


@pytest.fixture
def folder(kind, tmp_path):
    """A folder with a tiny model of a kind."""
    path = tmp_path / "model"
    tiny(NAMES[kind], vocab_size=len(byte_tokenizer())).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def document(tmp_path, characters):
    path = tmp_path / f"{characters}.txt"
    path.write_text((WORDS * 20)[:characters], encoding="utf-8")
    return path


def expected(folder, ids, new_tokens=8):
    """Return the answer of transformers to the whole prompt."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    prompt = torch.tensor([ids])
    mask = torch.ones_like(prompt)
    answer = model.generate(prompt, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False)
    return answer[0, len(ids) :].tolist()


def ids_of(path, question=QUESTION):
    return prompt_ids(byte_tokenizer(), path.read_text(encoding="utf-8"), question, is_raw=False)


def session_ids(tmp_path, name="book"):
    folder = tmp_path / "sessions" / name
    return saved_ids(folder, Manifest.read(folder))[0].tolist()


def read(command, folder, path, name="book", chunk=64):
    return command("read", folder, "--file", path, "--session", name, "--chunk-tokens", chunk)


def ask(command, *more, name="book", new_tokens=8, question=QUESTION):
    arguments = ("--session", name, "--max-new-tokens", new_tokens, "--json", *more)
    code, out, err = command("ask", *arguments, "--", question)
    assert code == 0, err
    return json.loads(out)["answers"][0]["token_ids"], err


def generate(command, folder, path, new_tokens=8):
    more = ("--file", path, "--prompt", QUESTION, "--max-new-tokens", new_tokens, "--chunk-tokens", 64, "--json")
    code, out, err = command("generate", folder, *more)
    assert code == 0, err
    return json.loads(out)["token_ids"], err


@pytest.mark.parametrize("kind", ["longrope"], indirect=True)
@pytest.mark.parametrize("characters", [500, 150])
def test_a_document_on_either_side_of_the_original_length(command, folder, tmp_path, characters):
    path = document(tmp_path, characters)
    code, _, err = read(command, folder, path)
    assert code == 0, err
    found, err = ask(command)
    assert "again" not in err
    assert found == expected(folder, ids_of(path))
    assert generate(command, folder, path)[0] == found


def test_a_question_that_crosses_the_original_length(command, folder, tmp_path):
    path = document(tmp_path, 230)
    assert read(command, folder, path)[0] == 0
    found, err = ask(command)
    assert "the 230 tokens are read again for each answer" in err
    assert found == expected(folder, ids_of(path))
    assert generate(command, folder, path)[0] == found
    assert ask(command)[0] == found  # the session did not change


def test_an_answer_that_crosses_the_original_length(command, folder, kind, tmp_path):
    path = document(tmp_path, 205)
    assert read(command, folder, path)[0] == 0
    found, err = ask(command, new_tokens=20)
    assert found == expected(folder, ids_of(path), 20)
    line = "change beyond 256 tokens of context: if the answer gets there, all tokens are read again"
    assert (line in err) == (kind == "longrope")
    again, err = generate(command, folder, path, 20)
    assert again == found
    assert (line in err) == (kind == "longrope")


@pytest.mark.parametrize("characters", [205, 230])
def test_kept_answers_across_the_original_length(command, folder, tmp_path, characters):
    path = document(tmp_path, characters)
    assert read(command, folder, path)[0] == 0
    first, _ = ask(command, "--keep", new_tokens=20)
    assert first == expected(folder, ids_of(path), 20)
    kept = session_ids(tmp_path)
    assert kept[: characters + 40] == (ids_of(path) + first)[: characters + 40]
    later = "And in which month?"
    second, _ = ask(command, question=later)
    assert second == expected(folder, kept + later_question_ids(byte_tokenizer(), later, is_raw=False))
    assert command("session", "verify", "book")[0] == 0
    code, _, err = command("session", "undo", "book")
    assert code == 0, err
    assert ask(command, new_tokens=20)[0] == first


@pytest.mark.parametrize("kind", ["longrope"], indirect=True)
def test_a_document_that_grew_beyond_the_original_length(command, folder, tmp_path):
    assert read(command, folder, document(tmp_path, 200))[0] == 0
    code, _, err = read(command, folder, document(tmp_path, 400))
    assert code == 2
    assert "with the rotary frequencies of a shorter context than the document's 400 tokens: choose another name" in err
    code, _, err = read(command, folder, document(tmp_path, 400), name="longer")
    assert code == 0
    assert "of the session book" not in err  # its keys are others
    assert ask(command, name="longer")[0] == expected(folder, ids_of(document(tmp_path, 400)))


@pytest.mark.parametrize("kind", ["longrope"], indirect=True)
def test_a_long_session_without_a_note_is_refused(command, folder, tmp_path):
    path = document(tmp_path, 400)
    assert read(command, folder, path)[0] == 0
    session = tmp_path / "sessions" / "book"
    manifest = Manifest.read(session)
    for fields in manifest.layers:
        fields.pop("rotary_tokens", None)  # as an earlier version wrote it
    write_manifest(session, manifest)
    for arguments in (("ask", "--session", "book", "Where?"), ("read", folder, "--file", path, "--session", "book")):
        code, _, err = command(*arguments)
        assert code == 2
        assert "was read by an earlier version of headinfer" in err


@pytest.mark.parametrize("kind", ["dynamic"], indirect=True)
def test_long_documents_with_dynamic_ntk_are_refused(command, folder, tmp_path):
    path = document(tmp_path, 400)
    code, _, err = read(command, folder, path)
    assert code == 2
    assert "change with each token beyond 256" in err
    assert not (tmp_path / "sessions" / "book").exists()
    assert generate(command, folder, path)[0] == expected(folder, ids_of(path))
