"""Print the table of README.md that says what to expect by GPU and RAM, as `headinfer plan` predicts it.

    python benchmarks/expectations.py                     the table of README.md
    python benchmarks/expectations.py --measured          predictions beside an H200, a table of docs/benchmarks.md
    python benchmarks/expectations.py --approximations    what approximations buy, a table of docs/approximations.md

A test compares these documents with what this script prints.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headinfer.plan.compare import kv_forms, sparse_forms
from headinfer.plan.hardware import find_hardware
from headinfer.plan.models import find_shape
from headinfer.plan.planner import make_plan
from headinfer.plan.request import Request
from headinfer.utils.units import format_bytes, format_seconds, format_tokens

RESULTS = Path(__file__).resolve().parent / "results"
K = 1024
CONTEXTS = (128 * K, 1024 * K)
# The limits of the runs on the H200: 24 GB, no resident KV, and RAM for any of the lengths.
H200 = "llama-3-8b --gpu h200 --device-memory 24GB --ram 600GB --device-kv-budget 256MiB --no-resident"
H200_CHUNK_TOKENS = 5376


@dataclass(frozen=True)
class Machine:
    """A row of README.md's table.

    Attributes:
        model: The model's name, for people.
        gpu: The GPU's name, for people.
        memory: Host RAM and disk, for people.
        arguments: What `headinfer plan` is called with.
    """

    model: str
    gpu: str
    memory: str
    arguments: str


MACHINES = (
    Machine("Qwen2.5-7B, 4 bits", "RTX 3060", "32 GB", "qwen2-7b --gpu rtx3060 --ram 32GB --weight-bits 4"),
    Machine("Qwen2.5-7B", "RTX 4090", "64 GB", "qwen2-7b --gpu rtx4090 --ram 64GB"),
    Machine("Llama-3.1-8B", "RTX 4090", "64 GB", "llama-3.1-8b --gpu rtx4090 --ram 64GB"),
    Machine("Llama-3.1-8B", "RTX 4090", "64 GB + disk", "llama-3.1-8b --gpu rtx4090 --ram 64GB --disk 1TB"),
    Machine("Llama-3.1-8B", "RTX 4090", "192 GB", "llama-3.1-8b --gpu rtx4090 --ram 192GB"),
    Machine("Llama-3.1-8B", "H100", "256 GB", "llama-3.1-8b --gpu h100 --ram 256GB"),
)


def predict(arguments: str) -> dict[str, Any]:
    """What `headinfer plan` says, as JSON."""
    command = [sys.executable, "-m", "headinfer", "plan", *arguments.split(), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def by_context(found: Mapping[str, Any], name: str) -> dict[int, float | None]:
    """The seconds of headinfer by context; None if the context does not fit."""
    return dict(zip(found["contexts"], found[name]["headinfer"], strict=True))


def expectations() -> str:
    """The table of README.md."""
    names = " | ".join(f"{format_tokens(tokens)}: read, token" for tokens in CONTEXTS)
    lines = [f"| model | GPU | RAM | longest context | {names} |", "|---|---|---|---|---|---|"]
    for machine in MACHINES:
        found = predict(machine.arguments)
        reading = by_context(found, "prefill_s")
        writing = by_context(found, "decode_s_per_token")
        longest = found["longest_tokens"]["headinfer"] // K
        cells = [_pair(reading[tokens], writing[tokens]) for tokens in CONTEXTS]
        lines.append(f"| {machine.model} | {machine.gpu} | {machine.memory} | {longest:,}K | {' | '.join(cells)} |")
    return "\n".join(lines)


def _pair(reading_s: float | None, token_s: float | None) -> str:
    if reading_s is None or token_s is None:
        return "too long"
    return f"{format_seconds(reading_s)}, {format_seconds(token_s)}"


def predicted_and_measured() -> str:
    """Predictions for the H200 beside the results of benchmarks/results."""
    lines = ["| Llama-3-8B on an H200 | predicted | measured | predicted / measured |", "|---|---|---|---|"]
    decode = by_context(predict(f"{H200} --context 4M"), "decode_s_per_token")
    measured = measured_seconds("decode", "past_tokens", "h200-24gb", "h200-first")
    for tokens, seconds in sorted(measured.items()):
        lines.append(_comparison(f"a token after {format_tokens(tokens)}", decode[tokens], seconds))
    measured = measured_seconds("prefill", "tokens", "h200-24gb", "h200-first")
    for tokens, seconds in sorted(measured.items()):
        found = predict(f"{H200} --chunk-tokens {H200_CHUNK_TOKENS} --context {tokens}")
        lines.append(_comparison(f"reading {format_tokens(tokens)}", found["plan"]["prefill_s"], seconds))
    return "\n".join(lines)


def measured_seconds(suite: str, key: str, *names: str) -> dict[int, float]:
    """headinfer's seconds by context, for a token or a whole prompt; the first file that has a context counts."""
    seconds: dict[int, float] = {}
    for name in names:
        result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        for line in result["lines"]:
            is_wanted = line["unit"] == "s/token" if suite == "decode" else line["details"].get("is_whole", False)
            if line["suite"] == suite and line["who"] == "headinfer" and line["value"] is not None and is_wanted:
                seconds.setdefault(line["details"][key], line["value"])
    return seconds


def approximations() -> str:
    """What each approximate form of KV buys Llama-3.1-8B on an RTX 4090 with 256 GB of RAM."""
    request = Request(find_shape("llama-3.1-8b"), find_hardware("rtx4090"), CONTEXTS[-1], host_bytes=256 * 10**9)
    plan = make_plan(request)
    lines = [
        "| KV | sparse heads | a token | 1M: read, token | longest context | 8M tokens |",
        "|---|---|---|---|---|---|",
    ]
    for form in (*kv_forms(plan), *sparse_forms(plan)):
        share = form["sparse_heads"]["streaming_share"] if form["sparse_heads"] else 0
        longest = form["longest_tokens"]
        cells = (
            "exact" if form["kv_dtype"] == "auto" else form["kv_dtype"],
            f"{share:.0%}" if share else "none",
            format_bytes(form["token_bytes"]),
            _pair(form["prefill_s"], form["decode_s_per_token"]),
            f"{longest // K:,}K",
            "fit" if longest >= 8 * K * K else f"need {format_bytes(8 * K * K * form['token_bytes'])}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _comparison(what: str, predicted_s: float | None, measured_s: float) -> str:
    assert predicted_s is not None, f"{what} was measured, so it fits"
    return f"| {what} | {format_seconds(predicted_s)} | {format_seconds(measured_s)} | {predicted_s / measured_s:.2f} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", action="store_true", help="predictions beside what an H200 measured")
    parser.add_argument("--approximations", action="store_true", help="what approximate forms of KV buy")
    chosen = parser.parse_args()
    if chosen.approximations:
        print(approximations())
    else:
        print(predicted_and_measured() if chosen.measured else expectations())
