"""The command `headinfer heads`: shows a head pattern, or makes one from a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headinfer.cli.console import say, show, warning
from headinfer.cli.documents import AGAIN_HELP, DOCUMENT_HELP, given_document
from headinfer.cli.options import Device, Dtype, Json, Raw, number, real, tokens
from headinfer.errors import UsageError
from headinfer.utils.files import Output, read_json_object
from headinfer.utils.head_pattern import PATTERN_FORMAT, HeadPattern, read_pattern
from headinfer.utils.units import format_bytes, format_tokens, parse_tokens

if TYPE_CHECKING:
    from headinfer.evals.calibrate import CalibrationJob, Calibrator, Text

__all__ = ["heads"]

_CONTEXTS = (4096, 8192)
_SPARSE_SHARE = 0.5
_FEW_PREDICTED = 0.5
_SHOWN_TOKENS = (2**13, 2**17, 2**20)
_PANEL = "With --calibrate"


def heads(
    target: Annotated[
        str,
        typer.Argument(
            help="A file with a head pattern to show: JSON, or full_attention_heads.tsv of DuoAttention. With "
            "--calibrate a model, as for `headinfer generate`.",
            show_default=False,
        ),
    ],
    calibrate: Annotated[bool, typer.Option("--calibrate", help="Measure a model and write its head pattern.")] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File to write the pattern to.", rich_help_panel=_PANEL),
    ] = None,
    file: Annotated[
        list[Path] | None,
        typer.Option(
            "--file",
            help=f"One more text to hide needles in. {DOCUMENT_HELP} {AGAIN_HELP}",
            metavar="PATH",
            show_default="the text that headinfer ships",
            rich_help_panel=_PANEL,
        ),
    ] = None,
    context: Annotated[
        str | None,
        typer.Option(
            help="Tokens of the contexts, separated by commas; each text is read at each of them.",
            show_default="4K,8K, or what the model was made for",
            rich_help_panel=_PANEL,
        ),
    ] = None,
    needles: Annotated[
        int | None,
        number("--needles", "Needles in each context.", high=1000, show_default="8", rich_help_panel=_PANEL),
    ] = None,
    sink_tokens: Annotated[
        int | None,
        tokens("--sink-tokens", "The first tokens, which all heads see.", show_default="64", rich_help_panel=_PANEL),
    ] = None,
    recent_tokens: Annotated[
        int | None,
        tokens(
            "--recent-tokens", "The newest tokens, which all heads see.", show_default="256", rich_help_panel=_PANEL
        ),
    ] = None,
    seed: Annotated[
        int | None,
        number("--seed", "Seed of the needles.", low=0, high=2**63 - 1, show_default="0", rich_help_panel=_PANEL),
    ] = None,
    sparse_share: Annotated[
        float | None,
        real(
            "--sparse-share",
            "The share of the heads to be streaming, those with the lowest values.",
            low=0.0,
            high=1.0,
            show_default="that of the file; 0.5 with --calibrate",
        ),
    ] = None,
    threshold: Annotated[
        float | None,
        real(
            "--threshold",
            "In place of a share: heads with at least this value are full.",
            low=0.0,
            high=1.0,
            show_default=False,
        ),
    ] = None,
    raw: Raw = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Show which KV heads of a model need the whole context, or measure it with --calibrate.

    The other heads may see only the first and newest tokens, which is approximate: see `--sparse-heads` of
    `headinfer generate`.
    """
    if sparse_share is not None and threshold is not None:
        raise UsageError("--sparse-share and --threshold both decide which heads are streaming: give one of them")
    if calibrate:
        if output is None:
            raise UsageError("--calibrate writes a file: name it with -o FILE")
        written = Output(output, is_ours=is_pattern)
        share = _SPARSE_SHARE if sparse_share is None and threshold is None else sparse_share
        job = _job(target, file or [], context, needles, sink_tokens, recent_tokens, seed, share, raw, dtype, device)
        pattern = _chosen(_measured(job), None, threshold)
        try:
            written.write(json.dumps(pattern.as_dict(), indent=1) + "\n")
        finally:  # the pattern is shown even if it cannot be written
            _show(pattern, as_json=as_json)
        say(f"written to {output}")
        return
    given = {
        "-o": output,
        "--file": file,
        "--context": context,
        "--needles": needles,
        "--sink-tokens": sink_tokens,
        "--recent-tokens": recent_tokens,
        "--seed": seed,
    }
    for name, value in given.items():
        if value is not None:
            raise UsageError(f"{name} is for --calibrate, which measures a model: add it, or leave {name} out")
    if not Path(target).exists():
        raise UsageError(
            f"there is no file {target}: name a file with a head pattern, or add --calibrate -o FILE to make one from "
            "a model"
        )
    _show(_chosen(read_pattern(target), sparse_share, threshold), as_json=as_json)


def is_pattern(path: Path) -> bool:
    """Return whether a file is a head pattern that headinfer wrote."""
    return read_json_object(path).get("format") == PATTERN_FORMAT


def _chosen(pattern: HeadPattern, share: float | None, threshold: float | None) -> HeadPattern:
    """Return a pattern with another share or threshold, if one is given."""
    if threshold is not None:
        pattern = replace(pattern, threshold=threshold)
        if pattern.share == 1.0:
            highest = max(value for values in pattern.values for value in values)
            raise UsageError(f"--threshold {threshold:g} leaves no full head: the highest value is {highest:g}")
    return pattern if share is None else pattern.with_share(share)


def _job(
    model: str,
    files: Sequence[Path],
    context: str | None,
    needles: int | None,
    sink_tokens: int | None,
    recent_tokens: int | None,
    seed: int | None,
    share: float | None,
    raw: bool,
    dtype: str,
    device: str,
) -> CalibrationJob:
    """Return a calibration from the options of the command. The files are read, and the weights are not."""
    from headinfer.engine.machine import chosen_device
    from headinfer.evals.calibrate import CalibrationJob
    from headinfer.hf.models import resolve
    from headinfer.jobs.generate import chosen_dtype
    from headinfer.plan.model_shape import ModelShape

    lengths = sorted({parse_tokens(part) for part in context.split(",")}) if context is not None else []
    texts = _texts(files)
    chosen = str(chosen_device(device))
    source = resolve(model)
    longest = ModelShape.from_config(source.config).max_context_tokens or max(_CONTEXTS)
    return CalibrationJob(
        source=source,
        name=model,
        dtype=chosen_dtype(dtype, source, chosen),
        device=chosen,
        texts=texts,
        lengths=lengths or sorted({min(length, longest) for length in _CONTEXTS}),
        needles=8 if needles is None else needles,
        sink_tokens=64 if sink_tokens is None else sink_tokens,
        recent_tokens=256 if recent_tokens is None else recent_tokens,
        seed=seed or 0,
        is_raw=raw,
        share=share,
    )


def _texts(files: Sequence[Path]) -> list[Text]:
    """Return the text that headinfer ships and those of files."""
    from headinfer.embedded import embedded_text
    from headinfer.evals.calibrate import Text

    texts = [Text("the text that headinfer ships", embedded_text())]
    for path in files:
        text = "".join(given_document([path], []).texts)
        if not text.strip():
            raise UsageError(f"{path} has no text to hide needles in")
        texts.append(Text(path.name, text))
    return texts


def _measured(job: CalibrationJob) -> HeadPattern:
    """Check a calibration, then run it with a progress bar."""
    from headinfer.cli.report import EvaluationProgress
    from headinfer.evals.calibrate import Calibrator

    calibrator: Calibrator = Calibrator(job)
    for line in calibrator.warnings:
        warning(line)
    with EvaluationProgress(calibrator.shape, calibrator.document_tokens) as progress:
        pattern = calibrator.run(progress.on_tokens, progress.on_document)
    if pattern.info["predicted"] < _FEW_PREDICTED:
        warning(
            f"the model predicted {pattern.info['predicted']:.0%} of the numbers' tokens itself, so what its heads do "
            "says little about how it finds something: try a shorter --context, or a model that finds needles"
        )
    return pattern


def _show(pattern: HeadPattern, *, as_json: bool) -> None:
    """Print a pattern: its heads by layer, its share, and the KV that stays."""
    from headinfer.cli.report import columns_table

    kept = {length: kept_share(pattern, length) for length in _SHOWN_TOKENS}
    if as_json:
        facts = {"share": pattern.share, "digest": pattern.digest, "kept": {str(key): kept[key] for key in kept}}
        print(json.dumps({**pattern.as_dict(), **facts}))
        return
    rows = []
    for layer, values in enumerate(pattern.values):
        if values:
            full = pattern.full_heads(layer)
            named = [" ".join(map(str, some)) or "-" for some in (full, pattern.streaming_heads(layer))]
            rows.append((layer, *named, " ".join(f"{value:.2f}" for value in values)))
    show(columns_table("", ("layer", "full heads", "streaming heads", "values"), rows, "left"))
    streaming = sum(len(pattern.streaming_heads(layer)) for layer in range(len(pattern.values)))
    show(
        f"{streaming} of {pattern.heads} KV heads ({pattern.share:.1%}) see only the first {pattern.sink_tokens:,} and "
        f"the newest {pattern.recent_tokens:,} tokens (threshold {pattern.threshold:g}); this is approximate"
    )
    for length, (share, nbytes) in kept.items():
        size = f": {format_bytes(nbytes)}" if nbytes is not None else ""
        show(f"KV that stays at {format_tokens(length)} tokens: {share:.1%}{size}")


def kept_share(pattern: HeadPattern, tokens: int) -> tuple[float, int | None]:
    """Return which part of the KV of the layers with full attention stays with a pattern.

    Args:
        pattern: the pattern.
        tokens: the context.

    Returns:
        The share, and the bytes of one row; None if the file does not say what a head takes.
    """
    sizes: Any = pattern.info.get("head_bytes_per_token")
    is_known = isinstance(sizes, list) and len(sizes) == len(pattern.values)
    near = min(pattern.sink_tokens + pattern.recent_tokens, tokens)
    whole = kept = 0
    for layer, values in enumerate(pattern.values):
        size = sizes[layer] if is_known else 1
        whole += size * len(values) * tokens
        kept += size * (len(pattern.full_heads(layer)) * tokens + len(pattern.streaming_heads(layer)) * near)
    return kept / whole, kept if is_known else None
