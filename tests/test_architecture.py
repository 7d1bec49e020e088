"""Who may import whom, small files, and a quiet `import headinfer`.

The rules are import-linter's contracts in pyproject.toml; ARCHITECTURE.md says why they are as they are.
"""

import contextlib
import io
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import grimp
import pytest
from importlinter.cli import lint_imports
from own_process import HANG_S

import headinfer

ROOT = Path(__file__).parents[1]
SOURCE = Path(headinfer.__file__).parent
MAX_LINES = 500


def contracts():
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"]


def test_every_import_keeps_the_contracts():
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        failed = lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True)
    assert not failed, shown.getvalue()


def test_every_third_party_has_a_contract():
    """A new dependency is noticed: each one says who may import it."""
    protected = {name for contract in contracts() for name in contract.get("protected_modules", ())}
    graph = grimp.build_graph("headinfer", include_external_packages=True, cache_dir=None)
    third_parties = {
        module
        for module in graph.modules
        if not module.startswith("headinfer") and module not in sys.stdlib_module_names
    }
    assert third_parties >= {"torch", "transformers", "triton", "rich"}
    assert third_parties <= protected


@pytest.mark.parametrize(
    ("path", "source", "contract"),
    [
        ("errors.py", "from headinfer.plan import tiles", "Floors"),
        ("utils/files.py", "from headinfer.kv.host_memory import HostTier", "Floors"),
        ("attention/state.py", "from headinfer.kv.host_memory import HostTier", "Floors"),
        ("kv/host_memory.py", "from ..attention.state import AttentionState", "Floors"),
        ("plan/tiles.py", "def f():\n    from headinfer.engine.streaming import attend_streaming", "Floors"),
        ("engine/streaming.py", "from headinfer.hf.cache import HeadCache", "Floors"),
        ("hf/models.py", "from headinfer.bench.run import run_suites", "Floors"),
        ("evals/tasks.py", "from headinfer.cli import report", "Floors"),
        ("unknown.py", "", "Floors"),
        ("kv/host_memory.py", "if TYPE_CHECKING:\n    from headinfer.hf.cache import HeadCache", "No circles"),
        (
            "kv/transfer.py",
            "from headinfer.kv import layer_kv",
            "The ring and the KV of a layer do not import each other",
        ),
        ("attention/state.py", "from headinfer.attention import triton_kernels", "triton"),
        ("attention/cuda.py", "import triton.language as tl", "triton"),
        ("attention/backends.py", "from . import reference", "The float64 oracle"),
        ("plan/tiles.py", "import torch.nn as nn", "torch"),
        ("cli/plan.py", "from headinfer.engine.machine import this_machine", "`import headinfer`"),
        ("engine/streaming.py", "from transformers import Cache", "transformers"),
        ("hf/cache.py", "from transformers.cache_utils import Cache", "transformers"),
        ("hf/compat.py", "import rich", "The terminal"),
    ],
)
def test_a_violation_is_seen(path, source, contract, tmp_path):
    shutil.copytree(SOURCE, tmp_path / "headinfer", ignore=shutil.ignore_patterns("__pycache__", "embedded"))
    (tmp_path / "headinfer" / "embedded").mkdir()
    shutil.copy(SOURCE / "embedded" / "__init__.py", tmp_path / "headinfer" / "embedded")
    with open(tmp_path / "headinfer" / path, "a", encoding="utf-8") as file:
        file.write(f"\n{source}\n")
    command = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = subprocess.run(
        [sys.executable, "-c", command, "--no-cache", "--config", ROOT / "pyproject.toml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=HANG_S,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    shown = " ".join(done.stdout.split())
    broken = [one["name"] for one in contracts() if f"{one['name']} BROKEN" in shown]
    assert any(name.startswith(contract) for name in broken), done.stdout


@pytest.mark.parametrize("pattern", ["*.py", "*.c"])
def test_files_are_small(pattern):
    files = list(SOURCE.rglob(pattern))
    assert files
    lines = {str(file.relative_to(SOURCE)): len(file.read_text("utf-8").splitlines()) for file in files}
    too_long = {path: count for path, count in lines.items() if count > MAX_LINES}
    assert not too_long, f"over {MAX_LINES} lines: {too_long}"


def test_importing_headinfer_changes_nothing_in_transformers():
    """No global patching: the name is registered by enable(), not by the import."""
    script = """
import transformers
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

def registered():
    return [dict(interface._global_mapping) for interface in (AttentionInterface, AttentionMaskInterface)]

before = registered()
import headinfer
import headinfer.cli.main
assert headinfer.enable and headinfer.HeadCache  # the package imports them when they are asked for
assert registered() == before, registered()
assert "headinfer" not in AttentionInterface().valid_keys()

from headinfer.hf.attention import register
register()
assert "headinfer" in AttentionInterface().valid_keys()
assert registered() != before
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=HANG_S)
    assert done.returncode == 0, done.stderr
