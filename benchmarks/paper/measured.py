"""GPU measurements beside the paper's tables 6, 7, 10 and 11: a section of docs/paper-comparison.md.

The measurements are the JSON files that `headinfer bench --device cuda --output benchmarks/results` writes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from paper_tables import CONTEXTS_K, DECODE_S, GIB, MEMORY_1M, MEMORY_AT_LIMIT, PREFILL_S, K, PrintedMemory

from headinfer.errors import UsageError
from headinfer.utils.units import format_tokens

__all__ = ["RESULTS", "measured_section"]

RESULTS = Path(__file__).resolve().parents[1] / "results"
_TITLE = "## Measured on a GPU, beside tables 6, 7, 10 and 11"
_PAPER_FLOPS_PER_S = 165e12
_PAPER_LINK_BYTES_PER_S = 25e9

# The benchmark's name for each way that the paper compares, by the paper's name in tables 6 and 7, and in 10 and 11.
_WAYS = {"standard": "DynamicCache", "layer-wise": "layer-wise", "1 head": "paper's scheme", "adaptive": "headinfer"}
_METHODS = {"standard": "DynamicCache", "layer-wise offload": "layer-wise", "head-wise (paper)": "paper's scheme"}

Times = dict[int, dict[str, tuple[float, bool]]]  # by tokens and way: the seconds, and whether they are simulated


def measured_section(folder: Path = RESULTS) -> str:
    """Return a section in Markdown with each GPU result of a folder beside the paper's figures.

    Args:
        folder: the folder; JSON files in it that are no GPU results are ignored.

    Raises:
        UsageError: a file that ends with .json is not JSON.
    """
    read = (_read(path) for path in sorted(folder.glob("*.json")))
    results = [result for result in read if result is not None]
    if not results:
        return (
            f"{_TITLE}\n\nThere is no GPU measurement yet: `benchmarks/gpu.sh` makes one on a machine with an NVIDIA "
            "GPU."
        )
    parts = [
        _TITLE,
        "The paper's times were measured on an RTX 4090. In a row that is marked as a simulation, all layers read the "
        'KV of one layer. "headinfer" has a device KV budget of 256 MiB. "paper\'s scheme" and "layer-wise" are built '
        'from headinfer\'s parts, and "DynamicCache" is the cache of transformers.',
    ]
    for result in results:
        parts += [
            _heading(result),
            _times("6", "prefill of a whole prompt, s", PREFILL_S, _whole_prefills(result), ("adaptive",)),
            _times("7", "decode, s a token", DECODE_S, _decodes(result), tuple(_WAYS)),
            _memory("10", "GPU memory at 1M tokens, GiB", MEMORY_1M, result, 1024 * K),
            _memory("11", "GPU memory at the longest context, GiB", MEMORY_AT_LIMIT[-1:], result, _longest(result)),
        ]
    return "\n\n".join(part for part in parts if part)


def _read(path: Path) -> dict[str, Any] | None:
    """Read a GPU result; return None for JSON that is something else."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} is not JSON ({error}): remove it, or run benchmarks/gpu.sh again") from error
    is_result = isinstance(result, dict) and {"device", "rates", "lines"} <= result.keys()
    return result if is_result else None


def _heading(result: Mapping[str, Any]) -> str:
    """Return a heading with the device, and how it differs from the paper's."""
    device = result["device"]
    host = result["host"]
    cap_bytes = result["gpu_memory_bytes"]
    held = f", held to {cap_bytes / 1e9:.3g} GB" if cap_bytes is not None else ""
    flops_per_s = result["rates"]["flops_per_s"]
    link_bytes_per_s = result["rates"]["link_bytes_per_s"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return (
        f"### {device['name']}, {device['total_bytes'] / GIB:.4g} GiB{held}\n\n"
        f"Hardware: the paper's RTX 4090 has 24 GB, 165 TFLOP/s in bfloat16 and a link of about 25 GB/s, with an EPYC "
        f"7V12 and 1 TB of RAM. Here a matrix product attains {flops_per_s / 1e12:.3g} TFLOP/s "
        f"({flops_per_s / _PAPER_FLOPS_PER_S:.2g} times) and a pinned copy {link_bytes_per_s / 1e9:.3g} GB/s "
        f"({link_bytes_per_s / _PAPER_LINK_BYTES_PER_S:.2g} times), with {host['name']} and "
        f"{host['host_total_bytes'] / GIB:.4g} GiB of RAM.\n\n"
        f"Measured by `{result['command']}` with {versions}."
    )


def _whole_prefills(result: Mapping[str, Any]) -> Times:
    """Return the seconds of whole prompts."""
    found: Times = {}
    for line in result["lines"]:
        if line["suite"] == "prefill" and line["details"].get("is_whole") and line["value"] is not None:
            found.setdefault(line["details"]["tokens"], {})[line["who"]] = (line["value"], False)
    return found


def _decodes(result: Mapping[str, Any]) -> Times:
    """Return the seconds of one decoded token."""
    found: Times = {}
    for line in result["lines"]:
        if line["suite"] == "decode" and line["unit"] == "s/token" and line["value"] is not None:
            details = line["details"]
            found.setdefault(details["past_tokens"], {})[line["who"]] = (line["value"], details["simulation"])
    return found


def _times(table: str, title: str, printed: Mapping[str, Sequence[float]], found: Times, methods: Sequence[str]) -> str:
    """Return a table of the printed and the measured seconds at all measured contexts; a dash stands for no figure."""
    if not found:
        return ""
    header = []
    for method in methods:
        header += [f"paper, {method}", f"here, {_WAYS[method]}"]
    lines = [f"Table {table}: {title}\n", f"| context | {' | '.join(header)} |", "|---" * (len(header) + 1) + "|"]
    for tokens in sorted(found):
        cells = []
        is_simulation = False
        for method in methods:
            by_context = dict(zip(CONTEXTS_K, printed.get(method, ()), strict=False))
            paper_s = by_context.get(tokens // K) if tokens % K == 0 else None
            measured_s, is_simulated = found[tokens].get(_WAYS[method], (None, False))
            is_simulation = is_simulation or is_simulated
            cells += [_figure(paper_s), _figure(measured_s)]
        label = format_tokens(tokens) + (" (simulation)" if is_simulation else "")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _longest(result: Mapping[str, Any]) -> int:
    return max(_decodes(result), default=0)


def _memory(table: str, title: str, printed: Sequence[PrintedMemory], result: Mapping[str, Any], tokens: int) -> str:
    """Return a table of the printed memory, the measured KV of the same ways, and headinfer's memory in all."""
    lines = [
        line
        for line in result["lines"]
        if line["suite"] in ("decode", "prefill")
        and line["device_kv_bytes"] is not None
        and line["details"].get("past_tokens") == tokens
    ]
    if not lines:
        return ""
    kv_gib: dict[str, float] = {}
    for line in lines:
        kv_gib[line["who"]] = max(line["device_kv_bytes"] / GIB, kv_gib.get(line["who"], 0.0))
    peak_bytes = max(line["details"].get("peak_device_bytes", 0) for line in lines)

    label = format_tokens(tokens)
    rows = []
    for one in printed:
        here = _figure(kv_gib.get(_METHODS.get(one.method, "")))
        context = format_tokens(one.context_k * K)
        rows.append(
            f"| {one.method}, {context}, the paper | {_figure(one.kv_gib)} | {_figure(one.total_gib)} | {here} |"
        )
    if "headinfer" in kv_gib:
        total = f"{peak_bytes / GIB:.4g}" if peak_bytes else "-"
        rows.append(f"| headinfer, {label}, measured | {_figure(kv_gib['headinfer'])} | {total} | |")
    head = f"| | KV on the GPU | total | the same way here, {label}: KV on the GPU |"
    return "\n".join([f"Table {table}: {title}\n", head, "|---|---|---|---|", *rows])


def _figure(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
