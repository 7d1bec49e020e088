"""The tables of arXiv 2502.12574, and what the memory and cost model predicts for the same settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from paper_notes import NOTES

from headinfer.plan.compare import Baseline
from headinfer.plan.footprint import BASELINES, activation_bytes, paper_activation_bytes
from headinfer.plan.hardware import HARDWARE, Hardware
from headinfer.plan.model_shape import ModelShape
from headinfer.plan.models import find_shape
from headinfer.plan.request import Request
from headinfer.plan.roofline import operating_points

__all__ = ["Row", "comparison", "rows_of"]

K, GIB = 1024, 2**30
CHUNK_TOKENS = 10 * K
USABLE_BYTES = round(19.77 * GIB)  # table 11: the paper's total where its standard inference ends
HOST_KV_BYTES = 512 * GIB  # tables 3 and 4: what both Llama-3-8B at 4096K and Llama-2-7B at 1024K hold
DECODE_LINK_BYTES_PER_S = 20.4e9  # table 7: 131,072 bytes a token x 1,000,000 tokens in 6.41 s
PREFILL_LINK_BYTES_PER_S = 25e9  # table 12: 102 TFLOP/s at 4,100 FLOP/byte
TABLE_12_DECODE_LINK_BYTES_PER_S = 13e9

CONTEXTS = (1, 10, 20, 40, 100, 200, 400, 1024, 2048, 4096)  # in K
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
LONGEST_K: dict[str, Sequence[float]] = {  # table 3, by method in the order of BASELINES
    "llama-3-8b": (25, 30, 45, 45, 4096),
    "llama-2-7b": (10, 20, 30, 60, 1024),
    "mistral-7b": (30, 40, 40, 45, 4096),
    "qwen2-7b": (35, 70, 50, 50, 4200),
    "gemma-2-9b": (10, 10, 20, 35, 1300),
}
LONGEST_BY_GROUP_K = {8: 550, 4: 1100, 2: 2100, 1: 4096}  # table 5
# Tables 10 and 11 in GiB (printed as GB): method, context in K, KV on the GPU, activations, total, KV in all.
MEMORY_1M = (
    ("standard", 1024, 128, 64, 207, 128),
    ("chunked prefill", 1024, 128, 0.625, 143, 128),
    ("4-bit KV", 1024, 32, 64, 111, 32),
    ("layer-wise offload", 1024, 8, 64, 87, 128),
    ("head-wise (paper)", 1024, 1, 0.625, 16.7, 128),
)
MEMORY_AT_LIMIT = (
    ("standard", 25, 3.13, 1.56, 19.77, 3.13),
    ("chunked prefill", 30, 3.75, 0.63, 19.46, 3.75),
    ("4-bit KV", 45, 1.41, 2.81, 19.30, 1.41),
    ("layer-wise offload", 45, 0.35, 2.81, 18.25, None),
    ("head-wise (paper)", 4000, 3.91, 0.63, 19.61, 500),
)
# Table 12, one layer: phase, K tokens, KV heads; FLOP, bytes, attained FLOP/s; link bytes, attained FLOP/s or None.
ROOFLINE = (
    ("prefill", 1, 8, 17e9, 21e6, 165e12, 4.2e6, 102e12),
    ("prefill", 10, 8, 1.7e12, 209e6, 165e12, 42e6, 165e12),
    ("prefill", 100, 8, 172e12, 2.1e9, 165e12, 419e6, 165e12),
    ("prefill", 10, 1, 215e9, 26e6, 165e12, 5.2e6, None),
    ("decode", 1, 8, 17e6, 17e6, 1e12, 17e6, 13e9),
    ("decode", 10, 8, 168e6, 168e6, 1e12, 168e6, 13e9),
    ("decode", 100, 8, 1.7e9, 1.7e9, 1e12, 1.7e9, 13e9),
    ("decode", 1, 1, 2.1e6, 2.1e6, 1e12, 2.1e6, 13e9),
    ("decode", 10, 1, 21e6, 21e6, 1e12, 21e6, 13e9),
    ("decode", 100, 1, 210e6, 210e6, 1e12, 210e6, 13e9),
)


@dataclass(frozen=True)
class Row:
    """One figure of the paper and the model's. allowed: the share of difference that needs no explanation."""

    table: str
    what: str
    unit: str
    paper: float
    ours: float
    allowed: float
    arithmetic: str = ""

    @property
    def difference(self) -> float:
        """The model's figure against the paper's: 0.1 is 10 % more."""
        return self.ours / self.paper - 1

    @property
    def note(self) -> str:
        """The explanation where the difference needs one. Raises StopIteration where it is missing."""
        if abs(self.difference) <= self.allowed:
            return ""
        reason = next(text for (table, words), text in NOTES.items() if table == self.table and words in self.what)
        return reason + self.arithmetic


def _machine(link_bytes_per_s: float) -> Hardware:
    """The paper's RTX 4090: 1 TB of eight-channel DDR4, and its link as a table implies it."""
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
    shape: ModelShape, method: str, heads: int | None = 1, link_bytes_per_s: float = PREFILL_LINK_BYTES_PER_S
) -> Baseline:
    request = Request(shape, _machine(link_bytes_per_s), context_tokens=1, host_bytes=HOST_KV_BYTES)
    return Baseline(
        request, method, CHUNK_TOKENS, heads, paper_activation_bytes, overhead_bytes=0, host_overhead_bytes=0
    )


def _all_full(shape: ModelShape) -> ModelShape:
    """The model as the paper's code caches it: sliding layers keep everything too."""
    layers = (dataclasses.replace(layer, kind="full_attention", window_tokens=0) for layer in shape.layers)
    return dataclasses.replace(shape, layers=tuple(layers))


def _memory_rows(table: str, printed: Sequence[tuple[str, int, float, float, float, float | None]]) -> list[Row]:
    shape, rows = find_shape("llama-3-8b"), []
    for method, context, kv, activations, total, all_kv in printed:
        found = _baseline(shape, method).footprint(context * K)
        figures = (("KV on the GPU", kv, found.device_kv_bytes), ("activations", activations, found.activation_bytes),
                   ("total", total, found.device_bytes), ("KV in all", all_kv, found.total_kv_bytes))  # fmt: skip
        rows += [
            Row(table, f"{method}, {name}", "GiB", paper, ours / GIB, 0.10)
            for name, paper, ours in figures
            if paper is not None
        ]
    return [Row(table, "weights", "GiB", 15.08, found.weights_bytes / GIB, 0.10), *rows]


def _longest_rows() -> list[Row]:
    rows = []
    for model, printed in LONGEST_K.items():
        shape = _all_full(find_shape(model))
        for method, paper in zip(BASELINES, printed, strict=True):
            one = _baseline(shape, method)
            own = dataclasses.replace(one, activations=activation_bytes)
            at_limit, by_ours = (x.footprint(round(paper * K)).device_bytes / GIB for x in (one, own))
            why = f"at {paper:,}K: {at_limit:.2f} GiB by the paper's rule, {by_ours:.2f} with activations by ours"
            rows.append(Row("3", f"{model}, {method}", "K tokens", paper, one.longest_tokens() / K, 0.10, why))
    return rows


def _group_rows() -> list[Row]:
    shape = find_shape("llama-3-8b")
    return [
        Row("5", f"{heads} heads per group", "K tokens", paper,
            _baseline(shape, "head-wise (paper)", heads).longest_tokens() / K, 0.10)
        for heads, paper in LONGEST_BY_GROUP_K.items()
    ]  # fmt: skip


def _time_rows(table: str, printed: dict[str, Sequence[float]], link: float) -> list[Row]:
    shape, rows = find_shape("llama-3-8b"), []
    for name, figures in printed.items():
        method = {"standard": "standard", "layer-wise": "layer-wise offload"}.get(name, "head-wise (paper)")
        heads = int(name.split()[0]) if name[0].isdigit() else None
        one = _baseline(shape, method, heads, link)
        for context, paper in zip(CONTEXTS, figures, strict=False):
            seconds = one.prefill(context * K) if table == "6" else one.decode(context * K)
            label = f"{context // K}M" if context >= K else f"{context}K"
            rows.append(Row(table, f"{name}, {label}", "s", paper, seconds.total_s, 0.25))
    return rows


def _roofline_rows() -> list[Row]:
    (layer, *_), peak, rows = find_shape("llama-3-8b").layers, HARDWARE["rtx4090"], []
    for phase, context, heads, flops, nbytes, attained, link_bytes, link_attained in ROOFLINE:
        link = PREFILL_LINK_BYTES_PER_S if phase == "prefill" else TABLE_12_DECODE_LINK_BYTES_PER_S
        found = operating_points(
            layer, peak.flops_per_s["bfloat16"], peak.device_bytes_per_s, link, (context * K,), heads=heads
        )
        on_device, over_link = (point for point in found if point.phase == phase)
        what = f"{phase} {context}K, {'all heads' if heads == 8 else 'one head'}"
        figures = (("FLOP", "GFLOP", 1e9, flops, on_device.flops), ("bytes", "MB", 1e6, nbytes, on_device.bytes_moved),
                   ("attained", "TFLOP/s", 1e12, attained, on_device.flops_per_s),
                   ("bytes over the link", "MB", 1e6, link_bytes, over_link.bytes_moved),
                   ("attained over the link", "TFLOP/s", 1e12, link_attained, over_link.flops_per_s))  # fmt: skip
        for name, unit, scale, paper, ours in figures:
            if paper is not None:
                rows.append(Row("12", f"{what}, {name}", unit, paper / scale, ours / scale, 0.10))
    return rows


TABLES: dict[str, tuple[str, Callable[[], list[Row]]]] = {
    "3": ("longest context by method and model", _longest_rows),
    "5": ("longest context by heads per group", _group_rows),
    "6": ("prefill", lambda: _time_rows("6", PREFILL_S, PREFILL_LINK_BYTES_PER_S)),
    "7": ("decode, a token", lambda: _time_rows("7", DECODE_S, DECODE_LINK_BYTES_PER_S)),
    "10": ("GPU memory at 1M tokens", lambda: _memory_rows("10", MEMORY_1M)),
    "11": ("GPU memory at each method's limit", lambda: _memory_rows("11", MEMORY_AT_LIMIT)),
    "12": ("roofline of one layer's attention", _roofline_rows),
}


def rows_of(table: str) -> list[Row]:
    """All rows of one of the paper's tables."""
    return TABLES[table][1]()
