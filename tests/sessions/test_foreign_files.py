"""No command and no function replaces or removes a file that headinfer did not write.

All code that writes, replaces or removes files runs here in a folder with files of other programs. Some of these files
have names that headinfer uses itself. The last test finds all such calls in the sources.
"""

import ast
import errno
import json
import os
import shutil
import stat
import subprocess
import tarfile
from pathlib import Path

import pytest
import torch
from families import tiny_model
from safetensors.torch import save_file

import headinfer
from headinfer import CapacityError, HeadCache, SessionError, UsageError
from headinfer.bench import run as bench_run
from headinfer.bench.measurement import Measurement
from headinfer.bench.plan_check import compared
from headinfer.kv.disk_file import DiskFile
from headinfer.plan.hardware import HARDWARE, Hardware
from headinfer.sessions.folder import Lock, remove_session
from headinfer.sessions.manifest import Manifest
from headinfer.sessions.ownership import own_files
from headinfer.utils.files import PARTIAL_SUFFIX, Output, write_file, write_text

ROOT = Path(__file__).parents[2]
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
    "drawing.svg": b"<?xml version='1.0'?><svg><text>headinfer plan, drawn by hand</text></svg>",
    "drawing.pdf": b"%PDF-1.4 % made for the slides about headinfer plan",
    "book.tar": b"an archive",
    "book.tar.partial": b"half an archive",
    "notes.txt": b"headinfer eval headinfer plan headinfer probe",
    ".hidden": b"hidden",
}


def put_file(path, content):
    """Write bytes, or a safetensors file like those of other programs if `content` is None."""
    if content is None:
        save_file({"layers.0.k": torch.arange(12.0)}, path, {"format": "pt"})
    else:
        path.write_bytes(content)


def put(folder, *names):
    """Put files of other programs into a folder; by default all of NAMES."""
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
def command(run_command, monkeypatch, tmp_path):
    """The fixture `run_command`, with a folder of sessions and a cache folder of its own."""
    monkeypatch.setenv("HEADINFER_SESSIONS", str(tmp_path / "sessions"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return run_command


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


# -- sessions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [(), *((name,) for name in NAMES)], ids=lambda names: "+".join(names) or "all")
def test_a_cache_is_not_saved_beside_foreign_files(cache, tmp_path, names):
    folder = put(tmp_path / "somebody's", *names)
    before = content_of(folder)
    with pytest.raises(SessionError, match="which no session of headinfer wrote: nothing was written or removed"):
        cache.save(folder, token_ids(300))
    assert content_of(folder) == before


def test_saving_into_a_model_folder_keeps_its_weights(model, cache, tmp_path):
    model.save_pretrained(tmp_path)
    before = content_of(tmp_path)
    with pytest.raises(SessionError, match=r"holds config\.json and \d+ more, which no session"):
        cache.save(tmp_path)
    assert content_of(tmp_path) == before


@pytest.mark.parametrize("kind", ["a file", "a link to a file", "a link to a folder", "a folder"])
@pytest.mark.parametrize("name", ["block-000000.safetensors", "manifest.json", "lock", f"x{PARTIAL_SUFFIX}"])
def test_files_that_are_not_regular_are_foreign(cache, tmp_path, kind, name):
    """Only regular files with a name that headinfer uses exclusively are not foreign."""
    folder = tmp_path / "folder"
    other = tmp_path / "other"
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
def test_a_foreign_file_in_a_session_is_kept_and_stops_writers(command, kept, book, tmp_path, name):
    put_file(kept / name, STRAYS[name])
    before = content_of(kept)
    assert command("read", MODEL, "--file", book, "--session", "mybook")[0] == 0, (
        "the document is already read, so nothing is written"
    )
    book.write_text(book.read_text() + "It goes on.")
    for arguments in (
        ("session", "rm", "mybook"),
        ("session", "undo", "mybook"),
        ("ask", "--session", "mybook", "--keep", "--max-new-tokens", 2, "When?"),
        ("read", MODEL, "--file", book, "--session", "mybook"),
    ):
        code, out, err = command(*arguments)
        assert (code, out) == (2, ""), arguments
        assert f"holds {name}, which no session of headinfer wrote" in err, arguments
        assert content_of(kept) == before, arguments
    # Commands that only read still work, and an archive contains only the session's files.
    assert command("ask", "--session", "mybook", "--max-new-tokens", 2, "When?")[0] == 0
    assert command("session", "verify", "mybook")[0] == 0
    assert command("session", "export", "mybook", tmp_path / "mybook.tar")[0] == 0
    with tarfile.open(tmp_path / "mybook.tar") as tar:
        assert f"mybook/{name}" not in tar.getnames()
    assert content_of(kept) == before


def test_a_file_created_while_a_session_is_written_is_kept(model, cache, tmp_path):
    """The file is created after locking, with a name that the checkpoint needs or with one that it would clean up."""
    from headinfer.sessions.writer import SessionWriter

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


@pytest.mark.parametrize("name", ["block-000000.safetensors", "end-000001.safetensors", "manifest.json"])
def test_a_shared_prefix_replaces_no_foreign_file(command, kept, book, tmp_path, monkeypatch, name):
    """Another program writes into the folder of a session while the session links files of another session."""
    from headinfer.jobs import reading

    target = tmp_path / "sessions" / "second"
    link_prefix = reading.link_prefix

    def meanwhile(*arguments):
        put(target, name, "mine.safetensors")
        return link_prefix(*arguments)

    monkeypatch.setattr(reading, "link_prefix", meanwhile)
    content = content_of(put(tmp_path / "the same", name, "mine.safetensors"))
    code, _, err = command("read", MODEL, "--file", book, "--session", "second")
    assert code == 2
    assert f"{name} was not written by headinfer" in err
    assert content.items() <= content_of(target).items()


def test_a_manifest_created_while_a_session_is_written_is_kept(model, cache, tmp_path, monkeypatch):
    from headinfer.sessions import writer as session

    def meanwhile(path, tensors):
        put(tmp_path / "book", "manifest.json")
        return write_tensors(path, tensors)

    write_tensors = session.write_tensors
    monkeypatch.setattr(session, "write_tensors", meanwhile)
    with pytest.raises(SessionError, match=r"manifest\.json was not written by headinfer"):
        cache.save(tmp_path / "book")
    assert (tmp_path / "book" / "manifest.json").read_bytes() == NAMES["manifest.json"]


def test_a_manifest_that_is_a_pipe_is_an_error(model, tmp_path):
    os.mkfifo(tmp_path / "manifest.json")
    with pytest.raises(SessionError, match="is not a regular file"):
        HeadCache.load(tmp_path, model)


@pytest.mark.parametrize("held", [200, 0], ids=["continued", "new"])
def test_a_session_written_by_another_process_meanwhile_is_not_written_again(command, book, tmp_path, held):
    """Another process extends the session between the checks and the lock. Tokens must not be read twice."""
    from headinfer.jobs import read as reading

    root = tmp_path / "sessions"
    job = reading.ReadJob(MODEL, book.read_text(), "mybook", root, chunk_tokens=200, device="cpu")
    if held:
        begun = reading.ReadJob(MODEL, book.read_text()[:held], "mybook", root, chunk_tokens=200, device="cpu")
        reading.read(reading.prepare_read(begun))
    prepared = reading.prepare_read(job)
    assert prepared.done == held
    reading.read(reading.prepare_read(job))
    before = content_of(root)
    with pytest.raises(SessionError, match=r"another process has written the session .* run the same command again"):
        reading.read(prepared)
    assert content_of(root) == before
    assert reading.read(reading.prepare_read(job)).tokens == len(book.read_text())


def test_a_question_is_not_kept_in_a_session_that_changed_meanwhile(command, kept):
    from headinfer.jobs import ask as asking

    job = asking.AskJob("mybook", kept.parent, ["When?"], max_new_tokens=2, keep=True, device="cpu")
    prepared = asking.prepare_ask(job)
    later = asking.prepare_ask(job)
    asking.ask(prepared, on_text=lambda _: None)
    before = content_of(kept)
    with pytest.raises(SessionError, match="another process has written the session"):
        asking.ask(later, on_text=lambda _: None)
    assert content_of(kept) == before


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


def test_a_model_folder_is_not_used_as_a_session(command, book, model, tmp_path, monkeypatch):
    from headinfer.hf.models import ModelSource

    model.save_pretrained(tmp_path / "models" / "novelist")
    before = content_of(tmp_path / "models")
    monkeypatch.setattr(ModelSource, "load", lambda *_, **__: pytest.fail("weights were loaded first"))
    code, out, err = command("read", MODEL, "--file", book, "--sessions", tmp_path / "models", "--session", "novelist")
    assert (code, out) == (2, "")
    assert "which no session of headinfer wrote" in err
    assert content_of(tmp_path / "models") == before


# -- files of a session ----------------------------------------------------------------------------------------


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


def test_a_damaged_data_file_still_belongs_to_the_session(model, cache, tmp_path):
    """The manifest lists the file, so that it is replaced and removed although its header is damaged."""
    cache.save(tmp_path / "book")
    loaded = HeadCache.load(tmp_path / "book", model)
    (end,) = (tmp_path / "book").glob("end-*")
    end.write_bytes(b"damaged")
    loaded.save(tmp_path / "book")
    assert not end.exists()
    assert HeadCache.load(tmp_path / "book", model).get_seq_length() == 300


def test_sessions_of_earlier_versions_are_recognized(model, cache, tmp_path):
    """Their lock is empty, and an interrupted write of their manifest leaves manifest.json.partial."""
    cache.save(tmp_path / "book")
    folder = tmp_path / "book"
    (folder / "lock").write_bytes(b"")
    shutil.copy(folder / "manifest.json", folder / "manifest.json.partial")
    (folder / "end-000077.safetensors").touch()  # a power failure left it empty
    HeadCache.load(folder, model).save(folder)
    assert (folder / "lock").read_bytes() == b""
    assert not (folder / "end-000077.safetensors").exists()
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


def test_files_of_the_file_system_are_ignored(cache, tmp_path):
    folder = tmp_path / "book"
    folder.mkdir()
    names = [".nfs000000000012", ".fuse_hidden0001", ".DS_Store", "._block-000000.safetensors", "Thumbs.db"]
    for name in names:
        (folder / name).write_bytes(b"the system's")
    (folder / "lost+found").mkdir()
    cache.save(folder)
    assert not remove_session(folder), "the folder remains because of these files"
    assert sorted(path.name for path in folder.iterdir()) == sorted([*names, "lost+found"])


def test_a_removed_lock_is_not_used(tmp_path, monkeypatch):
    """`session rm` removes the lock between opening and locking. The writer then uses the new file."""
    from headinfer.sessions import folder as sessions_folder

    locked = []
    original = sessions_folder._lock

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


# -- results ---------------------------------------------------------------------------------------------------


def commands_with_output(path):
    """Commands that write a result, with the functions that they must not call before they have checked the file."""
    return {
        "bench": (["bench", "decode", "--quick", "--output", path], "headinfer.bench.run.run_suites"),
        "bench --check-plan": (["bench", "--check-plan", "--quick", "--output", path], "headinfer.bench.run.run_check"),
        "probe": (["probe", "--device", "cpu", "--output", path], "headinfer.bench.probe.probe"),
        "plan --plot": (
            ["plan", "llama-3-8b", "--gpu", "rtx4090", "--ram", "64GB", "--plot", path],
            "headinfer.cli.plan_plots._draw_memory",
        ),
    }


@pytest.mark.parametrize("name", [name for name, content in NAMES.items() if content != b""])
@pytest.mark.parametrize("which", commands_with_output(""))
def test_a_result_replaces_no_foreign_file(command, tmp_path, monkeypatch, which, name):
    folder = put(tmp_path / "somebody's")
    arguments, expensive = commands_with_output(folder / name)[which]
    monkeypatch.setattr(expensive, lambda *_, **__: pytest.fail("the command began before it checked the file"))
    before = content_of(folder)
    code, out, err = command(*arguments)
    assert (code, out) == (2, "")
    is_drawing = which != "plan --plot" or name.endswith((".png", ".svg", ".pdf"))
    says = "is not an earlier result of this command and is not replaced" if is_drawing else "its name must end with"
    assert f"{name}" in err
    assert says in err
    assert content_of(folder) == before


@pytest.mark.parametrize("which", [*commands_with_output(""), "session export", "eval"])
@pytest.mark.parametrize("kind", ["a folder", "a link to a folder", "a link to nothing", "a pipe", "a socket"])
def test_a_result_replaces_only_regular_files(command, kept, tmp_path, which, kind):
    """Devices are not tested: a mistake could remove /dev/null from the machine."""
    folder = put(tmp_path / "somebody's")
    path = tmp_path / "out" / ("plan.png" if which == "plan --plot" else "results.json")
    path.parent.mkdir()
    if kind == "a folder":
        put(path)
    elif kind == "a link to a folder":
        path.symlink_to(folder)
    elif kind == "a link to nothing":
        path.symlink_to(tmp_path / "nothing")
    elif kind == "a pipe":
        os.mkfifo(path)
    else:
        os.mknod(path, stat.S_IFSOCK | 0o600)
    before = content_of(tmp_path)
    entries = sorted(tmp_path.rglob("*"))
    mode = path.lstat().st_mode
    commands = {name: arguments for name, (arguments, _) in commands_with_output(path).items()}
    commands["session export"] = ["session", "export", "mybook", path]
    commands["eval"] = ["eval", "niah", "embedded", "--lengths", "1K", "--out", path.parent]
    code, out, err = command(*commands[which])
    assert (code, out) == (2, "")
    assert "cannot write a result to" in err
    assert (content_of(tmp_path), sorted(tmp_path.rglob("*")), path.lstat().st_mode) == (before, entries, mode)


def test_an_archive_replaces_no_file(command, kept, tmp_path):
    for name in NAMES:
        if name == "block-000001.safetensors":
            continue  # an empty file may be replaced
        folder = put(tmp_path / name / "somebody's")
        before = content_of(folder)
        code, out, err = command("session", "export", "mybook", folder / name)
        assert (code, out) == (2, "")
        assert "exists and is not replaced" in err
        assert content_of(folder) == before
    archive = tmp_path / "mybook.tar"
    assert command("session", "export", "mybook", archive)[0] == 0
    before = archive.read_bytes()
    assert command("session", "export", "mybook", archive)[0] == 2  # not even an earlier archive
    assert archive.read_bytes() == before
    code, _, err = command("session", "export", "mybook", kept / "mybook.tar")
    assert code == 2
    assert "it is a session's folder" in err
    (tmp_path / f"left{PARTIAL_SUFFIX}").write_bytes(b"of a killed export")
    link = tmp_path / "link.tar"
    empty = tmp_path / "empty.tar"
    empty.touch()
    link.symlink_to(empty)
    assert command("session", "export", "mybook", link)[0] == 0
    assert link.is_symlink()
    with tarfile.open(empty) as tar:
        assert tar.getnames()[-1] == "mybook/manifest.json"


def test_the_gpu_benchmark_replaces_no_foreign_file(command, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_run, "check_device", lambda _: torch.device("cpu"))
    monkeypatch.setattr(
        bench_run, "run_suites", lambda *_, **__: pytest.fail("the command measured before it checked the file")
    )
    folder = put(tmp_path / "somebody's")
    before = content_of(folder)
    for name in ("results.json", "hardware.json"):
        code, out, err = command("bench", "--device", "cuda", "--output", folder / name)
        assert (code, out) == (2, "")
        assert f"{name} is not an earlier result" in err
    (folder / "results.json").unlink()
    code, _, err = command("bench", "--device", "cuda", "--output", folder / "results.json")
    assert code == 2
    assert "results.md is not an earlier result" in err
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
        "fidelity": ["fidelity", "embedded", "--file", ROOT / "ARCHITECTURE.md", "--kv-dtype", "int8"],
    }
    for name, arguments in evaluations.items():
        folder = put(tmp_path / name)
        before = content_of(folder)
        code, out, err = command("eval", *arguments, "--out", folder)
        assert (code, out) == (2, ""), name
        assert "holds no results of headinfer eval" in err or "niah.png is not an earlier result" in err
        assert content_of(folder) == before
    pytest.importorskip("matplotlib")
    folder = put(tmp_path / "picture", "niah.png")
    code, _, err = command("eval", *evaluations["niah"], "--out", folder)
    assert code == 2
    assert "niah.png is not an earlier result" in err
    assert content_of(folder) == {Path("niah.png"): PNG}
    for name in ("fidelity.png", "results.md"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_bytes(PNG)
        code, _, err = command("eval", *evaluations["fidelity"], "--out", folder)
        assert code == 2
        assert f"{name} is not an earlier result" in err
        assert content_of(folder) == {Path(name): PNG}


MEASUREMENT = Measurement("decode", "1K tokens", "seconds of a token", 1.0, "s")
COMPARED = compared("decode", "seconds", predicted=1.0, measured=1.0, unit="s")
PROBED = Hardware(**{**vars(HARDWARE["t4"]), "source": "headinfer probe, torch 2.11"})


def test_an_earlier_result_is_replaced(command, tmp_path, monkeypatch):
    """Commands replace their own earlier results, and empty files such as those of mktemp."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("headinfer.bench.run.run_suites", lambda *_, **__: iter([[MEASUREMENT]]))
    monkeypatch.setattr("headinfer.bench.run.run_check", lambda *_, **__: [COMPARED])
    monkeypatch.setattr("headinfer.bench.probe.probe", lambda *_: PROBED)
    monkeypatch.setattr("headinfer.cli.plan_plots._draw_seconds", lambda *_: None)  # what takes long to compute
    monkeypatch.setattr("headinfer.cli.plan_plots._draw_roofline", lambda *_: None)
    plan = ["plan", "llama-3-8b", "--gpu", "rtx4090", "--ram", "64GB"]
    for name in ("plan.png", "plan.svg", "plan.pdf", "plan.PNG"):
        path = tmp_path / name
        path.touch()
        for context in ("64K", "128K"):
            before = path.read_bytes()
            code, _, err = command(*plan, "--context", context, "--plot", path)
            assert code == 0, err
            assert path.read_bytes() != before
    for name, arguments in {
        "bench.json": ["bench", "--output"],
        "check.json": ["bench", "--check-plan", "--output"],
        "probe.json": ["probe", "--device", "cpu", "--output"],
    }.items():
        path = tmp_path / name
        path.touch()
        for _ in range(2):
            code, _, err = command(*arguments, path)
            assert code == 0, err
            assert json.loads(path.read_text())
    HARDWARE["t4"].save(tmp_path / "mine.json")
    with pytest.raises(UsageError, match="is not replaced"):
        PROBED.save(tmp_path / "mine.json")
    evaluation = ["eval", "niah", "embedded", "--lengths", "1K", "--depths", "50", "--out", tmp_path / "out"]
    for _ in range(2):  # the second time, all questions are answered and only the heatmap is drawn again
        code, _, err = command(*evaluation)
        assert code == 0, err
    link = tmp_path / "link.png"
    link.symlink_to(tmp_path / "plan.png")
    assert command(*plan, "--plot", link)[0] == 0
    assert link.is_symlink()
    assert not [found.name for found in tmp_path.rglob(f"*{PARTIAL_SUFFIX}")]


def test_a_file_created_while_a_command_measures_is_kept(command, tmp_path, monkeypatch):
    """The result is printed nevertheless, and the exit code reports that it was not written."""
    pytest.importorskip("matplotlib")
    path = tmp_path / "result.json"

    def meanwhile(result):
        def measured(*_, **__):
            path.write_bytes(b"somebody's")
            return result

        return measured

    monkeypatch.setattr("headinfer.bench.run.run_suites", meanwhile([[MEASUREMENT]]))
    monkeypatch.setattr("headinfer.bench.run.run_check", meanwhile([COMPARED]))
    monkeypatch.setattr("headinfer.bench.probe.probe", meanwhile(PROBED))
    for arguments, shown in (
        (["bench"], "seconds of a token"),
        (["bench", "--check-plan"], "predicted"),
        (["probe", "--device", "cpu"], "T4"),
    ):
        path.unlink(missing_ok=True)
        code, out, err = command(*arguments, "--output", path)
        assert code == 2
        assert shown in out
        assert "is not an earlier result" in err
        assert path.read_bytes() == b"somebody's"


@pytest.mark.parametrize("name", ["results.json", "niah.png"])
def test_a_file_created_while_an_evaluation_runs_is_kept(command, tmp_path, monkeypatch, name):
    pytest.importorskip("matplotlib")
    from headinfer.evals import reader

    original = reader.Reader.read_together

    def meanwhile(self, documents):
        put(tmp_path / "out", name)
        return original(self, documents)

    monkeypatch.setattr(reader.Reader, "read_together", meanwhile)
    code, out, err = command("eval", "niah", "embedded", "--lengths", "1K", "--depths", "50", "--out", tmp_path / "out")
    assert code == 2
    assert f"{name} is not an earlier result" in err
    assert (tmp_path / "out" / name).read_bytes() == NAMES[name]
    if name == "niah.png":
        assert "found" in out  # the scores are shown
        assert json.loads((tmp_path / "out" / "results.json").read_text())["answers"]


def test_write_errors_are_reported_in_one_sentence(tmp_path, monkeypatch):
    Output(tmp_path / ("x" * 240), is_ours=None).write("a long name")
    with pytest.raises(UsageError, match=r"cannot write a result to .* \(File name too long\)"):
        Output(tmp_path / ("x" * 300), is_ours=None)
    path = tmp_path / "result.json"
    path.write_bytes(b"{}")

    def refused(path):
        raise PermissionError(errno.EACCES, "Permission denied")

    with pytest.raises(UsageError, match=r"cannot write a result to .* \(Permission denied\)"):
        Output(path, is_ours=refused)


def test_simultaneous_exports_to_one_archive(kept, tmp_path, monkeypatch):
    """The second export reports the archive of the first one. They share no partial file and leave none."""
    from headinfer.sessions import archive

    written = []
    original = archive._write

    def meanwhile(*arguments):
        if not written:
            written.append(arguments)
            archive.export_session(kept, tmp_path / "mybook.tar")
        original(*arguments)

    monkeypatch.setattr(archive, "_write", meanwhile)
    with pytest.raises(UsageError, match="exists and is not replaced"):
        archive.export_session(kept, tmp_path / "mybook.tar")
    with tarfile.open(tmp_path / "mybook.tar") as tar:
        assert tar.getnames()[-1] == "mybook/manifest.json"
    assert not list(tmp_path.glob(f"*{PARTIAL_SUFFIX}"))


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
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


# -- other commands --------------------------------------------------------------------------------------------


def test_a_disk_tier_leaves_its_folder_unchanged(command, book, tmp_path):
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


def test_a_benchmark_of_a_disk_leaves_its_folder_unchanged(tmp_path):
    from headinfer.bench import disk_suites

    folder = put(tmp_path / "somebody's")
    before = content_of(folder)
    with disk_suites._work(folder) as work:
        disk_suites._write_file(work / "plain", 1000)
    assert content_of(folder) == before
    assert sorted(path.name for path in folder.iterdir()) == sorted([*NAMES, "checkpoints"])


@pytest.mark.parametrize("name", ["tests-gpu.txt", "decode-gpu.txt", "sanitizer-gpu.txt"])
def test_the_gpu_script_replaces_only_its_own_logs(tmp_path, name):
    """The part of the script that writes logs runs twice with its own log, then with other files."""
    script = (ROOT / "benchmarks" / "gpu.sh").read_text()
    logs = script[script.index("mark=") : script.index("bench() {")]
    begin = script[script.index("declare -A") : script.index("steps=")]
    begin += 'stop() { echo "$1" >&2; exit 2; }\nresults=$1\nsteps="tests sanitizer decode"\n'
    run_step = f"\nstep {name.removesuffix('-gpu.txt')} echo 1 passed\n"

    def run():
        command = ["bash", "-c", begin + logs + run_step, "-", str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    for _ in range(2):
        done = run()
        assert done.returncode == 0, done.stderr
        assert (tmp_path / name).read_text().splitlines()[1:] == ["1 passed"]
    for content in (b"somebody's\n", b"\0binary"):
        (tmp_path / name).write_bytes(content)
        done = run()
        assert done.returncode == 2
        assert name in done.stderr
        assert (tmp_path / name).read_bytes() == content


def test_training_replaces_only_its_own_runs(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "training")
    import evaluate
    import train

    for name in ("new", "empty", "mine", "somebody's"):
        (tmp_path / name).mkdir()
    (tmp_path / "new").rmdir()
    (tmp_path / "mine" / "training.json").write_text('{"seed": 0, "batch_tokens": 1, "run": {}}')
    for name in ("new", "empty", "mine"):
        train.check_run_folder(tmp_path / name)
    for made in (None, "{}"):
        put(tmp_path / "somebody's", "model.safetensors")
        if made is not None:
            (tmp_path / "somebody's" / "training.json").write_text(made)
        with pytest.raises(SystemExit, match="choose another --out"):
            train.check_run_folder(tmp_path / "somebody's")
    assert evaluate.is_table(ROOT / "benchmarks" / "results" / "embedded.json")
    folder = put(tmp_path / "results")
    assert not [name for name in NAMES if evaluate.is_table(folder / name)]
    rows = json.loads((ROOT / "benchmarks" / "results" / "embedded.json").read_text())
    new = {**rows[-1], "tokens": "1M"}
    assert evaluate.with_row(rows, new) == [*rows, new]
    again = {**rows[0], "exact": 0.5}
    assert evaluate.with_row([*rows, new], again) == [again, *rows[1:], new]


# -- all calls that change files -------------------------------------------------------------------------------

# All calls in the sources that remove, rename, replace or create a file or folder. A new one needs a test above.
CALLS = {
    # the kernel that is compiled, in the user's cache
    "attention/native_build.py": ["Path.replace", "TemporaryDirectory", "mkdir"],
    # all in a temporary folder
    "bench/disk_suites.py": ["TemporaryDirectory", "TemporaryDirectory", "open for writing", "rmtree", "unlink"],
    "bench/results.py": ["Output", "Output"],
    "cli/eval.py": ["Output"],
    "cli/heads.py": ["Output", "Output"],
    "cli/probe.py": ["Output", "Output"],
    # savefig: into memory
    # a file that has no name
    "evals/fidelity.py": ["TemporaryFile"],
    "evals/fidelity_plot.py": ["Output", "Output", "savefig"],
    "evals/fidelity_results.py": ["Output", "Output", "Output"],
    "evals/heatmap.py": ["Output", "savefig"],
    "evals/run.py": ["Output", "Output"],
    "utils/files.py": [
        "mkdir",
        "mkstemp",
        "open for writing",
        "os.link",
        "os.open for writing",
        "os.open for writing",
        "os.open for writing",
        "os.replace",
        "remove",
        "remove",
        "remove",
        "unlink",
        "write_bytes",
        "write_bytes",
        "write_file",
        "write_file",
    ],
    # in a temporary folder
    "hf/parallel.py": ["TemporaryDirectory", "save_pretrained"],
    "sessions/prefix.py": ["link_or_copy"],
    # a file that loses its name at once
    "kv/disk_file.py": ["mkdir", "mkstemp", "os.open for writing", "unlink"],
    "kv/tensor_file.py": ["write_file"],
    "plan/hardware.py": ["Output"],
    # savefig: into memory
    "cli/plan_plots.py": ["Output", "Output", "savefig"],
    # a temporary file
    "bench/probe.py": ["NamedTemporaryFile"],
    "serve/files.py": ["NamedTemporaryFile"],
    # a temporary file if standard output fails, and /dev/null
    "cli/streams.py": ["mkstemp", "open for writing", "os.open for writing", "os.open for writing"],
    "sessions/archive.py": ["Output", "open for writing", "os.replace", "remove", "tarfile.open for writing"],
    "sessions/folder.py": [
        "mkdir",
        "open for writing",
        "os.link",
        "os.open for writing",
        "remove",
        "remove",
        "rmdir",
        "write_bytes",
    ],
    "sessions/manifest.py": ["write_text"],
    "sessions/ownership.py": ["remove"],
    "serve/uploads.py": ["mkdir", "remove", "remove", "rmdir", "write_file", "write_text"],
    "training/evaluate.py": ["Output", "Output"],
    # the checkout's own files
    "training/package.py": ["save_pretrained", "shutil.copyfile", "write_bytes", "write_text"],
    "training/train.py": ["mkdir", "save_pretrained", "save_pretrained", "save_pretrained", "write_text", "write_text"],
}
METHODS = {
    "hardlink_to", "link_or_copy", "makedirs", "mkdir", "mkstemp", "rename", "renames", "rmdir", "rmtree", "savefig",
    "save_file", "save_pretrained", "symlink_to", "touch", "unlink", "write_bytes", "write_file", "write_text",
    "NamedTemporaryFile", "TemporaryDirectory", "TemporaryFile",
}  # fmt: skip
OF_A_MODULE = {"os.link", "os.remove", "os.removedirs", "os.replace", "os.symlink", "os.truncate", "torch.save"}
OF_A_MODULE |= {f"shutil.{name}" for name in ("copy", "copy2", "copyfile", "copytree", "move")}


def changing_call(node):
    """The name of a call that changes files; None for other calls."""
    called = ast.unparse(node.func)
    name = called.rpartition(".")[2]
    if called in OF_A_MODULE:
        return called
    if name == "open":
        values = [*node.args, *(keyword.value for keyword in node.keywords)]
        modes = [one.value for one in values if isinstance(one, ast.Constant) and isinstance(one.value, str)]
        is_for_writing = any(set(mode) & set("wax+") for mode in modes) or "O_" in ast.unparse(node)
        return f"{called} for writing" if is_for_writing else None
    if called in ("Output", "self.check().write", "written.write", "output.write", "one.write"):
        return "Output"
    if name == "replace":  # Path.replace(target); str.replace() has two arguments
        is_path = (len(node.args) == 1 and not node.keywords) or any(one.arg == "target" for one in node.keywords)
        return "Path.replace" if is_path and called != "dataclasses.replace" else None
    if called == "remove":
        return "remove"
    return name if name in METHODS else None


def test_every_call_that_changes_files_is_listed():
    source = Path(headinfer.__file__).parent
    found = {}
    for path in sorted([*source.rglob("*.py"), *(ROOT / "training").glob("*.py")]):
        calls = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)]
        changing = sorted(what for node in calls if (what := changing_call(node)))
        if changing:
            found[path.relative_to(ROOT if "training" in path.parts else source).as_posix()] = changing
    assert found == CALLS
