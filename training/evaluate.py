"""Measure the accuracy of the embedded model, and write it to benchmarks/results/embedded.json.

    python training/evaluate.py                                    up to 256K tokens: an hour on a CPU core
    python training/evaluate.py --lengths 512K,1M --device cuda    the longest ones, on a GPU

The second command adds its rows to those that are there. It should take two to three minutes on an H200: `headinfer
plan` predicts 20 s for reading 1M tokens, reading took up to 2.4 times its predictions there, and two texts with 200
questions are made and answered besides. No GPU has run it yet.

The needles are held-out words in held-out text, one at each depth. For each question all other needles of the text are
distractors.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headinfer.utils.files import Output

# Tokens of a text, depths (one needle at each), number of texts, and whether the beginning of the answer is given.
PLAN = (
    ("1K", 8, 40, False),
    ("4K", 16, 25, False),
    ("1K", 8, 40, True),
    ("4K", 16, 25, True),
    ("16K", 32, 8, True),
    ("64K", 50, 4, True),
    ("128K", 100, 2, True),
    ("256K", 100, 1, True),
    ("512K", 100, 1, True),
    ("1M", 100, 1, True),
)
_ON_CPUS = ("1K", "4K", "16K", "64K", "128K", "256K")


def main(out: Path, work: Path, lengths: Sequence[str], device: str) -> None:
    """Run the evaluations of some lengths and put their scores into a table, after each of them.

    Args:
        out: the JSON file of the table. Its rows of other lengths stay.
        work: the folder for the results of each evaluation. An interrupted evaluation continues from them.
        lengths: the lengths of PLAN to run.
        device: as for `headinfer eval`.
    """
    written = Output(out, is_ours=is_table)
    rows = json.loads(out.read_text(encoding="utf-8")) if out.exists() else []
    for length, depths, samples, gives_lead in PLAN:
        if length not in lengths:
            continue
        arguments = ["eval", "niah", "embedded", "--lengths", length, "--depths", f"0..100/{depths}"]
        arguments += ["--samples", str(samples), "--dtype", "float32", "--seed", "1"]
        arguments += [] if gives_lead else ["--no-lead"]
        arguments += [] if device == "auto" else ["--device", device]
        folder = work / (length if gives_lead else f"{length}-no-lead")
        command = [sys.executable, "-m", "headinfer", *arguments, "--out", str(folder), "--json"]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        summary = json.loads(done.stdout)
        row = {
            "tokens": length,
            "lead_given": gives_lead,
            "needles_in_a_text": depths,
            "questions": summary["questions"],
            "exact": summary["score"],
            "command": "headinfer " + " ".join(arguments),
            "machine": found["machine"],
        }
        print(f"{folder.name:>12}: {summary['score']:.2%} of {summary['questions']}", flush=True)
        rows = with_row(rows, row)
        written.write(json.dumps(rows, indent=1) + "\n")


def with_row(rows: Sequence[dict[str, Any]], row: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of a table with another one, which replaces that of the same evaluation, in the order of PLAN."""

    def key(one: dict[str, Any]) -> tuple[str, bool]:
        return one["tokens"], one["lead_given"]

    order = [(length, gives_lead) for length, _, _, gives_lead in PLAN]
    found = {key(one): one for one in (*rows, row)}
    return sorted(found.values(), key=lambda one: order.index(key(one)))


def is_table(path: Path) -> bool:
    """Whether a file was written by an earlier run of this program: a list of rows with headinfer's commands."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return bool(rows) and all(row["command"].startswith("headinfer eval") for row in rows)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return False


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/embedded.json"))
    parser.add_argument(
        "--work", type=Path, default=Path("results/embedded"), help="folder for the results of each evaluation"
    )
    parser.add_argument(
        "--lengths",
        default=",".join(_ON_CPUS),
        help=f"lengths of texts, separated by commas, of {', '.join(dict.fromkeys(row[0] for row in PLAN))}",
    )
    parser.add_argument("--device", default="auto", help="as for headinfer eval")
    chosen = parser.parse_args()
    wanted = chosen.lengths.split(",")
    unknown = set(wanted) - {row[0] for row in PLAN}
    if unknown:
        parser.error(f"--lengths has {sorted(unknown)[0]!r}, which is not one of the lengths that --help names")
    main(chosen.out, chosen.work, wanted, chosen.device)
