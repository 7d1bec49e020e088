"""The command `headinfer plan`: whether a job fits a machine, and how long it takes.

The module imports neither torch nor transformers, so that the command answers at once.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE
from rich.table import Table

from headinfer.cli.console import say, show, warning
from headinfer.cli.options import (
    CPU_SHARE_HELP,
    KV_DTYPE_HELP,
    SPARSE_HEADS_HELP,
    Json,
    cpu_share,
    number,
    real,
    size,
    tokens,
)
from headinfer.errors import UsageError
from headinfer.plan.compare import (
    OURS,
    kv_forms,
    longest_by_method,
    memory_by_method,
    plans_at,
    seconds_by_method,
    sparse_forms,
)
from headinfer.plan.cpu_share import unused_share_warnings
from headinfer.plan.footprint import Footprint
from headinfer.plan.hardware import HARDWARE, Hardware, find_hardware, probe_path
from headinfer.plan.memory import available_host_bytes
from headinfer.plan.model_shape import ModelShape
from headinfer.plan.models import BUILT_IN_CONFIGS, find_shape
from headinfer.plan.operating_points import OperatingPoint, operating_points
from headinfer.plan.planner import Plan, make_plan
from headinfer.plan.request import Request
from headinfer.plan.seconds import Seconds
from headinfer.utils.approximation import short_form
from headinfer.utils.head_pattern import HeadPattern, read_pattern
from headinfer.utils.units import format_bytes, format_seconds, format_tokens

__all__ = ["CONTEXTS", "plan"]

CONTEXTS = tuple(1024 * n for n in (1, 16, 64, 128, 256, 1024, 2048, 4096))
_POINT_CONTEXTS = (1024, 10 * 1024, 100 * 1024)


def plan(
    model: Annotated[
        str,
        typer.Argument(
            help=f"A folder, a config.json, a downloaded hub name, or one of: {', '.join(BUILT_IN_CONFIGS)}.",
            show_default=False,
        ),
    ] = "",
    context: Annotated[
        int, tokens("--context", "Tokens to read, such as 128K or 1M; K stands for 1,024.", show_default="128K")
    ] = 128 * 1024,
    gpu: Annotated[
        str | None,
        typer.Option(
            help=f"The device: {', '.join(HARDWARE)}, or a JSON file of headinfer probe; by default this machine, if "
            "it was probed."
        ),
    ] = None,
    ram: Annotated[
        int | None, size("--ram", "Host RAM for the job, such as 128GB; by default what is free here.")
    ] = None,
    disk: Annotated[int | None, size("--disk", "Disk for KV that does not fit RAM, such as 1TB.")] = None,
    device_memory: Annotated[int | None, size("--device-memory", "The most device memory, such as 12GiB.")] = None,
    device_kv_budget: Annotated[
        int | None, size("--device-kv-budget", "The most KV on the device, with resident KV, such as 256MiB.")
    ] = None,
    chunk_tokens: Annotated[int | None, tokens("--chunk-tokens", "Fix the tokens of a chunk of the prompt.")] = None,
    heads_per_group: Annotated[int | None, number("--heads-per-group", "Fix the KV heads of a tile.")] = None,
    tile_tokens: Annotated[int | None, tokens("--tile-tokens", "Fix the tokens of a tile.")] = None,
    new_tokens: Annotated[int, tokens("--new-tokens", "Tokens to generate, to weigh decode against prefill.")] = 256,
    rows: Annotated[int, number("--rows", "Rows of the batch, each with that context.")] = 1,
    dtype: Annotated[str, typer.Option(help="The dtype: auto, bfloat16, float16 or float32.")] = "auto",
    resident: Annotated[
        bool, typer.Option("--resident/--no-resident", help="Also keep KV on the device as far as its memory allows.")
    ] = True,
    weight_bits: Annotated[
        int | None, number("--weight-bits", "Bits of a quantized weight, such as 4.", high=64)
    ] = None,
    cpu_share: Annotated[
        float | None, cpu_share(CPU_SHARE_HELP, show_default="auto: above 0 if headinfer probe has measured the rates")
    ] = None,
    kv_dtype: Annotated[str, typer.Option(help=KV_DTYPE_HELP)] = "auto",
    sparse_heads: Annotated[
        Path | None,
        typer.Option(help=SPARSE_HEADS_HELP, metavar="FILE", show_default="all heads see all tokens"),
    ] = None,
    sparse_share: Annotated[
        float | None,
        real(
            "--sparse-share",
            "Share of the KV heads that are sparse, those that need the whole context least; without --sparse-heads, "
            "that share of the heads of each layer.",
            low=0.0,
            high=1.0,
            allows_zero=True,
        ),
    ] = None,
    as_json: Json = False,
    plot: Annotated[
        Path | None, typer.Option(help="Plot memory, seconds and the roofline into this .png, .svg or .pdf file.")
    ] = None,
    paper: Annotated[bool, typer.Option("--paper", hidden=True)] = False,
) -> None:
    """Predict whether a job fits a GPU and its host, how long it takes and what bounds it. No model is loaded."""
    if paper:
        raise UsageError(
            "--paper is not an option any more: in a checkout of headinfer, python benchmarks/paper/compare.py prints "
            "the comparison with the paper"
        )
    if not model:
        raise UsageError(f"name a model: a folder, a config.json, or one of {', '.join(BUILT_IN_CONFIGS)}")
    if plot is not None:
        from headinfer.cli.plan_plots import checked_plot, draw

        checked_plot(plot)
    hardware = _hardware(gpu)
    shape = find_shape(model)
    request = Request(
        shape=shape,
        hardware=hardware,
        context_tokens=context,
        host_bytes=ram if ram is not None else available_host_bytes(),
        device_bytes=device_memory,
        disk_bytes=disk or 0,
        new_tokens=new_tokens,
        rows=rows,
        dtype=_dtype(dtype, hardware),
        weight_bits=weight_bits,
        chunk_tokens=chunk_tokens,
        heads_per_group=heads_per_group,
        tile_tokens=tile_tokens,
        device_kv_budget_bytes=device_kv_budget,
        keeps_resident=resident,
        cpu_share=cpu_share,
        kv_dtype=kv_dtype,
        sparse_heads=_pattern(shape, sparse_heads, sparse_share),
    )
    made = make_plan(request)
    warnings = _warnings(request)
    for message in warnings:
        warning(message)
    if plot is not None:
        draw(made, model, plot, _points(made))
    if as_json:
        print(json.dumps(_as_dict(model, made, warnings)))
        return
    for table in _tables(model, made):
        show(table)
    for line in made.explain():
        show(line)
    if plot is not None:
        say(f"plots are in {plot}")


def _hardware(name: str | None) -> Hardware:
    if name is not None:
        return find_hardware(name)
    if os.path.isfile(probe_path()):
        return Hardware.load(probe_path())
    raise UsageError(
        f"name a device with --gpu, one of {', '.join(HARDWARE)}; or measure this machine once with headinfer probe"
    )


def _pattern(shape: ModelShape, path: Path | None, share: float | None) -> HeadPattern | None:
    """Return the heads that do not see the whole context; None if all do."""
    if path is not None:
        return read_pattern(path, share)
    return shape.even_pattern(share) if share is not None else None


def _dtype(name: str, hardware: Hardware) -> str:
    if name == "auto":
        return "bfloat16" if "bfloat16" in hardware.flops_per_s else next(iter(hardware.flops_per_s))
    return name


def _warnings(request: Request) -> list[str]:
    most = request.shape.max_context_tokens
    asked = request.context_tokens
    request.shape.check_positions(asked)
    lines = unused_share_warnings(request.cpu_share, is_in_place=request.hardware.is_host)
    if not most or asked <= most:
        return lines
    return [
        *lines,
        f"{asked:,} tokens exceed the {most:,} that this model was made for: it runs as planned, but answers will be "
        "poor unless its position encoding is extended (rope scaling) and it was trained for that",
    ]


def _points(made: Plan) -> list[OperatingPoint]:
    """Return the roofline of the layer with the most KV."""
    hardware = made.request.hardware
    layer = max(made.request.layers, key=lambda layer: layer.kv_bytes_per_token(1))
    return operating_points(
        layer,
        hardware.attained_flops_per_s(made.request.dtype),
        hardware.attained_device_bytes_per_s,
        hardware.attained_link_bytes_per_s,
        _POINT_CONTEXTS,
        made.request.element_bytes,
    )


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE)
    table.show_header = any(header)
    table.pad_edge = False
    table.collapse_padding = True
    for index, name in enumerate(header):
        style = "bold" if name == OURS else None
        table.add_column(name, justify="right" if index else "left", style=style, no_wrap=not index)
    for row in rows:
        table.add_row(*row)
    return table


def _tables(model: str, made: Plan) -> list[Table]:
    """Return the tables of the plan. Methods are columns, so that the tables fit a terminal with 80 columns."""
    hardware = made.request.hardware
    memory = memory_by_method(made)
    longest = longest_by_method(made)
    ours = plans_at(made, CONTEXTS)
    seconds = seconds_by_method(made, CONTEXTS, ours)
    methods = ("", *(name.removesuffix(" offload").removesuffix(" prefill") for name in memory))
    ram = "" if hardware.is_host else f", {format_bytes(made.request.host_bytes)} of RAM"
    machine = f"{hardware.name}, {format_bytes(made.request.room_bytes)}{ram}"
    context = format_tokens(made.request.context_tokens)
    components: dict[str, Callable[[Footprint], int]] = {
        "weights": lambda found: found.weights_bytes,
        "KV, device": lambda found: found.device_kv_bytes,
        "activations": lambda found: found.activation_bytes,
        "overhead": lambda found: found.overhead_bytes,
        "device": lambda found: found.device_bytes,
        "host RAM": lambda found: found.host_bytes,
        "disk": lambda found: found.disk_kv_bytes,
    }
    rows = [(name, *(f"{size(one) / 2**30:.2f}" for one in memory.values())) for name, size in components.items()]
    rows.append(("fits", *(_verdict(one, made.request) for one in memory.values())))
    tables = [
        _table(f"{model} at {context} tokens on {machine}; GiB", methods, rows),
        _table("longest context, tokens", methods, [("", *(format_tokens(n) for n in longest.values()))]),
    ]
    for phase, title in enumerate(("prefill of the whole context", "decode, a token")):
        cells = zip(*(_cells(row, phase) for row in seconds.values()), strict=True)
        rows = [(format_tokens(tokens), *row) for tokens, row in zip(CONTEXTS, cells, strict=True)]
        tables.append(_table(title, methods, rows))
    return [*tables, *_with_cpu(ours), _with_approximations(made), _roofline(made), _choices(made)]


def _with_approximations(made: Plan) -> Table:
    """Return a table of what approximate forms of KV would save."""
    header = ("", "KV, a token", "KV of the context", "prefill", "decode, a token", "longest context")
    rows = [
        (
            _form_name(one),
            format_bytes(one["token_bytes"]),
            format_bytes(one["kv_bytes"]),
            "-" if one["prefill_s"] is None else format_seconds(one["prefill_s"]),
            "-" if one["decode_s_per_token"] is None else format_seconds(one["decode_s_per_token"]),
            format_tokens(one["longest_tokens"]),
        )
        for one in (*kv_forms(made), *sparse_forms(made))
    ]
    title = "what approximations buy: --kv-dtype, and --sparse-heads or --sparse-share"
    return _table(title, header, rows)


def _form_name(form: dict[str, Any]) -> str:
    """Return the name of a form of KV, such as "int8, 50% sparse"."""
    names = [form["kv_dtype"]] if form["kv_dtype"] != "auto" else []
    if form["sparse_heads"] is not None:
        names.append(f"{form['sparse_heads']['streaming_share']:.0%} sparse")
    return ", ".join(names) or "exact"


def _with_cpu(ours: Sequence[Plan | None]) -> list[Table]:
    """Return a table of decode with and without the host's CPU, if it pays at any context."""
    header = ("", "link only", "with the CPU", "share of the CPU")
    rows = []
    for one in ours:
        if one is not None and one.with_cpu_share:
            share = one.with_cpu_share
            seconds = [one.decode_cost_with(each).total_s for each in (0.0, share)]
            rows.append((format_tokens(one.request.context_tokens), *map(format_seconds, seconds), f"{share:.0%}"))
    source = "measured" if any(one is not None and one.cpu_rates_are_measured for one in ours) else "a model of DRAM"
    return [_table(f"decode with the CPU, a token ({source})", header, rows)] if rows else []


def _roofline(made: Plan) -> Table:
    points = _points(made)
    has_link = not made.request.hardware.is_host
    header = ["", "FLOP", "FLOP/ byte", "FLOP/s", "bound"]
    if has_link:
        header += ["FLOP/ link byte", "FLOP/s", "bound"]
    rows = []
    for on_device, over_link in zip(points[::2], points[1::2], strict=True):
        row = [f"{on_device.phase} {format_tokens(on_device.tokens)}", _si(on_device.flops), *_point_cells(on_device)]
        if has_link:
            row += _point_cells(over_link)
        rows.append(row)
    return _table("roofline: attention of one layer, from device memory and over the link", header, rows)


def _point_cells(point: OperatingPoint) -> tuple[str, str, str]:
    return f"{point.intensity:,.0f}", _si(point.flops_per_s), point.bound.removeprefix("device ")


def _si(value: float) -> str:
    """Format a number with three digits and a letter, as in 17.2G or 1.72T."""
    for letter in ("", "K", "M", "G", "T"):
        if value < 1000:
            return f"{value:.3g}{letter}"
        value /= 1000
    return f"{value:,.3g}P"


def _choices(made: Plan) -> Table:
    rows = [("chunk", f"{made.chunk_tokens:,} tokens")]
    for phase, tile in (("prefill", made.prefill), ("decode", made.decode)):
        rows.append((f"tile in {phase}, KV heads x tokens", f"{tile.heads_per_group} x {tile.tile_tokens:,}"))
    if not made.request.hardware.is_host:
        resident = f"{made.resident_text} of {made.request.context_tokens:,}"
        rows.append(("tokens resident on the device", resident))
    rows += [
        ("device KV budget", format_bytes(made.device_kv_budget_bytes)),
        ("prefill", f"{format_seconds(made.prefill_cost.total_s)}, bound by {made.prefill_cost.bound}"),
        ("decode, a token", f"{format_seconds(made.decode_cost.total_s)}, bound by {made.decode_cost.bound}"),
    ]
    form = short_form(made.request.kv_dtype, made.request.sparse_heads)
    if form:
        rows.append(("approximate", form))
    if made.cpu_share:
        rows.append(("share of the host's CPU in decode", f"{made.cpu_share:.1%}"))
    return _table("plan", ("", ""), rows)


def _verdict(found: Footprint, request: Request) -> str:
    """Say whether a method fits, and which memory is too small if it does not."""
    if request.hardware.is_host:
        return "yes" if found.device_bytes + found.host_bytes <= request.host_bytes else "no: RAM"
    if found.device_bytes > request.room_bytes:
        return "no: GPU"
    return "yes" if found.host_bytes <= request.host_bytes else "no: RAM"


def _cells(row: Sequence[tuple[Seconds, Seconds] | None], phase: int) -> list[str]:
    """Format the seconds of one method. Phase 0 is prefill, phase 1 decode."""
    return ["-" if cell is None else format_seconds(cell[phase].total_s) for cell in row]


def _as_dict(model: str, made: Plan, warnings: list[str]) -> dict[str, Any]:
    """Return the JSON object of the command."""
    ours = plans_at(made, CONTEXTS)
    seconds = seconds_by_method(made, CONTEXTS, ours)
    return {
        "model": model,
        "plan": made.as_dict(),
        "memory": {
            method: dataclasses.asdict(found) | {"device_bytes": found.device_bytes, "host_bytes": found.host_bytes}
            for method, found in memory_by_method(made).items()
        },
        "longest_tokens": longest_by_method(made),
        "contexts": list(CONTEXTS),
        "prefill_s": {name: [cell and cell[0].total_s for cell in row] for name, row in seconds.items()},
        "decode_s_per_token": {name: [cell and cell[1].total_s for cell in row] for name, row in seconds.items()},
        "kv_dtypes": kv_forms(made),
        "with_sparse_heads": sparse_forms(made),
        "with_cpu": [one and {"tokens": one.request.context_tokens, **one.cpu_as_dict()} for one in ours],
        "roofline": [dataclasses.asdict(point) | {"intensity": point.intensity} for point in _points(made)],
        "warnings": warnings,
    }
