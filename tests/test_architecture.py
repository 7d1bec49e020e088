"""Who may import whom (shared/DESIGN.md, section 4), small files, and a quiet `import headinfer`.

Floors: a file imports only the standard library, its own room, lower floors, and the third parties of its room.
A file that no room names is on the top floor and may import anything.
"""

import ast
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pytest

import headinfer

SOURCE = Path(headinfer.__file__).parent
MAX_LINES = 350
ANYTHING = None


@dataclass(frozen=True)
class Room:
    """Files of one floor that may import each other. third_parties: ANYTHING where none is refused."""

    name: str
    floor: int
    paths: tuple[str, ...]
    third_parties: frozenset[str] | None


ROOMS = (
    Room("the errors", 0, ("errors.py", "ranks.py", "files.py", "embedded/"), frozenset()),
    Room("the model's shape", 0, ("model_shape.py",), frozenset()),
    Room("attention/", 1, ("attention/",), frozenset({"torch", "triton"})),
    Room("kv/", 1, ("kv/",), frozenset({"torch", "xxhash"})),
    Room("sessions/", 1, ("sessions/",), frozenset({"xxhash"})),
    Room("plan/", 1, ("plan/",), frozenset({"psutil"})),
    Room(
        "the loop",
        2,
        ("streaming.py", "device_kv.py", "engine.py", "machine.py", "run_plan.py"),
        frozenset({"torch", "psutil"}),
    ),
    Room("hf/", 3, ("hf/",), ANYTHING),
)
TOP = Room("the top floor", 4, (), ANYTHING)

# triton is not everywhere: only the file of its kernels imports it, and nothing but triton_calls.py loads that file.
TORCH_ONLY = ("backends", "cpu", "cuda", "eager", "native", "problem", "reference", "state", "triton_calls")

# Files stricter than their room: the third parties that they may import.
THIRD_PARTIES = {
    **{f"attention/{name}.py": frozenset({"torch"}) for name in TORCH_ONLY},
    "hf/cache.py": frozenset({"torch"}),
    "hf/attention.py": frozenset({"torch"}),
    "hf/enable.py": frozenset({"torch"}),
    "hf/compat.py": frozenset({"torch", "transformers", "packaging"}),
    "plan_cli.py": frozenset({"rich", "typer"}),
    "plan_plots.py": frozenset({"matplotlib"}),
}

# Modules that a file (or folder) never imports, although its floor would allow it.
NEVER = (
    ("attention/state.py", "headinfer.attention.backends"),
    ("attention/state.py", "headinfer.attention.cuda"),
    ("attention/state.py", "headinfer.attention.native"),
    *((f"attention/{name}.py", "headinfer.attention.triton_kernels") for name in TORCH_ONLY[:-1]),
    ("attention/reference.py", "headinfer.attention.backends"),
    ("kv/head_store.py", "headinfer.kv.transfer"),
    ("kv/transfer.py", "headinfer.kv.head_store"),
    ("kv/tiers.py", "headinfer.kv.head_store"),
    ("hf/compat.py", "headinfer.streaming"),
    ("plan_cli.py", "headinfer.engine"),
    ("plan_cli.py", "headinfer.report"),
    ("hf/cache.py", "headinfer.kv.transfer"),
    ("hf/attention.py", "headinfer.kv.transfer"),
    ("hf/enable.py", "headinfer.kv.transfer"),
)
ORACLE = "headinfer.attention.reference"
ORACLE_USERS = ("bench/",)  # and the tests


def is_at(path, place):
    """Whether a path is a file, or lies in a folder (named with a slash at its end)."""
    return path.startswith(place) if place.endswith("/") else path == place


def room_of(path):
    return next((room for room in ROOMS if any(is_at(path, place) for place in room.paths)), TOP)


def module_name(path):
    """headinfer.kv.tiers for kv/tiers.py, headinfer.kv for kv/__init__.py."""
    parts = PurePosixPath(path).with_suffix("").parts
    return ".".join(("headinfer", *(parts[:-1] if parts[-1] == "__init__" else parts)))


def path_of(module, modules):
    """The file of a module of this package; `modules` maps names to paths."""
    while module not in modules:
        module = module.rpartition(".")[0]  # a name inside a module
        assert module
    return modules[module]


def imports_of(path, source, modules):
    """The full names of all modules that a source imports, also inside functions and `if TYPE_CHECKING`."""
    package = ["headinfer", *PurePosixPath(path).parts[:-1]]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield full if full in modules else base
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            yield from (arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant))


def violations(path, source, modules):
    """What a file imports against the rules: sentences that name the file, the import and the rule."""
    room, found = room_of(path), []
    for name in dict.fromkeys(imports_of(path, source, modules)):
        top = name.partition(".")[0]

        def broken(rule, name=name):
            found.append(f"{path} imports {name}: {rule}")

        if top == "headinfer":
            other_path = path_of(name, modules)
            other, other_module = room_of(other_path), module_name(other_path)
            if other.floor > room.floor:
                broken(f"{room.name} (floor {room.floor}) may not import {other.name} (floor {other.floor})")
            elif other.floor == room.floor and other != room:
                broken(f"{room.name} may not import its neighbour {other.name} on floor {room.floor}")
            for place, never in NEVER:
                if is_at(path, place) and other_module == never:
                    broken(f"{place} never imports {never}")
            if other_module == ORACLE and not any(is_at(path, place) for place in ORACLE_USERS):
                broken("the oracle is for tests and bench/ only")
        elif top not in sys.stdlib_module_names:
            allowed = THIRD_PARTIES.get(path, room.third_parties)
            if allowed is not ANYTHING and top not in allowed:
                these = " and ".join(sorted(allowed)) or "nothing"
                broken(f"it may import {these} besides the standard library")
    return found


def source_files(pattern="*.py"):
    return {path.relative_to(SOURCE).as_posix(): path for path in sorted(SOURCE.rglob(pattern))}


def modules_of(paths):
    return {module_name(path): path for path in paths}


# -- the package -----------------------------------------------------------------------------------------------


def test_every_file_keeps_to_its_floor():
    files = source_files()
    assert len(files) > 20
    modules = modules_of(files)
    found = [line for path, file in files.items() for line in violations(path, file.read_text("utf-8"), modules)]
    assert not found, "\n" + "\n".join(found)


def test_every_rule_is_about_a_file_that_exists():
    """A file that moved takes its rule with it. (DESIGN's machine.py is not written yet.)"""
    files = source_files()
    places = [place for room in ROOMS for place in room.paths] + list(THIRD_PARTIES) + list(ORACLE_USERS)
    places += [place for place, _ in NEVER]
    missing = {place for place in places if not any(is_at(path, place) for path in files)}
    assert missing <= {"machine.py"}
    assert {never for _, never in NEVER} | {ORACLE} <= modules_of(files).keys()


def test_only_the_lower_floors_are_listed():
    """What is at the top of the package and in no room is a command or the package itself."""
    tops = {path for path in source_files() if room_of(path) is TOP and "/" not in path}
    assert {"__init__.py", "__main__.py", "cli.py"} <= tops
    assert room_of("streaming.py").floor == 2
    assert room_of("hf/cache.py").floor == 3
    assert room_of("anything_new.py") is TOP
    assert room_of("serve/http.py") is TOP


@pytest.mark.parametrize("pattern", ["*.py", "*.c"])
def test_files_are_small(pattern):
    files = source_files(pattern)
    assert files
    lines = {path: len(file.read_text("utf-8").splitlines()) for path, file in files.items()}
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
import headinfer.cli
assert headinfer.enable and headinfer.HeadCache  # the package imports them when they are asked for
assert registered() == before, registered()
assert "headinfer" not in AttentionInterface().valid_keys()

from headinfer.hf.attention import register
register()
assert "headinfer" in AttentionInterface().valid_keys()
assert registered() != before
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


# -- the checker itself ------------------------------------------------------------------------------------------

MODULES = modules_of(
    [
        "__init__.py",
        "errors.py",
        "model_shape.py",
        "attention/__init__.py",
        "attention/state.py",
        "attention/backends.py",
        "attention/reference.py",
        "attention/triton_kernels.py",
        "kv/__init__.py",
        "kv/head_store.py",
        "kv/transfer.py",
        "kv/tiers.py",
        "plan/__init__.py",
        "plan/tiles.py",
        "streaming.py",
        "engine.py",
        "hf/__init__.py",
        "hf/cache.py",
        "hf/compat.py",
        "hf/models.py",
        "bench/__init__.py",
        "bench/run.py",
        "cli.py",
    ]
)


@pytest.mark.parametrize(
    ("path", "source", "rule"),
    [
        ("errors.py", "import torch", "errors.py imports torch: it may import nothing"),
        ("errors.py", "from headinfer.model_shape import ModelShape", "neighbour the model's shape"),
        ("model_shape.py", "def f():\n    from transformers import AutoConfig", "imports transformers: it may import"),
        ("attention/state.py", "from headinfer.kv.tiers import HostTier", "neighbour kv/ on floor 1"),
        ("attention/state.py", "from headinfer.plan import tiles", "attention/ may not import its neighbour plan/"),
        (
            "attention/state.py",
            "from headinfer.attention import backends",
            "never imports headinfer.attention.backends",
        ),
        (
            "attention/backends.py",
            "from headinfer.attention.reference import attend_reference",
            "tests and bench/ only",
        ),
        ("attention/backends.py", "from headinfer.attention import reference", "tests and bench/ only"),
        ("attention/backends.py", "from . import reference", "tests and bench/ only"),
        ("attention/backends.py", "import numpy as np", "it may import torch besides"),
        ("attention/backends.py", "import triton", "it may import torch besides"),
        (
            "attention/state.py",
            "from headinfer.attention import triton_kernels",
            "never imports headinfer.attention.triton_k",
        ),
        ("kv/head_store.py", "from headinfer.kv.transfer import Ring", "never imports headinfer.kv.transfer"),
        ("kv/head_store.py", "from .transfer import Ring", "never imports headinfer.kv.transfer"),
        ("kv/head_store.py", "import headinfer.kv.transfer", "never imports headinfer.kv.transfer"),
        ("kv/transfer.py", "from headinfer.kv import head_store", "never imports headinfer.kv.head_store"),
        ("kv/tiers.py", "from ..attention.state import merge", "neighbour attention/"),
        ("kv/tiers.py", "import headinfer", "kv/ (floor 1) may not import the top floor (floor 4)"),
        ("kv/tiers.py", "import importlib\nimportlib.import_module('transformers')", "imports transformers"),
        ("plan/tiles.py", "import torch.nn as nn", "imports torch.nn: it may import psutil besides"),
        ("plan/tiles.py", "from headinfer.streaming import attend_streaming", "(floor 1) may not import the loop"),
        ("streaming.py", "from transformers import Cache", "imports transformers"),
        ("streaming.py", "from headinfer.hf.cache import HeadCache", "may not import hf/ (floor 3)"),
        ("engine.py", "if TYPE_CHECKING:\n    from headinfer.hf.cache import Tag", "may not import hf/ (floor 3)"),
        ("machine.py", "import transformers", "it may import psutil and torch besides"),
        ("hf/cache.py", "import transformers", "hf/cache.py imports transformers: it may import torch besides"),
        ("hf/cache.py", "from transformers.cache_utils import Cache", "imports transformers.cache_utils"),
        ("hf/cache.py", "from headinfer.kv.transfer import Ring", "never imports headinfer.kv.transfer"),
        ("hf/compat.py", "from headinfer.streaming import Tile", "never imports headinfer.streaming"),
        ("hf/compat.py", "import rich", "it may import packaging and torch and transformers besides"),
        ("hf/models.py", "from headinfer.bench.run import run", "may not import the top floor"),
        ("hf/models.py", "from headinfer import cli", "hf/models.py imports headinfer.cli"),
        ("cli.py", "from headinfer.attention.reference import attend_reference", "tests and bench/ only"),
        ("new_thing.py", "import headinfer.attention.reference", "tests and bench/ only"),
    ],
)
def test_the_checker_sees_a_violation(path, source, rule):
    (found,) = violations(path, source, MODULES)
    assert found.startswith(f"{path} imports ")
    assert rule in found


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("errors.py", "import dataclasses\nfrom collections.abc import Sequence"),
        ("attention/backends.py", "import torch\nfrom headinfer.attention.state import AttentionState"),
        ("attention/backends.py", "from headinfer.errors import UsageError\nfrom . import state"),
        ("attention/triton_kernels.py", "import triton.language as tl"),
        ("kv/head_store.py", "from headinfer.kv.tiers import HostTier\nfrom .ledger import Ledger"),
        ("plan/tiles.py", "import psutil\nfrom headinfer.model_shape import ModelShape"),
        ("streaming.py", "import torch\nfrom headinfer.kv.transfer import Ring\nfrom headinfer.plan import tiles"),
        ("engine.py", "from headinfer.streaming import attend_streaming"),
        ("hf/cache.py", "from headinfer.hf.compat import Cache\nfrom headinfer.engine import Engine"),
        ("hf/compat.py", "import transformers\nfrom packaging.version import Version"),
        ("hf/models.py", "import tokenizers, transformers"),
        ("bench/run.py", "from headinfer.attention.reference import attend_reference\nfrom headinfer import cli"),
        ("cli.py", "import typer\nfrom headinfer import engine, streaming\nfrom headinfer.bench.run import run"),
        ("new_thing.py", "import requests\nfrom headinfer.cli import app"),
    ],
)
def test_the_checker_lets_the_rest_pass(path, source):
    assert violations(path, source, MODULES) == []
