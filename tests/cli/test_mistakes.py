"""Mistakes of the user on the command line: one sentence, exit code 2, nothing expensive first, nothing lost."""

import dataclasses
import errno
import io
import json
import os
import shutil
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import headinfer
from headinfer.bench.measurement import Measurement
from headinfer.cli import main as cli
from headinfer.cli.streams import BROKEN_PIPE
from headinfer.engine.machine import chosen_device
from headinfer.errors import CapacityError, UsageError
from headinfer.plan.hardware import HARDWARE
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
    "fidelity": ("eval", "fidelity", MODEL, "--file", "book.txt", "--kv-dtype", "int8"),
    "plan": PLAN,
    "bench": ("bench",),
}
SIZES = ("--device-kv-budget",)
WHOLE = {
    "generate": ("--seed", "--max-new-tokens", "--chunk-tokens", "--heads-per-group", "--tile-tokens", "--top-k",
                 "--device-kv-budget", "--host-kv-budget"),
    "read": ("--seed", "--chunk-tokens", "--device-kv-budget", "--host-kv-budget"),
    "ask": ("--seed", "--max-new-tokens", "--top-k", "--device-kv-budget", "--host-kv-budget"),
    "demo": ("--seed", "--context", "--questions"),
    "niah": ("--seed", "--samples", "--device-kv-budget"),
    "ruler": ("--seed", "--samples", "--device-kv-budget"),
    "data": ("--most-tokens", "--device-kv-budget"),
    "fidelity": ("--window", "--chunk-tokens"),
    "plan": ("--context", "--chunk-tokens", "--heads-per-group", "--tile-tokens", "--new-tokens", "--rows",
             "--weight-bits", "--disk", "--device-memory", "--device-kv-budget"),
    "bench": ("--gpu-memory",),
}  # fmt: skip
REAL = {
    "generate": ("--temperature", "--top-p", "--min-p", "--repetition-penalty"),
    "ask": ("--temperature", "--top-p", "--min-p", "--repetition-penalty"),
    "bench": ("--limit-s",),
}


@pytest.mark.parametrize(("command", "option"), [(name, option) for name in WHOLE for option in WHOLE[name]])
def test_a_whole_number_out_of_range_is_refused(command, option, refused):
    for value in ("-1" if option == "--seed" else "0", "nan", "1" + "0" * 30):
        assert option in refused(*COMMANDS[command], option, value)


@pytest.mark.parametrize(("command", "option"), [(name, option) for name in REAL for option in REAL[name]])
def test_a_number_out_of_range_is_refused(command, option, refused):
    for value in ("-1", "x", "nan", "1e-300", "1e300"):
        if option not in ("--top-p", "--min-p") or value != "1e-300":
            assert f"{option} is " in refused(*COMMANDS[command], option, value)


def test_tokens_may_have_a_unit_everywhere(capsys, monkeypatch):
    arguments = ("generate", MODEL, "--prompt", "xyz", "--chunk-tokens", "1K", "--max-new-tokens", "2", "--json")
    assert exit_code(arguments, monkeypatch) == 0
    assert json.loads(capsys.readouterr().out)["options"]["chunk_tokens"] == 1024


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ask", "x", "--session", "s", "--host-kv-budget", "1"), "--host-kv-budget and --disk-tier go together"),
        ((*COMMANDS["generate"], "--transport", "warp"), "--transport is warp"),
        ((*COMMANDS["generate"], "--heads-per-group", "99"), "--heads-per-group"),
        ((*COMMANDS["generate"], "--dtype", "int8"), "--dtype is int8"),
        (("eval", "niah", MODEL, "--depths", "90..10"), "reversed range"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_message_names_the_option_of_the_command_line(arguments, message, refused):
    assert message in refused(*arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", MODEL, "--seed", "1", "--seed", "2"),
        ("generate", MODEL, "--guesses", "1", "--guesses", "2"),
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
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\0\xff\xff")))
    assert "cannot read standard input: it is not UTF-8 text" in refused("generate", MODEL, "--file", "-")


# -- sizes that never end --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("demo", "--context", "1000M"), "is too long for the demo's model"),
        (("demo", "--questions", "50", "--context", "1000"), "of at least 5,000 tokens"),
        (("generate", "random:llama-3-8b?layers=99999999", "--prompt", "x"), "is too large"),
        (("generate", "random:gemma-3-4b?num_hidden_layers=9999999", "--prompt", "x"), "is too large"),
        (("eval", "niah", "random:llama-3-8b?layers=99999999"), "is too large"),
        (("eval", "niah", MODEL, "--lengths", "1000000M"), "tokens fit"),
        (("eval", "niah", MODEL, "--depths", "0..100/99999999999"), "more than 1000 depths"),
        (("read", MODEL + "&vocab=10", "--file", "book.txt", "--session", "s"), "the model has 10 tokens"),
        (("generate", MODEL + "&vocab=10", "--prompt", "x"), "the model has 10 tokens"),
        (("eval", "ruler", MODEL + "&vocab=10"), "the model has 10 tokens"),
    ],
    ids=lambda value: " ".join(value[:3]) if isinstance(value, tuple) else "",
)
def test_a_size_that_is_too_large_is_refused_at_once(arguments, message, capsys, monkeypatch):
    began = time.monotonic()
    assert exit_code(arguments, monkeypatch) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert time.monotonic() - began < 30


# -- broken models ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good_model(tmp_path_factory):
    """A model folder that works."""
    from headinfer.hf.models import byte_tokenizer, resolve

    folder = tmp_path_factory.mktemp("models") / "good"
    resolve(MODEL).load(dtype=torch.float32, device="cpu", seed=0).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def change_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_weights(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


BROKEN_CONFIGS = {
    "no KV heads": (lambda folder: change_config(folder, num_key_value_heads=0), "num_key_value_heads is 0"),
    "a text": (lambda folder: change_config(folder, hidden_size="sixty-four"), "hidden_size"),
    "too few layer types": (lambda folder: change_config(folder, layer_types=[]), "layer_types"),
    "no layers": (lambda folder: change_config(folder, num_hidden_layers=-1), "num_hidden_layers"),
    "too many layers": (lambda folder: change_config(folder, num_hidden_layers=99999999), "99,999,999"),
    "another text": (lambda folder: change_config(folder, max_position_embeddings="x"), "max_position_embeddings"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), "config"),
    "deep JSON": (lambda folder: (folder / "config.json").write_text("[" * 100000), "recursion"),
    "a list": (lambda folder: (folder / "config.json").write_text("[]"), "config"),
    "another family": (
        lambda folder: change_config(folder, model_type="bloom"),
        "the model family bloom is not verified",
    ),
    "another family with other names": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "bloom", "n_layer": 2, "hidden_size": 64}'),
        "the model family bloom is not verified",
    ),
    "a refused family": (
        lambda folder: change_config(folder, model_type="jetmoe"),
        "the model family jetmoe cannot be",
    ),
}


@pytest.mark.parametrize("fault", BROKEN_CONFIGS)
def test_a_broken_config_is_refused_by_generate_and_plan(fault, refused, good_model, tmp_path):
    folder = shutil.copytree(good_model, tmp_path / "model")
    change, message = BROKEN_CONFIGS[fault]
    change(folder)
    generated = refused("generate", folder, "--prompt", "x")
    planned = refused("plan", folder, "--gpu", "rtx4090", "--ram", "64GB")
    assert message in generated
    assert message in planned
    if "family" in fault:
        assert generated == planned


BROKEN_GENERATION = (
    {"eos_token_id": "x"}, {"stop_strings": 5}, {"bad_words_ids": 5}, {"suppress_tokens": ["x"]}, {"sequence_bias": 5},
    {"exponential_decay_length_penalty": [1]}, {"min_new_tokens": "z"}, {"max_time": "soon"}, {"compile_config": {}},
    {"forced_eos_token_id": 9999}, {"pad_token_id": "q"}, {"repetition_penalty": 0, "temperature": 0.6}, [], 5,
)  # fmt: skip


@pytest.mark.parametrize("content", [*map(json.dumps, BROKEN_GENERATION), "{", ""])
def test_a_broken_generation_config_is_refused(content, refused, good_model, tmp_path):
    folder = shutil.copytree(good_model, tmp_path / "model")
    (folder / "generation_config.json").write_text(content)
    for command in (("generate", folder, "--prompt", "x"), ("eval", "niah", folder)):
        said = refused(*command)
        assert f"the generation_config.json of {folder}" in said
        if content.startswith("{") and len(content) > 1:
            assert next(iter(json.loads(content))) in said


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [2, 3], "transformers_version": "4.40.0"},
        {"temperature": 0.0, "max_length": 4096},
        {"num_beams": 4, "num_return_sequences": 2, "early_stopping": True},
        {"eos_token_id": -1, "pad_token_id": 99999, "chat_format": "chatml"},
        {"use_mtp": True, "cache_implementation": "hybrid"},
    ],
    ids=str,
)
def test_a_generation_config_that_works_is_accepted(fields, good_model, tmp_path):
    from headinfer.hf.models import resolve

    folder = shutil.copytree(good_model, tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps(fields))
    state = torch.random.get_rng_state()
    assert resolve(str(folder)).name == str(folder)
    assert torch.equal(torch.random.get_rng_state(), state)


BROKEN_WEIGHTS = {
    "with another layer": (lambda path: change_weights(path.parent, lambda found: found.update(
        {"model.layers.1.mlp.up_proj.weight": torch.ones(7)})), "such as model.layers.1.mlp.up_proj.weight"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:5000]), "incomplete metadata"),
    "empty": (lambda path: path.write_bytes(b""), "header too small"),
    "garbage": (lambda path: path.write_bytes(b"x" * 999), "header too large"),
    "missing": (lambda path: path.unlink(), "no file named"),
    "without a tensor": (lambda path: change_weights(path.parent, lambda found: found.pop("model.norm.weight")),
                         "lack model.norm.weight"),
    "with another shape": (lambda path: change_weights(path.parent, lambda found: found.update(
        {"model.norm.weight": torch.ones(7)})), "model.norm.weight has shape [7]"),
}  # fmt: skip


def test_weights_that_are_not_of_a_layer_may_be_unused(good_model, tmp_path):
    from headinfer.hf.models import resolve

    folder = shutil.copytree(good_model, tmp_path / "model")
    names = ("vision.layers.7.up.weight", "model.layers.0.self_attn.rotary_emb.inv_freq", "model.mtp.weight")
    change_weights(folder, lambda found: found.update({name: torch.ones(2) for name in names}))
    resolve(str(folder)).load(dtype=torch.float32, device="cpu", seed=0)


@pytest.mark.parametrize("fault", BROKEN_WEIGHTS)
def test_broken_weights_are_refused(fault, good_model, tmp_path, capsys, monkeypatch):
    """transformers puts random numbers in the place of tensors that are missing."""
    folder = shutil.copytree(good_model, tmp_path / "model")
    change, message = BROKEN_WEIGHTS[fault]
    change(folder / "model.safetensors")
    assert exit_code(("generate", folder, "--prompt", "x"), monkeypatch) == 2
    out, err = capsys.readouterr()
    assert out == ""
    said = err.splitlines()[-1]
    assert said.startswith(f"headinfer: error: the weights of {folder}")
    assert message in said


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: [(folder / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")],
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        lambda folder: (folder / "tokenizer_config.json").write_text("["),
    ],
    ids=["missing", "empty", "no JSON"],
)
@pytest.mark.parametrize("command", ["generate", "niah"])
def test_a_broken_tokenizer_is_refused(command, change, refused, good_model, tmp_path):
    folder = shutil.copytree(good_model, tmp_path / "model")
    change(folder)
    arguments = [folder if value == MODEL else value for value in COMMANDS[command]]
    assert f"the tokenizer of {folder}" in refused(*arguments)


def test_a_session_of_two_rows_is_refused_by_ask(refused, tmp_path):
    from headinfer import HeadCache, enable
    from headinfer.hf.models import resolve

    model = resolve(MODEL).load(dtype=torch.float32, device="cpu", seed=0)
    ids = torch.arange(200).view(2, 100)
    with enable(model), torch.inference_mode():
        cache = model(input_ids=ids, past_key_values=HeadCache(model.config)).past_key_values
    cache.save(tmp_path / "root" / "s", ids, about={"model": MODEL})
    assert "holds 2 rows" in refused("ask", "x", "--session", "s", "--sessions", tmp_path / "root")


# -- folders without permission --------------------------------------------------------------------------------------


@pytest.fixture
def forbid(tmp_path, saved, monkeypatch):
    """Return a function that makes a folder unreadable. The superuser, who may run the tests, reads any folder."""
    root = shutil.copytree(saved, tmp_path / "sessions")

    def forbid(folder):
        def refuse_in(name, real):
            def call(path=".", *more, **named):
                text = os.fspath(path) if not isinstance(path, int) else ""
                is_listed = name in ("listdir", "scandir") and text == str(folder)
                if is_listed or str(text).startswith(f"{folder}/"):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), text)
                return real(path, *more, **named)

            return call

        for name in ("stat", "lstat", "listdir", "scandir", "open"):
            monkeypatch.setattr(os, name, refuse_in(name, getattr(os, name)))
        monkeypatch.setattr(io, "open", refuse_in("open", io.open))
        return root

    return forbid


SESSION_COMMANDS = {
    "list": ("session", "list"),
    "info": ("session", "info", "s"),
    "verify": ("session", "verify", "s"),
    "rm": ("session", "rm", "s"),
    "undo": ("session", "undo", "s"),
    "export": ("session", "export", "s", "s.tar"),
    "ask": ("ask", "x", "--session", "s"),
    "read": ("read", MODEL, "--file", "book.txt", "--session", "s"),
}


@pytest.mark.parametrize("command", SESSION_COMMANDS)
def test_an_unreadable_folder_of_sessions_is_named(command, refused, forbid, tmp_path):
    root = forbid(tmp_path / "sessions")
    said = refused(*SESSION_COMMANDS[command], "--sessions", root)
    assert f"cannot read the folder of sessions {root} (Permission denied" in said


@pytest.mark.parametrize("command", [name for name in SESSION_COMMANDS if name != "list"])
def test_an_unreadable_session_is_named(command, refused, forbid, tmp_path):
    root = forbid(tmp_path / "sessions" / "s")
    assert str(root / "s") in refused(*SESSION_COMMANDS[command], "--sessions", root)


def test_an_unreadable_session_is_listed(forbid, tmp_path, capsys, monkeypatch):
    root = forbid(tmp_path / "sessions" / "s")
    assert exit_code(("session", "list", "--sessions", root, "--json"), monkeypatch) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["name"] == "s"
    assert "Permission denied" in found["error"]


@pytest.mark.parametrize("command", SESSION_COMMANDS)
def test_a_file_in_place_of_the_folder_of_sessions_is_named(command, refused, book):
    assert str(book) in refused(*SESSION_COMMANDS[command], "--sessions", book)


@pytest.mark.parametrize(
    ("query", "message"),
    {
        "head_dim=3": "must be even",
        "layers=1&layers=2": "is given twice",
        "layers=1&num_hidden_layers=2": "is given twice",
        "hidden=1000000000000000&heads=1&kv_heads=1": "overflow",
        "vocab=99999999999999999999": "is too large",
    }.items(),
)
def test_fields_of_a_random_model_that_cannot_be(query, message, refused):
    assert message in refused("generate", f"random:tiny-llama?{query}", "--prompt", "x")


@pytest.mark.parametrize("model", ["", " "])
def test_a_model_without_a_name_is_refused(model, refused):
    assert "is not the name of a model" in refused("generate", model, "--prompt", "x")


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(HARDWARE["l4"])])
def test_a_broken_description_of_hardware_is_refused(field, refused, tmp_path):
    path = tmp_path / "hardware.json"
    texts = ("name", "source", "is_host")
    optional = ("kv_bytes_per_s", "attention_share", "cpu_threads_beside_link")
    for value in ([], -1, {"bfloat16": "x"}, {"bfloat16": 0}, float("nan"), None, "x"):
        if field in texts or (field in optional and value is None):
            continue
        path.write_text(json.dumps(dataclasses.asdict(HARDWARE["l4"]) | {field: value}))
        assert field in refused("plan", "llama-3-8b", "--gpu", path, "--ram", "64GB")
    path.write_text("[" * 100_000)
    assert "is not a description of hardware" in refused("plan", "llama-3-8b", "--gpu", path)


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
        assert "No such file" not in refused(*WRITERS[command], place)
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


@pytest.mark.parametrize("file", ["/dev/zero", "an-empty-folder", "no-such-file", "/proc/self/mem"])
def test_a_file_that_is_no_text_is_refused(file, refused):
    os.mkdir("an-empty-folder")
    for arguments in (("generate", MODEL), ("read", MODEL, "--session", "s"), ("eval", "niah", MODEL)):
        option = "--text" if arguments[0] == "eval" else "--file"
        assert f"cannot read {file}" in refused(*arguments, option, file)


def test_standard_input_that_is_closed(refused, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert "cannot read standard input: it is closed" in refused("generate", MODEL, "--file", "-")


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
