"""Several questions and prompts are answered together, as each alone, in the order of the questions."""

import io
import json

import pytest

from headinfer.engine.options import Options
from headinfer.errors import UsageError
from headinfer.jobs import ask as asking
from headinfer.jobs.chat import ChatJob
from headinfer.jobs.generate import Job, prepare
from headinfer.jobs.open_chat import prepare_chat
from headinfer.jobs.sampling import Sampling
from headinfer.jobs.together import read_questions

FILLER = "The ship sailed on under a grey sky, and no one on deck said a word. " * 8
FACTS = {"bazuko": 40817, "tirelo": 93265, "mugapi": 57140}
TEXT = "".join(f"{FILLER}The magic number for {word} is {number}. " for word, number in FACTS.items())
QUESTIONS = [f"What is the magic number for {word}?" for word in FACTS]
QUESTIONS[1] += " Only the number, and nothing else."
SHORT = ("--max-new-tokens", 20)


@pytest.fixture(scope="module")
def sessions(tmp_path_factory):
    """A folder with the session `book`."""
    from headinfer.jobs.read import ReadJob, prepare_read, read

    root = tmp_path_factory.mktemp("sessions")
    read(prepare_read(ReadJob("embedded", TEXT, "book", root, device="cpu", dtype="float32")))
    return root


@pytest.fixture
def ask(run_command, sessions):
    """A function from the arguments of `headinfer ask --json` to its answers."""

    def answers(*arguments, code=0):
        found, out, err = run_command("ask", "--session", "book", "--sessions", sessions, "--json", *SHORT, *arguments)
        assert found == code, err
        return json.loads(out)["answers"]

    return answers


def texts(answers):
    return [(one["text"], one["token_ids"], one["tokens_in"]) for one in answers]


@pytest.mark.parametrize("more", [(), ("--repetition-penalty", 1.2, "--stop", "2"), ("--ignore-eos",)])
def test_questions_are_answered_as_each_alone(ask, more):
    together = ask(*more, *QUESTIONS)
    assert texts(together) == [texts(ask(*more, question))[0] for question in QUESTIONS]
    assert [one["question"] for one in together] == QUESTIONS


def test_answers_are_shown_in_order(run_command, sessions):
    command = ("ask", "--session", "book", "--sessions", sessions, *SHORT)
    code, out, err = run_command(*command, *QUESTIONS)
    assert code == 0
    assert out == "".join(run_command(*command, question)[1] for question in QUESTIONS)
    assert "3/3 answers" in err


def test_what_precedes_each_question_is_read_once(ask, tmp_path):
    (tmp_path / "more.txt").write_text(FILLER * 2)
    more = ("--file", tmp_path / "more.txt")
    alone = [texts(ask(*more, question))[0] for question in QUESTIONS]
    assert texts(ask(*more, *QUESTIONS)) == alone


def test_a_file_of_questions(ask, tmp_path, monkeypatch):
    alone = texts(ask(*QUESTIONS))
    objects = [{"question": question, "id": number} for number, question in enumerate(QUESTIONS)]
    lines = "\n\n".join(map(json.dumps, objects))
    (tmp_path / "questions.jsonl").write_text(lines)
    found = ask("--questions", tmp_path / "questions.jsonl")
    assert texts(found) == alone
    assert [one["id"] for one in found] == [0, 1, 2]
    for text in ("\n".join(QUESTIONS[1:]) + "\n", "\n".join(map(json.dumps, objects[1:]))):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        assert texts(ask(QUESTIONS[0], "--questions", "-")) == alone


@pytest.mark.parametrize(
    ("text", "message"),
    [("\n \n", "no question"), ("{}\n", 'line 1 .*"question"'), ('{"question": "a"}\n\nb\n', 'line 3 .*"question"'),
     ('{"question": " "}', 'line 1 .*"question"'), ('{"question": "a", "text": 1}', 'line 1 .*"text".*rename')],
)  # fmt: skip
def test_files_of_questions_that_are_refused(tmp_path, text, message):
    (tmp_path / "questions.jsonl").write_text(text)
    with pytest.raises(UsageError, match=message):
        read_questions(tmp_path / "questions.jsonl")


def test_kept_questions_are_asked_one_after_the_other(sessions):
    def job(**changes):
        return asking.AskJob("book", sessions, QUESTIONS, **changes)

    assert job().is_together
    assert not job(keep=True).is_together


def test_a_draft_model_for_several_questions_is_refused(run_command, sessions, tmp_path):
    (tmp_path / "questions.txt").write_text("\n".join(QUESTIONS))
    session = ("ask", "--session", "book", "--sessions", sessions)
    for command in (
        ("generate", "embedded", "--prompt", QUESTIONS[0], "--prompt", QUESTIONS[1]),
        (*session, *QUESTIONS),
        (*session, "--questions", tmp_path / "questions.txt"),
    ):
        code, out, err = run_command(*command, "--draft", "embedded")
        assert (code, out) == (2, "")
        assert "--draft guesses for one question at a time" in err
    drafted = Sampling(draft="embedded")
    assert asking.prepare_ask(asking.AskJob("book", sessions, QUESTIONS, keep=True, sampling=drafted)).draft is not None


def test_a_share_of_the_cpu_on_a_cpu_is_said_to_have_no_effect(sessions, tmp_path):
    lines = ["--cpu-share has no effect: the CPU computes here, and attends to all KV in host RAM where it is"]
    for share, wanted in ((0.5, lines), (0.0, []), (None, [])):
        options = {} if share is None else {"cpu_share": share}
        job = Job("embedded", prompt="When?", device="cpu", options=Options(**options))
        assert prepare(job).warnings == wanted
        asked = asking.AskJob("book", sessions, QUESTIONS, device="cpu", options=options)
        assert asking.prepare_ask(asked).warnings == wanted
        assert prepare_chat(ChatJob(sessions, session="book", device="cpu", options=options)).warnings == wanted
    ring = Options(cpu_share=0.5, transport="eager")
    assert prepare(Job("embedded", prompt="When?", device="cpu", options=ring)).warnings == []


def test_an_interruption_shows_what_was_answered(sessions):
    passes = 0
    shown = []

    def stop(cache):
        nonlocal passes
        passes += 1
        if passes == 4:
            raise KeyboardInterrupt

    job = asking.AskJob("book", sessions, QUESTIONS, device="cpu", max_new_tokens=20)
    whole = asking.ask(asking.prepare_ask(job), on_text=lambda text: None)
    found = asking.ask(asking.prepare_ask(job), on_text=shown.append, on_forward=stop)
    assert [one.token_ids for one in found] == [one.token_ids[:3] for one in whole]
    assert all(one.interrupted for one in found)
    assert shown == [one.text + "\n" for one in found]


def test_memory_for_fewer_rows_is_said_in_one_line(sessions, monkeypatch):
    monkeypatch.setattr("headinfer.hf.batch.MOST_ROWS", 2)
    lines = []
    job = asking.AskJob("book", sessions, QUESTIONS, device="cpu", max_new_tokens=4)
    found = asking.ask(asking.prepare_ask(job), on_text=lambda text: None, on_note=lines.append)
    assert lines == ["3 questions are answered in 2 batches (2, 1), as their lengths and the memory allow"]
    assert [one.tokens_out for one in found] == [4, 4, 4]


@pytest.mark.parametrize("document", [True, False])
def test_several_prompts_of_generate(run_command, tmp_path, document):
    (tmp_path / "book.txt").write_text(TEXT)
    command = ["generate", "embedded", "--json", "--dtype", "float32", *SHORT]
    prompts = QUESTIONS if document else [TEXT[: 400 + 90 * number] for number in range(3)]
    command += ["--file", tmp_path / "book.txt"] if document else []
    alone = [json.loads(run_command(*command, "--prompt", prompt)[1]) for prompt in prompts]
    code, out, _ = run_command(*command, *(word for prompt in prompts for word in ("--prompt", prompt)))
    assert code == 0
    together = [json.loads(line) for line in out.splitlines()]
    assert texts(together) == texts(alone)
    assert [one["prompt"] for one in together] == prompts
    assert [one["tokens_read"] for one in together] == [one["tokens_in"] for one in alone]
    if document:
        command.remove("--json")
        code, out, err = run_command(*command, "--prompt", prompts[0], "--prompt", prompts[1])
        assert (code, out) == (0, "".join(one["text"] + "\n" for one in alone[:2]))
        assert "2/2 answers" in err


def test_an_empty_prompt_among_several_is_refused(run_command):
    code, _, err = run_command("generate", "embedded", "--prompt", "When?", "--prompt", " ")
    assert code == 2
    assert "one of the prompts is empty" in err
