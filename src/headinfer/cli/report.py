"""What people see on stderr: progress, summaries, tables."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console, JustifyMethod
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from headinfer.hf.cache import HeadCache
from headinfer.jobs.generate import Summary
from headinfer.plan.hardware import Hardware
from headinfer.plan.model_shape import ModelShape
from headinfer.utils.units import format_bytes

__all__ = ["GenerationProgress", "columns_table", "hardware_table", "summary_table"]


class GenerationProgress:
    """A bar for the prefill, whose share done and time left count attention's quadratic cost, then one for decode.

    The decode bar is left out where the text itself is streamed to the same terminal.
    """

    def __init__(
        self,
        console: Console,
        shape: ModelShape,
        prompt_tokens: int,
        new_tokens: int,
        *,
        show_decode: bool,
        read_before: int = 0,
    ) -> None:
        """read_before: tokens of the prompt that need not be read."""
        self._shape, self._prompt_tokens, self._new_tokens = shape, prompt_tokens, new_tokens
        self._read_before = read_before
        self._show_decode = show_decode
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[tokens]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._start = time.perf_counter()
        self._decode_start = 0.0
        self._prefill: TaskID | None = None
        self._decode: TaskID | None = None

    def __enter__(self) -> GenerationProgress:
        self._progress.start()
        total = self._shape.prefill_flops(self._prompt_tokens)
        self._prefill = self._progress.add_task("reading", total=total, tokens=f"0/{self._prompt_tokens:,} tokens")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def on_forward(self, cache: HeadCache) -> None:
        """After each chunk and each token."""
        now = time.perf_counter()
        tokens = cache.head_layers[0].get_seq_length()
        assert self._prefill is not None
        if self._decode is None:
            done = min(tokens, self._prompt_tokens)
            rate = (done - self._read_before) / (now - self._start)
            self._progress.update(
                self._prefill,
                completed=self._shape.prefill_flops(done),
                tokens=f"{done:,}/{self._prompt_tokens:,} tokens, {rate:,.0f} tokens/s",
            )
        if tokens >= self._prompt_tokens and self._decode is None:
            self._decode_start = now
            if not self._show_decode:
                self._progress.stop()
            self._decode = self._progress.add_task(
                "writing", total=self._new_tokens, tokens="", visible=self._show_decode
            )
        elif self._decode is not None:
            done = tokens - self._prompt_tokens
            rate = done / (now - self._decode_start)
            self._progress.update(
                self._decode,
                completed=done + 1,
                tokens=f"{done + 1:,}/{self._new_tokens:,} tokens, {rate:,.2f} tokens/s",
            )


def columns_table(
    title: str, header: Sequence[str], rows: Sequence[Sequence[object]], justify: JustifyMethod = "right"
) -> Table:
    """A table whose first column names the row; figures stand right, text is better left."""
    table = Table(title=title, title_justify="left", show_header=any(header))
    for index, name in enumerate(header):
        table.add_column(name, justify=justify if index else "left")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    return table


def summary_table(summary: Summary) -> Table:
    """What a generation did, for the end of it."""
    rate, stats = summary.decode_tokens_per_s, summary.stats
    rows: list[tuple[str, object]] = [
        ("tokens read", f"{summary.tokens_read:,} of {summary.tokens_in:,}"),
        ("tokens written", f"{summary.tokens_out:,}" + (" (interrupted)" if summary.interrupted else "")),
        ("time to first token", "-" if summary.first_token_s is None else f"{summary.first_token_s:.2f} s"),
        ("tokens/s after the first", "-" if rate is None else f"{rate:.2f}"),
    ]
    if stats is not None:
        each = f", each of {summary.ranks} ranks" if summary.ranks > 1 else ""  # they hold equally many heads
        rows += [
            (f"KV on the device, peak{each}", format_bytes(stats.device_kv_peak_bytes)),
            (f"KV on the host{each}", format_bytes(stats.host_kv_bytes)),
            (f"over the link to the device{each}", format_bytes(stats.link_to_device_bytes)),
            (f"over the link to the host{each}", format_bytes(stats.link_to_host_bytes)),
            ("tokens of a chunk", f"{summary.plan['chunk_tokens']:,}"),
            ("heads per group", f"{stats.heads_per_group} ({stats.tile_reason})"),
        ]
    return columns_table("headinfer", ("", ""), rows)


def hardware_table(found: Hardware) -> Table:
    """What a probe has measured."""
    rates = [
        ("host memory, read", found.dram_bytes_per_s),
        ("KV, read by decode's attention", found.kv_bytes_per_s or 0.0),
        *((f"weights times one token, {name}", rate) for name, rate in found.weight_bytes_per_s.items()),
        *(() if found.is_host else (("link to the device", found.link_bytes_per_s),)),
        *(() if found.is_host else (("link to the host", found.link_back_bytes_per_s),)),
        *(() if found.is_host else (("device memory", found.device_bytes_per_s),)),
        ("disk, read", found.disk_read_bytes_per_s),
        ("disk, write", found.disk_write_bytes_per_s),
    ]
    rows = [(name, f"{rate / 1e9:,.2f} GB/s") for name, rate in rates]
    for what, by_dtype in (("matrices", found.flops_per_s), ("attention", found.attention_flops_per_s)):
        rows += [(f"{what} in {name}", f"{rate / 1e9:,.1f} GFLOP/s") for name, rate in by_dtype.items()]
    rows.append(("queueing a small kernel", f"{found.launch_s * 1e6:,.1f} us"))
    return columns_table(f"headinfer probe: {found.name}", ("", ""), rows)
