"""Mistakes of the user on the command line: one sentence, exit code 2, nothing expensive first, nothing lost."""

import errno
import io
import json
import os
import sys

import pytest
import torch

import headinfer
from headinfer.bench.measurement import Measurement
from headinfer.cli import main as cli
from headinfer.cli.streams import BROKEN_PIPE
from headinfer.engine.machine import chosen_device
from headinfer.errors import CapacityError, UsageError
from headinfer.utils.files import Output

MODEL = "random:tiny-llama?layers=1&hidden=64&intermediate=64&heads=4&kv_heads=2"
PLAN = ("plan", "llama-3-8b", "--gpu", "rtx4090", "--ram", "256GB")


def exit_code(arguments, monkeypatch):
    """Run main() in this process and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["headinfer", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return stopped.value.code or 0


@pytest.fixture
def refused(capsys, monkeypatch):
    """Check that a command is refused in one sentence before any weights are loaded; return the sentence."""
    from headinfer.hf.models import ModelSource

    def check(*arguments):
        monkeypatch.setattr(ModelSource, "load", lambda *_, **__: pytest.fail("weights were loaded"))
        assert exit_code(arguments, monkeypatch) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("headinfer: error: ")
        assert err.count("\n") == 1
        return err

    return check


@pytest.fixture(autouse=True)
def book(tmp_path, monkeypatch):
    """A text in the current folder."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "book.txt"
    path.write_text("It was a bright cold day in April.\n" * 60, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of sessions with one session `s`, which a model has read."""
    from headinfer.jobs.read import ReadJob, prepare_read, read

    root = tmp_path_factory.mktemp("sessions")
    read(prepare_read(ReadJob(MODEL, "It was a bright cold day in April.\n" * 20, "s", root)))
    return root


# -- numbers -----------------------------------------------------------------------------------------------------------

COMMANDS = {
    "generate": ("generate", MODEL, "--prompt", "x"),
    "read": ("read", MODEL, "--file", "book.txt", "--session", "s"),
    "ask": ("ask", "x", "--session", "s"),
    "demo": ("demo",),
    "niah": ("eval", "niah", MODEL),
    "ruler": ("eval", "ruler", MODEL),
    "data": ("eval", "data", MODEL, "--task", "longbench-v2", "--data", "x.json"),
    "plan": PLAN,
    "bench": ("bench",),
}
SIZES = ("--device-kv-budget",)
WHOLE = {
    "generate": ("--seed", "--max-new-tokens", "--chunk-tokens", "--heads-per-group", "--tile-tokens", "--top-k",
                 "--device-kv-budget", "--host-kv-budget"),
    "read": ("--seed", "--chunk-tokens", "--device-kv-budget", "--host-kv-budget"),
    "ask": ("--seed", "--max-new-tokens", "--device-kv-budget", "--host-kv-budget"),
    "demo": ("--seed", "--context", "--questions"),
    "niah": ("--seed", "--samples", "--device-kv-budget"),
    "ruler": ("--seed", "--samples", "--device-kv-budget"),
    "data": ("--most-tokens", "--device-kv-budget"),
    "plan": ("--context", "--chunk-tokens", "--heads-per-group", "--tile-tokens", "--new-tokens", "--rows",
             "--weight-bits", "--disk", "--device-memory", "--device-kv-budget"),
    "bench": ("--gpu-memory",),
}  # fmt: skip
REAL = {
    "generate": ("--temperature", "--top-p", "--repetition-penalty"),
    "ask": ("--temperature",),
    "bench": ("--limit-s",),
}


@pytest.mark.parametrize(("command", "option"), [(name, option) for name in WHOLE for option in WHOLE[name]])
def test_a_whole_number_out_of_range_is_refused(command, option, refused):
    for value in ("-1" if option == "--seed" else "0", "nan", "1" + "0" * 30):
        assert option in refused(*COMMANDS[command], option, value)


@pytest.mark.parametrize(("command", "option"), [(name, option) for name in REAL for option in REAL[name]])
def test_a_number_out_of_range_is_refused(command, option, refused):
    for value in ("-1", "x", "nan", "1e-300", "1e300"):
        if (option, value) != ("--top-p", "1e-300"):
            assert f"{option} is " in refused(*COMMANDS[command], option, value)


def test_tokens_may_have_a_unit_everywhere(capsys, monkeypatch):
    arguments = ("generate", MODEL, "--prompt", "xyz", "--chunk-tokens", "1K", "--max-new-tokens", "2", "--json")
    assert exit_code(arguments, monkeypatch) == 0
    assert json.loads(capsys.readouterr().out)["options"]["chunk_tokens"] == 1024


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", MODEL, "--file", "a", "--file", "b"),
        ("generate", MODEL, "--prompt", "a", "--prompt", "b"),
        ("read", MODEL, "--file", "a", "--session", "s", "--session", "t"),
        ("ask", "x", "--session", "s", "--session", "t"),
        ("eval", "niah", MODEL, "--lead", "--no-lead"),
        ("session", "list", "--sessions", "a", "--sessions", "b"),
        ("bench", "--device", "cpu", "--device", "cuda"),
        ("plan", "llama-3-8b", "--gpu", "rtx4090", "--gpu", "l4"),
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_a_repeated_option_is_refused(arguments, refused):
    assert "is given 2 times: give it once" in refused(*arguments)


# -- devices ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["generate", "read", "ask", "demo", "niah", "ruler", "probe"])
def test_a_device_that_does_not_exist_is_refused(command, refused, saved, monkeypatch):
    monkeypatch.setattr("headinfer.bench.probe.probe", lambda *_: pytest.fail("it measured"))
    arguments = {**COMMANDS, "probe": ("probe",), "ask": ("ask", "x", "--session", "s", "--sessions", saved)}[command]
    for device in ("cpu:x", "cpu:9", "cpu:0", "cuda:99", "cuda:x", "cuda", "abacus", "", "CPU", "meta", "cuda:-1"):
        assert "--device is " in refused(*arguments, "--device", device)


def test_devices_are_checked_in_one_place(monkeypatch):
    assert chosen_device("auto") == chosen_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert chosen_device("auto") == chosen_device("cuda") == torch.device("cuda")
    assert chosen_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UsageError, match="this machine has cuda:0 to cuda:1"):
        chosen_device("cuda:2")


# -- texts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [("generate", MODEL, "--prompt", "\udcff"), ("ask", "\udcff", "--session", "s")])
def test_a_text_that_is_not_utf_8_is_refused(arguments, refused):
    assert "is not UTF-8 text" in refused(*arguments)


def test_a_file_from_standard_input(book, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(book.read_bytes())))
    assert exit_code(("generate", MODEL, "--file", "-", "--max-new-tokens", "2", "--json"), monkeypatch) == 0
    assert json.loads(capsys.readouterr().out)["tokens_in"] == len(book.read_bytes())


def test_standard_input_that_is_not_utf_8(refused, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    assert "cannot read standard input: it is not UTF-8 text" in refused("generate", MODEL, "--file", "-")


# -- files to write --------------------------------------------------------------------------------------------------

WRITERS = {
    "niah": (*COMMANDS["niah"], "--out"),
    "ruler": (*COMMANDS["ruler"], "--out"),
    "bench": ("bench", "--quick", "--output"),
    "bench on a disk": ("bench", "session", "--quick", "--folder"),
    "probe": ("probe", "--output"),
    "read": (*COMMANDS["read"], "--sessions"),
    "disk tier": (*COMMANDS["generate"], "--host-kv-budget", "1MB", "--disk-tier"),
}


@pytest.fixture
def nothing_runs(monkeypatch):
    for name in ("headinfer.bench.probe.probe", "headinfer.bench.run.run_suites", "headinfer.evals.run.evaluate"):
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("it began"))


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("command", WRITERS)
def test_a_place_that_cannot_be_written_is_refused_first(command, refused, book, saved, tmp_path, monkeypatch):
    takes_file = command in ("bench", "probe")
    places = [book / "x", book / "x" / "y", tmp_path if takes_file else book, saved / "s" / "x", "/dev/null", "/proc/x"]
    before = sorted(tmp_path.rglob("*")), sorted(saved.rglob("*"))
    for place in places:
        refused(*WRITERS[command], place)
    place = tmp_path / "new" / "x"
    for number in (errno.ENOSPC, errno.EROFS, errno.EACCES):

        def fail(*_, number=number):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr("headinfer.utils.files.os.write", fail)
        assert os.strerror(number) in refused(*WRITERS[command], tmp_path if "disk" in command else place)
    assert (sorted(tmp_path.rglob("*")), sorted(saved.rglob("*"))) == before


@pytest.mark.usefixtures("nothing_runs")
def test_a_probe_checks_its_cache_folder_first(refused, book, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(book))
    assert "not a writable folder" in refused("probe")


@pytest.mark.parametrize("place", [".", "/dev/full", "/dev/null", "/proc/x.tar", "book.txt"])
def test_an_archive_goes_to_a_new_file(place, refused, saved):
    refused("session", "export", "s", place, "--sessions", saved)


def test_a_session_in_a_read_only_folder_is_exported(saved, tmp_path, monkeypatch, capsys):
    real = os.open

    def refuse(path, flags, *more, **named):
        if str(path).startswith(str(saved)) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return real(path, flags, *more, **named)

    monkeypatch.setattr(os, "open", refuse)
    assert exit_code(("session", "export", "s", tmp_path / "s.tar", "--sessions", saved), monkeypatch) == 0
    assert (tmp_path / "s.tar").stat().st_size > 1000


def test_a_result_that_cannot_be_written_is_kept(tmp_path, monkeypatch):
    output = Output(tmp_path / "result.json", is_ours=None)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("headinfer.utils.files.write_bytes", _fail_to_write)
    with pytest.raises(CapacityError, match="the result is in") as raised:
        output.write("measured")
    (kept,) = tmp_path.glob("headinfer-result-*.json")
    assert str(kept) in str(raised.value)
    assert kept.read_text() == "measured"


def _fail_to_write(path, _):
    raise CapacityError(f"cannot write {path} (No space left on device): free some space on this disk")


def test_a_benchmark_prints_and_keeps_what_it_measured(tmp_path, monkeypatch, capsys):
    suites = [[Measurement("a", "p", "headinfer", 1.0, "s")], [Measurement("b", "p", "headinfer", 2.0, "s")]]
    monkeypatch.setattr("headinfer.bench.run.run_suites", lambda *_: iter(suites))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("headinfer.utils.files.write_bytes", _fail_to_write)
    assert exit_code(("bench", "--output", tmp_path / "result.json"), monkeypatch) == 2
    out, err = capsys.readouterr()
    assert "bench: a" in out
    assert "bench: b" in out
    kept = err.splitlines()[-1].rpartition("the result is in ")[2]
    with open(kept, encoding="utf-8") as file:
        assert len(json.load(file)["lines"]) == 2


# -- standard output ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", MODEL, "--prompt", "x", "--max-new-tokens", "3"),
        ("generate", MODEL, "--prompt", "x", "--max-new-tokens", "3", "--json"),
        PLAN,
        (*PLAN, "--json"),
        ("session", "list", "--json"),
        ("--help",),
    ],
    ids=lambda arguments: f"{arguments[0]} {arguments[-1]}",
)
def test_output_is_kept_if_standard_output_is_full(arguments, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("HEADINFER_SESSIONS", str(tmp_path / "sessions"))
    with open("/dev/full", "w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert exit_code(arguments, monkeypatch) == 2
    (kept,) = tmp_path.glob("headinfer-output-*.txt")
    message = capfd.readouterr().err.splitlines()[-1]
    assert "cannot write to standard output (No space left on device)" in message
    assert message.endswith(f"the output was written to {kept} instead")
    text = kept.read_text(encoding="utf-8")
    assert text.endswith("\n")
    if arguments[-1] == "--json":
        json.loads(text)


def test_output_ends_quietly_if_its_reader_has_ended(monkeypatch, capfd):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert exit_code(PLAN, monkeypatch) == BROKEN_PIPE
    assert "Traceback" not in capfd.readouterr().err


def test_closed_standard_output_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", None)
    assert exit_code(PLAN, monkeypatch) == 2
    assert "standard output is closed" in capsys.readouterr().err


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(12, "Cannot allocate memory"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried ..."),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("can't start new thread"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_memory_that_the_system_refuses(error, monkeypatch, capsys):
    from headinfer.cli import session

    def fail(_):
        raise error

    monkeypatch.setattr(session, "session_names", fail)
    assert exit_code(("session", "list"), monkeypatch) == 2
    err = capsys.readouterr().err
    assert err.startswith("headinfer: error: the system refuses memory (")
    assert err.count("\n") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="address space has a limit on Linux")
def test_a_limit_of_memory_below_what_the_libraries_need(refused, monkeypatch):
    import resource

    monkeypatch.setattr(resource, "getrlimit", lambda _: (10**9, 10**9))
    assert "ulimit -v" in refused("generate", MODEL, "--prompt", "x")
    assert exit_code(("session", "list"), monkeypatch) == 0


def test_other_errors_keep_their_traceback(monkeypatch):
    from headinfer.cli import session

    def fail(_):
        raise RuntimeError("a fault of headinfer")

    monkeypatch.setattr(session, "session_names", fail)
    monkeypatch.setattr(sys, "argv", ["headinfer", "session", "list"])
    with pytest.raises(RuntimeError, match="a fault"):
        cli.main()


# -- help --------------------------------------------------------------------------------------------------------------


def test_the_version(monkeypatch, capsys):
    assert exit_code(("--version",), monkeypatch) == 0
    assert capsys.readouterr().out == f"headinfer {headinfer.__version__}\n"


def test_help_names_the_exit_codes(monkeypatch, capsys):
    assert exit_code(("--help",), monkeypatch) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for code in ("0 success", "1 a check", "2 a mistake", "130 Ctrl-C", f"{BROKEN_PIPE} the reader"):
        assert code in shown
