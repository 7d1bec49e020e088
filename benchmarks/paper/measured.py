"""What GPUs measured, beside the paper's tables 6, 7, 10 and 11: a section of docs/paper-comparison.md.

It is made from the JSON files that `headinfer bench --device cuda --output benchmarks/results` writes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from headinfer.errors import UsageError
from headinfer.utils.units import format_tokens

__all__ = ["RESULTS", "measured_section"]

RESULTS = Path(__file__).resolve().parents[1] / "results"
_TITLE = "## Measured on a GPU, beside tables 6, 7, 10 and 11"
_K, _GIB = 1024, 2**30
_PAPER_FLOPS_PER_S, _PAPER_LINK_BYTES_PER_S = 165e12, 25e9
# The bench's names for what the paper compares.
_WAYS = {"standard": "DynamicCache", "layer-wise": "layer-wise", "1 head": "paper's scheme", "adaptive": "headinfer"}
_METHODS = {"standard": "DynamicCache", "layer-wise offload": "layer-wise", "head-wise (paper)": "paper's scheme"}
Seconds = Mapping[str, Sequence[float]]
Memory = Sequence[tuple[str, int, float, float, float, float | None]]


def measured_section(
    contexts_k: Sequence[int],
    prefill_s: Seconds,
    decode_s: Seconds,
    memory_1m: Memory,
    memory_at_limit: Memory,
    folder: Path = RESULTS,
) -> str:
    """Markdown: each result of a folder beside the paper's figures, or that there is none yet.

    contexts_k: of prefill_s and decode_s, in K tokens. Raises UsageError for a file that is no JSON.
    """
    found = [result for path in sorted(folder.glob("*.json")) if (result := _read(path)) is not None]
    if not found:
        return f"{_TITLE}\n\nNo GPU measurement yet; `benchmarks/gpu.sh` makes them, on a machine with an NVIDIA GPU."
    parts = [
        _TITLE,
        "The paper's times are an RTX 4090's; where a row's figures are a simulation, all layers read one layer's KV. "
        '"headinfer" has a device KV budget of 256 MiB; the other columns are its ways of the bench, made of the same '
        "parts, and transformers' cache for the standard.",
    ]
    for result in found:
        parts += [
            _heading(result),
            _times("6", "prefill of a whole prompt, s", contexts_k, prefill_s, _whole_prefills(result), ("adaptive",)),
            _times("7", "decode, s a token", contexts_k, decode_s, _decodes(result), tuple(_WAYS)),
            _memory("10", "GPU memory at 1M tokens, GiB", memory_1m, result, 1024 * _K),
            _memory("11", "GPU memory at the longest context, GiB", memory_at_limit[-1:], result, _longest(result)),
        ]
    return "\n\n".join(part for part in parts if part)


def _read(path: Path) -> dict[str, Any] | None:
    """A GPU result; None for JSON of something else."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} is no JSON ({error}): remove it, or run benchmarks/gpu.sh again") from error
    is_result = isinstance(result, dict) and {"device", "rates", "lines"} <= result.keys()
    return result if is_result else None


def _heading(result: Mapping[str, Any]) -> str:
    """The device, and how it differs from the paper's."""
    device, rates, cap = result["device"], result["rates"], result["gpu_memory_bytes"]
    held = f", held to {cap / 1e9:.3g} GB" if cap is not None else ""
    flops, link = rates["flops_per_s"], rates["link_bytes_per_s"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return (
        f"### {device['name']}, {device['total_bytes'] / _GIB:.4g} GiB{held}\n\n"
        f"Hardware: the paper's RTX 4090 has 24 GB, 165 TFLOP/s in bfloat16 and a link of about 25 GB/s, with an EPYC "
        f"7V12 and 1 TB of RAM. Here a matrix product attains {flops / 1e12:.3g} TFLOP/s "
        f"({flops / _PAPER_FLOPS_PER_S:.2g} times) and a pinned copy {link / 1e9:.3g} GB/s "
        f"({link / _PAPER_LINK_BYTES_PER_S:.2g} times), with {result['host']['name']} and "
        f"{result['host']['host_total_bytes'] / _GIB:.4g} GiB of RAM.\n\n"
        f"By `{result['command']}`; {versions}."
    )


Times = dict[int, dict[str, tuple[float, bool]]]  # by tokens and way: seconds, and whether they are a simulation's


def _whole_prefills(result: Mapping[str, Any]) -> Times:
    """Seconds of whole prompts."""
    found: Times = {}
    for line in result["lines"]:
        if line["suite"] == "prefill" and line["details"].get("is_whole") and line["value"] is not None:
            found.setdefault(line["details"]["tokens"], {})[line["who"]] = (line["value"], False)
    return found


def _decodes(result: Mapping[str, Any]) -> Times:
    """Seconds of a token."""
    found: Times = {}
    for line in result["lines"]:
        if line["suite"] == "decode" and line["unit"] == "s/token" and line["value"] is not None:
            details = line["details"]
            found.setdefault(details["past_tokens"], {})[line["who"]] = (line["value"], details["simulation"])
    return found


def _times(
    table: str, what: str, contexts_k: Sequence[int], printed: Seconds, found: Times, methods: Sequence[str]
) -> str:
    """The paper's and the measured seconds at all measured contexts; a dash where either has no figure."""
    if not found:
        return ""
    header = [text for method in methods for text in (f"paper, {method}", f"here, {_WAYS[method]}")]
    lines = [f"Table {table}: {what}\n", f"| context | {' | '.join(header)} |", "|---" * (len(header) + 1) + "|"]
    for tokens in sorted(found):
        cells, simulated = [], False
        for method in methods:
            figures = dict(zip(contexts_k, printed.get(method, ()), strict=False))
            seconds, is_simulated = found[tokens].get(_WAYS[method], (None, False))
            simulated = simulated or is_simulated
            cells += [_figure(figures.get(tokens // _K) if tokens % _K == 0 else None), _figure(seconds)]
        lines.append(f"| {format_tokens(tokens)}{' (simulation)' if simulated else ''} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _longest(result: Mapping[str, Any]) -> int:
    return max(_decodes(result), default=0)


def _memory(table: str, what: str, printed: Memory, result: Mapping[str, Any], tokens: int) -> str:
    """KV on the GPU by way, and for headinfer what all tensors took; the paper's rows above them."""
    lines = [line for line in result["lines"]
             if line["suite"] in ("decode", "prefill") and line["device_kv_bytes"] is not None
             and line["details"].get("past_tokens") == tokens]  # fmt: skip
    if not lines:
        return ""
    kv = {line["who"]: max(x["device_kv_bytes"] for x in lines if x["who"] == line["who"]) for line in lines}
    peak = max((line["details"].get("peak_device_bytes", 0) for line in lines), default=0)
    label = format_tokens(tokens)
    rows = [
        f"| {method}, {format_tokens(context * _K)}, the paper | {_figure(on_gpu)} | {_figure(total)} | "
        f"{_figure(kv[_METHODS[method]] / _GIB) if _METHODS.get(method) in kv else '-'} |"
        for method, context, on_gpu, _, total, _ in printed
    ]
    total = f"{peak / _GIB:.4g}" if peak else "-"
    rows.append(f"| headinfer, {label}, measured | {_figure(kv['headinfer'] / _GIB)} | {total} | |"
                if "headinfer" in kv else "")  # fmt: skip
    head = f"| | KV on the GPU | total | the same way here, {label}: KV on the GPU |"
    return "\n".join([f"Table {table}: {what}\n", head, "|---|---|---|---|", *(row for row in rows if row)])


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
