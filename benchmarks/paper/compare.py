"""Compare the paper's tables with the memory and cost model and with GPU results.

Prints docs/paper-comparison.md. From the root of a checkout:

    python benchmarks/paper/compare.py > docs/paper-comparison.md
"""

from __future__ import annotations

import dataclasses
import sys

from measured import measured_section
from paper_notes import HEAD, inconsistencies
from paper_tables import CHUNK_TOKENS, CONTEXTS, DECODE_S, GIB, MEMORY_1M, MEMORY_AT_LIMIT, PREFILL_S, TABLES, K

from headinfer.errors import HeadinferError
from headinfer.plan.footprint import Footprint
from headinfer.plan.hardware import HARDWARE
from headinfer.plan.models import find_shape
from headinfer.plan.planner import make_plan
from headinfer.plan.request import Request

__all__ = ["comparison"]


def comparison() -> str:
    """docs/paper-comparison.md."""
    parts = [HEAD]
    for table, (title, make) in TABLES.items():
        parts.append(
            f"## Table {table}: {title}\n\n| | unit | paper | model | difference | why |\n|---|---|---|---|---|---|"
        )
        parts[-1] += "".join(
            f"\n| {row.what} | {row.unit} | {_figure(row.paper)} | {_figure(row.ours)} | {row.difference:+.0%} "
            f"| {row.note} |"
            for row in make()
        )
        if table == "10":
            parts.append(_own_memory())
    measured = measured_section(CONTEXTS, PREFILL_S, DECODE_S, MEMORY_1M, MEMORY_AT_LIMIT)
    return "\n\n".join([*parts, measured, inconsistencies()]) + "\n"


def _own_memory() -> str:
    """headinfer itself, beside table 10: its own activation rule, and a device KV budget of 256 MiB."""
    machine = dataclasses.replace(HARDWARE["rtx4090"], overhead_bytes=0)
    lines = []
    for context in (64 * K, 1024 * K, 4096 * K):
        request = Request(find_shape("llama-3-8b"), machine, context, host_bytes=1000 * GIB, chunk_tokens=CHUNK_TOKENS,
                          device_kv_budget_bytes=256 * 2**20)  # fmt: skip
        found: Footprint = make_plan(request).footprint
        kv, activations, total = found.device_kv_bytes, found.activation_bytes, found.device_bytes
        lines.append(f"| {context // K:,}K | {kv / GIB:.3g} | {activations / GIB:.3g} | {total / GIB:.4g} |")
    return (
        "headinfer itself, with a device KV budget of 256 MiB, chunks of 10K and activations by its own rule "
        "(116 KiB a token), GiB:\n\n| context | KV on the GPU | activations | total |\n|---|---|---|---|\n"
        + "\n".join(lines)
    )


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def main() -> int:
    """Print the document, or one sentence about what is wrong."""
    try:
        print(comparison(), end="")
    except HeadinferError as error:
        print(f"benchmarks/paper/compare.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
