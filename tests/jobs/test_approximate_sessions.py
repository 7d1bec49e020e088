"""Commands with --kv-dtype: each says that KV is approximate, and sessions neither mix nor go on as exact ones."""

import json

import pytest

MODEL = "random:tiny-llama?layers=2&hidden=64&intermediate=64&heads=4&kv_heads=2"
SAYS = "is approximate: answers are not exactly those of the model"


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("It was a bright cold day in April, and the clocks were striking.\n" * 20, encoding="utf-8")
    return path


def test_a_session_in_int8(run_command, book, tmp_path):
    root = ("--sessions", tmp_path / "sessions")
    read = ("read", MODEL, "--file", book, *root, "--session")
    code, out, err = run_command(*read, "exact", "--json")
    assert code == 0
    assert "approximate" not in out
    exact = json.loads(out)
    code, out, err = run_command(*read, "small", "--kv-dtype", "int8", "--json")
    assert code == 0
    assert "stored in int8" in err
    assert "are stored already" not in err, "an exact session begins with the same tokens, and is not used"
    found = json.loads(out)
    assert (found["kv_dtype"], found["approximate"]) == ("int8", True)
    assert found["disk_bytes"] < 0.65 * exact["disk_bytes"]
    code, out, err = run_command(*read, "other", "--kv-dtype", "int8")
    assert "of the session small" in err, "sessions with the same kv_dtype share what they begin with"
    code, out, _ = run_command("session", "list", *root)
    assert "approximate (int8)" in out
    assert json.loads((tmp_path / "sessions" / "small" / "manifest.json").read_text())["version"] == 2
    assert json.loads((tmp_path / "sessions" / "exact" / "manifest.json").read_text())["version"] == 1
    ask = ("ask", *root, "When?", "--max-new-tokens", 3, "--session")
    code, out, err = run_command(*ask, "small", "--keep", "--json")
    assert code == 0, err
    assert SAYS in err
    assert json.loads(out)["answers"][0]["approximate"]
    code, out, err = run_command(*ask, "exact", "--json")
    assert SAYS not in err
    assert "approximate" not in json.loads(out)["answers"][0]
    code, _, err = run_command(*read, "exact", "--kv-dtype", "int4")
    assert code == 2
    assert "was begun with --kv-dtype auto, and goes on with the same" in err
    code, _, err = run_command(*read, "other", "--kv-dtype", "auto")
    assert code == 2
    assert "was read approximately (int8), and does not go on exactly: leave out --kv-dtype to go on as it" in err
    code, _, err = run_command(*read, "exact", "--kv-dtype", "auto")
    assert code == 0, err
    code, _, err = run_command(*read, "other")
    assert code == 0
    assert SAYS in err, "without the option the session goes on as it was begun"
    code, _, err = run_command("chat", "--device", "cpu", *root, "--session", "other", "--kv-dtype", "auto")
    assert code == 2
    assert "holds its KV in int8, which is approximate" in err


def test_generate_eval_and_plan(run_command, book, tmp_path):
    code, out, err = run_command(
        "generate", MODEL, "--file", book, "--prompt", "When?", "--max-new-tokens", 2, "--kv-dtype", "int4", "--json"
    )
    assert code == 0, err
    assert SAYS in err
    found = json.loads(out)
    assert found["approximate"]
    assert found["options"]["kv_dtype"] == "int4"
    assert found["plan"]["kv_dtype"] == "int4"
    niah = (
        "eval",
        "niah",
        MODEL,
        "--lengths",
        1024,
        "--depths",
        50,
        "--text",
        book,
        "--out",
        tmp_path / "niah",
        "--json",
    )
    code, out, err = run_command(*niah, "--kv-dtype", "int8")
    assert code == 0, err
    assert SAYS in err
    assert '"approximate": true' in (tmp_path / "niah" / "results.json").read_text(encoding="utf-8")
    code, out, err = run_command("plan", "llama-3.1-8b", "--gpu", "rtx4090", "--ram", "64GB", "--kv-dtype", "int8")
    assert code == 0
    assert "KV is approximate" in out
    forms = json.loads(run_command("plan", "llama-3.1-8b", "--gpu", "rtx4090", "--ram", "64GB", "--json")[1])[
        "kv_dtypes"
    ]
    assert [form["token_bytes"] for form in forms] == [131_072, 68_608, 35_840]
    assert forms[2]["longest_tokens"] > 3.5 * forms[0]["longest_tokens"]
    assert forms[1]["decode_s_per_token"] < 0.6 * forms[0]["decode_s_per_token"]
    code, out, err = run_command("generate", MODEL, "--prompt", "x", "--kv-dtype", "int3")
    assert code == 2
    assert "--kv-dtype is int3: it must be one of auto, int8, int4" in err
