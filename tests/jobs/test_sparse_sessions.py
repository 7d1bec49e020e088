"""Commands and sessions with --sparse-heads: each says what is approximate, and patterns neither mix nor change."""

import json

import pytest
import torch
from core_client import Asked, wait_until_read

import headinfer
from headinfer.engine.options import Options
from headinfer.errors import ApproximationWarning, UsageError
from headinfer.hf.models import resolve
from headinfer.jobs import generate
from headinfer.jobs.ask import AskJob, ask, prepare_ask
from headinfer.jobs.read import ReadJob, prepare_read, read
from headinfer.serve.service import Service
from headinfer.serve.settings import ServeSettings
from headinfer.sessions.manifest import Manifest
from headinfer.utils.head_pattern import HeadPattern

MODEL = "random:tiny-llama?layers=3&hidden=64&intermediate=64&heads=4&kv_heads=2"
BOOK = "It was a bright cold day in April, and the clocks were striking.\n" * 12
PATTERN = HeadPattern(((0.9, 0.1), (0.0, 0.2), (0.7, 0.8)), sink_tokens=4, recent_tokens=32)
"""Layer 0 has one full head, layer 1 none, and layer 2 two."""
OTHER = HeadPattern(PATTERN.values, sink_tokens=4, recent_tokens=31)
SAYS = "3 of 6 KV heads see only the first 4 and the newest 32 tokens, which is approximate: answers are not exactly"
FORM = f"3 of 6 heads sparse, pattern {PATTERN.digest}"
CHUNK = 128


@pytest.fixture
def files(tmp_path):
    """The paths of the book and of two patterns."""
    paths = [tmp_path / name for name in ("book.txt", "pattern.json", "other.json")]
    contents = (BOOK, json.dumps(PATTERN.as_dict()), json.dumps(OTHER.as_dict()))
    for path, content in zip(paths, contents, strict=True):
        path.write_text(content, encoding="utf-8")
    return paths


@pytest.fixture(scope="module")
def model():
    return resolve(MODEL).load(dtype=torch.float32, device="cpu", seed=0)


def read_job(root, name="one", text=BOOK, **options):
    return ReadJob(MODEL, text, name, root, chunk_tokens=CHUNK, device="cpu", options=Options(**options))


def asked(root, name, **options):
    job = AskJob(name, root, ["When was it?"], device="cpu", max_new_tokens=6, **options)
    return ask(prepare_ask(job), on_text=lambda text: None)[0]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_commands_name_what_is_approximate(run_command, files, tmp_path):
    book, pattern, other = files
    root = ("--sessions", tmp_path / "sessions")
    begin = ("read", MODEL, "--file", book, *root, "--chunk-tokens", CHUNK, "--session")
    exact = json.loads(run_command(*begin, "exact", "--json")[1])
    code, out, err = run_command(*begin, "small", "--sparse-heads", pattern, "--json")
    assert code == 0, err
    assert SAYS in err
    assert "are stored already" not in err, "an exact session begins with the same tokens, and is not used"
    found = json.loads(out)
    assert found["approximate"]
    assert SAYS in found["approximation"]
    assert found["disk_bytes"] < 0.8 * exact["disk_bytes"]
    _, _, err = run_command(*begin, "equal", "--sparse-heads", pattern)
    assert "of the session small" in err, "sessions with the same pattern share what they begin with"
    code, _, err = run_command(*begin, "another", "--sparse-heads", other)
    assert code == 0, err
    assert "are stored already" not in err, "the pattern is another one"
    code, _, err = run_command(*begin, "small")
    assert code == 0
    assert SAYS in err, "without the option the session goes on as it was begun"
    for name, option, message in (
        ("small", other, f"was begun with the head pattern {PATTERN.digest}, and goes on with the same, not with"),
        ("exact", pattern, "was begun with all heads full, and goes on with the same, not with the head pattern"),
    ):
        code, _, err = run_command(*begin, name, "--sparse-heads", option)
        assert code == 2
        assert message in err
        assert "leave out --sparse-heads, or choose another name" in err
        chat = ("chat", "--device", "cpu", *root, "--session", name, "--sparse-heads", option)
        code, _, err = run_command(*chat)
        assert code == 2
        assert "leave --sparse-heads out, or read the document again into another session" in err
    assert f"approximate ({FORM})" in run_command("session", "list", *root)[1]
    assert FORM in run_command("session", "info", "small", *root)[1]
    facts = json.loads(run_command("session", "info", "small", *root, "--json")[1])
    assert facts["approximate"]
    assert facts["sparse_heads"] == {
        "streaming_share": 0.5,
        "sink_tokens": 4,
        "recent_tokens": 32,
        "digest": PATTERN.digest,
    }
    assert facts["arithmetic"]["sparse_heads"] == PATTERN.reduced().as_dict()
    assert json.loads((tmp_path / "sessions" / "small" / "manifest.json").read_text())["version"] == 2
    assert json.loads((tmp_path / "sessions" / "exact" / "manifest.json").read_text())["version"] == 1
    code, out, err = run_command(
        "ask", *root, "When was it?", "--max-new-tokens", 6, "--session", "small", "--keep", "--json"
    )
    assert code == 0, err
    assert SAYS in err
    answer = json.loads(out)["answers"][0]
    assert answer["approximate"]
    assert answer["stats"]["approximation"] == FORM
    code, _, err = run_command("session", "undo", "small", *root)
    assert code == 0, err
    run = ("generate", MODEL, "--file", book, "--prompt", "When was it?", "--max-new-tokens", 6)
    code, out, err = run_command(*run, "--sparse-heads", pattern, "--sparse-share", 0.4, "--json")
    assert code == 0, err
    assert "2 of 6 KV heads see only" in err
    found = json.loads(out)
    assert found["approximate"]
    assert found["options"]["sparse_heads"]["heads"] == [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]


def test_an_answer_is_that_of_generate_in_one_go(tmp_path):
    job = generate.Job(
        MODEL,
        [BOOK],
        "When was it?",
        max_new_tokens=6,
        chunk_tokens=CHUNK,
        device="cpu",
        options=Options(sparse_heads=PATTERN),
    )
    whole = generate.run(generate.prepare(job), on_text=lambda text: None).text
    read(prepare_read(read_job(tmp_path, sparse_heads=PATTERN)))
    assert asked(tmp_path, "one").text == whole
    kept = asked(tmp_path, "one", keep=True)
    assert kept.text == whole
    assert Manifest.read(tmp_path / "one").sparse_heads == PATTERN.reduced()


def test_an_interrupted_read_goes_on_with_equal_bytes(tmp_path):
    options = {"sparse_heads": PATTERN, "kv_dtype": "int8"}
    read(prepare_read(read_job(tmp_path / "whole", **options)))

    def interrupt(cache):
        if cache.get_seq_length() >= 3 * CHUNK:
            raise KeyboardInterrupt

    cut = tmp_path / "cut"
    assert read(prepare_read(read_job(cut, **options)), on_forward=interrupt).interrupted
    result = read(prepare_read(read_job(cut)))
    assert (result.resumed_at, result.tokens) == (3 * CHUNK, len(BOOK))
    assert contents(cut / "one") == contents(tmp_path / "whole" / "one")
    read(prepare_read(read_job(cut, "longer", BOOK + BOOK, **options)))
    read(prepare_read(read_job(tmp_path / "anew", "longer", BOOK + BOOK, **options)))
    assert asked(cut, "longer").text == asked(tmp_path / "anew", "longer").text


def test_caches_are_saved_loaded_and_refused(model, tmp_path):
    ids = torch.randint(0, 256, (1, 700), generator=torch.Generator().manual_seed(1))

    def logits(cache, part):
        with torch.inference_mode():
            return model(input_ids=part, past_key_values=cache, use_cache=True).logits

    with headinfer.enable(model, chunk_tokens=CHUNK):
        cache = headinfer.HeadCache(model.config, sparse_heads=PATTERN)
        exact = headinfer.HeadCache(model.config)
        assert not torch.allclose(logits(cache, ids[:, :600]), logits(exact, ids[:, :600]), atol=1e-4)
        cache.save(tmp_path / "one", ids[:, :600])
        exact.save(tmp_path / "two", ids[:, :600])
        with pytest.warns(ApproximationWarning, match="of the session .*: answers are not exactly those of the model"):
            loaded = headinfer.HeadCache.load(tmp_path / "one", model)
        loaded = headinfer.HeadCache.load(tmp_path / "one", model, sparse_heads=PATTERN)
        for one in (loaded, cache):
            one.crop(590)
        fork = loaded.fork()
        wanted = logits(cache, ids[:, 590:])
        assert torch.equal(logits(loaded, ids[:, 590:]), wanted)
        assert torch.equal(logits(fork, ids[:, 590:]), wanted)
        for folder, given in (("one", OTHER), ("one", None), ("two", PATTERN)):
            with pytest.raises(UsageError, match="leave sparse_heads out, or read the document again"):
                headinfer.HeadCache.load(tmp_path / folder, model, sparse_heads=given)
        loaded.save(tmp_path / "one", ids)
        again = headinfer.HeadCache.load(tmp_path / "one", model, sparse_heads=PATTERN)
        assert torch.equal(again.token_ids, ids)
        assert torch.equal(logits(again, ids[:, :5]), logits(cache, ids[:, :5]))


def test_a_server_reads_and_answers_with_the_pattern(tmp_path):
    read(prepare_read(read_job(tmp_path, "exact")))
    options = Options(sparse_heads=PATTERN)
    settings = ServeSettings(MODEL, tmp_path, device="cpu", chunk_tokens=CHUNK, max_new_tokens=6, options=options)
    with Service(settings) as service:
        assert SAYS in service.state().approximation
        assert f"and this server reads approximately ({FORM})" in service.document("exact").error
        state = wait_until_read(service, service.add_document("book.txt", BOOK.encode(), "me").name)
        assert (state.status, state.error) == ("ready", "")
        assert SAYS in state.approximation
        for _ in range(2):  # of the session, and of the cache that is kept
            assert Asked(service, session=state.name, messages="When was it?").text == asked(tmp_path, state.name).text
        prompt = BOOK + BOOK
        longer = Asked(service, prompt=prompt)
        assert Asked(service, prompt=prompt + "x").last.cached_tokens >= len(prompt) - CHUNK
        service._caches.clear()
        assert Asked(service, prompt=prompt).text == longer.text
