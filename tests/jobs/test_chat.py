"""The command `headinfer chat`. Each answer is compared with that to the whole conversation as a template writes it."""

import io
import json
import shutil
import signal
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from families import tiny_model
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from headinfer.cli import chat as command_line
from headinfer.errors import UnsupportedError, UsageError
from headinfer.hf.enable import Enabled
from headinfer.hf.models import byte_tokenizer, resolve
from headinfer.jobs.ask import AskJob, ask, prepare_ask
from headinfer.jobs.chat import ChatJob
from headinfer.jobs.documents import as_document
from headinfer.jobs.open_chat import open_chat, prepare_chat
from headinfer.jobs.read import ReadJob, prepare_read, read
from headinfer.jobs.sampling import Sampling
from headinfer.jobs.talk import talk
from headinfer.sessions.manifest import Manifest
from headinfer.sessions.writer import undo

DOCUMENT = "It was a bright cold day in April, and the clocks were striking thirteen.\n" * 4
SYSTEM = "{% if messages[0].role == 'system' %}[{{ messages[0].content }}]{% endif %}"
TURNS = "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ CONTENT }}</>\n{% endfor %}<assistant>"
TEMPLATES = {
    "none": None,
    "plain": SYSTEM + TURNS.replace("CONTENT", "m.content"),
    "strips": SYSTEM + TURNS.replace("CONTENT", "m.content | trim"),
    # The newest question is marked, as some templates write into it whether the model may think.
    "marks the last": TURNS.replace("CONTENT", "m.content + ('!!' if loop.last else '')"),
    # The generation prompt is not what is written before an earlier answer.
    "thinks": TURNS.replace("CONTENT", "m.content") + "<think>",
}
QUESTIONS = ("When was it?", "And where?", "Why?")
READ_AGAIN = "read again, as the template writes them"


def saved_model(folder, template, family, seed=0):
    """A random tiny model that writes ASCII, in a folder with a chat template. So each text has one encoding."""
    if family is None:
        source = resolve("random:tiny-llama?layers=2&hidden=64&intermediate=64&heads=4&kv_heads=2")
        model = source.load(dtype=torch.float32, device="cpu", seed=seed)
    else:
        model = tiny_model(family, vocab_size=len(byte_tokenizer()))
    tokenizer = byte_tokenizer()
    letters = {token for token in range(256) if " " <= tokenizer.decode([token]) <= "~"}
    others = [token for token in range(len(tokenizer)) if token not in letters]
    model.generation_config.suppress_tokens = others
    model.generation_config.repetition_penalty = 2.0  # without it the model writes one letter again and again
    model.save_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A function that returns the folder of a model with a template, made once."""
    made = {}

    def folder(template="plain", family=None):
        if (template, family) not in made:
            path = tmp_path_factory.mktemp("model")
            made[template, family] = saved_model(path, TEMPLATES[template], family)
        return made[template, family]

    return folder


CONVOLUTIONS = "lfm2"  # whose states cannot be cut


@contextmanager
def opened(root, **options):
    """A chat. Its attribute `said` has the lines that it says."""
    said = []
    if options.get("document") is not None:
        options["document"] = as_document(options["document"])
    job = ChatJob(root, **{"max_new_tokens": 6, "device": "cpu", **options})
    with open_chat(prepare_chat(job), say=said.append) as chat:
        chat.said = said
        yield chat


def ask_chat(chat, question):
    """The answer of a chat to a question, after a check that what was streamed is the answer."""
    parts = []
    summary = chat.ask(question, parts.append)
    assert "".join(parts) == summary.text
    return summary


def expected(folder, text, new_tokens=6):
    """The tokens that transformers' own cache generates after a text."""
    ids = byte_tokenizer()(text, add_special_tokens=False, return_tensors="pt").input_ids
    model = resolve(folder).load(dtype=torch.float32, device="cpu", seed=0)
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, pad_token_id=0
    )
    return found[0, ids.shape[1] :].tolist()


def whole_text(chat, template, question, document=DOCUMENT):
    """What the template writes for the conversation so far and a question; oracle."""
    turns = [(turn.question, turn.answer) for turn in chat.conversation.turns]
    if TEMPLATES[template] is None:
        first, *later = [one + answer for one, answer in [*turns, (question, "")]]
        return "\n".join([(f"{document}\n\n" if document else "") + first, *later])
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATES[template]
    messages = []
    for asked, answer in [*turns, (question, None)]:
        content = f"{document}\n\n{asked}" if document and not messages else asked
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)


@pytest.mark.parametrize("document", [DOCUMENT, None], ids=["document", "alone"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_each_answer_is_that_to_the_whole_conversation(folders, tmp_path, template, document):
    folder = folders(template)
    with opened(tmp_path, model=folder, document=document) as chat:
        for number, question in enumerate(QUESTIONS):
            text = whole_text(chat, template, question, document)
            summary = ask_chat(chat, question)
            assert summary.token_ids == expected(folder, text)
            if number and template in ("none", "plain"):  # the question, and the last token of the answer before it
                assert summary.tokens_in <= len(f"</>\n<user>{question}</>\n<assistant>") + 1
        assert (int(dict(chat.stats())[READ_AGAIN]) > 0) == (template in ("marks the last", "thinks"))


@pytest.mark.parametrize("draft", ["itself", "another model"])
def test_answers_with_a_draft_model_are_those_without(folders, tmp_path, press, draft):
    folder = folders("plain")
    guesser = folder if draft == "itself" else saved_model(tmp_path / "draft", TEMPLATES["plain"], None, seed=1)
    with opened(tmp_path, model=folder, document=DOCUMENT, sampling=Sampling(draft=guesser)) as chat:
        for question in QUESTIONS:
            text = whole_text(chat, "plain", question)
            summary = ask_chat(chat, question)
            assert summary.token_ids == expected(folder, text)
            assert summary.guess_counts.guessed > 0
            assert draft == "another model" or summary.guess_counts.passes < summary.tokens_out
        assert chat.undo().question == QUESTIONS[-1]
        text = whole_text(chat, "plain", "Who?")
        whole = expected(folder, text)
        press(3)  # the model reads the question, the draft model too, and guesses
        stopped = ask_chat(chat, "Who?")
        assert stopped.interrupted
        assert stopped.token_ids == whole[: stopped.tokens_out]
        text = whole_text(chat, "plain", "Where?")
        assert ask_chat(chat, "Where?").token_ids == expected(folder, text)
        assert chat.said == []


def test_a_system_prompt_that_moves_to_the_newest_question_is_announced(folders, tmp_path):
    """It precedes the document, which is not read again."""
    template = (
        "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{% if loop.last %}[{{ messages[0].content }}]"
    )
    folder = saved_model(tmp_path / "model", template + "{% endif %}{{ m.content }}</>{% endfor %}<assistant>", None)
    with opened(tmp_path, model=folder, document=DOCUMENT, system="Be brief.") as chat:
        ask_chat(chat, "When?")
        assert chat.said == []
        ask_chat(chat, "Where?")
        assert "now writes something else before the document" in chat.said[0]


@pytest.mark.parametrize("family", [None, CONVOLUTIONS], ids=["full attention", "convolutions"])
def test_a_chat_over_a_session_is_kept_undone_and_resumed(folders, tmp_path, family):
    folder = folders("plain", family)
    read(prepare_read(ReadJob(folder, DOCUMENT, "s", tmp_path, device="cpu")))
    tokens = []
    with opened(tmp_path, session="s", keep=True) as chat:
        for question in QUESTIONS:
            tokens.append(Manifest.read(tmp_path / "s").tokens)
            text = whole_text(chat, "plain", question)
            answer = ask_chat(chat, question).token_ids
            assert answer == expected(folder, text)
        assert chat.undo().question == QUESTIONS[2]
        assert Manifest.read(tmp_path / "s").tokens == tokens[2]
    with opened(tmp_path, session="s", keep=True) as chat:  # another day
        assert [turn.question for turn in chat.conversation.turns] == list(QUESTIONS[:2])
        assert ask_chat(chat, QUESTIONS[2]).token_ids == answer
        for number in (2, 1):
            assert chat.undo().question == QUESTIONS[number]
            assert Manifest.read(tmp_path / "s").tokens == tokens[number]
        text = whole_text(chat, "plain", "Who?")
        assert ask_chat(chat, "Who?").token_ids == expected(folder, text)
        text = whole_text(chat, "plain", "Why?")
    (asked,) = ask(prepare_ask(AskJob("s", tmp_path, ["Why?"], max_new_tokens=6)), on_text=lambda text: None)
    assert asked.token_ids == expected(folder, text)
    assert undo(tmp_path / "s").tokens == tokens[1]
    assert undo(tmp_path / "s").tokens == tokens[0]


def test_a_chat_goes_on_after_answers_that_ask_has_kept(folders, tmp_path):
    folder = folders("plain")
    read(prepare_read(ReadJob(folder, DOCUMENT, "s", tmp_path, device="cpu")))
    job = AskJob("s", tmp_path, ["When?"], max_new_tokens=6, device="cpu", keep=True)
    (first,) = ask(prepare_ask(job), on_text=lambda text: None)
    with opened(tmp_path, session="s") as chat:
        text = f"<user>{DOCUMENT}\n\nWhen?</>\n<assistant>{first.text}</>\n<user>Where?</>\n<assistant>"
        second = ask_chat(chat, "Where?")
        assert second.token_ids == expected(folder, text)
        third = ask_chat(chat, "Why?")
        assert third.token_ids == expected(folder, f"{text}{second.text}</>\n<user>Why?</>\n<assistant>")
        chat.undo()
        chat.undo()
        with pytest.raises(UsageError, match="no question of this conversation"):
            chat.undo()


@pytest.mark.parametrize("template", ["plain", "thinks"])
def test_a_session_of_a_model_that_cannot_go_back_goes_on(folders, tmp_path, template):
    """Its template may write earlier turns differently, so the whole conversation would have to be read again."""
    folder = folders(template, CONVOLUTIONS)
    with opened(tmp_path, model=folder, document=DOCUMENT) as chat:
        for question in QUESTIONS:
            text = whole_text(chat, template, question)
            assert ask_chat(chat, question).token_ids == expected(folder, text)
        chat.save("mine")
        text = whole_text(chat, template, "Who?")
    with opened(tmp_path, session="mine") as chat:
        answer = ask_chat(chat, "Who?").token_ids
        assert bool(chat.said) == (template == "thinks")
        if template == "plain":
            assert answer == expected(folder, text)


# -- Ctrl-C and stop strings -------------------------------------------------------------------------------------------


@pytest.fixture
def press(monkeypatch):
    """A function that presses Ctrl-C in the n-th forward pass from now on."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore SIGINT
    state = SimpleNamespace(left=0)
    one_chunk = Enabled._one_chunk

    def counted(enabled, *arguments):
        state.left -= 1
        if state.left == 0:
            signal.raise_signal(signal.SIGINT)
        return one_chunk(enabled, *arguments)

    monkeypatch.setattr(Enabled, "_one_chunk", counted)
    yield lambda passes: setattr(state, "left", passes)
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("family", [None, CONVOLUTIONS], ids=["full attention", "convolutions"])
@pytest.mark.parametrize("in_pass", [1, 3, 7])  # in the question, in the answer, and while the last token is kept
def test_ctrl_c_ends_an_answer_and_the_conversation_goes_on(folders, tmp_path, press, family, in_pass):
    folder = folders("plain", family)
    read(prepare_read(ReadJob(folder, DOCUMENT, "s", tmp_path, device="cpu")))
    with opened(tmp_path, session="s", keep=True) as chat:
        ask_chat(chat, "When?")
        text = whole_text(chat, "plain", "Where?")
        press(in_pass)
        if in_pass == 7:
            with pytest.raises(KeyboardInterrupt):
                ask_chat(chat, "Where?")
        else:
            stopped = ask_chat(chat, "Where?")
            assert stopped.interrupted
            assert stopped.token_ids == expected(folder, text)[: in_pass - 1]
        assert len(chat.conversation.turns) == (1 if in_pass == 1 else 2)
        text = whole_text(chat, "plain", "Why?")
        assert ask_chat(chat, "Why?").token_ids == expected(folder, text)
        text = whole_text(chat, "plain", "Who?")
        ids = Manifest.read(tmp_path / "s").tokens
    with opened(tmp_path, session="s") as chat:
        assert whole_text(chat, "plain", "Who?") == text
        assert ids == len(text) - len("</>\n<user>Who?</>\n<assistant>")
        assert ask_chat(chat, "Who?").token_ids == expected(folder, text)


@pytest.mark.parametrize("family", [None, CONVOLUTIONS], ids=["full attention", "convolutions"])
def test_the_next_question_follows_an_answer_that_was_stopped(folders, tmp_path, family):
    folder = folders("plain", family)
    with opened(tmp_path, model=folder, document=DOCUMENT) as chat:
        whole = ask_chat(chat, "When?").text
    stop = next(letter for letter in whole[1:] if letter != whole[0])
    with opened(tmp_path, model=folder, document=DOCUMENT, sampling=Sampling(stop=(stop,))) as chat:
        assert ask_chat(chat, "When?").text == whole[: whole.index(stop)]
        text = whole_text(chat, "plain", "Where?")
        answer = byte_tokenizer().decode(expected(folder, text))
        assert ask_chat(chat, "Where?").text == answer.split(stop)[0]


def test_an_error_leaves_the_conversation_as_it_was(folders, tmp_path, monkeypatch):
    folder = folders("plain")
    with opened(tmp_path, model=folder, document=DOCUMENT) as chat:
        ask_chat(chat, "When?")
        text = whole_text(chat, "plain", "Where?")
        with monkeypatch.context() as patched:
            patched.setattr(Enabled, "_one_chunk", lambda *_: (_ for _ in ()).throw(UsageError("no memory")))
            with pytest.raises(UsageError, match="no memory"):
                chat.ask("Where?", lambda text: None)
        assert ask_chat(chat, "Where?").token_ids == expected(folder, text)


# -- the loop and the terminal -----------------------------------------------------------------------------------------


class Script:
    """A terminal whose lines are given. An exception in their place is raised."""

    def __init__(self, *lines, is_interactive=True):
        self.is_interactive = is_interactive
        self.lines = list(lines)
        self.written = ""
        self.said = []
        self.failed = []
        self.shown = []

    def read(self):
        line = self.lines.pop(0) if self.lines else EOFError()
        if isinstance(line, BaseException):
            raise line
        return line

    def write(self, text):
        self.written += text

    def say(self, line):
        self.said.append(line)

    def fail(self, line):
        self.failed.append(line)

    def show(self, rows):
        self.shown += [name for name, _ in rows]


def test_a_document_beyond_the_context_of_the_model_gets_one_line(folders, tmp_path, run_command, monkeypatch):
    folder = Path(shutil.copytree(folders("plain"), tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 100}))
    (tmp_path / "book.txt").write_text(DOCUMENT)
    monkeypatch.setattr(sys, "stdin", io.StringIO("When?\n"))
    command = ("chat", folder, "--file", tmp_path / "book.txt", "--device", "cpu", "--max-new-tokens", 4)
    code, _, err = run_command(*command)
    assert code == 0
    assert err.count("exceed the 100 that this model was made for") == 1


def test_ctrl_c_while_the_document_is_read_ends_the_command(folders, tmp_path, run_command, press):
    (tmp_path / "book.txt").write_text(DOCUMENT)
    press(1)
    code, out, err = run_command("chat", folders("plain"), "--file", tmp_path / "book.txt", "--device", "cpu")
    assert (code, out) == (130, "")
    assert err.endswith("headinfer: interrupted\n")


def test_commands_errors_and_ctrl_c_at_the_prompt(folders, tmp_path, press):
    pressed = KeyboardInterrupt()
    lines = ["/save", "/undo", "When?", "", "/nope", "/save mine", "/undo", "/stats", "/help"]
    script = Script(*lines, pressed, "Where?", pressed, pressed)
    with opened(tmp_path, model=folders("plain")) as chat:
        assert talk(chat, script)
        assert script.failed[:2] == [
            "this chat belongs to no session: name a new one, /save NAME",
            "there is no question of this conversation to undo",
        ]
        assert "there is no command /nope" in script.failed[2]
        assert f"the conversation is kept in {tmp_path / 'mine'}" in script.said
        assert "removed: When?" in script.said
        assert script.said.count("press Ctrl-C again to leave, or Ctrl-D") == 2
        assert {"turns", "/undo", "its guesses", "KV in the files of the session"} <= set(script.shown)
        assert script.written.count("\n") == 2
        assert "not kept" in script.said[-1]
        press(3)
        script = Script("Who?", "/quit", "never asked")
        assert not talk(chat, script)
        assert "interrupted: the conversation goes on after this" in script.said
        assert script.lines == ["never asked"]
    with opened(tmp_path, session="mine") as chat:
        assert [turn.question for turn in chat.conversation.turns] == ["When?"]


def test_lines_of_a_pipe_end_with_the_first_error_and_with_ctrl_c(folders, tmp_path, press):
    with opened(tmp_path, model=folders("plain")) as chat:
        script = Script("When?", "Where?", is_interactive=False)
        assert not talk(chat, script)
        assert script.written.count("\n") == 2
        with pytest.raises(UsageError, match="no command"):
            talk(chat, Script("/nope", "When?", is_interactive=False))
        press(2)
        script = Script("Why?", "Who?", is_interactive=False)
        assert talk(chat, script)
        assert script.lines == ["Who?"]


def test_the_command_answers_lines_of_standard_input(folders, tmp_path, run_command, monkeypatch):
    folder = folders("plain")
    (tmp_path / "book.txt").write_text(DOCUMENT)
    monkeypatch.setattr(sys, "stdin", io.StringIO("When?\n\nWhere?\n/save mine\n"))
    arguments = ("--device", "cpu", "--max-new-tokens", 6, "--sessions", tmp_path)
    code, out, _ = run_command("chat", folder, "--file", tmp_path / "book.txt", *arguments)
    assert code == 0
    with opened(tmp_path, session="mine") as chat:
        assert "".join(turn.answer + "\n" for turn in chat.conversation.turns) == out
    monkeypatch.setattr(sys, "stdin", io.StringIO("/undo\nWhere?\n"))
    code, again, err = run_command("chat", "--session", "mine", *arguments)
    assert code == 0
    assert again == out.split("\n")[1] + "\n"
    assert "the last of 2 questions: Where?" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "name a model, or a session"),
        (("embedded", "--keep"), "--keep adds answers to a session"),
        (("embedded", "--file", "-"), "standard input has the questions"),
        (("--session", "s", "--file", "x"), "--file and --session exclude each other"),
        (("--session", "s", "--raw"), "a session has --raw from `headinfer read`"),
        (("embedded", "--system", "x"), "the model has no chat template"),
        (("embedded", "--min-p", "0.1"), "--min-p chooses among samples"),
    ],
)
def test_a_mistake_gets_one_sentence(arguments, message, tmp_path, run_command):
    code, out, err = run_command("chat", *arguments, "--device", "cpu", "--sessions", tmp_path)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_a_template_for_one_question_is_refused_before_loading(tmp_path):
    template = "{% if messages[1:] %}{{ raise_exception('one question only') }}{% endif %}{{ messages[0].content }}"
    folder = saved_model(tmp_path / "model", template, None)
    with pytest.raises(UnsupportedError, match="one question only"):
        prepare_chat(ChatJob(tmp_path, model=folder, device="cpu"))


def test_the_line_editor_has_a_history_and_questions_of_several_lines():
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        editor = command_line._line_editor(["When?"], None)
        keys.send_text("\x1b[A again\r")
        assert editor.prompt("> ") == "When? again"
        keys.send_text("one\x1b\rtwo\r")
        assert editor.prompt("> ") == "one\ntwo"
        keys.send_text("\x1b[200~pasted\nlines\x1b[201~\r")
        assert editor.prompt("> ") == "pasted\nlines"
        keys.send_text("\x03")
        with pytest.raises(KeyboardInterrupt):
            editor.prompt("> ")
        keys.send_text("\x04")
        with pytest.raises(EOFError):
            editor.prompt("> ")
