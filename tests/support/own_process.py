"""Tests that need a process of their own: what they set up cannot be undone in it."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]


def run_pytest(*arguments, timeout_s, **environment):
    """Run pytest with more in its environment, and no GPU; fails with the end of its output where a test does."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *map(str, arguments)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout_s,
        cwd=TESTS.parent,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
