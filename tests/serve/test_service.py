"""The core of the server with the embedded model: its answers are those of the commands, token for token."""

import json
import logging
import threading

import pytest
from core_client import Asked, counted_tokens, wait_until_read

from headinfer.errors import CapacityError, HeadinferError, SessionError, StateError, UnsupportedError, UsageError
from headinfer.jobs import ask as asking
from headinfer.jobs import generate
from headinfer.jobs.documents import read_documents
from headinfer.jobs.read import ReadJob, prepare_read, read
from headinfer.jobs.sampling import Sampling
from headinfer.serve.errors import NotFoundError, QueueFullError
from headinfer.serve.events import Done, Failed, Prefill, Queued, Text, Where
from headinfer.serve.requests import Ask
from headinfer.serve.service import Service
from headinfer.serve.settings import Limits, ServeSettings
from headinfer.sessions.folder import remove_session

CHUNK = 128
FILLER = "The ship sailed on under a grey sky, and no one on deck said a word. " * 12
FACTS = {"bazuko": 40817, "tirelo": 93265, "mugapi": 57140}
BOOK = "".join(f"{FILLER}The magic number for {word} is {number}. " for word, number in FACTS.items()) + FILLER
QUESTIONS = [f"What is the magic number for {word}?" for word in FACTS]
LONG = FILLER * 2 + "The magic number for velona is 11733. " + FILLER


def settings(root, **changes):
    chosen = {"device": "cpu", "dtype": "float32", "chunk_tokens": CHUNK, "max_new_tokens": 20, **changes}
    return ServeSettings("embedded", root, **chosen)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("sessions")


@pytest.fixture(scope="module")
def service(root):
    with Service(settings(root)) as service:
        yield service


@pytest.fixture(scope="module")
def book(service):
    """The name of a document that the service has read."""
    state = service.add_document("The Book.txt", BOOK.encode(), "a client")
    assert wait_until_read(service, state.name).status == "ready"
    return state.name


def generated(question, document="", **options):
    """The summary of `headinfer generate`."""
    job = generate.Job(
        "embedded",
        [document],
        question,
        max_new_tokens=20,
        chunk_tokens=CHUNK,
        device="cpu",
        dtype="float32",
        **options,
    )
    return generate.run(generate.prepare(job), on_text=lambda text: None)


def asked(root, name, *questions, **options):
    """The texts of `headinfer ask`."""
    summaries = []
    for question in questions:
        job = asking.AskJob(name, root, [question], device="cpu", max_new_tokens=20, **options)
        summaries += asking.ask(asking.prepare_ask(job), on_text=lambda text: None)
    return [summary.text for summary in summaries]


# -- answers -----------------------------------------------------------------------------------------------------------


def test_a_short_chat_is_answered_as_by_generate(service):
    found = Asked(service, messages=QUESTIONS[0])
    expected = generated(QUESTIONS[0])
    assert found.text == expected.text
    assert isinstance(found.events[0], Queued)
    assert found.last == Done("stop", expected.tokens_in, 0, expected.tokens_out)
    assert sum(isinstance(event, Text) for event in found.events) > 3


@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(temperature=0.8, seed=3), Sampling(stop=("7",)), Sampling(ignore_eos=True)],
    ids=["greedy", "sampled", "stop", "ignore_eos"],
)
def test_a_long_prompt_is_read_in_steps_and_answered_as_by_generate(service, sampling):
    prompt = f"{LONG}\n\nWhat is the magic number for velona?"
    expected = generated("What is the magic number for velona?", LONG, sampling=sampling)
    service._caches.clear()
    found = Asked(service, prompt=prompt, sampling=sampling)
    assert found.text == expected.text
    assert found.last.completion_tokens == expected.tokens_out
    progress = [event.tokens for event in found.events if isinstance(event, Prefill)]
    assert progress == list(range(0, found.last.prompt_tokens, CHUNK))
    assert found.last.finish_reason == ("length" if sampling.ignore_eos else "stop")


def test_token_ids_are_continued(service):
    ids = service._served.tokenizer("It was a dark night").input_ids
    assert Asked(service, prompt=ids).text == Asked(service, prompt="It was a dark night").text


def test_the_next_turn_reads_its_new_tokens_only(service):
    messages = [{"role": "user", "content": f"{LONG}\n\nWhat is the magic number for velona?"}]
    first = Asked(service, messages=messages)
    messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "And once more?"}]
    with counted_tokens(service) as read:
        second = Asked(service, messages=messages, max_new_tokens=1)
        assert second.last.finish_reason == "length"
    new = second.last.prompt_tokens - first.last.prompt_tokens - first.last.completion_tokens
    assert second.last.cached_tokens == first.last.prompt_tokens + first.last.completion_tokens - 1
    assert sum(read) == new + 1  # the last token of an answer is generated, and not read
    with counted_tokens(service) as read:
        again = Asked(service, messages=messages, max_new_tokens=1)
        assert again.text == second.text
    assert again.last.prompt_tokens - again.last.cached_tokens == sum(read) <= CHUNK  # from the last checkpoint on


def test_an_earlier_turn_that_has_changed_is_cut_off(service):
    first = Asked(service, prompt=f"{LONG} A", max_new_tokens=3)
    changed = Asked(service, prompt=f"{LONG} B and C", max_new_tokens=3)
    assert changed.last.cached_tokens >= first.last.prompt_tokens - CHUNK
    service._caches.clear()
    assert Asked(service, prompt=f"{LONG} B and C", max_new_tokens=3).text == changed.text


def test_a_request_that_is_cancelled_while_it_is_read_keeps_what_was_read(service):
    found = []

    def cancel(event):
        if isinstance(event, Prefill) and event.tokens >= 2 * CHUNK:
            found[0].work.cancel()

    ready = threading.Event()
    asked_for = f"Once more. {LONG}"
    found.append(Asked(service, prompt=asked_for, on_event=lambda event: ready.wait(60) and cancel(event)))
    ready.set()
    assert found[0].last.finish_reason == "cancelled"
    assert found[0].events[-2].tokens == 2 * CHUNK
    again = Asked(service, prompt=f"Once more. {LONG}", max_new_tokens=1)
    assert again.last.cached_tokens == 2 * CHUNK


def test_a_request_that_is_cancelled_while_it_is_answered_ends_with_the_next_token(service):
    found = []
    ready = threading.Event()

    def cancel(event):
        ready.wait(60)
        if isinstance(event, Text):
            found[0].work.cancel()

    found.append(Asked(service, prompt=LONG[:300], max_new_tokens=2000, on_event=cancel))
    ready.set()
    assert found[0].last.finish_reason == "cancelled"
    assert found[0].last.completion_tokens < 50
    assert Asked(service, prompt=LONG[:300], max_new_tokens=1).last.finish_reason == "length"


# -- documents ---------------------------------------------------------------------------------------------------------


def test_a_document_is_the_session_that_read_makes(service, book, root, tmp_path):
    (tmp_path / "The Book.txt").write_text(BOOK)
    job = ReadJob(
        "embedded",
        read_documents([tmp_path / "The Book.txt"]),
        "same",
        tmp_path / "sessions",
        chunk_tokens=CHUNK,
        device="cpu",
        dtype="float32",
    )
    read(prepare_read(job))
    ours, theirs = root / book, tmp_path / "sessions" / "same"
    assert sorted(path.name for path in ours.iterdir()) == sorted(path.name for path in theirs.iterdir())
    for path in theirs.iterdir():
        assert (ours / path.name).read_bytes() == path.read_bytes(), path.name
    state = service.document(book)
    assert (state.filename, state.nbytes, state.characters) == ("The Book.txt", len(BOOK.encode()), len(BOOK))
    assert state.tokens == state.of == json.loads((ours / "manifest.json").read_text())["tokens"]
    assert state.disk_bytes > 0
    assert state in service.documents()


def test_questions_are_answered_as_by_ask(service, book, root):
    expected = asked(root, book, *QUESTIONS)
    for question, text in zip(QUESTIONS, expected, strict=True):
        found = Asked(service, messages=question, session=book)
        assert found.text == text
        assert found.last.cached_tokens == service.document(book).tokens
    assert all(str(number) in text for number, text in zip(FACTS.values(), expected, strict=True))


def test_a_conversation_about_a_document_reads_its_new_tokens_only(service, book):
    messages = [{"role": "user", "content": QUESTIONS[0]}]
    first = Asked(service, messages=messages, session=book)
    messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": QUESTIONS[1]}]
    with counted_tokens(service) as read:
        second = Asked(service, messages=messages, session=book)
        assert str(FACTS["tirelo"]) in second.text
    before = first.last.prompt_tokens + first.last.completion_tokens - 1
    assert second.last.cached_tokens == before
    assert read[0] == second.last.prompt_tokens - before


def test_a_prompt_that_begins_like_a_document_begins_there(service, book):
    service._caches.clear()
    found = Asked(service, messages=f"{BOOK}\n\n{QUESTIONS[2]}")
    assert str(FACTS["mugapi"]) in found.text
    assert found.last.cached_tokens == service.document(book).tokens


def test_waiting_questions_are_answered_in_one_batch(service, book, root):
    expected = asked(root, book, *QUESTIONS)
    gate = threading.Event()
    blocker = Asked(service, prompt="Hello", max_new_tokens=2, on_event=lambda event: gate.wait(60))
    found = [Asked(service, f"client {at}", messages=text, session=book) for at, text in enumerate(QUESTIONS)]
    gone = Asked(service, "another", messages="Whatever is asked here", session=book)
    gone.work.cancel()
    other = Asked(service, messages=QUESTIONS[0], session=book, sampling=Sampling(repetition_penalty=1.1))
    with counted_tokens(service) as read:
        gate.set()
        assert [one.text for one in found] == expected
        assert other.text
    assert gone.last.finish_reason == "cancelled"
    assert blocker.text
    longest = max(one.last.prompt_tokens for one in found) - found[0].last.cached_tokens
    assert sorted(read)[-2:] == sorted([longest, other.last.prompt_tokens - other.last.cached_tokens])
    assert found[2].events[0] == Queued(2)


def test_a_row_that_is_cancelled_leaves_its_batch(service, book, root):
    expected = asked(root, book, QUESTIONS[0])[0]
    gate = threading.Event()
    blocker = Asked(service, prompt="Hello", max_new_tokens=2, on_event=lambda event: gate.wait(60))
    found = Asked(service, messages=QUESTIONS[0], session=book)
    rows = []

    def leave(event):
        if isinstance(event, Text):
            rows[0].work.cancel()

    rows.append(Asked(service, messages=QUESTIONS[1], session=book, max_new_tokens=500, on_event=leave))
    gate.set()
    assert blocker.text
    assert found.text == expected
    assert rows[0].last.finish_reason == "cancelled"
    assert rows[0].last.completion_tokens <= 2


def test_a_question_waits_until_its_document_is_read(service, root):
    text = BOOK.replace("ship", "boat")
    state = service.add_document("later.txt", text.encode(), "a client")
    found = Asked(service, messages=QUESTIONS[1], session=state.name)
    gone = Asked(service, messages=QUESTIONS[1], session=state.name)
    gone.work.cancel()
    assert str(FACTS["tirelo"]) in found.text
    assert gone.last.finish_reason == "cancelled"
    progress = [event for event in found.events if isinstance(event, Prefill)]
    assert len(progress) > 3
    assert {event.of for event in progress[1:]} == {found.last.prompt_tokens}
    assert not (root / ".uploads" / state.name).exists()
    assert service.add_document("later.txt", text.encode(), "another") == service.document(state.name)
    other = service.add_document("later.txt", b"Another text of this name.", "another")
    assert other.name == f"{state.name}-2"
    wait_until_read(service, other.name)
    for name in (state.name, other.name):
        service.remove_document(name)
        assert not (root / name).exists()
        with pytest.raises(NotFoundError, match="there is no document"):
            service.document(name)
        with pytest.raises(NotFoundError):
            Asked(service, messages="What?", session=name)


def test_a_document_that_is_removed_while_it_is_asked_is_forgotten(service):
    name = service.add_document("secret.txt", BOOK.replace("ship", "raft").encode(), "a client").name
    wait_until_read(service, name)

    def remove(event):
        if isinstance(event, Text) and name in [state.name for state in service.documents()]:
            service.remove_document(name)

    found = Asked(service, messages=QUESTIONS[0], session=name, on_event=remove)
    assert str(FACTS["bazuko"]) in found.text
    assert isinstance(Asked(service, prompt="Hello", max_new_tokens=1).last, Done)
    assert all(kept.session != name for kept in service._caches._kept)
    assert name not in service._library._manifests


@pytest.mark.parametrize("sampling", [Sampling(ignore_eos=True), Sampling(temperature=0.9, seed=5, ignore_eos=True)])
def test_a_long_answer_lets_other_clients_go_on_and_is_the_same(service, sampling):
    """Its turns change neither its tokens nor its end, and a short answer to another client does not wait for it."""
    request = {"prompt": "It was a dark night", "max_new_tokens": 90, "sampling": sampling}
    alone = Asked(service, **request)
    ended = []
    others = []
    is_over = threading.Event()

    def note(event):
        if isinstance(event, Text) and not others:
            others.append(Asked(service, messages=QUESTIONS[0], client="another", on_event=short))
        if isinstance(event, Done):
            ended.append("long")
            is_over.set()

    def short(event):
        if isinstance(event, Done):
            ended.append("short")

    found = Asked(service, on_event=note, **request)
    assert found.text == alone.text
    assert (found.last.finish_reason, found.last.completion_tokens) == ("length", 90)
    assert found.last.prompt_tokens == alone.last.prompt_tokens
    assert is_over.wait(60)
    assert ended == ["short", "long"]


def test_a_stop_string_that_two_turns_share_ends_an_answer(service):
    greedy = Sampling(ignore_eos=True)
    request = {"prompt": "It was a dark night", "sampling": greedy, "max_new_tokens": 40}
    tokens = service._served.tokenizer(Asked(service, **request).text, add_special_tokens=False).input_ids
    stop = service._served.tokenizer.decode(tokens[28:36])  # a turn has 32 tokens
    others = []

    def note(event):
        if isinstance(event, Text) and not others:
            others.append(Asked(service, messages=QUESTIONS[0], client="another"))

    request["sampling"] = Sampling(ignore_eos=True, stop=(stop,))
    found = Asked(service, on_event=note, **(request | {"max_new_tokens": 300}))
    assert found.last.finish_reason == "stop"
    assert 32 < found.last.completion_tokens < 45
    assert isinstance(others[0].last, Done)


def test_a_paused_answer_can_be_cancelled(service):
    """What was told until then is all of the answer, and its client hears its end."""
    others = []

    def note(event):
        if isinstance(event, Text) and not others:
            others.append(Asked(service, messages=QUESTIONS[0], client="another", on_event=cancel))

    def cancel(event):
        if isinstance(event, Done):
            found.work.cancel()

    ready = threading.Event()
    found = Asked(
        service,
        prompt="It was a dark night",
        max_new_tokens=300,
        sampling=Sampling(ignore_eos=True),
        on_event=lambda event: ready.wait(60) and note(event),
    )
    ready.set()
    assert found.last.finish_reason == "cancelled"
    assert 32 <= found.last.completion_tokens < 300


def test_the_text_of_a_document(service, book):
    assert service.document_text(book) == BOOK
    assert service.document_text(book, 10, 20) == BOOK[10:20]
    assert service.document_text(book, len(BOOK) - 3, len(BOOK) + 100) == BOOK[-3:]
    with pytest.raises(UsageError, match="are no range"):
        service.document_text(book, 5, 4)


def test_a_document_with_the_name_of_a_removed_one_is_another_document(service):
    """The names of its session and checkpoint, and the numbers of its tokens, are the same."""
    numbers = {}
    for number in ("11111", "22222"):
        state = service.add_document("same.txt", f"The magic number for velona is {number}.".encode(), "a client")
        assert state.name == "same"
        wait_until_read(service, "same")
        text = service.document_text("same")
        numbers[number] = (text, service._library.ids("same").tolist())
        service.remove_document("same")
    assert [text for text, _ in numbers.values()] == [f"The magic number for velona is {n}." for n in numbers]
    assert numbers["11111"][1] != numbers["22222"][1]


def test_a_name_is_free_when_all_of_the_removed_document_is_gone(service, monkeypatch):
    """A document that comes while one of the same name is removed has another name, and none of its files are lost."""
    state = service.add_document("early.txt", b"The first text.", "a client")
    wait_until_read(service, state.name)
    added = []

    def remove(folder):
        remove_session(folder)
        added.append(service.add_document("early.txt", b"The second text.", "a client").name)

    monkeypatch.setattr("headinfer.serve.service.remove_session", remove)
    service.remove_document(state.name)
    assert added == [f"{state.name}-2"]
    assert wait_until_read(service, added[0]).status == "ready"
    assert service.document_text(added[0]) == "The second text."
    with pytest.raises(NotFoundError):
        service.remove_document(state.name)


def test_where_an_answer_came_from(service, book):
    found = Asked(service, messages=QUESTIONS[1], session=book, where=True)
    assert isinstance(found.last, Done)
    passages = found.until(Where).passages
    assert str(FACTS["tirelo"]) in passages[0].text
    assert BOOK[passages[0].start : passages[0].stop] == passages[0].text
    assert passages[0].file == "The Book.txt"
    with pytest.raises(UsageError, match="name a document"):
        Asked(service, messages="What?", where=True)


def test_an_answer_whose_passages_cannot_be_told_is_whole(service, book, monkeypatch):
    def refuse(*given):
        raise UnsupportedError("this model's answers cannot be computed again")

    alone = Asked(service, messages=QUESTIONS[1], session=book)
    monkeypatch.setattr("headinfer.serve.answering.passages", refuse)
    found = Asked(service, messages=QUESTIONS[1], session=book, where=True)
    assert found.text == alone.text
    assert found.until(Where) == Where((), "this model's answers cannot be computed again")


def test_a_document_without_text_fails_and_is_forgotten(service):
    state = service.add_document("picture.bin", b"\x00\x01\x02\xff" * 100, "a client")
    with pytest.raises(HeadinferError, match="not UTF-8 text"):
        raise SessionError(wait_until_read(service, state.name).error)
    with pytest.raises(SessionError, match="not UTF-8 text"):
        Asked(service, messages="What?", session=state.name)
    service.remove_document(state.name)
    with pytest.raises(UsageError, match="the document is empty"):
        service.add_document("empty.txt", b"", "a client")


def test_sessions_of_the_command_line_are_served(service, root):
    common = {"chunk_tokens": 64, "device": "cpu", "dtype": "float32"}
    read(prepare_read(ReadJob("embedded", BOOK, "by-hand", root, **common)))
    assert service.document("by-hand").status == "ready"
    assert Asked(service, messages=QUESTIONS[0], session="by-hand").text == asked(root, "by-hand", QUESTIONS[0])[0]
    assert service.document_text("by-hand") == BOOK
    kept = asking.AskJob("by-hand", root, [QUESTIONS[0]], device="cpu", max_new_tokens=20, keep=True)
    asking.ask(asking.prepare_ask(kept), on_text=lambda text: None)
    found = Asked(service, messages=QUESTIONS[1], session="by-hand")
    assert found.text == asked(root, "by-hand", QUESTIONS[1])[0]
    read(prepare_read(ReadJob("random:tiny-llama?layers=1", BOOK[:100], "other-model", root, **common)))
    assert service.document("other-model").status == "failed"
    with pytest.raises(SessionError, match="another model"):
        Asked(service, messages="What?", session="other-model")
    with pytest.raises(NotFoundError, match="not a valid session name"):
        Asked(service, messages="What?", session="../by-hand")


# -- the queue and errors ----------------------------------------------------------------------------------------------


def test_errors_end_one_request_only(service, monkeypatch, caplog):
    def failing(error):
        def fail(*args, **kwargs):
            raise error

        return fail

    for error, kind, message in (
        (ZeroDivisionError("a bug"), HeadinferError, "its log says why"),
        (MemoryError("out of memory"), CapacityError, "not enough memory"),
        (CapacityError(f"no room in {service.settings.root}/book"), CapacityError, "no room in book"),
    ):
        with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
            patch.setattr(service._answerer, "_answer", failing(error))
            failed = Asked(service, prompt="Hello").last
        assert isinstance(failed, Failed)
        assert type(failed.error) is kind
        assert message in str(failed.error)
        assert isinstance(Asked(service, prompt="Hello").last, Done)
    assert "a bug" in caplog.text


def test_a_client_whose_function_fails_is_cancelled(service, caplog):
    def fail(event):
        if isinstance(event, Text):
            raise TypeError("the client is gone")

    with caplog.at_level(logging.ERROR):
        assert Asked(service, prompt="Hello", max_new_tokens=1000, on_event=fail).last.finish_reason == "cancelled"
    assert "the client is gone" in caplog.text


@pytest.mark.parametrize(
    ("request_fields", "message"),
    [
        ({}, "either messages or a prompt"),
        ({"messages": "a", "prompt": "b"}, "either messages or a prompt"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": "a", "max_new_tokens": 0}, "ask for 1 to"),
        ({"prompt": [99999]}, "token id"),
        ({"messages": [{"role": "king", "content": "a"}]}, "role 'king'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "has a part"),
        ({"prompt": "a", "sampling": Sampling(draft="embedded")}, "draft model"),
    ],
)
def test_invalid_requests_are_refused_at_once(service, request_fields, message):
    with pytest.raises(UsageError, match=message):
        Asked(service, **request_fields)


def test_the_state_and_the_bounds_of_memory(service):
    for number in range(8):
        assert isinstance(Asked(service, prompt=f"{number} {LONG[:400]}", max_new_tokens=2).last, Done)
    assert len(service._caches) <= service.settings.caches_kept
    before = service.state()
    for number in range(8):
        assert isinstance(Asked(service, prompt=f"{number} {LONG[:400]}!", max_new_tokens=2).last, Done)
    after = service.state()
    assert after.host_kv_bytes + after.device_kv_bytes <= before.host_kv_bytes + before.device_kv_bytes
    assert after.completion_tokens_total == before.completion_tokens_total + 16
    assert after.prompt_tokens_total > before.prompt_tokens_total
    assert after.seconds_prefill_total > before.seconds_prefill_total
    assert after.tokens_per_s > 0
    assert (after.model, after.waiting, after.running) == ("embedded", 0, 0)
    assert isinstance(Asked(service, prompt=LONG, max_new_tokens=2).last, Done)
    assert service.state().cpu_bytes_total > after.cpu_bytes_total, "the CPU reads KV in place"
    assert service.state().link_bytes_total == 0


# -- services of their own ---------------------------------------------------------------------------------------------


def test_a_document_goes_on_after_a_restart(tmp_path):
    """The first service ends in the middle of it, with a queue that was full."""
    is_reading = threading.Event()
    goes_on = threading.Event()

    def pause(event):
        if isinstance(event, Prefill) and event.tokens >= 2 * CHUNK:
            is_reading.set()
            goes_on.wait(60)

    with Service(settings(tmp_path, queue_limit=2, limits=Limits(document_bytes=10_000))) as service:
        state = service.add_document("book.txt", BOOK.encode(), "a client")
        found = [Asked(service, messages=QUESTIONS[0], session=state.name, on_event=pause)]
        assert is_reading.wait(60)
        found.append(Asked(service, "another", messages=QUESTIONS[0], session=state.name))
        with pytest.raises(QueueFullError, match="2 requests wait already") as full:
            Asked(service, "another", messages="Hello")
        assert full.value.retry_after_s >= 1
        with pytest.raises(UsageError, match="send a shorter one"):
            service.add_document("long.txt", b"a" * 10_001, "a client")
        closing = threading.Thread(target=service.close)
        closing.start()
        while service.is_ready:
            closing.join(0.01)
        goes_on.set()
        closing.join()
    assert [one.last.finish_reason for one in found] == ["cancelled"] * 2
    with pytest.raises(StateError, match="shut down"):
        service.submit(Ask("a client", prompt="Hello"), lambda event: None)
    held = json.loads((tmp_path / "book" / "manifest.json").read_text())["tokens"]
    assert (tmp_path / ".uploads" / "book" / "data").read_bytes() == BOOK.encode()
    (tmp_path / ".uploads" / "killed").mkdir()
    (tmp_path / ".uploads" / "killed" / "data").write_text("half of a docu")
    with Service(settings(tmp_path)) as service:
        found = Asked(service, messages=QUESTIONS[0], session="book")
        assert str(FACTS["bazuko"]) in found.text
        first = next(event for event in found.events if isinstance(event, Prefill) and event.tokens)
        assert held <= first.tokens < service.document("book").tokens
        assert service.document("book").status == "ready"
        assert [path.name for path in tmp_path.iterdir() if path.name != ".uploads"] == ["book"]
        assert [path.name for path in (tmp_path / ".uploads").iterdir()] == [".server"]
