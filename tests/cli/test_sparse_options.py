"""--sparse-heads and --sparse-share: mistakes are found before a model is loaded, by all commands that have them."""

import pytest

from headinfer.hf.models import ModelSource

MODEL = "random:tiny-llama?layers=2&hidden=64&intermediate=64&heads=4&kv_heads=2"
SHARE_ALONE = "--sparse-share is 0.5, and --sparse-heads is not given: name the file of `headinfer heads` or of"


@pytest.fixture(autouse=True)
def never_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr(ModelSource, "load", lambda *_, **__: pytest.fail("the model is loaded"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text("It was a bright cold day in April, and the clocks were striking.\n")
    (tmp_path / "other.json").write_text('{"name": "not a pattern"}')


@pytest.mark.parametrize(
    "command",
    [
        ("generate", MODEL, "--prompt", "x"),
        ("read", MODEL, "--file", "book.txt", "--session", "one", "--sessions", "sessions"),
        ("chat", MODEL),
        ("serve", MODEL, "--sessions", "sessions"),
        ("eval", "niah", MODEL),
        ("eval", "ruler", MODEL),
        ("eval", "fidelity", MODEL, "--file", "book.txt"),
    ],
    ids=" ".join,
)
def test_mistakes(command, run_command):
    for options, message in (
        (("--sparse-share", 0.5), SHARE_ALONE),
        (("--sparse-heads", "missing.json"), "cannot read missing.json"),
        (("--sparse-heads", "other.json"), "other.json is not a head pattern"),
    ):
        code, out, err = run_command(*command, *options)
        assert (code, out) == (2, "")
        assert message in err
        assert len(err.splitlines()) == 1
