"""Compare the paper's tables with the memory and cost model, and with GPU measurements.

The script prints docs/paper-comparison.md. Run it from the root of a checkout:

    python benchmarks/paper/compare.py > docs/paper-comparison.md
"""

from __future__ import annotations

import dataclasses
import sys

from measured import measured_section
from paper_notes import HEAD, inconsistencies
from paper_tables import CHUNK_TOKENS, GIB, TABLES, K, rows_of

from headinfer.errors import HeadinferError
from headinfer.plan.hardware import HARDWARE
from headinfer.plan.models import find_shape
from headinfer.plan.planner import make_plan
from headinfer.plan.request import Request

__all__ = ["comparison"]

_COLUMNS = "| | unit | paper | predicted | difference | why |\n|---|---|---|---|---|---|"


def comparison() -> str:
    """Return the document in Markdown."""
    parts = [HEAD]
    for table in TABLES:
        parts.append(_table(table))
        if table == "10":
            parts.append(_headinfer_memory())
    return "\n\n".join([*parts, measured_section(), inconsistencies()]) + "\n"


def _table(table: str) -> str:
    title, _ = TABLES[table]
    lines = [f"## Table {table}: {title}\n", _COLUMNS]
    for row in rows_of(table):
        figures = f"{_figure(row.paper)} | {_figure(row.predicted)} | {row.difference:+.0%}"
        lines.append(f"| {row.what} | {row.unit} | {figures} | {row.note} |")
    return "\n".join(lines)


def _headinfer_memory() -> str:
    """Return what headinfer needs, beside table 10."""
    shape = find_shape("llama-3-8b")
    machine = dataclasses.replace(HARDWARE["rtx4090"], overhead_bytes=0)
    lines = []
    for context in (64 * K, 1024 * K, 4096 * K):
        request = Request(
            shape,
            machine,
            context,
            host_bytes=1000 * GIB,
            chunk_tokens=CHUNK_TOKENS,
            device_kv_budget_bytes=256 * 2**20,
        )
        found = make_plan(request).footprint
        kv_gib = found.device_kv_bytes / GIB
        activations_gib = found.activation_bytes / GIB
        total_gib = found.device_bytes / GIB
        lines.append(f"| {context // K:,}K | {kv_gib:.3g} | {activations_gib:.3g} | {total_gib:.4g} |")
    return (
        "headinfer with a device KV budget of 256 MiB, chunks of 10K tokens and activations by the planner's rule "
        "(116 KiB a token), in GiB:\n\n| context | KV on the GPU | activations | total |\n|---|---|---|---|\n"
        + "\n".join(lines)
    )


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def main() -> int:
    """Print the document, or an error in one sentence, and return the exit code."""
    try:
        print(comparison(), end="")
    except HeadinferError as error:
        print(f"benchmarks/paper/compare.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
