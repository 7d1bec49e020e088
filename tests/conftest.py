"""Settings of all tests: no network, one thread, files of their own instead of the user's, and a seed.

`./run test` runs one process with tests for each core. Nothing that a test uses may therefore be shared with another
test: names of files, ports, or the environment.
"""

import gc
import logging
import os
import sys
from pathlib import Path

# Processes that tests start inherit the environment.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
# The compiled kernel is kept from run to run. The user's downloaded models and probe change no test.
os.environ["XDG_CACHE_HOME"] = str(Path(__file__).parents[1] / ".pytest_cache" / "cache-of-tests")
os.environ["HF_HUB_CACHE"] = os.environ["XDG_CACHE_HOME"] + "/huggingface/hub"
os.environ["MPLCONFIGDIR"] = os.environ["XDG_CACHE_HOME"] + "/matplotlib"

import pytest
import torch

from headinfer.plan.memory import available_host_bytes

torch.set_num_threads(1)  # for tiny models a second thread costs more than it gains
logging.getLogger("transformers").setLevel(logging.ERROR)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """One process for each core that may be used, if there is memory for as many: each takes up to 2 GiB."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(cores, available_host_bytes() >> 31))


def pytest_collection_modifyitems(items):
    for item in items:
        if " at 0x" in item.nodeid:
            raise pytest.UsageError(f"{item.nodeid}: name its parameters (ids=): the processes must find equal names")
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish():
    """Leave out of later collections what exists now: the modules of torch and transformers, which stay.

    Many tests call gc.collect(), which would go through all of them each time.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Processes that a test starts see a GPU only if the test has the mark `gpu`."""
    with pytest.MonkeyPatch.context() as patch:
        if not item.get_closest_marker("gpu"):
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
        return (yield)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def run_command(capsys, monkeypatch):
    """A function that runs a command of headinfer in this process; returns its exit code, stdout and stderr.

    Commands that compute do so on the CPU, also on a machine with a GPU, unless the test names a device.
    """
    from headinfer.cli import main as cli

    monkeypatch.setenv("COLUMNS", "300")

    def run(*arguments):
        words = 2 if arguments[0] in ("eval", "session") else 1
        device = ("--device", "cpu") if arguments[0] in ("ask", "demo", "eval", "generate", "read") else ()
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["headinfer", *map(str, (*arguments[:words], *device, *arguments[words:]))])
        code = 0
        try:
            cli.main()
        except SystemExit as stopped:
            code = stopped.code or 0
        return code, *capsys.readouterr()

    return run
