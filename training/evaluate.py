"""Measure the accuracy of the embedded model: `python training/evaluate.py` writes benchmarks/results/embedded.json.

The needles are held-out words in held-out text, one at each depth. For each question all other needles of the text are
distractors.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

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
)


def main(out: Path, work: Path, count: int) -> None:
    """Run the evaluations and write a table of their scores.

    Args:
        out: the JSON file of the table.
        work: the folder for the results of each evaluation. An interrupted evaluation continues from them.
        count: run only the first `count` evaluations of PLAN.
    """
    written = Output(out, is_ours=is_table)
    rows = []
    for length, depths, samples, gives_lead in PLAN[:count]:
        arguments = ["eval", "niah", "embedded", "--lengths", length, "--depths", f"0..100/{depths}"]
        arguments += ["--samples", str(samples), "--dtype", "float32", "--seed", "1"]
        arguments += [] if gives_lead else ["--no-lead"]
        folder = work / (length if gives_lead else f"{length}-no-lead")
        command = [sys.executable, "-m", "headinfer", *arguments, "--out", str(folder), "--json"]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        summary = json.loads(done.stdout)
        rows.append(
            {
                "tokens": length,
                "lead_given": gives_lead,
                "needles_in_a_text": depths,
                "questions": summary["questions"],
                "exact": summary["score"],
                "command": "headinfer " + " ".join(arguments),
                "machine": found["machine"],
            }
        )
        print(f"{folder.name:>12}: {summary['score']:.2%} of {summary['questions']}", flush=True)
    written.write(json.dumps(rows, indent=1) + "\n")


def is_table(path: Path) -> bool:
    """Whether a file was written by an earlier run of this program: a list of rows with headinfer's commands."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return bool(rows) and all(row["command"].startswith("headinfer eval") for row in rows)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return False


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/embedded.json"))
    parser.add_argument(
        "--work", type=Path, default=Path("results/embedded"), help="folder for the results of each evaluation"
    )
    parser.add_argument("--most", type=int, default=len(PLAN), help="run only the first evaluations, this many")
    chosen = parser.parse_args()
    main(chosen.out, chosen.work, chosen.most)
