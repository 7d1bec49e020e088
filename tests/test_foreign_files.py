"""No command and no function replaces or removes a file that headinfer did not write.

Each place that writes, replaces or removes files runs here on a folder that holds files of other programs, some of them
with the names that headinfer uses itself. The last test finds every such place in the sources.
"""

import ast
import errno
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from families import tiny_model
from safetensors.torch import save_file

import headinfer
from headinfer import CapacityError, HeadCache, SessionError, UsageError
from headinfer.bench import gpu as gpu_bench
from headinfer.files import PARTIAL_SUFFIX, check_output, write_file, write_text
from headinfer.kv.disk import DiskFile
from headinfer.plan.hardware import HARDWARE, Hardware, is_probe
from headinfer.sessions.folder import Lock, remove_session
from headinfer.sessions.manifest import Manifest
from headinfer.sessions.ownership import LOCK_TEXT, own_files

MODEL = "random:tiny-llama?layers=2&hidden=64&intermediate=64&heads=4&kv_heads=2"
PNG = b"\x89PNG\r\n\x1a\n a picture of somebody else"
NAMES = {
    "block-000000.safetensors": None,  # see put_file()
    "model.safetensors": None,
    "block-000001.safetensors": b"",
    "end-000001.safetensors": b"not even safetensors",
    "end-000002.safetensors": (2**62).to_bytes(8, "little") + b"{}",
    "mine.safetensors": b"x" * 100,
    "manifest.json": b'{"format": "of another program", "files": []}',
    "manifest.json.partial": b"{",
    "lock": b"1234\n",
    "config.json": b"{}",
    "results.json": b'{"command": "train.py", "lines": []}',
    "results.json.partial": b"half a result",
    "results.md": b"# My results\n",
    "niah.png": PNG,
    "plan.png": PNG,
    "plan.png.partial": PNG,
    "hardware.json": b'{"source": "my own description"}',
    "book.tar": b"an archive",
    "book.tar.partial": b"half an archive",
    "notes.txt": b"headinfer eval headinfer plan headinfer probe",
    ".hidden": b"hidden",
}


def put_file(path, content):
    """content: bytes, or None for a safetensors file as other programs write it."""
    if content is None:
        save_file({"layers.0.k": torch.arange(12.0)}, path, {"format": "pt"})
    else:
        path.write_bytes(content)


def put(folder, *names):
    """Put files of other programs into a folder, all of NAMES if none is named."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names or NAMES:
        put_file(folder / name, NAMES[name])
    if not names:
        (folder / "checkpoints").mkdir()
        (folder / "checkpoints" / "weights.safetensors").write_bytes(b"weights")
    return folder


def content_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture
def cache(model):
    """A filled cache of an enabled model."""
    with headinfer.enable(model, chunk_tokens=128) as enabled, torch.inference_mode():
        cache = enabled.new_cache()
        model(input_ids=token_ids(300), past_key_values=cache, use_cache=True)
        yield cache


def token_ids(tokens):
    return torch.randint(0, 90, (1, tokens), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def command(capsys, monkeypatch, tmp_path):
    """Run a command in this process; returns its exit code, stdout and stderr."""
    from headinfer import cli

    monkeypatch.setenv("HEADINFER_SESSIONS", str(tmp_path / "sessions"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "300")

    def run(*arguments):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["headinfer", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as stopped:
            return stopped.code or 0, *capsys.readouterr()
        return 0, *capsys.readouterr()

    return run


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("It was a bright cold day in April, and the clocks were striking thirteen.\n" * 8)
    return path


@pytest.fixture
def kept(command, book, tmp_path):
    """A session `mybook` that `headinfer read` made."""
    code, _, err = command("read", MODEL, "--file", book, "--session", "mybook", "--chunk-tokens", 200)
    assert code == 0, err
    return tmp_path / "sessions" / "mybook"


# -- sessions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [(), *((name,) for name in NAMES)], ids=lambda names: "+".join(names) or "all")
def test_a_cache_is_not_saved_beside_foreign_files(cache, tmp_path, names):
    folder = put(tmp_path / "somebody's", *names)
    before = content_of(folder)
    with pytest.raises(SessionError, match="which no session of headinfer wrote: nothing was written or removed"):
        cache.save(folder, token_ids(300))
    assert content_of(folder) == before


def test_a_model_folder_keeps_its_weights(model, cache, tmp_path):
    model.save_pretrained(tmp_path)
    before = content_of(tmp_path)
    with pytest.raises(SessionError, match=r"holds config\.json and \d+ more, which no session"):
        cache.save(tmp_path)
    assert content_of(tmp_path) == before


@pytest.mark.parametrize("kind", ["a file", "a link to a file", "a link to a folder", "a folder"])
@pytest.mark.parametrize("name", ["block-000000.safetensors", "manifest.json", "lock", f"x{PARTIAL_SUFFIX}"])
def test_what_is_no_regular_file_is_foreign(cache, tmp_path, kind, name):
    """Except what carries a name that only headinfer uses, if it is a regular file."""
    folder, other = tmp_path / "folder", tmp_path / "other"
    folder.mkdir()
    other.mkdir()
    (other / "file").write_bytes(b"somebody's")
    if kind == "a file":
        (folder / name).write_bytes(b"somebody's")
    elif kind == "a link to a file":
        (folder / name).symlink_to(other / "file")
    elif kind == "a link to a folder":
        (folder / name).symlink_to(other)
    else:
        (folder / name).mkdir()
    if kind == "a file" and name.endswith(PARTIAL_SUFFIX):
        cache.save(folder)
        assert not (folder / name).exists()
        return
    with pytest.raises(SessionError, match="which no session of headinfer wrote"):
        cache.save(folder)
    assert [path.name for path in folder.iterdir()] == [name]
    assert (other / "file").read_bytes() == b"somebody's"


STRAYS = {
    "notes.txt": NAMES["notes.txt"],
    "mine.safetensors": NAMES["mine.safetensors"],
    "block-000099.safetensors": None,
    "end-000099.safetensors": NAMES["end-000001.safetensors"],
}


@pytest.mark.parametrize("name", STRAYS)
def test_a_foreign_file_in_a_session_stays_and_stops_what_writes(command, kept, book, tmp_path, name):
    put_file(kept / name, STRAYS[name])
    before = content_of(kept)
    for arguments in (
        ("session", "rm", "mybook"),
        ("ask", "--session", "mybook", "--keep", "--max-new-tokens", 2, "When?"),
        ("read", MODEL, "--file", book, "--session", "mybook"),
    ):
        code, out, err = command(*arguments)
        assert (code, out) == (2, ""), arguments
        assert f"holds {name}, which no session of headinfer wrote" in err, arguments
        assert content_of(kept) == before, arguments
    # What only reads goes on, and an archive holds the session's own files.
    assert command("ask", "--session", "mybook", "--max-new-tokens", 2, "When?")[0] == 0
    assert command("session", "verify", "mybook")[0] == 0
    assert command("session", "export", "mybook", tmp_path / "mybook.tar")[0] == 0
    with tarfile.open(tmp_path / "mybook.tar") as tar:
        assert f"mybook/{name}" not in tar.getnames()
    assert content_of(kept) == before


def test_a_file_that_comes_while_a_session_is_written_stays(model, cache, tmp_path):
    """Between the lock and the checkpoint: under a name that the checkpoint needs, and under one that it cleans up."""
    from headinfer.hf.session import SessionWriter

    with SessionWriter(tmp_path / "book", model, {}, {}) as writer:
        put(tmp_path / "book", "end-000001.safetensors", "end-000002.safetensors", "mine.safetensors")
        before = content_of(tmp_path / "book")
        writer.checkpoint(cache)
        with pytest.raises(SessionError, match=r"end-000001\.safetensors was not written by headinfer"):
            writer.finish()
        assert before.items() <= content_of(tmp_path / "book").items()
        (tmp_path / "book" / "end-000001.safetensors").unlink()
        writer.checkpoint(cache)
        writer.finish()
        for name in ("end-000002.safetensors", "mine.safetensors"):
            assert (tmp_path / "book" / name).read_bytes() == NAMES[name]
    assert Manifest.read(tmp_path / "book").tokens == 300


def test_a_shared_prefix_replaces_nothing(command, kept, book, tmp_path, monkeypatch):
    """A second session takes files over from the first one while another program writes into its folder."""
    from headinfer import reading

    target, taken = tmp_path / "sessions" / "second", reading.take_over

    def meanwhile(*arguments):
        put(target, "block-000000.safetensors", "end-000001.safetensors", "mine.safetensors")
        return taken(*arguments)

    monkeypatch.setattr(reading, "take_over", meanwhile)
    code, _, err = command("read", MODEL, "--file", book, "--session", "second")
    assert code == 2
    assert "block-000000.safetensors was not written by headinfer" in err
    assert sorted(path.name for path in target.iterdir()) == [
        "block-000000.safetensors", "end-000001.safetensors", "lock", "mine.safetensors",
    ]  # fmt: skip
    assert (target / "end-000001.safetensors").read_bytes() == NAMES["end-000001.safetensors"]


def test_only_sessions_are_removed(command, tmp_path):
    root = tmp_path / "sessions"
    put(root / "novelist")
    put(root / "locked", "lock")
    put(root / "listed", "manifest.json")
    (root / "empty").mkdir()
    (root / "waiting").mkdir()
    (root / "waiting" / "lock").touch()
    before = content_of(root)
    for name in ("novelist", "locked", "listed", "empty", "waiting"):
        code, _, err = command("session", "rm", name)
        assert code == 2, name
        assert f"there is no session {name}" in err
        assert content_of(root) == before
        assert (root / name).is_dir()


def test_a_model_folder_is_not_read_into(command, book, model, tmp_path, monkeypatch):
    from headinfer.hf.models import ModelSource

    model.save_pretrained(tmp_path / "models" / "novelist")
    before = content_of(tmp_path / "models")
    monkeypatch.setattr(ModelSource, "load", lambda *_, **__: pytest.fail("weights were loaded first"))
    code, out, err = command("read", MODEL, "--file", book, "--sessions", tmp_path / "models", "--session", "novelist")
    assert (code, out) == (2, "")
    assert "which no session of headinfer wrote" in err
    assert content_of(tmp_path / "models") == before


# -- what is a session's own ------------------------------------------------------------------------------------------


def test_leftovers_of_a_killed_write_are_removed_by_the_next_checkpoint(model, cache, tmp_path):
    cache.save(tmp_path / "book")
    data = sorted((tmp_path / "book").glob("block-*"))[0]
    shutil.copy(data, tmp_path / "book" / "block-000077.safetensors")
    shutil.copy(data, tmp_path / "book" / "end-000077.safetensors")
    for name in ("manifest.json", "block-000078.safetensors"):
        (tmp_path / "book" / (name + PARTIAL_SUFFIX)).write_bytes(b"half")
    loaded = HeadCache.load(tmp_path / "book", model)
    loaded.save(tmp_path / "book")
    named = {entry.name for entry in Manifest.read(tmp_path / "book").files()}
    assert {path.name for path in (tmp_path / "book").iterdir()} == {*named, "manifest.json", "lock"}


def test_a_data_file_that_was_damaged_is_still_the_sessions_own(model, cache, tmp_path):
    """The manifest names it, so it is replaced and removed although its header no longer speaks for it."""
    cache.save(tmp_path / "book")
    loaded = HeadCache.load(tmp_path / "book", model)
    (end,) = (tmp_path / "book").glob("end-*")
    end.write_bytes(b"damaged")
    loaded.save(tmp_path / "book")
    assert not end.exists()
    assert HeadCache.load(tmp_path / "book", model).get_seq_length() == 300


def test_sessions_of_earlier_versions_are_sessions(model, cache, tmp_path):
    """They have an empty lock, and a killed write of their manifest leaves manifest.json.partial."""
    cache.save(tmp_path / "book")
    folder = tmp_path / "book"
    (folder / "lock").write_bytes(b"")
    shutil.copy(folder / "manifest.json", folder / "manifest.json.partial")
    HeadCache.load(folder, model).save(folder)
    assert (folder / "lock").read_bytes() == LOCK_TEXT
    assert remove_session(folder)
    assert not folder.exists()


@pytest.mark.parametrize(
    "manifest", ['{\n "format": "headinfer session",\n "vers', '{"format": "headinfer session"}', None]
)
def test_a_damaged_session_can_be_removed(cache, tmp_path, manifest):
    cache.save(tmp_path / "book")
    path = tmp_path / "book" / "manifest.json"
    path.write_text(manifest) if manifest is not None else path.unlink()
    assert remove_session(tmp_path / "book")
    assert list(tmp_path.iterdir()) == []


def test_a_session_that_never_had_a_checkpoint_can_be_removed_and_written(cache, tmp_path):
    Lock(tmp_path / "book").release()
    assert own_files(tmp_path / "book") == ["lock"]
    assert remove_session(tmp_path / "book")
    Lock(tmp_path / "book").release()
    cache.save(tmp_path / "book")
    (tmp_path / "empty").mkdir()
    cache.fork().save(tmp_path / "empty")


def test_files_of_the_file_system_do_not_count(cache, tmp_path):
    folder = tmp_path / "book"
    folder.mkdir()
    for name in (".nfs000000000012", ".DS_Store"):
        (folder / name).write_bytes(b"the system's")
    cache.save(folder)
    assert not remove_session(folder), "the folder stays with them"
    assert sorted(path.name for path in folder.iterdir()) == [".DS_Store", ".nfs000000000012"]


def test_a_lock_that_its_holder_removed_locks_nothing(tmp_path, monkeypatch):
    """Opened before `session rm` removed it, locked after: the writer takes the file that is there now."""
    from headinfer.sessions import folder as sessions_folder

    locked, original = [], sessions_folder._lock

    def meanwhile(descriptor):
        if not locked:
            (tmp_path / "book" / "lock").unlink()
        locked.append(descriptor)
        return original(descriptor)

    monkeypatch.setattr(sessions_folder, "_lock", meanwhile)
    with Lock(tmp_path / "book"):
        assert len(locked) == 2
        with pytest.raises(SessionError, match="another process is writing"):
            Lock(tmp_path / "book")


# -- results ----------------------------------------------------------------------------------------------------------


def commands_with_output(path):
    """Commands that write a result to a file, with what they must not begin before they have looked at it."""
    return {
        "bench": (["bench", "decode", "--quick", "--output", path], "headinfer.bench.run.run_suites"),
        "bench --check-plan": (["bench", "--check-plan", "--quick", "--output", path], "headinfer.bench.run.run_check"),
        "probe": (["probe", "--device", "cpu", "--output", path], "headinfer.probe.probe"),
        "plan --plot": (
            ["plan", "llama-3-8b", "--gpu", "rtx4090", "--plot", path],
            "headinfer.plan_plots._draw_memory",
        ),
    }


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("which", commands_with_output(""))
def test_a_result_replaces_no_foreign_file(command, tmp_path, monkeypatch, which, name):
    folder = put(tmp_path / "somebody's")
    arguments, expensive = commands_with_output(folder / name)[which]
    if NAMES[name] == b"":
        return  # an empty file may be replaced
    monkeypatch.setattr(expensive, lambda *_, **__: pytest.fail("it began before it looked at the file"))
    before = content_of(folder)
    code, out, err = command(*arguments)
    assert (code, out) == (2, "")
    assert f"{name} holds something else than an earlier result of this command and is not replaced" in err
    assert content_of(folder) == before


@pytest.mark.parametrize("which", [*commands_with_output(""), "session export", "eval"])
@pytest.mark.parametrize("kind", ["a folder", "a device", "a link to nothing", "a pipe"])
def test_a_result_replaces_no_folder_device_or_pipe(command, kept, tmp_path, which, kind):
    path = {"a folder": tmp_path / "somebody's", "a device": Path("/dev/full")}.get(kind, tmp_path / "results.json")
    if kind == "a folder":
        put(path)
    elif kind == "a link to nothing":
        path.symlink_to(tmp_path / "nothing")
    elif kind == "a pipe":
        os.mkfifo(path)
    commands = {name: arguments for name, (arguments, _) in commands_with_output(path).items()}
    commands["session export"] = ["session", "export", "mybook", path]
    if kind == "a device":
        (tmp_path / "results.json").symlink_to("/dev/full")
    elif kind == "a folder":
        (tmp_path / "results.json").mkdir()
    commands["eval"] = ["eval", "niah", "embedded", "--lengths", "1K", "--out", tmp_path]
    before = content_of(path) if kind == "a folder" else None
    code, out, err = command(*commands[which])
    assert (code, out) == (2, "")
    assert "cannot write a result to" in err
    if kind == "a folder":
        assert content_of(path) == before
    elif kind == "a device":
        assert path.is_char_device()
    else:
        assert path.is_symlink() if kind == "a link to nothing" else path.is_fifo()
        assert not (tmp_path / "nothing").exists()


def test_an_archive_replaces_nothing(command, kept, tmp_path):
    for name in NAMES:
        if name == "block-000001.safetensors":
            continue  # an empty file may be replaced
        folder = put(tmp_path / name / "somebody's")
        before = content_of(folder)
        code, out, err = command("session", "export", "mybook", folder / name)
        assert (code, out) == (2, "")
        assert "is not replaced" in err
        assert content_of(folder) == before
    archive = tmp_path / "mybook.tar"
    assert command("session", "export", "mybook", archive)[0] == 0
    before = archive.read_bytes()
    assert command("session", "export", "mybook", archive)[0] == 2  # not even an earlier archive
    assert archive.read_bytes() == before


def test_the_gpu_benchmark_replaces_no_foreign_file(command, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_bench, "check_device", lambda _: torch.device("cpu"))
    monkeypatch.setattr(gpu_bench, "run_gpu", lambda *_, **__: pytest.fail("it measured before it looked"))
    folder = put(tmp_path / "somebody's")
    before = content_of(folder)
    for name in ("results.json", "hardware.json"):
        code, out, err = command("bench", "--device", "cuda", "--output", folder / name)
        assert (code, out) == (2, "")
        assert f"{name} holds something else" in err
    (folder / "results.json").unlink()
    code, _, err = command("bench", "--device", "cuda", "--output", folder / "results.json")
    assert code == 2
    assert "results.md holds something else" in err
    assert content_of(folder) == {path: data for path, data in before.items() if path.name != "results.json"}


def test_an_evaluation_replaces_no_foreign_file(command, tmp_path, monkeypatch):
    from headinfer.hf.models import ModelSource

    monkeypatch.setattr(ModelSource, "load", lambda *_, **__: pytest.fail("weights were loaded first"))
    data = tmp_path / "data.json"
    item = {"context": "c", "question": "q", "choice_A": "a", "choice_B": "b", "choice_C": "c", "choice_D": "d"}
    item |= {"answer": "A", "difficulty": "easy", "length": "short", "domain": "d"}
    data.write_text(json.dumps([item]))
    evaluations = {
        "niah": ["niah", "embedded", "--lengths", "1K"],
        "ruler": ["ruler", "embedded", "--lengths", "2K", "--tasks", "niah_single_1"],
        "data": ["data", "embedded", "--task", "longbench-v2", "--data", data],
    }
    for name, arguments in evaluations.items():
        folder = put(tmp_path / name)
        before = content_of(folder)
        code, out, err = command("eval", *arguments, "--out", folder)
        assert (code, out) == (2, ""), name
        assert "holds no results of headinfer eval" in err or "niah.png holds something else" in err
        assert content_of(folder) == before
    folder = put(tmp_path / "picture", "niah.png")
    code, _, err = command("eval", *evaluations["niah"], "--out", folder)
    assert code == 2
    assert "niah.png holds something else" in err
    assert content_of(folder) == {Path("niah.png"): PNG}


def test_an_earlier_result_is_replaced(command, tmp_path):
    """Each command that may replace its own result does so, and the empty file of mktemp is free."""
    pytest.importorskip("matplotlib")
    for name in ("plan.png", "plan.svg", "plan.pdf", "plan"):
        path = tmp_path / name
        path.touch()
        for context in ("64K", "128K"):
            before = path.read_bytes()
            code, _, err = command("plan", "llama-3-8b", "--gpu", "rtx4090", "--context", context, "--plot", path)
            assert code == 0, err
            assert path.read_bytes() != before
    path = tmp_path / "hardware.json"
    Hardware(**{**vars(HARDWARE["t4"]), "source": "headinfer probe, torch 2.11"}).save(path)
    check_output(path, is_ours=is_probe)
    HARDWARE["t4"].save(path)
    with pytest.raises(UsageError, match="is not replaced"):
        check_output(path, is_ours=is_probe)
    evaluation = ["eval", "niah", "embedded", "--lengths", "1K", "--depths", "50", "--out", tmp_path / "out"]
    for _ in range(2):  # the second time all is answered already, and the heatmap is drawn again
        code, _, err = command(*evaluation)
        assert code == 0, err
    link = tmp_path / "link.png"
    link.symlink_to(tmp_path / "plan.png")
    assert command("plan", "llama-3-8b", "--gpu", "rtx4090", "--plot", link)[0] == 0
    assert link.is_symlink()
    assert not [found.name for found in tmp_path.rglob(f"*{PARTIAL_SUFFIX}")]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    path.write_text("old")

    def full(descriptor, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        with pytest.raises(CapacityError, match="No space left on device"):
            write_text(path, "new")

    def stopped():
        yield b"ne"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_file(path, stopped())
    with pytest.raises(CapacityError, match="cannot write"):
        write_text(path / "below", "new")
    assert content_of(tmp_path) == {Path("result.json"): b"old"}


# -- other places -----------------------------------------------------------------------------------------------------


def test_a_disk_tier_leaves_a_folder_as_it_was(command, book, tmp_path):
    folder = put(tmp_path / "somebody's")
    before = content_of(folder)
    file = DiskFile(folder, 2**20)
    file.write(file.allocate(4096), [memoryview(bytearray(b"k" * 4096))])
    assert content_of(folder) == before
    del file
    tier = ("--host-kv-budget", "4MiB", "--disk-tier", folder)
    code, _, err = command("generate", MODEL, "--file", book, "--prompt", "When?", "--max-new-tokens", 2, *tier)
    assert code == 0, err
    assert content_of(folder) == before


def test_a_benchmark_of_a_disk_leaves_its_folder_as_it_was(tmp_path):
    from headinfer.bench import disk

    folder = put(tmp_path / "somebody's")
    before = content_of(folder)
    with disk._work(folder) as work:
        disk._write_file(work / "plain", 1000)
    assert content_of(folder) == before
    assert sorted(path.name for path in folder.iterdir()) == sorted([*NAMES, "checkpoints"])


@pytest.mark.parametrize("name", ["tests-gpu.txt", "bench-gpu.txt", "sanitizer.txt"])
def test_the_gpu_script_replaces_only_its_own_logs(tmp_path, name):
    script = (Path(__file__).parents[1] / "benchmarks" / "gpu.sh").read_text()
    start, end = script.index("mark="), script.index("failed=()")
    check = 'stop() { echo "$1" >&2; exit 2; }\nresults=$1\n' + script[start:end]

    def run():
        return subprocess.run(["bash", "-c", check, "-", str(tmp_path)], capture_output=True, text=True, check=False)

    assert run().returncode == 0
    for content, code in ((b"somebody's\n", 2), (b"\0binary", 2), (b"# benchmarks/gpu.sh: tests-gpu\n1 passed\n", 0)):
        (tmp_path / name).write_bytes(content)
        done = run()
        assert done.returncode == code, done.stderr
        assert (name in done.stderr) == (code == 2)
        assert (tmp_path / name).read_bytes() == content


# -- the list is whole ------------------------------------------------------------------------------------------------

# Every call in the sources that removes, renames, replaces or creates a file or folder. A new one needs a test above.
CALLS = {
    # the kernel that is compiled, in the user's cache
    "attention/native.py": ["Path.replace", "TemporaryDirectory", "mkdir"],
    # all in a temporary folder
    "bench/disk.py": ["TemporaryDirectory", "TemporaryDirectory", "open for writing", "rmtree", "unlink"],
    "bench_cli.py": ["write_text", "write_text", "write_text"],
    # savefig: into memory
    "evals/heatmap.py": ["savefig", "write_file"],
    "evals/run.py": ["write_text"],
    "files.py": [
        "mkdir",
        "os.link",
        "os.open for writing",
        "os.replace",
        "remove",
        "remove",
        "remove",
        "unlink",
        "write_file",
        "write_file",
    ],
    # in a temporary folder
    "hf/parallel.py": ["TemporaryDirectory", "save_pretrained"],
    "hf/prefix.py": ["link_or_copy"],
    # a file that loses its name at once
    "kv/disk.py": ["mkdir", "mkstemp", "unlink"],
    "kv/tensor_file.py": ["write_file"],
    "plan/hardware.py": ["write_text"],
    # savefig: into memory
    "plan_plots.py": ["savefig", "write_file"],
    # a temporary file
    "probe.py": ["NamedTemporaryFile"],
    "sessions/archive.py": ["open for writing", "os.replace", "remove", "remove", "tarfile.open for writing"],
    "sessions/folder.py": ["mkdir", "os.open for writing", "remove", "rmdir"],
    "sessions/manifest.py": ["write_text"],
    "sessions/ownership.py": ["remove"],
}
METHODS = {
    "hardlink_to", "link_or_copy", "makedirs", "mkdir", "mkstemp", "rename", "renames", "rmdir", "rmtree", "savefig",
    "save_file", "save_pretrained", "symlink_to", "touch", "unlink", "write_bytes", "write_file", "write_text",
    "NamedTemporaryFile", "TemporaryDirectory", "TemporaryFile",
}  # fmt: skip
OF_A_MODULE = {"os.link", "os.remove", "os.removedirs", "os.replace", "os.symlink", "os.truncate", "torch.save"}
OF_A_MODULE |= {f"shutil.{name}" for name in ("copy", "copy2", "copyfile", "copytree", "move")}


def changing_call(node):
    """What a call does to files, if anything."""
    called = ast.unparse(node.func)
    name = called.rpartition(".")[2]
    if called in OF_A_MODULE:
        return called
    if name == "open":
        values = [*node.args, *(keyword.value for keyword in node.keywords)]
        modes = [one.value for one in values if isinstance(one, ast.Constant) and isinstance(one.value, str)]
        is_for_writing = any(set(mode) & set("wax+") for mode in modes) or "O_CREAT" in ast.unparse(node)
        return f"{called} for writing" if is_for_writing else None
    if name == "replace":  # Path.replace(target); str.replace() has two arguments
        return "Path.replace" if len(node.args) == 1 and not node.keywords and called != "dataclasses.replace" else None
    if called == "remove":
        return "remove"
    return name if name in METHODS else None


def test_every_place_that_changes_files_is_known():
    source = Path(headinfer.__file__).parent
    found = {}
    for path in sorted(source.rglob("*.py")):
        calls = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)]
        changing = sorted(what for node in calls if (what := changing_call(node)))
        if changing:
            found[path.relative_to(source).as_posix()] = changing
    assert found == CALLS
