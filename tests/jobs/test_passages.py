"""The passages that an answer came from: their offsets for every kind of tokenizer, and the needles in them."""

import json
import random

import pytest
from test_prompts import KINDS, TEMPLATES, tokenizer_of

from headinfer.cli.where import passage_lines
from headinfer.embedded import embedded_text
from headinfer.errors import UnsupportedError, UsageError
from headinfer.evals.needles import build_haystack, random_needles
from headinfer.hf.enable import Enabled
from headinfer.jobs.documents import Document, Piece, SourceFile
from headinfer.jobs.generate import Summary
from headinfer.jobs.prompts import chat_texts, document_parts
from headinfer.jobs.where import DocumentText, passages

WORDS = "    It was a bright cold day in April,\n\tand the clocks were striking thirteen.\n"


def tokens_of(tokenizer, texts, headings=("a\n\n", "\n\nare\n\n", "\n\nday\n\n", "")):
    """A document of files, its tokens, and the number of tokens of each piece, with the facts of a session."""
    files = tuple(SourceFile(f"{at}.txt", 0, "", "UTF-8", text) for at, text in enumerate(texts))
    pieces = tuple(Piece(at, headings[at], 0, len(text)) for at, text in enumerate(texts))
    document = Document(files, pieces)
    chat = chat_texts(tokenizer, is_raw=False)
    parts = document_parts(tokenizer, document.texts, chat)
    ids = [token for part in parts for token in part]
    about = {"document_tokens": len(ids), "chat": vars(chat) if chat else None, **document.facts()}
    return document, ids, [len(part) for part in parts], about


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", ["none", "with a beginning"])
def test_passages_are_the_text_that_was_read(kind, template):
    tokenizer = tokenizer_of(kind, TEMPLATES[template], begins=True)
    document, ids, lengths, about = tokens_of(tokenizer, [WORDS * 30, WORDS, "", WORDS * 9])
    found = DocumentText(tokenizer, [*ids, 5, 6], about)
    edges = zip(found.edges, found.edges[1:], strict=False)
    assert found.edges[-1] == len(ids)
    assert all(0 < stop - start < 384 for start, stop in edges)
    count = len(found.edges) - 1
    named = found.passages([1 / count] * count, most=count)
    named.sort(key=lambda passage: passage.start)
    assert "".join(passage.text for passage in named) == found.text
    if kind == "WordPiece":  # it changes blanks and letters
        assert not found.is_exact
        assert {passage.file for passage in named} == {""}
        return
    assert found.is_exact
    assert found.text == "".join(document.texts)
    assert {sum(lengths[:at]) for at in range(1, 4)} <= set(found.edges), "a stretch is from one file"
    for passage in named:
        at = int(passage.file.removesuffix(".txt"))
        of_file = passage.text.removeprefix(document.pieces[at].before) if not passage.file_start else passage.text
        assert document.files[at].text[passage.file_start :].startswith(of_file)


def test_characters_of_several_tokens_are_not_split():
    tokenizer = tokenizer_of("byte-level")
    letters = random.Random(1)
    text = "".join(letters.choice("äß🎉漢 a\n") for _ in range(2000))
    _, ids, _, about = tokens_of(tokenizer, [text], headings=[""])
    found = DocumentText(tokenizer, ids, about)
    assert found.text == text
    count = len(found.edges) - 1
    assert count > 10
    assert not any("\ufffd" in passage.text for passage in found.passages([1.0] * count, most=count))


def test_tokens_without_facts_are_the_document():
    tokenizer = tokenizer_of("byte-level")
    found = DocumentText(tokenizer, tokenizer(WORDS * 3).input_ids)
    assert found.text == WORDS * 3
    assert not found.is_exact
    assert found.passages([0.0]) == [], "no head looks far"
    with pytest.raises(UsageError, match="the prompt has 3 tokens, and the document"):
        passages(None, None, [1, 2, 3], [4], found)


@pytest.fixture(scope="module")
def needles():
    return random_needles(4, random.Random(3), held_out=True, accepts=lambda word: word not in embedded_text())


def test_ask_names_the_passages_of_needles(run_command, tmp_path, needles, monkeypatch):
    """The passage with the needle is the first one, for each of several needles in two files of 4K tokens."""
    folder = tmp_path / "files"
    folder.mkdir()
    texts = {}
    for name, own, start in (("a.txt", needles[:2], 0), ("b.txt", needles[2:], 9000)):
        texts[name] = build_haystack(embedded_text()[start : start + 5200], own, [0.1, 0.9])
        (folder / name).write_text(texts[name], encoding="utf-8")
    names = ("--session", "book", "--sessions", tmp_path / "sessions")
    code, _, err = run_command("read", "embedded", "--file", folder, *names)
    assert code == 0, err
    questions = tmp_path / "questions.txt"
    questions.write_text("\n".join(needle.question.strip() for needle in needles))
    code, out, err = run_command("ask", *names, "--where", "--json", "--questions", questions)
    assert code == 0, err
    for needle, answer in zip(needles, json.loads(out)["answers"], strict=True):
        assert needle.number in answer["text"]
        first = answer["where"][0]
        place = texts[first["file"]].find(needle.sentence)
        assert place >= 0, f"the needle at {needle.sentence} is in another file"
        assert place < first["file_start"] + len(first["text"])
        assert first["file_start"] < place + len(needle.sentence)
        assert 1 >= first["share"] >= answer["where"][1]["share"] > 0
        assert len(answer["where"]) == 5
        assert answer["where_s"] > 0
    for keep in ((), ("--keep",)):
        code, out, err = run_command("ask", *names, "--where", *keep, needles[3].question)
        assert code == 0, err
        assert "where the answer came from (shares of the attention that looks far):" in out
        assert "b.txt, characters" in out.splitlines()[-5]

    def refuse(*_, **__):
        raise UnsupportedError("it is a test")

    monkeypatch.setattr(Enabled, "where", refuse)
    code, out, _ = run_command("ask", *names, "--where", needles[0].question)
    assert code == 0
    assert needles[0].number in out
    assert "cannot be told: it is a test" in out


def test_lines_of_an_answer_that_looks_nowhere():
    assert passage_lines(Summary("model")) == []
    assert passage_lines(Summary("model", where=[]), "2") == [
        "",
        "no head looks at one passage for answer 2",
    ]
