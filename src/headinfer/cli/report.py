"""Progress bars and tables of the commands."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import JustifyMethod
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from headinfer.cli.console import stderr, write
from headinfer.plan.hardware import Hardware
from headinfer.plan.model_shape import ModelShape
from headinfer.utils.units import format_bytes

if TYPE_CHECKING:
    from headinfer.hf.cache import HeadCache
    from headinfer.jobs.generate import Summary

__all__ = [
    "ANSWER_COLUMNS",
    "AgainProgress",
    "AnswersProgress",
    "EvaluationProgress",
    "GenerationProgress",
    "ReadingProgress",
    "columns_table",
    "hardware_table",
    "summary_row",
    "summary_table",
]


# Rich tells the remaining time from what was done in the last 30 seconds, in which there may be no chunk.
_RATE_PERIOD_S = 3600.0


def _new_progress() -> Progress:
    """Return a progress display on stderr. Its tasks have a field `shown`, the text beside the bar."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[shown]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=stderr,
        speed_estimate_period=_RATE_PERIOD_S,
    )


class _Shown:
    """A progress display that is shown within a `with` statement."""

    def __init__(self) -> None:
        self._progress = _new_progress()

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()


class _AgainBar:
    """A bar for tokens that a model reads again (hf/rotary.py)."""

    def __init__(self, progress: Progress, shape: ModelShape, tokens: int) -> None:
        self._progress = progress
        self._shape = shape
        self._tokens = tokens
        self._task = progress.add_task("reading again", total=shape.prefill_flops(tokens), shown="")
        progress.start()

    def update(self, done: int) -> bool:
        """Show the tokens that are read. Returns whether these are all, after which the bar is removed."""
        shown = f"{done:,}/{self._tokens:,} tokens"
        self._progress.update(self._task, completed=self._shape.prefill_flops(done), shown=shown)
        if done < self._tokens:
            return False
        self._progress.remove_task(self._task)
        return True


class AgainProgress(_Shown):
    """A progress bar that is shown while the document of a session is read again.

    Args:
        shape: the model.
        tokens: tokens of the session.
    """

    def __init__(self, shape: ModelShape, tokens: int) -> None:
        super().__init__()
        self._shape = shape
        self._tokens = tokens
        self._bar: _AgainBar | None = None

    def __enter__(self) -> Self:
        return self

    def on_forward(self, cache: HeadCache) -> None:
        """Update the bar. Called after each chunk and after each generated token."""
        done = cache.head_layers[0].get_seq_length()
        if self._bar is None and done < self._tokens:
            self._bar = _AgainBar(self._progress, self._shape, self._tokens)
        if self._bar is not None and self._bar.update(done):
            self._bar = None
            self._progress.stop()


class AnswersProgress(_Shown):
    """A progress bar for questions that are answered together.

    Args:
        questions: the number of questions.
        to_read: tokens of what precedes the questions, if it is still to be read.
    """

    def __init__(self, questions: int, to_read: int = 0) -> None:
        super().__init__()
        self._questions = questions
        self._to_read = to_read
        self._done = 0
        self._steps = 0
        self._task = self._progress.add_task("answering", total=questions, shown="")

    def on_forward(self, cache: HeadCache) -> None:
        """Update the bar. Called after each chunk and after each token of all answers."""
        read = cache.get_seq_length()
        if read < self._to_read:
            self._progress.update(self._task, shown=f"{read:,}/{self._to_read:,} tokens are read")
            return
        self._steps += 1
        self._show()

    def on_done(self, answers: int) -> None:
        """Note how many answers are complete."""
        self._done = answers
        self._show()

    def write(self, text: str) -> None:
        """Write lines to stdout, which may be the terminal that the bar is on."""
        self._progress.stop()
        write(text)
        if self._done < self._questions:
            self._progress.start()

    def _show(self) -> None:
        shown = f"{self._done:,}/{self._questions:,} answers, {self._steps:,} passes"
        self._progress.update(self._task, completed=self._done, shown=shown)


class GenerationProgress(_Shown):
    """A progress bar for prefill, then one for decode.

    The prefill bar and its remaining time account for attention's quadratic cost.

    Args:
        shape: the model.
        prompt_tokens: tokens of the prompt.
        new_tokens: most tokens that are generated.
        show_decode: whether the decode bar is shown. It would disturb text that is streamed to the same terminal.
        read_before: tokens of the prompt that a session holds already.
    """

    def __init__(
        self,
        shape: ModelShape,
        prompt_tokens: int,
        new_tokens: int,
        *,
        show_decode: bool,
        read_before: int = 0,
    ) -> None:
        super().__init__()
        self._shape = shape
        self._prompt_tokens = prompt_tokens
        self._new_tokens = new_tokens
        self._read_before = read_before
        self._show_decode = show_decode
        self._start = time.perf_counter()
        self._decode_start = 0.0
        self._prefill = self._progress.add_task(
            "reading",
            total=shape.prefill_flops(prompt_tokens),
            completed=int(shape.prefill_flops(read_before)),
            shown=self._read_so_far(read_before),
        )
        self._decode: TaskID | None = None
        self._tokens = 0
        self._again: _AgainBar | None = None

    def on_resumed(self, tokens: int) -> None:
        """Begin after tokens that need not be read. The rate and the remaining time leave them out."""
        self._read_before = tokens
        self._start = time.perf_counter()
        completed = int(self._shape.prefill_flops(tokens))
        self._progress.reset(self._prefill, completed=completed, shown=self._read_so_far(tokens))

    def on_forward(self, cache: HeadCache) -> None:
        """Update the bars. Called after each chunk and after each generated token."""
        now = time.perf_counter()
        tokens = cache.head_layers[0].get_seq_length()
        if tokens < self._tokens:
            self._again = _AgainBar(self._progress, self._shape, self._tokens)
        self._tokens = tokens
        if self._again is not None:
            if self._again.update(tokens):
                self._again = None
                if self._decode is not None and not self._show_decode:
                    self._progress.stop()
        elif self._decode is not None:
            self._update_decode(self._decode, tokens - self._prompt_tokens + 1, now)
        else:
            self._update_prefill(min(tokens, self._prompt_tokens), now)
            if tokens >= self._prompt_tokens:
                self._decode = self._begin_decode(now)

    def _update_prefill(self, done: int, now: float) -> None:
        rate = (done - self._read_before) / (now - self._start)
        self._progress.update(
            self._prefill,
            completed=self._shape.prefill_flops(done),
            shown=f"{self._read_so_far(done)}, {rate:,.0f} tokens/s",
        )

    def _read_so_far(self, tokens: int) -> str:
        return f"{tokens:,}/{self._prompt_tokens:,} tokens"

    def _begin_decode(self, now: float) -> TaskID:
        self._decode_start = now
        if not self._show_decode:
            self._progress.stop()
        return self._progress.add_task("writing", total=self._new_tokens, shown="", visible=self._show_decode)

    def _update_decode(self, task: TaskID, written: int, now: float) -> None:
        rate = (written - 1) / (now - self._decode_start)  # the first token came with the last chunk
        self._progress.update(
            task,
            completed=written,
            shown=f"{written:,}/{self._new_tokens:,} tokens, {rate:,.2f} tokens/s",
        )


class EvaluationProgress(_Shown):
    """A progress bar for the documents of an evaluation.

    The bar and its remaining time account for attention's quadratic cost.

    Args:
        shape: the model.
        document_tokens: tokens of each document, in the order in which the documents are read.
    """

    def __init__(self, shape: ModelShape, document_tokens: Sequence[int]) -> None:
        super().__init__()
        self._shape = shape
        self._costs = [shape.prefill_flops(tokens) for tokens in document_tokens]
        self._done = 0
        self._task = self._progress.add_task("evaluating", total=sum(self._costs), shown=self._count())

    def on_tokens(self, tokens: int) -> None:
        """Update the bar. Called with the tokens of the current document that are read so far."""
        cost = min(self._shape.prefill_flops(tokens), sum(self._costs[self._done : self._done + 1]))
        self._progress.update(self._task, completed=self._cost_done() + cost)

    def on_document(self, score: float | None) -> None:
        """Update the bar after a document. `score` is the mean so far, or None if there is none."""
        self._done += 1
        shown = self._count() + ("" if score is None else f", score {score:.1%}")
        self._progress.update(self._task, completed=self._cost_done(), shown=shown)

    def _cost_done(self) -> float:
        return sum(self._costs[: self._done])

    def _count(self) -> str:
        return f"{self._done} of {len(self._costs)} texts"


class ReadingProgress:
    """A progress bar for each reading of a document, one reading after another."""

    def __init__(self) -> None:
        self._update: Callable[[int], None] | None = None

    @contextmanager
    def reading(self, name: str, shape: ModelShape, tokens: int) -> Iterator[None]:
        """Show a bar while a document is read. It ends with the last token, before any answer is printed.

        Args:
            name: the text before the bar.
            shape: the model. The bar and its remaining time account for attention's quadratic cost.
            tokens: tokens of the document.
        """
        progress = _new_progress()
        task = progress.add_task(name, total=shape.prefill_flops(tokens), shown="")

        def update(tokens_read: int) -> None:
            if progress.finished:
                return
            done = min(tokens_read, tokens)
            progress.update(task, completed=shape.prefill_flops(done), shown=f"{done:,}/{tokens:,}")
            if done == tokens:
                progress.stop()

        self._update = update
        with progress:
            yield
        self._update = None

    def on_tokens(self, tokens: int) -> None:
        """Update the bar, if one is shown. Called with the tokens that are read so far."""
        if self._update is not None:
            self._update(tokens)


def columns_table(
    title: str, header: Sequence[str], rows: Sequence[Sequence[object]], justify: JustifyMethod = "right"
) -> Table:
    """Make a table whose first column names the row.

    Args:
        title: the title, on the left.
        header: the names of the columns. No header is shown if all are empty.
        rows: the cells of each row, shown as str() gives them.
        justify: alignment of the other columns: "right" for numbers, "left" for text.
    """
    table = Table(title=title, title_justify="left", show_header=any(header))
    for index, name in enumerate(header):
        table.add_column(name, justify=justify if index else "left")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    return table


ANSWER_COLUMNS = ("first token", "tokens/s", "tokens/pass", "KV on the device, peak")
"""The columns of summary_row() after the first one."""


def summary_row(number: int, summary: Summary) -> tuple[str, str, str, str, str]:
    """Return one question's number, time to first token, tokens per second and pass, and peak of KV on the device."""
    return (
        str(number),
        _seconds(summary.first_token_s),
        _rate(summary.decode_tokens_per_s),
        _rate(summary.guess_counts.tokens_per_pass),
        "-" if summary.stats is None else format_bytes(summary.stats.device_kv_peak_bytes),
    )


def summary_table(summary: Summary) -> Table:
    """Return the table that ends a generation: tokens, times and bytes."""
    stats = summary.stats
    rows: list[tuple[str, object]] = [
        ("tokens read", f"{summary.tokens_read:,} of {summary.tokens_in:,}"),
        ("tokens written", f"{summary.tokens_out:,}" + (" (interrupted)" if summary.interrupted else "")),
        ("time to first token", _seconds(summary.first_token_s)),
        ("tokens/s after the first", _rate(summary.decode_tokens_per_s)),
    ]
    if summary.guesses_text:
        rows.append(("guesses", summary.guesses_text))
    if stats is not None:
        each = f", each of {summary.ranks} ranks" if summary.ranks > 1 else ""  # all ranks have equally many heads
        rows += [
            (f"KV on the device, peak{each}", format_bytes(stats.device_kv_peak_bytes)),
            (f"KV on the host{each}", format_bytes(stats.host_kv_bytes)),
            *([("KV is approximate", stats.approximation)] if stats.approximation else []),
            (f"over the link to the device{each}", format_bytes(stats.link_to_device_bytes)),
            (f"over the link to the host{each}", format_bytes(stats.link_to_host_bytes)),
            *([(f"attended by the CPU{each}", summary.cpu_text)] if summary.cpu_text else []),
            ("tokens of a chunk", f"{summary.plan['chunk_tokens']:,}"),
            ("heads per group", f"{stats.heads_per_group} ({stats.tile_reason})"),
        ]
    if summary.kernel_failure:
        rows.append(("slower attention on the CPU", summary.kernel_failure))
    return columns_table("headinfer", ("", ""), rows)


def hardware_table(found: Hardware) -> Table:
    """Return the rates that a probe has measured."""
    rates = {
        "host memory, read": found.dram_bytes_per_s,
        "KV, read by decode's attention": found.kv_bytes_per_s or 0.0,
    }
    rates |= {f"weights times one token, {name}": rate for name, rate in found.weight_bytes_per_s.items()}
    if not found.is_host:
        rates |= {
            "link to the device": found.link_bytes_per_s,
            "link to the host": found.link_back_bytes_per_s,
            "device memory": found.device_bytes_per_s,
        }
    for query_rows, by_threads in found.cpu_kv_bytes_per_s.items():
        for count, rate in by_threads.items():
            rates[f"KV, attended by the CPU, {query_rows} query rows, {count} threads"] = rate
    for query_rows, rate in found.cpu_beside_link_bytes_per_s.items():
        threads = f"{found.cpu_threads_beside_link or 'all'} threads"
        rates[f"KV, attended by the CPU beside the link, {query_rows} query rows, {threads}"] = rate
        link = found.link_beside_cpu_bytes_per_s[query_rows]
        rates[f"link to the device beside the CPU, {query_rows} query rows"] = link
    rates |= {"disk, read": found.disk_read_bytes_per_s, "disk, write": found.disk_write_bytes_per_s}
    rows = [(name, f"{rate / 1e9:,.2f} GB/s") for name, rate in rates.items()]
    for what, by_dtype in (("matrices", found.flops_per_s), ("attention", found.attention_flops_per_s)):
        rows += [(f"{what} in {name}", f"{rate / 1e9:,.1f} GFLOP/s") for name, rate in by_dtype.items()]
    rows.append(("queueing a small kernel", f"{found.launch_s * 1e6:,.1f} us"))
    return columns_table(f"headinfer probe: {found.name}", ("", ""), rows)


def _seconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.2f} s"


def _rate(tokens_per_s: float | None) -> str:
    return "-" if tokens_per_s is None else f"{tokens_per_s:.2f}"
