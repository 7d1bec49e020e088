"""Evaluations: tasks, metrics with known scores, results that continue after an interruption."""

import dataclasses
import json
import random
import re
import sys

import pytest
import torch
from families import tiny_model

from headinfer.errors import UsageError
from headinfer.evals import data_files
from headinfer.evals.data_files import data_documents
from headinfer.evals.heatmap import save_heatmap
from headinfer.evals.niah import niah_document
from headinfer.evals.reader import HEAD_WISE, STANDARD, Reader
from headinfer.evals.ruler import RULER_TASKS, ruler_documents
from headinfer.evals.run import Results, evaluate
from headinfer.evals.tasks import Document, Question, largest_fitting, match_all, match_part
from headinfer.hf.models import ModelSource, byte_tokenizer, resolve
from headinfer.plan.model_shape import ModelShape

ESSAY = " ".join(f"Sentence {n} of the essay says {'rather ' * (n % 7)}little." for n in range(900))


def count(text):
    """Count words and punctuation marks: a fast tokenizer, whose tokens do not grow quite linearly with the text."""
    return len(re.findall(r"\w+|[^\w\s]", text))


# -- tasks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RULER_TASKS)
@pytest.mark.parametrize("length", [1500, 9000])
def test_ruler_document_contains_its_answers_and_fills_its_length(name, length):
    first = list(ruler_documents(name, [length], 2, ESSAY, count, seed=3))
    again = list(ruler_documents(name, [length], 2, ESSAY, count, seed=3))
    assert [one.text for one in first] == [one.text for one in again], "documents depend only on the seed"
    assert first[0].text != first[1].text
    other = next(ruler_documents(name, [length], 1, ESSAY, count, seed=4))
    assert other.text != first[0].text
    for document in first:
        (question,) = document.questions
        used = count(document.text + question.text + question.lead) + question.new_tokens
        assert 0.93 * length <= used <= length
        assert question.references
        for reference in question.references:
            assert reference in document.text
            assert reference not in question.text + question.lead


@pytest.mark.parametrize(
    ("name", "references", "needles"),
    [("niah_single_1", 1, 1), ("niah_multikey_1", 1, 4), ("niah_multivalue", 4, 4), ("niah_multiquery", 4, 4)],
)
def test_numbers_of_ruler_needles_are_the_published_ones(name, references, needles):
    document = next(ruler_documents(name, [3000], 1, ESSAY, count, 0))
    (question,) = document.questions
    found = re.findall(r"One of the special magic numbers for ([\w-]+-?[\w-]*) is: (\d{7})\.", document.text)
    assert len(found) == needles
    assert len(question.references) == references
    asked = {key for key, value in found if value in question.references}
    assert all(key in question.text for key in asked)
    assert {value for key, value in found if key in question.text} == set(question.references)


def test_frequencies_of_ruler_words_are_the_published_ones():
    cwe = next(ruler_documents("cwe", [20_000], 1, ESSAY, count, 0))
    example, listed = cwe.text.split("\nBelow is")
    assert example.count("Question: What are the 10 most common words") == 1
    words = re.findall(r"\d+\. (\S+)", listed)
    assert {words.count(word) for word in cwe.questions[0].references} == {30}
    assert {words.count(word) for word in set(words) - set(cwe.questions[0].references)} == {3}
    fwe = next(ruler_documents("fwe", [20_000], 1, ESSAY, count, 0))
    coded = fwe.text.split("coded words. ")[1].split()
    often = sorted(set(coded) - {"..."}, key=coded.count, reverse=True)
    assert set(often[:3]) == set(fwe.questions[0].references)
    counts = [coded.count(word) for word in often[:3]]
    assert counts[0] / counts[1] == pytest.approx(9 / 4, rel=0.05), "zeta law: shares of 1/4 and 1/9"
    assert coded.count(often[2]) > coded.count(often[3])


def test_variables_of_a_chain_have_the_value():
    document = next(ruler_documents("vt", [3000], 1, ESSAY, count, 0))
    (question,) = document.questions
    value = re.search(r"value (\d+) in", question.text).group(1)
    text = document.text.split("Memorize and track")[2]
    found = dict(re.findall(r"VAR (\w{5}) = (?:VAR )?(\w+)", text))
    for name in question.references:
        while name in found:
            name = found[name]
        assert name == value
    assert len(question.references) == 5


def test_document_has_a_needle_at_each_depth():
    depths = [0, 0.25, 0.5, 1]
    document = niah_document(2000, depths, 1, ESSAY, count, seed=5)
    assert niah_document(2000, depths, 1, ESSAY, count, seed=5) == document
    assert niah_document(2000, depths, 2, ESSAY, count, seed=5).text != document.text
    assert [question.facts["depth"] for question in document.questions] == depths
    for question, depth in zip(document.questions, depths, strict=True):
        (number,) = question.references
        assert document.text.count(number) == 1
        assert number not in question.text + question.lead
        assert document.text.count(question.lead) == 1
        assert abs(document.text.index(number) / len(document.text) - depth) < 0.05
    used = max(count(document.text + question.text + question.lead) for question in document.questions)
    assert 1900 <= used + 16 <= 2000
    bare = niah_document(2000, depths, 1, ESSAY, count, seed=5, gives_lead=False)
    assert [one.references for one in bare.questions] == [one.references for one in document.questions]
    assert {one.lead for one in bare.questions} == {""}, "the model has to write the lead itself"
    assert bare.questions[0].new_tokens > document.questions[0].new_tokens
    used = max(count(bare.text + question.text) for question in bare.questions)
    assert used + bare.questions[0].new_tokens <= 2000
    long = niah_document(60_000, depths, 0, ESSAY, count, seed=5)
    assert count(long.text) > 3 * count(ESSAY), "a text that is too short is repeated"


def test_too_short_lengths_and_unknown_tasks_are_rejected():
    with pytest.raises(UsageError, match="cannot hold 4 needles and a question"):
        niah_document(60, [0, 0.3, 0.6, 1], 0, ESSAY, count, 0)
    for name in RULER_TASKS:
        with pytest.raises(UsageError, match=f"20 tokens are too few for RULER's {name}"):
            next(ruler_documents(name, [20], 1, ESSAY, count, 0))
    with pytest.raises(UsageError, match="no task 'nope' here: choose among niah_single_1"):
        next(ruler_documents("nope", [2000], 1, ESSAY, count, 0))


@pytest.mark.parametrize("max_tokens", [1, 30, 777, 12_345])
def test_largest_fitting_does_not_exceed_the_tokens(max_tokens):
    def build(units):
        return "word " * units + "and more " * (units // 10)

    units = largest_fitting(build, count, max_tokens)
    assert count(build(units)) <= max_tokens
    assert count(build(units + max(units // 50, 2))) > max_tokens
    assert largest_fitting(build, count, 0) == 0


# -- metrics ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("score", "answer", "references", "expected"),
    [
        (match_all, "They are 12 and 34.", ("12", "34", "56", "78"), 0.5),
        (match_all, "FOO bar", ("foo", "Bar"), 1.0),
        (match_part, "It was Paris.", ("London", "paris"), 1.0),
        (match_part, "It was Rome.", ("London", "paris"), 0.0),
        (data_files.longbench_score, "**The correct answer is (B)**", ("B",), 1.0),
        (data_files.longbench_score, "The correct answer is C.", ("C",), 1.0),
        (data_files.longbench_score, "I think (B)", ("B",), 0.0),
        (data_files.longbench_score, "The correct answer is (A), not (B)", ("B",), 0.0),
        (data_files.contains_score, "the value is a1-B2", ("a1-B2",), 1.0),
        (data_files.contains_score, "the value is A1-b2", ("a1-B2",), 0.0),
        (data_files.first_number_score, "The smallest is 17, then 12", ("17",), 1.0),
        (data_files.first_number_score, "17.9 or so", ("17",), 1.0),
        (data_files.first_number_score, "about 2.5", ("2.5",), 1.0),
        (data_files.first_number_score, "none", ("17",), 0.0),
        (data_files.first_letter_score, "B. because", ("B",), 1.0),
        (data_files.first_letter_score, "the answer is: C", ("C",), 1.0),
        (data_files.first_letter_score, "the answer is: C", ("D",), 0.0),
        (data_files.first_letter_score, "surely D of them", ("D",), 1.0),
        (data_files.first_letter_score, "", ("A",), 0.0),
        (data_files.characters_f1_score, "北京。", ("北京",), 1.0),
        (data_files.characters_f1_score, "北京市", ("北京",), 0.8),
        (data_files.characters_f1_score, "上海", ("北京",), 0.0),
    ],
)
def test_metrics(score, answer, references, expected):
    assert score(answer, references) == pytest.approx(expected)


# -- local files -----------------------------------------------------------------------------------------------------

LONGBENCH = {
    "_id": "1", "domain": "Code", "difficulty": "hard", "length": "short", "question": "Which?", "context": " A text. ",
    "choice_A": "one", "choice_B": "two", "choice_C": "three", "choice_D": "four", "answer": "B",
}  # fmt: skip
TURNS = [{"input": "Key: k1", "answer": "v1"}, {"input": "Key: k2", "answer": "v2"}]


def test_longbench_and_scbench_files(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([LONGBENCH, LONGBENCH]))
    first, second = data_documents("longbench-v2", path)
    assert first.key != second.key
    (question,) = first.questions
    assert first.text.endswith("<text>\nA text.\n</text>")
    assert "Which?\nChoices:\n(A) one\n(B) two\n(C) three\n(D) four\n\nFormat your response" in question.text
    assert question.score("The correct answer is (B)", question.references) == 1
    assert first.facts["difficulty"] == "hard"

    path.write_text("\n" + json.dumps({"id": 0, "context": '{"k1": "v1"}', "multi_turns": TURNS}) + "\n")
    (document,) = data_documents("scbench_kv", path)
    assert document.text.startswith("Extract the value")
    assert document.text.endswith('{"k1": "v1"}')
    assert [question.text for question in document.questions] == ["\n\nKey: k1", "\n\nKey: k2"]
    assert [question.references for question in document.questions] == [("v1",), ("v2",)]

    turn = {"input": "Who?", "options": ["w", "x", "y", "z"], "answer": ["B"]}
    path.write_text(json.dumps({"context": "A book.", "multi_turns": [turn]}))
    (question,) = data_documents("scbench_choice_eng", path)[0].questions
    assert question.text.endswith("Question: Who?\nA. w\nB. x\nC. y\nD. z\n\nThe the correct answer is")
    turn = {"input": "The smallest number is", "answer": 3}
    path.write_text(json.dumps({"context": "[5, 3]", "multi_turns": [turn]}))
    (document,) = data_documents("scbench_mf", path)
    assert document.text == "The smallest number is\n\n[5, 3]"
    assert document.questions[0].text == "\n\nWhat is the smallest number?\n\nThe smallest number is"
    assert document.questions[0].references == ("3",)


@pytest.mark.parametrize(
    ("task", "content", "message"),
    [
        ("longbench-v2", json.dumps([LONGBENCH, {}]), "item 2 is not a longbench-v2 item: it has no 'choice_A'"),
        ("scbench_kv", json.dumps({"context": "x", "multi_turns": []}), "item 1 is not a scbench_kv item: a field has"),
        ("scbench_kv", json.dumps({"context": "x", "multi_turns": TURNS}) + "\n{oops", "line 2 is not valid JSON"),
        ("scbench_kv", "[1, 2", "is not valid JSON"),
        ("scbench_kv", "[1, 2]", "item 1 is not a scbench_kv item: a field has the wrong type"),
        ("scbench_kv", "  ", "holds no items"),
        ("scbench_summary", "{}", "there is no task 'scbench_summary' for local files: choose among longbench-v2"),
    ],
)  # fmt: skip
def test_invalid_files_are_rejected(tmp_path, task, content, message):
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    with pytest.raises(UsageError, match=re.escape(message)):
        data_documents(task, path)
    with pytest.raises(UsageError, match="cannot read"):
        data_documents("scbench_kv", tmp_path / "none")


# -- reading and results ---------------------------------------------------------------------------------------------


def documents_of(count=2):
    """Yield documents of random letters with three questions each."""
    rng = random.Random(0)
    for number in range(count):
        text = "".join(rng.choices("abcdef ", k=700))
        questions = tuple(Question(str(k), f"\nq{k}?", ("x",), 4, facts={"depth": k / 2}) for k in range(3))
        yield Document(f"d/{number}", text, questions, {"length": 700 + number})


@pytest.fixture(scope="module")
def tiny():
    source = resolve("random:tiny-llama?layers=2&hidden=64&intermediate=64&heads=4&kv_heads=2")
    return source, source.load(dtype=torch.float32, device="cpu", seed=0)


def reader_of(tiny, **options):
    return Reader(tiny[1], byte_tokenizer(), options={"chunk_tokens": 128, **options})


def run(tiny, folder, documents, *, compare=True, **about):
    shape = ModelShape.from_config(tiny[0].config)
    results = Results.open(folder, {"model": "tiny", "seed": 0, **about})
    read = []
    evaluate(
        reader_of(tiny), documents, results, compare=compare, kv_bytes_per_token=shape.kv_bytes_per_token(4),
        on_document=lambda document, readings: read.append((document.key, [one.method for one in readings])),
    )  # fmt: skip
    return results, read


@pytest.mark.parametrize("transport", ["auto", "eager"])
def test_questions_are_independent_and_both_caches_agree(tiny, transport):
    document = next(documents_of())
    reader = reader_of(tiny, transport=transport, device_kv_budget_bytes=2**20)
    pieces = []

    def on_text(question, text):
        pieces.append((question.key, text))

    head_wise = reader.read(document, HEAD_WISE, on_text)
    standard = reader.read(document, STANDARD, on_text)
    head_wise_ids = [answer.token_ids for answer in head_wise.answers]
    assert head_wise_ids == [answer.token_ids for answer in standard.answers]
    assert len(head_wise_ids) == 3
    assert head_wise.tokens == standard.tokens == 700
    assert head_wise.host_kv_bytes > 0 == standard.host_kv_bytes
    head, tails = reader.encode(document)
    for tail, tokens in zip(tails, head_wise_ids, strict=True):  # the oracle: one prompt with an empty cache
        ids = torch.tensor([head + tail])
        expected = tiny[1].generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, pad_token_id=0
        )
        assert expected[0, ids.shape[1] :].tolist() == tokens
    for key in "012":
        text = "".join(piece for one, piece in pieces[: len(pieces) // 2] if one == key)
        assert text == head_wise.answers[int(key)].text + "\n"


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_documents_that_are_read_together_get_the_answers_of_each_alone(family):
    tokenizer = byte_tokenizer()
    model = tiny_model(family, vocab_size=len(tokenizer))
    reader = Reader(model, tokenizer, options={"chunk_tokens": 128})
    documents = [dataclasses.replace(one, text=one.text[40 * number :]) for number, one in enumerate(documents_of(3))]
    alone = [reader.read(document, HEAD_WISE) for document in documents]
    together = reader.read_together(documents)
    for found, wanted in zip(together, alone, strict=True):
        assert [one.token_ids for one in found.answers] == [one.token_ids for one in wanted.answers]
        assert [one.text for one in found.answers] == [one.text for one in wanted.answers]
        assert found.tokens == wanted.tokens
    assert reader.can_read_together()
    assert not Reader(tiny_model("qwen3_next"), tokenizer).can_read_together()


def test_documents_of_one_length_are_read_together(tiny, tmp_path, monkeypatch):
    groups = []
    read_together = Reader.read_together

    def noted(self, documents):
        groups.append([document.key for document in documents])
        return read_together(self, documents)

    monkeypatch.setattr(Reader, "read_together", noted)
    documents = [dataclasses.replace(one, facts={"length": 800}) for one in documents_of(4)]
    documents[3] = dataclasses.replace(documents[3], facts={"length": 900})
    run(tiny, tmp_path, documents[1:2], compare=False)
    results, read = run(tiny, tmp_path, documents, compare=False)
    assert groups == [["d/1"], ["d/0"], ["d/2"], ["d/3"]]
    assert [len(readings) for _, readings in read] == [1, 0, 1, 1]
    groups.clear()
    fresh, _ = run(tiny, tmp_path / "fresh", documents, compare=False)
    assert groups == [["d/0", "d/1", "d/2"], ["d/3"]]
    tokens = {one["key"]: one["token_ids"] for one in fresh.records}
    assert tokens == {one["key"]: one["token_ids"] for one in results.records}


def test_interrupted_evaluation_continues(tiny, tmp_path):
    class Stopped(Exception):
        pass

    def interrupted():
        yield next(documents_of(3))
        raise Stopped

    with pytest.raises(Stopped):
        run(tiny, tmp_path, interrupted())
    kept = json.loads((tmp_path / "results.json").read_text())
    assert len(kept["answers"]) == 6
    results, read = run(tiny, tmp_path, documents_of(3))
    assert read == [("d/0", []), ("d/1", ["head-wise", "standard"]), ("d/2", ["head-wise", "standard"])]
    summary = json.loads((tmp_path / "results.json").read_text())["summary"]
    assert summary["questions"] == 9
    assert summary["compared"]["identical"] == summary["compared"]["questions"] == 9
    assert summary["compared"]["score_difference"] == 0
    assert results.differing() == []
    _, read = run(tiny, tmp_path, documents_of(3))
    assert all(methods == [] for _, methods in read)
    fresh, _ = run(tiny, tmp_path / "other", documents_of(3))
    assert [one["token_ids"] for one in fresh.records] == [one["token_ids"] for one in results.records]
    with pytest.raises(UsageError, match="holds another evaluation: its seed is 0, not 1; choose another --out"):
        run(tiny, tmp_path, documents_of(3), seed=1)
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(UsageError, match="holds no results of headinfer eval"):
        run(tiny, tmp_path, documents_of(3))


def test_different_answers_are_counted(tiny, tmp_path):
    results, _ = run(tiny, tmp_path, documents_of(1))
    results.records[0]["token_ids"] = [1, 2]
    results.records[0]["score"] = 1.0
    compared = results.summary()["compared"]
    assert (compared["identical"], compared["questions"]) == (2, 3)
    assert compared["score_difference"] == pytest.approx(1 / 3)
    assert results.differing() == ["d/0/0"]


def test_documents_too_large_for_the_standard_cache_are_skipped(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("headinfer.evals.run.available_host_bytes", lambda: 1000)
    results, read = run(tiny, tmp_path, documents_of(1))
    assert read == [("d/0", ["head-wise"])]
    assert re.match(r"needs .* for its KV and a copy; there are 1,?000 B", results.skipped["d/0"])
    assert "compared" not in results.summary()


def test_chat_template_is_split_at_the_end_of_the_document(tiny):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}</>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    document = Document("d", "  A text. ", (Question("0", "\nWhat? ", ("x",), 2, lead=" It is"),))
    head, (tail,) = Reader(tiny[1], tokenizer).encode(document)
    assert tokenizer.decode(head) == "<user>  A text. "
    assert tokenizer.decode(tail) == "\nWhat?</><assistant> It is"
    head, (tail,) = Reader(tiny[1], tokenizer, is_raw=True).encode(document)
    assert (tokenizer.decode(head), tokenizer.decode(tail)) == ("  A text. ", "\nWhat?  It is")


def test_a_chat_template_that_fails_is_refused_before_loading(tmp_path, monkeypatch, capsys):
    from headinfer.cli import main as cli
    from headinfer.hf.models import ModelSource

    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('a system message is needed') }}"
    monkeypatch.setattr(ModelSource, "tokenizer", lambda self: tokenizer)
    monkeypatch.setattr(ModelSource, "load", lambda *_, **__: pytest.fail("weights were loaded first"))
    arguments = ["eval", "niah", TINY, "--lengths", "1K", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["headinfer", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    err = capsys.readouterr().err
    assert stopped.value.code == 2
    assert "a system message is needed" in err
    assert "--raw" in err


def test_heatmap_is_a_png_file(tiny, tmp_path):
    results, _ = run(tiny, tmp_path, documents_of(2), compare=False)
    save_heatmap(results, tmp_path / "niah.png")
    assert (tmp_path / "niah.png").read_bytes().startswith(b"\x89PNG")
    assert results.scores("length", "depth").keys() == {(n, d) for n in (700, 701) for d in (0.0, 0.5, 1.0)}


# -- the command -----------------------------------------------------------------------------------------------------


TINY = "random:tiny-llama?layers=2&hidden=64&intermediate=64&heads=4&kv_heads=2"


def test_eval_niah_and_ruler_end_to_end(run_command, tmp_path):
    niah = ("eval", "niah", TINY, "--lengths")
    code, out, err = run_command(*niah, "600,900", "--depths", "0..100/3", "--compare", "--out", tmp_path)
    assert code == 0, err
    assert "6 of 6 answers identical, difference in score 0" in " ".join(out.split())
    assert (tmp_path / "niah.png").is_file()
    kept = json.loads((tmp_path / "results.json").read_text())
    assert kept["command"].startswith("headinfer eval niah")
    assert {one["length"] for one in kept["answers"]} == {600, 900}
    _, again, _ = run_command(*niah, "600,900", "--depths", "0,50,100", "--out", tmp_path, "--json")
    assert json.loads(again)["questions"] == 6
    _, bare, _ = run_command(*niah, "600", "--depths", "50", "--no-lead", "--json")
    assert json.loads(bare)["questions"] == 1
    _, _, err = run_command(*niah, "600", "--depths", "50", "--no-lead", "--out", tmp_path)
    assert "holds another evaluation" in err
    code, _, err = run_command("eval", "ruler", TINY, "--lengths", "1K", "--out", tmp_path)
    assert code == 2
    assert "holds another evaluation" in err
    tasks = ("--tasks", "vt,niah_single_1", "--samples", 1, "--out", tmp_path / "r")
    code, out, err = run_command("eval", "ruler", TINY, "--lengths", "4000", *tasks)
    assert code == 0, err
    assert "vt" in out


def test_eval_data_end_to_end(run_command, tmp_path):
    path = tmp_path / "data.jsonl"
    items = [{"context": text, "multi_turns": TURNS} for text in ("short " * 20, "long " * 2000)]
    path.write_text("\n".join(map(json.dumps, items)))
    options = ("--task", "scbench_kv", "--data", path, "--most-tokens", "2K", "--out", tmp_path / "a")
    code, _, err = run_command("eval", "data", TINY, *options)
    assert code == 0, err
    assert "1 of 2 texts are longer than 2,048 tokens and left out" in err
    kept = json.loads((tmp_path / "a" / "results.json").read_text())
    assert len(kept["answers"]) == 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("niah", TINY, "--depths", "0..200"), "is not a list of depths: write percents"),
        (("niah", TINY, "--depths", "deep"), "is not a list of depths: write percents"),
        (("niah", TINY, "--lengths", "4X"), "is not a number of tokens"),
        (("niah", TINY, "--text", "/nowhere.txt"), "cannot read /nowhere.txt"),
        (("niah", "no/such-model"), "there is no model 'no/such-model'"),
        (("niah", TINY, "--lengths", "4000M"), "of host RAM for KV"),
        (("niah", TINY, "--lengths", "100,4K"), "100 tokens cannot hold 11 needles"),
        (("ruler", TINY, "--lengths", "100,4K"), "100 tokens are too few for RULER's niah_single_1"),
        (("ruler", TINY, "--tasks", "vt,nope"), "RULER has no task 'nope' here"),
        (("data", TINY, "--task", "scbench_kv", "--data", "/nowhere"), "cannot read /nowhere"),
    ],
)
def test_mistakes_are_reported_in_one_sentence(run_command, tmp_path, monkeypatch, args, message):
    monkeypatch.setattr(ModelSource, "load", lambda *_, **__: pytest.fail("weights were loaded first"))
    code, _, err = run_command("eval", *args, "--out", tmp_path)
    assert code == 2
    assert message in " ".join(err.split())
    assert err.startswith("headinfer: error: ")
    assert not (tmp_path / "results.json").exists()


def test_error_without_wonderwords_says_what_to_install(monkeypatch):
    from headinfer.evals import ruler

    ruler._word_lists.cache_clear()
    monkeypatch.setitem(sys.modules, "wonderwords", None)
    with pytest.raises(UsageError, match=re.escape("pip install 'headinfer[eval]'")):
        next(ruler_documents("cwe", [2000], 1, ESSAY, count, 0))
    ruler._word_lists.cache_clear()
