"""The command `headinfer plan`, its plots, and the comparison with the paper."""

import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import paper_notes
import paper_tables
import pytest
from own_process import HANG_S

from headinfer.errors import UsageError
from headinfer.plan.compare import METHODS
from headinfer.plan.hardware import HARDWARE
from headinfer.plan.models import BUILT_IN_CONFIGS, find_shape

ROOT = Path(__file__).parents[2]
JOB = ("llama-3-8b", "--context", "1M", "--gpu", "rtx4090", "--ram", "256GB")


def run(*arguments, **environment):
    command = [sys.executable, "-W", "error", "-m", "headinfer", "plan", *map(str, arguments)]
    variables = {**os.environ, "COLUMNS": "80", "NO_COLOR": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=HANG_S, check=False, env=variables)


def test_plan_is_quick_and_loads_neither_torch_nor_transformers():
    """Function calls are counted instead of seconds, which depend on the load: 5 million take less than a second."""
    script = f"""
import cProfile, pstats, sys
profile = cProfile.Profile()
profile.enable()
from headinfer.cli.main import main
sys.argv = ["headinfer", "plan", *{JOB!r}]
try:
    main()
except SystemExit as done:
    assert not done.code, done.code
profile.disable()
calls = pstats.Stats(profile).total_calls
assert calls < 5_000_000, calls
for name in ("torch", "transformers", "matplotlib", "numpy"):
    assert name not in sys.modules, name
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=HANG_S, check=False)
    assert done.returncode == 0, done.stderr


def test_the_tables_fit_a_terminal_and_show_the_main_figures():
    done = run(*JOB)
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    for words in ("128.00", "weights", "longest context", "prefill of the whole context", "decode, a token",
                  "roofline", "bound by link", "decode with the CPU, a token (a model of DRAM)",
                  "tokens resident", "no: GPU", "It streams from host RAM"):  # fmt: skip
        assert words in done.stdout
    assert "1,048,576 tokens exceed the 8,192 that this model was made for" in done.stderr
    assert "stay on the device" in done.stdout
    assert "stay on the device" not in run(*JOB, "--no-resident").stdout


def test_json_is_one_object_with_all_tables():
    done = run(*JOB, "--json", "--device-kv-budget", "256MiB", "--dtype", "float16")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found["memory"]) == set(found["longest_tokens"]) == set(found["prefill_s"]) == set(METHODS)
    assert found["plan"]["host_bytes"] > found["memory"]["headinfer"]["host_kv_bytes"] == 128 * 2**30
    assert found["plan"]["device_kv_budget_bytes"] <= 256 * 2**20
    assert len(found["decode_s_per_token"]["headinfer"]) == len(found["contexts"])
    assert len(found["plan"]["resident_tokens"]) == 32
    resident_bytes = sum(found["plan"]["resident_tokens"]) * 4096
    assert found["plan"]["footprint"]["resident_bytes"] == resident_bytes
    assert found["plan"]["streaming_budget_bytes"] + resident_bytes == found["plan"]["device_kv_budget_bytes"]
    assert found["warnings"]
    assert found["plan"]["cpu_share"] == 0
    at_1m = found["with_cpu"][found["contexts"].index(2**20)]
    assert 0.5 < at_1m["with_cpu"]["cpu_share"] < 1
    assert at_1m["with_cpu"]["decode_s_per_token"] < 0.5 * at_1m["link_only_decode_s_per_token"]


def test_a_share_of_the_cpu_on_a_cpu_has_no_effect(run_command):
    code, _, err = run_command("plan", "llama-3-8b", "--gpu", "cpu", "--ram", "64GB", "--cpu-share", "0.5")
    assert code == 0
    assert err.count("--cpu-share has no effect") == 1
    for arguments in (("--gpu", "cpu", "--cpu-share", "0"), ("--gpu", "cpu"), ("--gpu", "l4", "--cpu-share", "0.5")):
        assert "--cpu-share" not in run_command("plan", "llama-3-8b", "--ram", "64GB", *arguments)[2]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("llama-3-8b", "--gpu", "rtx4091"), "there is no device 'rtx4091' in the table: choose one of rtx4090"),
        (("llama-3-9b", "--gpu", "rtx4090"), "there is no model 'llama-3-9b'"),
        (("llama-3-9b", "--gpu", "rtx4090"), "llama-3-8b"),
        (("llama-3-8b", "--gpu", "rtx4090", "--ram", "12XB"), "'12XB' is not a size"),
        (("llama-3-8b", "--gpu", "rtx4090", "--disk", "TB"), "'TB' is not a size"),
        (("llama-3-8b", "--gpu", "rtx4090", "--context", "1Q"), "'1Q' is not a number of tokens"),
        (("llama-3-8b", "--gpu", "rtx4090", "--context", "0"), "--context is 0: it must be a positive number"),
        (("llama-3-8b", "--gpu", "rtx4090", "--ram", "94GiB", "--context", "1M"), "at most 753,888 tokens fit"),
        (("llama-3-8b", "--gpu", "rtx4090", "--ram", "1GB"), "no context fits"),
        (("llama-3-8b", "--gpu", "rtx4090", "--device-kv-budget", "1MiB", "--ram", "64GB"), "is too small"),
        (("llama-3-70b", "--gpu", "rtx4090"), "the weights need 131.4 GiB at 16 bits each"),
        (("llama-3-8b", "--gpu", "t4", "--dtype", "bfloat16"), "T4 has no figure for bfloat16"),
        (("llama-3-8b", "--gpu", "nowhere.json"), "nowhere.json is not a description of hardware"),
        (("llama-3-8b",), "name a device with --gpu"),
        (
            ("llama-3-8b", "--gpu", "l4", "--cpu-share", "1.5"),
            "--cpu-share is 1.5: it must be auto or a number from 0 to 1",
        ),
        ((), "name a model"),
        (("--paper",), "python benchmarks/paper/compare.py prints the comparison with the paper"),
    ],
)
def test_a_mistake_gets_one_sentence_and_exit_code_2(arguments, sentence, tmp_path):
    done = run(*arguments, XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("headinfer: error: ")
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_probe_of_this_machine_is_the_default_device(tmp_path):
    HARDWARE["l4"].save(tmp_path / "headinfer" / "hardware.json")
    done = run("llama-3-8b", "--ram", "64GB", XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "on L4" in done.stdout


def download(hub_cache, model, revision, config, *, is_main=True):
    """Put a config into a folder as huggingface_hub stores a downloaded one; returns its folder."""
    folder = hub_cache / f"models--{model.replace('/', '--')}"
    snapshot = folder / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(config))
    if is_main:
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text(revision)
    return snapshot


def test_the_hub_cache_is_where_hugging_face_looks_for_it(tmp_path):
    config = BUILT_IN_CONFIGS["llama-3-8b"] | {"num_hidden_layers": 2}
    folders = {"HF_HOME": "hub", "HF_HUB_CACHE": ".", "XDG_CACHE_HOME": "huggingface/hub"}
    script = """
import sys
from headinfer.plan.models import find_shape
assert len(find_shape("Some/Model").layers) == 2
assert not {"torch", "transformers"} & set(sys.modules), "headinfer plan loads neither"
"""
    unset = {name: value for name, value in os.environ.items() if name not in (*folders, "HUGGINGFACE_HUB_CACHE")}
    for name, below in folders.items():
        download(tmp_path / name / below, "Some/Model", "abc", config)
        environment = {**unset, name: str(tmp_path / name)}
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False, env=environment
        )
        assert done.returncode == 0, (name, done.stderr)


def test_models_are_found_in_folders_files_and_the_hub_cache(tmp_path, monkeypatch):
    config = BUILT_IN_CONFIGS["qwen3-8b"]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = download(tmp_path / "hub", "Some/Model", "abc", config | {"num_hidden_layers": 7})
    download(tmp_path / "hub", "Some/Model", "def", config | {"num_hidden_layers": 8}, is_main=False)
    for name in (snapshot, snapshot / "config.json", "Some/Model"):
        assert len(find_shape(str(name)).layers) == 7
    for name in ("Some/Other", "Some/Model/config.json", "-/Model", "https://some/model"):
        with pytest.raises(UsageError, match="there is no model"):
            find_shape(name)
    assert find_shape("meta-llama/Meta-Llama-3-8B-Instruct") == find_shape("llama-3-8b")
    assert find_shape("google/gemma-3-12b-it") == find_shape("gemma-3-12b")
    (snapshot / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="is not the config of a decoder: the config's hidden_size is None"):
        find_shape(str(snapshot))
    with pytest.raises(UsageError, match="is not a model folder"):
        find_shape(str(tmp_path))


@pytest.mark.parametrize("job", [JOB, ("gemma-3-4b", "--gpu", "laptop-cpu", "--ram", "32GB")])
def test_plots_are_drawn(job, tmp_path):
    path = tmp_path / "plan.png"
    done = run(*job, "--plot", path)
    assert done.returncode == 0, done.stderr
    assert path.read_bytes().startswith(b"\x89PNG")
    width = int.from_bytes(path.read_bytes()[16:20], "big")
    assert width == 900  # readable in a README
    done = run(*job, "--plot", tmp_path / "no" / "plan.png")
    assert done.returncode == 2
    assert "cannot draw into" in done.stderr


# -- the paper ------------------------------------------------------------------------------------------------------


def test_the_document_is_what_its_command_prints():
    command = [sys.executable, "-W", "error", ROOT / "benchmarks" / "paper" / "compare.py"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=HANG_S, check=False)
    assert done.returncode == 0, done.stderr
    assert (ROOT / "docs" / "paper-comparison.md").read_text("utf-8") == done.stdout


def test_every_difference_is_explained_and_no_explanation_is_stale():
    used = set()
    for table in paper_tables.TABLES:
        for row in paper_tables.rows_of(table):
            note = row.note  # raises if there is none
            assert bool(note) == (abs(row.difference) > row.allowed)
            used |= {text for text in paper_notes.NOTES.values() if note.startswith(text) and note}
    assert used == set(paper_notes.NOTES.values())


@pytest.mark.parametrize("table", ["5", "10", "11"])
def test_memory_agrees_with_the_paper(table):
    for row in paper_tables.rows_of(table):
        assert abs(row.difference) <= 0.03, row


def test_time_agrees_with_the_paper_beyond_1k_tokens():
    for row in paper_tables.rows_of("6") + paper_tables.rows_of("7"):
        if not row.what.endswith(", 1K"):
            assert abs(row.difference) <= 0.25, row
