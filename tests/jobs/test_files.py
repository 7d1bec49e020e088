"""Documents of several files and folders: how they are laid out, and that reading again reads only what is new."""

import dataclasses
import hashlib
import io
import json
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from headinfer import enable
from headinfer.hf.models import byte_tokenizer, resolve
from headinfer.jobs import prompts
from headinfer.jobs.convert import Text
from headinfer.jobs.documents import Document, Piece, SourceFile, as_document, read_documents
from headinfer.sessions.manifest import Manifest

MODEL = "random:tiny-llama?layers=2&hidden=64&intermediate=64&heads=4&kv_heads=2"
WINDOWED = "random:gemma-3-4b?layers=6&hidden=64&intermediate=64&heads=4&kv_heads=2&head_dim=16&sliding_window=64"
LINE = "It was a bright cold day in April.\n"


@pytest.fixture
def headinfer(run_command, monkeypatch, tmp_path):
    """The fixture `run_command`, with a folder of sessions of its own."""
    monkeypatch.setenv("HEADINFER_SESSIONS", str(tmp_path / "sessions"))
    return run_command


@pytest.fixture
def code(tmp_path):
    """A folder with a small code base."""
    folder = tmp_path / "code"
    contents = {
        "b.py": "b = 1\n",
        "a/z.py": "z = 2\n",
        "a/caf\u00e9.py": "c = 3\n",
        "a.txt": LINE,
        "README.md": "Read me.\n",
        "empty.py": "",
        ".env": "secret",
        ".git/config": "secret",
        "__pycache__/b.pyc": b"\0\1\2\3",
        "image.png": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
    }
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    (folder / "loop").symlink_to(folder)
    (folder / "gone.py").symlink_to(folder / "nothing")
    return folder


def text_of(document):
    return "".join(document.texts)


def names_of(document):
    return [file.name for file in document.files]


# -- files and folders -------------------------------------------------------------------------------------------------


def test_a_single_file_has_no_heading(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes(b"One.\r\nTwo.\n")
    document = read_documents([path])
    assert text_of(document) == "One.\nTwo.\n"
    assert document.notes == ()
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert document.facts()["files"] == [{"name": "book.txt", "bytes": 11, "sha256": sha256, "read_as": "UTF-8"}]


def test_a_folder_is_read_in_the_order_of_its_paths(code):
    document = read_documents([code])
    assert names_of(document) == ["README.md", "a/café.py", "a/z.py", "a.txt", "b.py"]
    assert text_of(document) == (
        "# README.md\n\nRead me.\n\n\n# a/café.py\n\nc = 3\n\n\n# a/z.py\n\nz = 2\n\n\n"
        f"# a.txt\n\n{LINE}\n\n# b.py\n\nb = 1\n"
    )
    (note,) = document.notes
    for part in (
        "2 hidden (",
        "1 made by programs (__pycache__)",
        "1 behind a link (loop)",
        "1 not found (gone.py)",
        "1 binary (image.png)",
        "1 empty (empty.py)",
    ):
        assert part in note
    assert read_documents([code]) == document


@pytest.mark.parametrize(
    ("globs", "names"),
    [
        (["*.py"], ["a/café.py", "a/z.py", "b.py"]),
        (["*.py", "*.md"], ["README.md", "a/café.py", "a/z.py", "b.py"]),
        (["a/*.py"], ["a/café.py", "a/z.py"]),
        (["./a/*"], ["a/café.py", "a/z.py"]),
        (["**/*.py"], ["a/café.py", "a/z.py", "b.py"]),
        (["a/**/z.py"], ["a/z.py"]),
    ],
)
def test_a_pattern_chooses_among_the_files_of_a_folder(code, globs, names):
    assert names_of(read_documents([code], globs)) == names


def test_several_files_have_headings_and_short_names(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b.py").write_text("other\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"from a pipe\n")))
    paths = [code / "b.py", tmp_path / "code" / "a.txt", "-", code / "a" / ".." / "b.py"]
    document = read_documents([*map(type(code), paths)])
    assert names_of(document) == ["b.py", "a.txt", "standard input"]
    assert text_of(document).startswith("# b.py\n\nb = 1\n\n\n# a.txt\n\n")
    twice = read_documents([type(code)("b.py"), type(code)("code"), type(code)("code/b.py")], ["*.py"])
    assert names_of(twice) == ["b.py", "a/café.py", "a/z.py", "code/b.py"]


@pytest.mark.parametrize(
    ("files", "globs", "says"),
    [
        (["code"], ["*.rs"], "cannot read code: this folder has no file that matches '*.rs'"),
        (["code"], ["*.png"], "cannot read code: no file has text (left out: "),
        (["code/b.py"], ["*.py"], "--glob chooses among the files of a folder"),
        (["code/image.png"], [], "cannot read code/image.png: it is not UTF-8 text"),
        (["code/none.txt"], [], "cannot read code/none.txt: No such file"),
        (["-", "-"], [], "standard input is given twice"),
        (["code/scan.pdf"], [], "cannot read code/scan.pdf: it is PDF that is damaged"),
    ],
)
def test_mistakes_get_one_sentence(headinfer, code, tmp_path, monkeypatch, files, globs, says):
    monkeypatch.chdir(tmp_path)
    (code / "scan.pdf").write_bytes(b"%PDF-1.4\n")
    options = [f"--file={name}" for name in files] + [f"--glob={pattern}" for pattern in globs]
    for command in (["generate", MODEL], ["read", MODEL, "--session", "s"]):
        exit_code, out, err = headinfer(*command, *options)
        assert (exit_code, out, err.count("\n")) == (2, "", 1)
        assert says in err


def test_many_files_with_pages_without_text_get_few_lines(code, monkeypatch):
    text = Text("x", "PDF by a library", notes=["1 of 2 pages hold no text"])
    monkeypatch.setattr("headinfer.jobs.documents.to_text", lambda data, name: text)
    notes = read_documents([str(code)]).notes
    assert notes[0] == "README.md: 1 of 2 pages hold no text"
    assert notes[3] == "3 more files have pages without text"
    assert len(notes) == 5


def test_a_file_without_text_in_a_folder_is_left_out(code):
    (code / "scan.pdf").write_bytes(b"%PDF-1.4\n")
    assert "1 without text (scan.pdf)" in read_documents([code]).notes[0]


# -- a document goes on from an earlier one ----------------------------------------------------------------------------


def document_of(**texts):
    files = tuple(SourceFile(name, len(text), str(hash(text)), "UTF-8", text) for name, text in texts.items())
    pieces = tuple(
        Piece(index, f"# {file.name}\n\n" if not index else f"\n\n# {file.name}\n\n", 0, len(file.text))
        for index, file in enumerate(files)
    )
    return Document(files, pieces)


def test_grown_and_added_files_follow_at_the_end():
    kept = document_of(a="a\n", b="b\n", d="d").facts()
    grown, reason = document_of(a="a\nA\n", b="b\n", c="c\n", d="dD").continuing(kept)
    assert reason == ""
    assert text_of(grown) == "# a\n\na\n\n\n# b\n\nb\n\n\n# d\n\ndD\n\n# a (continued)\n\nA\n\n\n# c\n\nc\n"
    assert text_of(document_of(a="a\n", b="b\n", d="d")) + "D" == text_of(grown)[: text_of(grown).index("\n\n# a (c")]
    again, _ = document_of(a="a\nA\nB\n", b="b\n", c="c\n", d="dD").continuing(json.loads(json.dumps(grown.facts())))
    assert text_of(again) == text_of(grown) + "\n\n# a (continued)\n\nB\n"
    same, _ = document_of(a="a\nA\nB\n", b="b\n", c="c\n", d="dD").continuing(again.facts())
    assert same == again


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        ({"a": "x\n", "b": "b\n"}, "a has changed"),
        ({"a": "a", "b": "b\n"}, "a has changed"),
        ({"b": "b\n"}, "a is no longer given"),
        ({"a": "a\n", "c": "c\n"}, "b is no longer given"),
    ],
)
def test_what_has_changed_is_named(texts, reason):
    document = document_of(**texts)
    assert document.continuing(document_of(a="a\n", b="b\n").facts()) == (document, reason)


def test_a_file_that_grew_within_a_line_has_changed_unless_it_is_the_last():
    kept = document_of(a="a", b="b").facts()
    assert document_of(a="aa", b="b").continuing(kept)[1] == "a has changed"
    assert document_of(a="a\na", b="b").continuing(kept)[1] == ""
    assert document_of(a="a", b="bb").continuing(kept)[1] == ""


def test_a_renamed_file_is_recognized_and_another_conversion_is_named():
    kept = document_of(a="a\n", b="b\n").facts()
    moved, reason = document_of(b="b\n", c="a\n+").continuing(kept)
    assert (names_of(moved), reason) == (["c", "b"], "")
    other = document_of(a="a\n", b="x\n")
    file = dataclasses.replace(other.files[1], sha256=kept["files"][1]["sha256"], read_as="latin-1")
    other = dataclasses.replace(other, files=(other.files[0], file))
    assert other.continuing(kept)[1] == "b was read as UTF-8, and is now read as latin-1"


def test_a_text_is_a_document():
    document = as_document("text")
    assert document.texts == ["text"]
    grown, _ = as_document("text and more").continuing(document.facts())
    assert grown.texts == ["text", " and more"]


def merging_tokenizer():
    """A tokenizer whose tokens reach over the ends of files: newlines, words and headings merge."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["a\n\n# b\n\nb\nb a\n\n\n# a (continued)\n\nab\n"] * 50, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


MERGING = merging_tokenizer()
TEXTS = st.text("ab \n", max_size=8)


@settings(deadline=None, max_examples=50, derandomize=True)
@given(st.dictionaries(st.sampled_from("abcd"), st.tuples(TEXTS, TEXTS), min_size=2), st.sampled_from([None, "chat"]))
def test_the_tokens_of_what_was_read_stay_the_same(texts, template):
    """For any tokenizer: whatever is appended or added, the tokens before it are a prefix, and no text is lost."""
    chat = prompts.ChatTexts("<|user|>", "<|end|>", is_stripped=False) if template else None
    names = sorted(texts)
    before = document_of(**{name: texts[name][0] + "\n" for name in names[1:]})
    after = document_of(**{name: texts[name][0] + "\n" + texts[name][1] for name in names})
    grown, reason = after.continuing(before.facts())
    assert reason == ""
    held = prompts.document_ids(MERGING, before.texts, chat)
    ids = prompts.document_ids(MERGING, grown.texts, chat)
    assert ids[: len(held)] == held
    assert MERGING.decode(ids) == ("<|user|>" if chat else "") + text_of(grown)
    for name in names:
        found = [piece for piece in grown.pieces if grown.files[piece.file].name == name]
        characters = "".join(grown.files[piece.file].text[piece.start : piece.stop] for piece in found)
        assert characters == texts[name][0] + "\n" + texts[name][1]


# -- commands ----------------------------------------------------------------------------------------------------------


def run_json(headinfer, *arguments):
    exit_code, out, err = headinfer(*arguments, "--json")
    assert exit_code == 0, err
    return json.loads(out), err


def test_read_again_reads_only_what_is_new(headinfer, code, tmp_path):
    arguments = ("read", MODEL, "--file", code, "--session", "s", "--chunk-tokens", 64)
    first, err = run_json(headinfer, *arguments)
    assert "left out: " in err
    assert first["tokens"] == len(text_of(read_documents([code])).encode())
    again, err = run_json(headinfer, *arguments)
    assert again["resumed_at"] == first["tokens"]
    assert f"{first['tokens']:,} tokens are stored already (of this session): nothing is new" in err
    (code / "README.md").write_text("Read me.\nAnd on.\n")  # the first one
    (code / "b.py").write_text("b = 1\nb = 2\n")  # the last one
    (code / "B.py").write_text("B = 1\n")
    third, err = run_json(headinfer, *arguments)
    text = text_of(read_documents([code]).continuing(Manifest.read(tmp_path / "sessions" / "s").about)[0])
    assert text.endswith("b = 1\nb = 2\n\n\n# README.md (continued)\n\nAnd on.\n\n\n# B.py\n\nB = 1\n")
    assert third["resumed_at"] == first["tokens"]
    assert third["tokens"] == len(text.encode())
    new = third["tokens"] - first["tokens"]
    assert f"resuming after them, {new} are new, from b.py, README.md, B.py" in err
    answer = run_json(headinfer, "ask", "--session", "s", "--max-new-tokens", 8, "What?")[0]["answers"][0]
    model = resolve(MODEL).load(dtype=torch.float32, device="cpu", seed=0)
    ids = torch.tensor([byte_tokenizer()(text + "\n\nWhat?").input_ids])
    with enable(model):
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    assert answer["token_ids"] == expected[0, ids.shape[1] :].tolist()
    assert run_json(headinfer, *arguments)[0]["resumed_at"] == third["tokens"]

    (code / "a.txt").write_text("Changed.\n")
    exit_code, _, err = headinfer(*arguments)
    assert exit_code == 2
    assert "holds another text (a.txt has changed; it differs after " in err
    fresh = run_json(headinfer, "read", MODEL, "--file", code, "--session", "fresh", "--chunk-tokens", 64)[0]
    assert fresh["tokens"] == len(text_of(read_documents([code])).encode())


def test_an_interrupted_reading_goes_on_with_files_that_have_changed(headinfer, code, tmp_path, monkeypatch):
    """What was not read yet may change, and what was read keeps its place."""
    (code / "README.md").write_text(LINE * 10)
    arguments = ("read", MODEL, "--file", code, "--session", "s", "--chunk-tokens", 128)
    with monkeypatch.context() as patched:
        chunks = []

        def on_forward(progress, cache):
            chunks.append(cache)
            if len(chunks) == 2:
                raise KeyboardInterrupt

        patched.setattr("headinfer.cli.report.GenerationProgress.on_forward", on_forward)
        assert headinfer(*arguments)[0] == 130
    (code / "a.txt").write_text("Changed.\n")
    (code / "A.md").write_text("New, and first.\n")
    exit_code, _, err = headinfer(*arguments)
    assert exit_code == 2
    assert "a.txt has changed" in err
    (code / "A.md").unlink()
    resumed, err = run_json(headinfer, *arguments)
    assert resumed["resumed_at"] == 256
    assert resumed["tokens"] == len(text_of(read_documents([code])).encode())
    assert "are new, from README.md, a/café.py, a/z.py and 2 more" in err


@pytest.mark.parametrize("model", [MODEL, WINDOWED], ids=["full attention", "windows"])
def test_a_session_of_one_file_goes_on_with_a_second_one(headinfer, tmp_path, model):
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_text(LINE * 3)
    two.write_text("Two.\n")
    first = run_json(headinfer, "read", model, "--file", one, "--session", "s")[0]
    both, err = run_json(headinfer, "read", model, "--file", two, "--file", one, "--session", "s")
    assert both["resumed_at"] == first["tokens"] == len(LINE) * 3
    assert both["tokens"] - first["tokens"] == len("\n\n# two.txt\n\nTwo.\n")
    assert "are new, from two.txt" in err


def test_a_session_says_what_it_is_made_of(headinfer, code, tmp_path):
    run_json(headinfer, "read", MODEL, "--file", code, "--glob", "*.py", "--session", "s")
    facts = run_json(headinfer, "session", "info", "s")[0]
    assert facts["files"] == read_documents([code], ["*.py"]).facts()["files"]
    shown = headinfer("session", "info", "s")[1]
    assert "a/z.py" in shown
    assert facts["files"][0]["sha256"][:16] in shown
    folder = tmp_path / "sessions" / "s"
    manifest = Manifest.read(folder)
    for name in ("files", "pieces"):
        del manifest.about[name]  # as an earlier version wrote it
    manifest.write(folder)
    assert run_json(headinfer, "session", "info", "s")[0]["files"] is None
    assert "SHA-256" not in headinfer("session", "info", "s")[1]
    again = run_json(headinfer, "read", MODEL, "--file", code, "--glob", "*.py", "--session", "s")[0]
    assert again["resumed_at"] == again["tokens"]
    (code / "b.py").write_text("b = 1\nb = 2\n")
    assert run_json(headinfer, "read", MODEL, "--file", code, "--glob", "*.py", "--session", "s")[0]["resumed_at"] > 0
    assert len(run_json(headinfer, "session", "info", "s")[0]["files"]) == 3


def test_generate_and_ask_have_the_same_document(headinfer, code):
    files = ("--file", code / "b.py", "--file", code / "a")
    run_json(headinfer, "read", MODEL, *files, "--session", "s")
    asked = run_json(headinfer, "ask", "--session", "s", "--max-new-tokens", 8, "What?")[0]["answers"][0]
    generated = run_json(headinfer, "generate", MODEL, *files, "--max-new-tokens", 8, "--prompt", "What?")[0]
    assert generated["token_ids"] == asked["token_ids"]


def test_a_question_may_bring_files(headinfer, code):
    run_json(headinfer, "read", MODEL, "--file", code / "a.txt", "--session", "s")
    asked = ("ask", "--session", "s", "--max-new-tokens", 4)
    brought = run_json(headinfer, *asked, "--file", code / "b.py", "What?", "Why?")[0]["answers"]
    written = run_json(headinfer, *asked, "b = 1\n\n\nWhat?", "b = 1\n\n\nWhy?")[0]["answers"]
    assert [one["token_ids"] for one in brought] == [one["token_ids"] for one in written]
    kept = run_json(headinfer, *asked, "--keep", "--file", code / "b.py", "What?", "Why?")[0]["answers"]
    assert kept[0]["token_ids"] == brought[0]["token_ids"]
    assert kept[1]["tokens_in"] == len("\nWhy?")
