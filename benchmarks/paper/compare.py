"""Compare the paper's tables with the memory and cost model, and with GPU measurements.

The script prints docs/paper-comparison.md. Run it from the root of a checkout:

    python benchmarks/paper/compare.py > docs/paper-comparison.md
"""

from __future__ import annotations

import dataclasses
import sys

from measured import measured_section
from paper_notes import HEAD, inconsistencies
from paper_tables import CHUNK_TOKENS, GIB, SPARSE_SHARE, TABLES, K, rows_of

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
        if table == "14":
            parts.append(_headinfer_sparse())
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
    lines = []
    for context in (64 * K, 1024 * K, 4096 * K):
        found = make_plan(_headinfer_request(context)).footprint
        kv_gib = found.device_kv_bytes / GIB
        activations_gib = found.activation_bytes / GIB
        total_gib = found.device_bytes / GIB
        lines.append(f"| {context // K:,}K | {kv_gib:.3g} | {activations_gib:.3g} | {total_gib:.4g} |")
    return (
        "headinfer with a device KV budget of 256 MiB, chunks of 10K tokens and activations by the planner's rule "
        "(116 KiB a token), in GiB:\n\n| context | KV on the GPU | activations | total |\n|---|---|---|---|\n"
        + "\n".join(lines)
    )


def _headinfer_sparse() -> str:
    """Return what headinfer is predicted to do with sparse heads, beside table 14."""
    full = _headinfer_request(1024 * K)
    sparse = full.with_sparse_heads(full.shape.even_pattern(SPARSE_SHARE))
    pattern = sparse.sparse_heads
    assert pattern is not None
    lines = []
    for name, request in (("all heads full", full), ("50% of the heads sparse", sparse)):
        plan = make_plan(request)
        host_gib = plan.footprint.host_kv_bytes / GIB
        seconds = f"{_figure(plan.prefill_cost.total_s)} | {_figure(plan.decode_cost.total_s)}"
        lines.append(f"| {name} | {seconds} | {host_gib:.3g} | {plan.footprint.window_bytes / 2**20:.3g} |")
    return (
        "The paper composes its scheme with DuoAttention (section D.2), and does not say how many tokens its sparse "
        f"heads see. The predictions take {pattern.sink_tokens} first and {pattern.recent_tokens} newest tokens, and "
        "four of the eight KV heads of each layer. This project has not measured sparse heads on a GPU.\n\n"
        "headinfer (`--sparse-heads`, which is approximate: [approximations.md](approximations.md)) with a device KV "
        "budget of 256 MiB and chunks of 10K tokens, predicted at 1M tokens with the planner's own rates for an RTX "
        "4090:\n\n| | prefill, s | a token, s | KV in host RAM, GiB | windows on the GPU, MiB |\n"
        "|---|---|---|---|---|\n" + "\n".join(lines)
    )


def _headinfer_request(context_tokens: int) -> Request:
    """Return a job of headinfer on the paper's GPU."""
    return Request(
        find_shape("llama-3-8b"),
        dataclasses.replace(HARDWARE["rtx4090"], overhead_bytes=0),
        context_tokens,
        host_bytes=1000 * GIB,
        chunk_tokens=CHUNK_TOKENS,
        device_kv_budget_bytes=256 * 2**20,
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
