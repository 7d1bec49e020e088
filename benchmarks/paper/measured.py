"""GPU measurements beside the paper's tables 6, 7, 10 and 11: a section of docs/paper-comparison.md.

The measurements are the JSON files that `headinfer bench --device cuda --output benchmarks/results` writes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paper_tables import (
    CONTEXTS_K,
    DECODE_LINK_BYTES_PER_S,
    DECODE_S,
    GIB,
    MEMORY_1M,
    MEMORY_AT_LIMIT,
    PREFILL_LINK_BYTES_PER_S,
    PREFILL_S,
    K,
    PrintedMemory,
)

from headinfer.errors import UsageError
from headinfer.plan.hardware import HARDWARE
from headinfer.utils.units import format_tokens

__all__ = ["RESULTS", "measured_section"]

RESULTS = Path(__file__).resolve().parents[1] / "results"
_TITLE = "## Measured on a GPU, beside tables 6, 7, 10 and 11"

# The benchmark's name for each way that the paper compares, by the paper's name in tables 6 and 7, and in 10 and 11.
_WAYS = {"standard": "DynamicCache", "layer-wise": "layer-wise", "1 head": "paper's scheme", "adaptive": "headinfer"}
_METHODS = {"standard": "DynamicCache", "layer-wise offload": "layer-wise", "head-wise (paper)": "paper's scheme"}

# How a result was made, if its command is not one of the command line.
_MADE_BY = {
    "h200-24gb": "a Python call, since the options for its sizes did not exist yet; `headinfer bench decode prefill "
    "--device cuda --gpu-memory 24GB --limit-s 290 --tokens 1M,1K,4M,256K --offsets 1M,256K --whole 100K` measures the "
    "same points today",
}


@dataclass(frozen=True)
class Result:
    """A result file.

    Attributes:
        name: the file's name without its suffix.
        content: the JSON object.
    """

    name: str
    content: Mapping[str, Any]

    @property
    def device(self) -> str:
        """The name of the GPU."""
        return str(self.content["device"]["name"])

    @property
    def link(self) -> str:
        """A link to the file from docs/."""
        return f"[{self.name}](../benchmarks/results/{self.name}.json)"


@dataclass(frozen=True)
class Time:
    """The seconds of one way at one context.

    Attributes:
        tokens: the context.
        way: the benchmark's name of the way.
        seconds: the seconds.
        is_simulation: whether all layers read the KV of one layer.
        kv_bytes: bytes of KV of the context, of all layers; 0 if the result does not say it.
        result: where it was measured.
    """

    tokens: int
    way: str
    seconds: float
    is_simulation: bool
    kv_bytes: int
    result: Result


def measured_section(folder: Path = RESULTS) -> str:
    """Return a section in Markdown with the GPU results of a folder beside the paper's figures, GPU by GPU.

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
        "The paper's figures were measured on an RTX 4090, those of this section on other GPUs. In a row that is "
        'marked as a simulation, all layers read the KV of one layer. "headinfer" has a device KV budget of 256 MiB. '
        '"paper\'s scheme" and "layer-wise" are built from headinfer\'s parts, and "DynamicCache" is the cache of '
        'transformers. A dash means that there is no such figure. "paper / here" is the paper\'s time over the '
        "measured one: 2 means that it took half as long here.",
    ]
    for device in dict.fromkeys(result.device for result in results):
        parts += _device_parts(device, [result for result in results if result.device == device])
    return "\n\n".join(part for part in parts if part)


def _device_parts(device: str, results: Sequence[Result]) -> list[str]:
    """Return the paragraphs and tables of one GPU."""
    prefills = list(_whole_prefills(results))
    decodes = list(_decodes(results))
    longest = max((time.tokens for time in decodes), default=0)
    return [
        f"### {device}",
        _hardware(results),
        _sources(results),
        _times("6", "prefill of a whole prompt", PREFILL_S, prefills),
        _times("7", "decode, a token", DECODE_S, decodes),
        _memory("10", "GPU memory at 1M tokens, GiB", MEMORY_1M, results, 1024 * K),
        _memory("11", "GPU memory at the longest context, GiB", MEMORY_AT_LIMIT[-1:], results, longest),
    ]


def _read(path: Path) -> Result | None:
    """Read a GPU result; return None for JSON that is something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} is not JSON ({error}): remove it, or run benchmarks/gpu.sh again") from error
    is_result = isinstance(content, dict) and {"device", "rates", "lines"} <= content.keys()
    return Result(path.stem, content) if is_result else None


def _hardware(results: Sequence[Result]) -> str:
    """Return a table of what the hardware differs in, and what follows from it."""
    paper = HARDWARE["rtx4090"]
    first = results[0].content
    host = first["host"]
    rates = [result.content["rates"] for result in results]
    flops = [rate["flops_per_s"] for rate in rates]
    memory = [rate["device_bytes_per_s"] for rate in rates]
    link = [rate["link_bytes_per_s"] for rate in rates]
    paper_flops = paper.flops_per_s["bfloat16"]
    lines = [
        "| hardware | the paper's | here | times |",
        "|---|---|---|---|",
        f"| GPU memory | 24 GB | {first['device']['total_bytes'] / GIB:.4g} GiB | |",
        f"| matrix product in bfloat16, TFLOP/s | {paper_flops / 1e12:.3g}, data sheet | {_span(flops, 1e12)} | "
        f"{_span(flops, paper_flops)} |",
        f"| device memory, GB/s | {paper.device_bytes_per_s / 1e9:,.0f}, data sheet | {_span(memory, 1e9)} | "
        f"{_span(memory, paper.device_bytes_per_s)} |",
        f"| link to the GPU in prefill, GB/s | {PREFILL_LINK_BYTES_PER_S / 1e9:.3g}, from its table 12 | "
        f"{_span(link, 1e9)} | {_span(link, PREFILL_LINK_BYTES_PER_S)} |",
        f"| link to the GPU in decode, GB/s | {DECODE_LINK_BYTES_PER_S / 1e9:.3g}, from its table 7 | "
        f"{_span(link, 1e9)} | {_span(link, DECODE_LINK_BYTES_PER_S)} |",
        f"| host | EPYC 7V12, 1 TB of RAM | {host['name']}, {host['cores']} cores, "
        f"{host['host_total_bytes'] / GIB:.4g} GiB of RAM | |",
    ]
    fastest = max(link)
    follows = (
        f"So the hardware alone explains a factor of up to {max(flops) / paper_flops:.2g} in reading, which arithmetic "
        f"bounds, and of {fastest / PREFILL_LINK_BYTES_PER_S:.2g} to {fastest / DECODE_LINK_BYTES_PER_S:.2g} in "
        "decode, if the KV comes over the link."
    )
    return "\n".join(lines) + f"\n\n{follows}"


def _span(values: Iterable[float], scale: float) -> str:
    """Return the range of values in a unit, such as "757 to 791"."""
    shown = [_figure(value / scale) for value in sorted(values)]
    return shown[0] if shown[0] == shown[-1] else f"{shown[0]} to {shown[-1]}"


def _sources(results: Sequence[Result]) -> str:
    """Return a list of the result files with their commands."""
    lines = []
    for result in results:
        cap_bytes = result.content["gpu_memory_bytes"]
        held = f", held to {cap_bytes / 1e9:.3g} GB of GPU memory" if cap_bytes is not None else ""
        made_by = _MADE_BY.get(result.name, f"`{result.content['command']}`")
        versions = ", ".join(f"{name} {version}" for name, version in result.content["versions"].items())
        lines.append(f"- {result.link}{held}, by {made_by}. Versions: {versions}.")
    return "\n".join(lines)


def _whole_prefills(results: Iterable[Result]) -> Iterator[Time]:
    """Yield the seconds of whole prompts."""
    for result in results:
        for line in result.content["lines"]:
            details = line["details"]
            if line["suite"] == "prefill" and details.get("is_whole") and line["value"] is not None:
                kv_bytes = details.get("kv_bytes", 0)
                yield Time(details["tokens"], line["who"], line["value"], False, kv_bytes, result)


def _decodes(results: Iterable[Result]) -> Iterator[Time]:
    """Yield the seconds of one decoded token."""
    for result in results:
        lines = [line for line in result.content["lines"] if line["suite"] == "decode"]
        kv_bytes = {line["details"].get("past_tokens"): line["details"].get("kv_bytes") for line in lines}
        for line in lines:
            if line["unit"] == "s/token" and line["value"] is not None:
                tokens = line["details"]["past_tokens"]
                is_simulation = line["details"]["simulation"]
                kv = kv_bytes.get(tokens) or line["details"].get("kv_bytes") or 0
                yield Time(tokens, line["who"], line["value"], is_simulation, kv, result)


def _times(table: str, title: str, printed: Mapping[str, Sequence[float]], times: Sequence[Time]) -> str:
    """Return a table of the printed and the measured seconds of each way at each context."""
    if not times:
        return ""
    lines = [
        f"#### Table {table}: {title}\n",
        "| context | the paper's way | paper, s | here | here, s | paper / here | result |",
        "|---|---|---|---|---|---|---|",
    ]
    for tokens in sorted({time.tokens for time in times}):
        for method, way in _WAYS.items():
            paper_s = _printed_seconds(printed, method, tokens)
            for time in (time for time in times if (time.tokens, time.way) == (tokens, way)):
                label = format_tokens(tokens) + (" (simulation)" if time.is_simulation else "")
                ratio = f"{paper_s / time.seconds:.2f}" if paper_s is not None else "-"
                lines.append(
                    f"| {label} | {method} | {_figure(paper_s)} | {way} | {_figure(time.seconds)} | {ratio} | "
                    f"{time.result.link} |"
                )
    measured = {time.tokens for time in times}
    missing = [format_tokens(context_k * K) for context_k in CONTEXTS_K if context_k * K not in measured]
    sentences = [f"The paper also has {', '.join(missing)}, which were not measured here."] if missing else []
    sentences += [_of_reading(printed, times) if table == "6" else _of_the_link(printed, times)]
    return "\n".join(lines) + "\n\n" + " ".join(sentence for sentence in sentences if sentence)


def _printed_seconds(printed: Mapping[str, Sequence[float]], method: str, tokens: int) -> float | None:
    """Return the paper's seconds of a way at a context; None if it has none."""
    by_context = dict(zip(CONTEXTS_K, printed.get(method, ()), strict=False))
    return by_context.get(tokens // K) if tokens % K == 0 else None


def _of_reading(printed: Mapping[str, Sequence[float]], times: Sequence[Time]) -> str:
    """Return a sentence about how much faster headinfer reads prompts here, beside the arithmetic of the hardware."""
    ratios = []
    for time in times:
        paper_s = _printed_seconds(printed, "adaptive", time.tokens)
        if time.way == "headinfer" and paper_s is not None:
            ratios.append(paper_s / time.seconds)
    if not ratios:
        return ""
    flops = [time.result.content["rates"]["flops_per_s"] for time in times]
    return (
        f"headinfer reads these prompts {_span(ratios, 1)} times as fast as the paper, and the matrix product is "
        f"{_span(flops, HARDWARE['rtx4090'].flops_per_s['bfloat16'])} times as fast: the time to pin new host memory "
        "and the launches of short prompts do not shrink with the arithmetic."
    )


def _of_the_link(printed: Mapping[str, Sequence[float]], times: Sequence[Time]) -> str:
    """Return a sentence about the bytes per second of decode over long contexts, in the paper and here."""
    sentences = []
    seen: set[int] = set()
    for time in times:
        paper_s = _printed_seconds(printed, "adaptive", time.tokens)
        is_long = time.way == "headinfer" and time.tokens >= 1024 * K
        if not is_long or paper_s is None or not time.kv_bytes or time.tokens in seen:
            continue
        seen.add(time.tokens)
        theirs = time.kv_bytes / paper_s / 1e9
        ours = time.kv_bytes / time.seconds / 1e9
        sentences.append(
            f"At {format_tokens(time.tokens)} tokens a token reads {time.kv_bytes / GIB:,.0f} GiB of KV: at "
            f"{theirs:.3g} GB/s in the paper, at {ours:.3g} GB/s here."
        )
    return " ".join(sentences)


def _memory(table: str, title: str, printed: Sequence[PrintedMemory], results: Sequence[Result], tokens: int) -> str:
    """Return a table of the printed memory, the measured KV of the same ways, and headinfer's memory in all."""
    lines = [
        line
        for result in results
        for line in result.content["lines"]
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
    most = max(line["details"].get("tokens", 1) for line in lines)
    of_pass = f"a chunk of {most:,} tokens" if most > 1 else "a decoded token"
    text = (
        f"The measured total is the peak of weights, KV and activations of {of_pass}, without the CUDA context. The "
        "paper's is for chunks of 10K tokens. Neither depends on the speed of the GPU."
    )
    return "\n".join([f"#### Table {table}: {title}\n", head, "|---|---|---|---|", *rows, "", text])


def _figure(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
