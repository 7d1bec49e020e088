"""The tables of arXiv 2502.12574, and what the memory and cost model predicts for the same settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from paper_notes import NOTES

from headinfer.plan.compare import Baseline
from headinfer.plan.footprint import BASELINES, activation_bytes
from headinfer.plan.hardware import HARDWARE, Hardware
from headinfer.plan.model_shape import ModelShape
from headinfer.plan.models import find_shape
from headinfer.plan.operating_points import operating_points
from headinfer.plan.request import Request
from headinfer.utils.head_pattern import HeadPattern

__all__ = [
    "CHUNK_TOKENS",
    "CONTEXTS_K",
    "DECODE_LINK_BYTES_PER_S",
    "DECODE_S",
    "GIB",
    "MEMORY_1M",
    "MEMORY_AT_LIMIT",
    "PREFILL_LINK_BYTES_PER_S",
    "PREFILL_S",
    "SPARSE_SHARE",
    "TABLES",
    "K",
    "PrintedMemory",
    "Row",
    "rows_of",
]

K = 1024
GIB = 2**30
CHUNK_TOKENS = 10 * K
USABLE_BYTES = round(19.77 * GIB)  # table 11: the paper's total at the limit of its standard inference
HOST_KV_BYTES = 512 * GIB  # tables 3 and 4: the KV of Llama-3-8B at 4096K tokens, and of Llama-2-7B at 1024K
DECODE_LINK_BYTES_PER_S = 20.4e9  # table 7: 131,072 bytes a token x 1,000,000 tokens in 6.41 s
PREFILL_LINK_BYTES_PER_S = 25e9  # table 12: 102 TFLOP/s at 4,100 FLOP/byte
TABLE_12_DECODE_LINK_BYTES_PER_S = 13e9


# -- printed figures --------------------------------------------------------------------------------------------------


class PrintedMemory(NamedTuple):
    """A row of table 10 or 11. The paper prints GB and means GiB.

    Attributes:
        method: the method, one of `headinfer.plan.footprint.BASELINES`.
        context_k: the context, in K tokens.
        kv_gib: the KV on the GPU.
        activations_gib: the activations.
        total_gib: the GPU memory in all.
        all_kv_gib: the KV of the whole context; None if the paper does not print it.
    """

    method: str
    context_k: int
    kv_gib: float
    activations_gib: float
    total_gib: float
    all_kv_gib: float | None


class PrintedPoint(NamedTuple):
    """A row of table 12, the roofline of one layer's attention.

    Attributes:
        phase: "prefill" or "decode".
        context_k: the context, in K tokens.
        kv_heads: 8 for all KV heads, 1 for one.
        flops: floating-point operations.
        device_bytes: bytes moved in device memory.
        flops_per_s: the rate attained from device memory.
        link_bytes: bytes moved over the link when the KV is offloaded.
        link_flops_per_s: the rate attained over the link; None if the printed one is left out.
    """

    phase: str
    context_k: int
    kv_heads: int
    flops: float
    device_bytes: float
    flops_per_s: float
    link_bytes: float
    link_flops_per_s: float | None


CONTEXTS_K = (1, 10, 20, 40, 100, 200, 400, 1024, 2048, 4096)  # the columns of tables 6 and 7
PREFILL_S: dict[str, Sequence[float]] = {
    "standard": (0.11, 1.23, 2.83),
    "layer-wise": (0.12, 1.24, 2.84, 6.93),
    "8 heads": (0.12, 1.24, 2.84, 7.11, 30.2, 100, 357),
    "4 heads": (0.13, 1.23, 2.89, 7.26, 30.2, 99, 351, 2033),
    "2 heads": (0.14, 1.23, 2.94, 7.54, 30.5, 100, 353, 2035, 7952),
    "1 head": (0.21, 1.27, 3.06, 7.77, 31.2, 101, 356, 2054, 7975, 27114),
    "adaptive": (0.13, 1.24, 2.84, 7.11, 30.2, 99, 351, 2033, 7952, 27114),
}
DECODE_S: dict[str, Sequence[float]] = {
    "standard": (0.03, 0.03, 0.03, 0.04),
    "layer-wise": (0.03, 0.09, 0.17, 0.28, 0.66, 1.3, 2.58),
    "8 heads": (0.03, 0.09, 0.17, 0.28, 0.66, 1.3, 2.58),
    "1 head": (0.10, 0.14, 0.21, 0.33, 0.71, 1.33, 2.61, 6.51, 13.8, 27.2),
    "adaptive": (0.03, 0.09, 0.17, 0.28, 0.66, 1.73, 3.03, 6.41, 13.7, 27.2),
}
LONGEST_K: dict[str, Sequence[float]] = {  # table 3: one column for each method, in the order of BASELINES
    "llama-3-8b": (25, 30, 45, 45, 4096),
    "llama-2-7b": (10, 20, 30, 60, 1024),
    "mistral-7b": (30, 40, 40, 45, 4096),
    "qwen2-7b": (35, 70, 50, 50, 4200),
    "gemma-2-9b": (10, 10, 20, 35, 1300),
}
LONGEST_BY_GROUP_K = {8: 550, 4: 1100, 2: 2100, 1: 4096}  # table 5
WEIGHTS_GIB = 15.08  # tables 10 and 11
MEMORY_1M = (  # table 10
    PrintedMemory("standard", 1024, 128, 64, 207, 128),
    PrintedMemory("chunked prefill", 1024, 128, 0.625, 143, 128),
    PrintedMemory("4-bit KV", 1024, 32, 64, 111, 32),
    PrintedMemory("layer-wise offload", 1024, 8, 64, 87, 128),
    PrintedMemory("head-wise (paper)", 1024, 1, 0.625, 16.7, 128),
)
MEMORY_AT_LIMIT = (  # table 11
    PrintedMemory("standard", 25, 3.13, 1.56, 19.77, 3.13),
    PrintedMemory("chunked prefill", 30, 3.75, 0.63, 19.46, 3.75),
    PrintedMemory("4-bit KV", 45, 1.41, 2.81, 19.30, 1.41),
    PrintedMemory("layer-wise offload", 45, 0.35, 2.81, 18.25, None),
    PrintedMemory("head-wise (paper)", 4000, 3.91, 0.63, 19.61, 500),
)
ROOFLINE = (  # table 12
    PrintedPoint("prefill", 1, 8, 17e9, 21e6, 165e12, 4.2e6, 102e12),
    PrintedPoint("prefill", 10, 8, 1.7e12, 209e6, 165e12, 42e6, 165e12),
    PrintedPoint("prefill", 100, 8, 172e12, 2.1e9, 165e12, 419e6, 165e12),
    PrintedPoint("prefill", 10, 1, 215e9, 26e6, 165e12, 5.2e6, None),
    PrintedPoint("decode", 1, 8, 17e6, 17e6, 1e12, 17e6, 13e9),
    PrintedPoint("decode", 10, 8, 168e6, 168e6, 1e12, 168e6, 13e9),
    PrintedPoint("decode", 100, 8, 1.7e9, 1.7e9, 1e12, 1.7e9, 13e9),
    PrintedPoint("decode", 1, 1, 2.1e6, 2.1e6, 1e12, 2.1e6, 13e9),
    PrintedPoint("decode", 10, 1, 21e6, 21e6, 1e12, 21e6, 13e9),
    PrintedPoint("decode", 100, 1, 210e6, 210e6, 1e12, 210e6, 13e9),
)
SPARSE_SHARE = 0.5  # table 14: half of the heads are sparse
SPARSE_S: dict[str, tuple[float, float]] = {  # table 14: prefill of 1M tokens, and a token after them
    "all heads full": (2054, 6.51),
    "50% of the heads sparse": (1152, 3.28),
}


# -- predicted figures ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A figure of the paper beside the predicted one.

    Attributes:
        table: the number of the paper's table.
        what: what the figure is, such as "standard, 10K".
        unit: the unit of both figures.
        paper: the printed figure.
        predicted: the figure of the memory and cost model.
        allowed: the relative difference that needs no explanation.
        arithmetic: figures that follow the explanation, if there is one.
    """

    table: str
    what: str
    unit: str
    paper: float
    predicted: float
    allowed: float
    arithmetic: str = ""

    @property
    def difference(self) -> float:
        """The relative difference from the paper: 0.1 if the predicted figure is 10 % larger."""
        return self.predicted / self.paper - 1

    @property
    def note(self) -> str:
        """The explanation of the difference, or an empty string if it needs none.

        Raises:
            StopIteration: the difference needs an explanation, and NOTES has none.
        """
        if abs(self.difference) <= self.allowed:
            return ""
        reason = next(text for (table, words), text in NOTES.items() if table == self.table and words in self.what)
        return reason + self.arithmetic


def rows_of(table: str) -> list[Row]:
    """Return all rows of one of the paper's tables."""
    _, make = TABLES[table]
    return make()


def paper_activation_bytes(shape: ModelShape, chunk_tokens: int, element_bytes: int) -> int:
    """Return the activation bytes of a chunk by the paper's rule.

    Tables 10 and 11 count 64 KiB a token for a hidden size H of 4096 in bfloat16, which is 8 H elements.
    """
    return chunk_tokens * 8 * shape.hidden_size * element_bytes


def _machine(link_bytes_per_s: float) -> Hardware:
    """Return the paper's machine: an RTX 4090, 1 TB of eight-channel DDR4, and the link that a table implies."""
    return dataclasses.replace(
        HARDWARE["rtx4090"],
        device_memory_bytes=USABLE_BYTES,
        link_bytes_per_s=link_bytes_per_s,
        link_back_bytes_per_s=link_bytes_per_s,
        link_share=1.0,
        dram_bytes_per_s=204.8e9,
        overhead_bytes=0,
    )


def _baseline(
    shape: ModelShape,
    method: str,
    heads: int | None = 1,
    link_bytes_per_s: float = PREFILL_LINK_BYTES_PER_S,
    sparse_heads: HeadPattern | None = None,
) -> Baseline:
    machine = _machine(link_bytes_per_s)
    request = Request(shape, machine, context_tokens=1, host_bytes=HOST_KV_BYTES, sparse_heads=sparse_heads)
    return Baseline(
        request, method, CHUNK_TOKENS, heads, paper_activation_bytes, overhead_bytes=0, host_overhead_bytes=0
    )


def _as_the_paper_caches_it(shape: ModelShape) -> ModelShape:
    """Return the model with full attention in all layers: the paper's code keeps the KV outside of windows too."""
    layers = (dataclasses.replace(layer, kind="full_attention", window_tokens=0) for layer in shape.layers)
    return dataclasses.replace(shape, layers=tuple(layers))


def _memory_rows(table: str, printed: Sequence[PrintedMemory]) -> list[Row]:
    shape = find_shape("llama-3-8b")
    weights_gib = shape.weights * 2 / GIB
    rows = [Row(table, "weights", "GiB", WEIGHTS_GIB, weights_gib, 0.10)]
    for one in printed:
        found = _baseline(shape, one.method).footprint(one.context_k * K)
        figures = (
            ("KV on the GPU", one.kv_gib, found.device_kv_bytes),
            ("activations", one.activations_gib, found.activation_bytes),
            ("total", one.total_gib, found.device_bytes),
            ("KV in all", one.all_kv_gib, found.total_kv_bytes),
        )
        for name, paper_gib, predicted_bytes in figures:
            if paper_gib is not None:
                rows.append(Row(table, f"{one.method}, {name}", "GiB", paper_gib, predicted_bytes / GIB, 0.10))
    return rows


def _longest_rows() -> list[Row]:
    rows = []
    for model, printed in LONGEST_K.items():
        shape = _as_the_paper_caches_it(find_shape(model))
        for method, paper_k in zip(BASELINES, printed, strict=True):
            by_paper = _baseline(shape, method)
            by_planner = dataclasses.replace(by_paper, activations=activation_bytes)
            tokens = round(paper_k * K)
            paper_gib = by_paper.footprint(tokens).device_bytes / GIB
            planner_gib = by_planner.footprint(tokens).device_bytes / GIB
            arithmetic = (
                f"; at {paper_k:,}K the total is {paper_gib:.2f} GiB with activations by the paper's rule and "
                f"{planner_gib:.2f} GiB by the planner's"
            )
            longest_k = by_paper.longest_tokens() / K
            rows.append(Row("3", f"{model}, {method}", "K tokens", paper_k, longest_k, 0.10, arithmetic))
    return rows


def _group_rows() -> list[Row]:
    shape = find_shape("llama-3-8b")
    rows = []
    for heads, paper_k in LONGEST_BY_GROUP_K.items():
        longest_k = _baseline(shape, "head-wise (paper)", heads).longest_tokens() / K
        rows.append(Row("5", f"{heads} heads per group", "K tokens", paper_k, longest_k, 0.10))
    return rows


def _time_rows(table: str, printed: Mapping[str, Sequence[float]], link_bytes_per_s: float) -> list[Row]:
    shape = find_shape("llama-3-8b")
    rows = []
    for name, figures in printed.items():
        method = {"standard": "standard", "layer-wise": "layer-wise offload"}.get(name, "head-wise (paper)")
        heads = int(name.split()[0]) if name[0].isdigit() else None
        baseline = _baseline(shape, method, heads, link_bytes_per_s)
        for context_k, paper_s in zip(CONTEXTS_K, figures, strict=False):
            tokens = context_k * K
            seconds = baseline.prefill(tokens) if table == "6" else baseline.decode(tokens)
            label = f"{context_k // K}M" if context_k >= K else f"{context_k}K"
            rows.append(Row(table, f"{name}, {label}", "s", paper_s, seconds.total_s, 0.25))
    return rows


def _sparse_rows() -> list[Row]:
    """Return the rows of table 14, whose figures without sparse heads are those of one head per group."""
    shape = find_shape("llama-3-8b")
    found: dict[str, tuple[float, float]] = {}
    for name in SPARSE_S:
        pattern = shape.even_pattern(SPARSE_SHARE) if "sparse" in name else None
        read, token = (
            _baseline(shape, "head-wise (paper)", 1, link, pattern)
            for link in (PREFILL_LINK_BYTES_PER_S, DECODE_LINK_BYTES_PER_S)
        )
        found[name] = (read.prefill(1024 * K).total_s, token.decode(1024 * K).total_s)
    rows = []
    for phase, what in enumerate(("prefill of 1M", "a token after 1M")):
        for name, printed in SPARSE_S.items():
            rows.append(Row("14", f"{what}, {name}", "s", printed[phase], found[name][phase], 0.25))
        (full, sparse), (paper_full, paper_sparse) = (
            [figures[phase] for figures in each.values()] for each in (found, SPARSE_S)
        )
        rows.append(Row("14", f"{what}, gain", "times", paper_full / paper_sparse, full / sparse, 0.25))
    return rows


def _roofline_rows() -> list[Row]:
    layer = find_shape("llama-3-8b").layers[0]
    gpu = HARDWARE["rtx4090"]
    rows = []
    for one in ROOFLINE:
        link_bytes_per_s = PREFILL_LINK_BYTES_PER_S if one.phase == "prefill" else TABLE_12_DECODE_LINK_BYTES_PER_S
        points = operating_points(
            layer,
            gpu.flops_per_s["bfloat16"],
            gpu.device_bytes_per_s,
            link_bytes_per_s,
            (one.context_k * K,),
            heads=one.kv_heads,
        )
        on_device, over_link = (point for point in points if point.phase == one.phase)
        what = f"{one.phase} {one.context_k}K, {'all heads' if one.kv_heads == 8 else 'one head'}"
        figures = (
            ("FLOP", "GFLOP", 1e9, one.flops, on_device.flops),
            ("bytes", "MB", 1e6, one.device_bytes, on_device.bytes_moved),
            ("attained", "TFLOP/s", 1e12, one.flops_per_s, on_device.flops_per_s),
            ("bytes over the link", "MB", 1e6, one.link_bytes, over_link.bytes_moved),
            ("attained over the link", "TFLOP/s", 1e12, one.link_flops_per_s, over_link.flops_per_s),
        )
        for name, unit, scale, paper, predicted in figures:
            if paper is not None:
                rows.append(Row("12", f"{what}, {name}", unit, paper / scale, predicted / scale, 0.10))
    return rows


TABLES: dict[str, tuple[str, Callable[[], list[Row]]]] = {
    "3": ("longest context by method and model", _longest_rows),
    "5": ("longest context by heads per group", _group_rows),
    "6": ("prefill", lambda: _time_rows("6", PREFILL_S, PREFILL_LINK_BYTES_PER_S)),
    "7": ("decode, a token", lambda: _time_rows("7", DECODE_S, DECODE_LINK_BYTES_PER_S)),
    "10": ("GPU memory at 1M tokens", lambda: _memory_rows("10", MEMORY_1M)),
    "11": ("GPU memory at each method's limit", lambda: _memory_rows("11", MEMORY_AT_LIMIT)),
    "12": ("roofline of one layer's attention", _roofline_rows),
    "14": ("half of the heads sparse, at 1M tokens", _sparse_rows),
}
