"""Runs tests in a separate process, because their set-up cannot be undone."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
HANG_S = 3600  # no test waits longer for another process; only one that hangs takes so long, also under load


def run_pytest(*arguments, **environment):
    """Run pytest without a GPU and with further environment variables. Fails with the output if a test fails."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *map(str, arguments)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=HANG_S,
        cwd=TESTS.parent,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
