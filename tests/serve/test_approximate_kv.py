"""A server with --kv-dtype: documents are read and answered with it, and exact and approximate sessions do not mix."""

from contextlib import closing

import pytest
from core_client import Asked, wait_until_read

from headinfer.engine.options import Options
from headinfer.errors import SessionError, UnsupportedError
from headinfer.jobs.ask import AskJob, ask, prepare_ask
from headinfer.jobs.read import ReadJob, prepare_read, read
from headinfer.serve.files import file_json
from headinfer.serve.service import Service
from headinfer.serve.settings import ServeSettings
from headinfer.serve.uploads import Upload, Uploads
from headinfer.sessions.manifest import Manifest

MODEL = "random:tiny-llama?layers=2&hidden=64&intermediate=64&heads=4&kv_heads=2"
BOOK = "The ship sailed on under a grey sky, and no one on deck said a word. " * 12
SAYS = "is approximate: answers are not exactly those of the model"


def settings(root, **changes):
    return ServeSettings(MODEL, root, device="cpu", chunk_tokens=128, max_new_tokens=5, **changes)


def read_session(root, name, **options):
    read(prepare_read(ReadJob(MODEL, BOOK, name, root, chunk_tokens=128, device="cpu", options=Options(**options))))


def test_documents_are_read_and_answered_in_int8(tmp_path):
    read_session(tmp_path, "exact")
    with Service(settings(tmp_path, options=Options(kv_dtype="int8"))) as service:
        state = wait_until_read(service, service.add_document("book.txt", BOOK.encode(), "me").name)
        assert state.status == "ready"
        assert SAYS in state.approximation
        assert SAYS in file_json(state)["headinfer"]["approximation"]
        assert SAYS in service.state().approximation
        assert Manifest.read(tmp_path / state.name).kv_dtype == "int8"
        found = Asked(service, session=state.name, messages="What?")
        job = AskJob(state.name, tmp_path, ["What?"], device="cpu", max_new_tokens=5)
        assert found.text == ask(prepare_ask(job), on_text=lambda text: None)[0].text
        exact = service.document("exact")
        assert (exact.status, exact.approximation) == ("failed", "")
        assert exact.error == (
            "the session exact was read exactly, and this server reads approximately (int8): ask it with "
            "`headinfer ask`"
        )
        with pytest.raises(SessionError, match="was read exactly"):
            Asked(service, session="exact", messages="What?")


def test_an_exact_server_does_not_go_on_from_approximate_sessions(tmp_path):
    read_session(tmp_path, "small", kv_dtype="int4")
    read_session(tmp_path, "begun", kv_dtype="int8")
    with closing(Uploads(tmp_path)) as uploads:  # which a server with --kv-dtype int8 did not read to its end
        uploads.store(Upload("begun", "begun.txt", "me", len(BOOK), "", 0.0), BOOK.encode())
    with Service(settings(tmp_path)) as service:
        begun = wait_until_read(service, "begun")
        assert begun.error == (
            "the session begun was read approximately (int8), and this server reads exactly: remove it, or add the "
            "file under another name"
        )
        small = service.document("small")
        assert small.status == "failed"
        assert "was read approximately (int4), and this server reads exactly: ask it with" in small.error
        assert SAYS in small.approximation
        assert service.state().approximation == ""
        found = Asked(service, prompt=BOOK + BOOK)
        assert found.last.cached_tokens == 0, "a prompt does not begin with the KV of an approximate session"
        state = service.add_document("small", BOOK.encode(), "me")
        assert wait_until_read(service, state.name).status == "ready"
        assert state.name != "small"


def test_head_dims_that_do_not_fit_are_refused_before_the_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("headinfer.hf.models.ModelSource.load", lambda *_, **__: pytest.fail("it is loaded"))
    model = "random:tiny-llama?layers=1&hidden=48&intermediate=64&heads=4&kv_heads=2"
    with pytest.raises(UnsupportedError, match="cannot be stored in int8 or int4 for this model"):
        Service(ServeSettings(model, tmp_path, options=Options(kv_dtype="int8")))
