"""`headinfer plan`: whether a job fits, what it costs and why. Imports neither torch nor transformers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from headinfer.errors import UsageError
from headinfer.plan.compare import OURS, longest_by_method, memory_by_method, seconds_by_method
from headinfer.plan.footprint import Footprint
from headinfer.plan.hardware import HARDWARE, Hardware, find_hardware, probe_path
from headinfer.plan.memory import available_host_bytes
from headinfer.plan.models import BUILT_IN_CONFIGS, find_shape
from headinfer.plan.planner import Plan, make_plan
from headinfer.plan.request import Request
from headinfer.plan.roofline import OperatingPoint, Seconds, operating_points
from headinfer.utils.units import format_bytes, format_seconds, format_tokens, parse_bytes, parse_tokens

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
    context: Annotated[str, typer.Option(help="Tokens to read, e.g. 128K or 1M (K is 1,024).")] = "128K",
    gpu: Annotated[
        str | None,
        typer.Option(help=f"The device: {', '.join(HARDWARE)}, or a JSON file; this machine's where it was probed."),
    ] = None,
    ram: Annotated[
        str | None, typer.Option(help="Host RAM for the job, e.g. 128GB; what is free here if left out.")
    ] = None,
    disk: Annotated[str | None, typer.Option(help="Disk for KV that RAM cannot hold, e.g. 1TB.")] = None,
    device_memory: Annotated[str | None, typer.Option(help="Use no more of the device than this, e.g. 12GiB.")] = None,
    device_kv_budget: Annotated[
        str | None, typer.Option(help="KV bytes on the device, at most, resident KV included.")
    ] = None,
    chunk_tokens: Annotated[int | None, typer.Option(help="Fix the tokens of a chunk.")] = None,
    heads_per_group: Annotated[int | None, typer.Option(help="Fix the KV heads streamed together.")] = None,
    tile_tokens: Annotated[int | None, typer.Option(help="Fix the tokens streamed together.")] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens to write, when weighing decode against prefill.")] = 256,
    rows: Annotated[int, typer.Option(help="Rows of the batch.")] = 1,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "auto",
    resident: Annotated[
        bool, typer.Option("--resident/--no-resident", help="Keep on the device as well what KV it has room for.")
    ] = True,
    weight_bits: Annotated[int | None, typer.Option(help="Bits of a weight, where it is quantised, e.g. 4.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw memory, seconds and roofline into this .png, .svg or .pdf file.")
    ] = None,
    paper: Annotated[bool, typer.Option("--paper", hidden=True)] = False,
) -> None:
    """Whether a job fits a GPU and its host, how long it takes, what bounds it; nothing is loaded."""
    if paper:
        raise UsageError(
            "--paper is not an option any more: in a checkout of headinfer, python benchmarks/paper/compare.py prints "
            "the comparison with the paper"
        )
    if not model:
        raise UsageError(f"name a model: a folder, a config.json, or one of {', '.join(BUILT_IN_CONFIGS)}")
    hardware = _hardware(gpu)
    request = Request(
        shape=find_shape(model),
        hardware=hardware,
        context_tokens=parse_tokens(context),
        host_bytes=parse_bytes(ram) if ram is not None else available_host_bytes(),
        device_bytes=parse_bytes(device_memory) if device_memory is not None else None,
        disk_bytes=parse_bytes(disk) if disk is not None else 0,
        new_tokens=new_tokens,
        rows=rows,
        dtype=_dtype(dtype, hardware),
        weight_bits=weight_bits,
        chunk_tokens=chunk_tokens,
        heads_per_group=heads_per_group,
        tile_tokens=tile_tokens,
        device_kv_budget_bytes=parse_bytes(device_kv_budget) if device_kv_budget is not None else None,
        keeps_resident=resident,
    )
    made = make_plan(request)
    warnings = _warnings(request)
    stderr = Console(stderr=True)
    for warning in warnings:
        stderr.print(f"headinfer: warning: {warning}", style="yellow", highlight=False, soft_wrap=True)
    if plot is not None:
        from headinfer.cli.plan_plots import draw

        draw(made, model, plot, _points(made))
    if as_json:
        print(json.dumps(_as_dict(model, made, warnings)))
        return
    console = Console()
    for table in _tables(model, made):
        console.print(table)
    for line in made.explain():
        console.print(line, highlight=False, markup=False)
    if plot is not None:
        stderr.print(f"drawn into {plot}", highlight=False, markup=False)


def _hardware(name: str | None) -> Hardware:
    if name is not None:
        return find_hardware(name)
    if probe_path().is_file():
        return Hardware.load(probe_path())
    raise UsageError(
        f"name a device with --gpu, one of {', '.join(HARDWARE)}; or measure this machine once with headinfer probe"
    )


def _dtype(name: str, hardware: Hardware) -> str:
    if name == "auto":
        return "bfloat16" if "bfloat16" in hardware.flops_per_s else next(iter(hardware.flops_per_s))
    return name


def _warnings(request: Request) -> list[str]:
    most, asked = request.shape.max_context_tokens, request.context_tokens
    if not most or asked <= most:
        return []
    return [
        f"{asked:,} tokens exceed the {most:,} that this model was made for: it runs as planned, but answers will be "
        "poor unless its position encoding is extended (rope scaling) and it was trained for that"
    ]


def _points(made: Plan) -> list[OperatingPoint]:
    hardware, layer = made.request.hardware, max(made.request.layers, key=lambda x: x.kv_bytes_per_token(1))
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
    table.show_header, table.pad_edge, table.collapse_padding = any(header), False, True
    for index, name in enumerate(header):
        style = "bold" if name == OURS else None
        table.add_column(name, justify="right" if index else "left", style=style, no_wrap=not index)
    for row in rows:
        table.add_row(*row)
    return table


def _tables(model: str, made: Plan) -> list[Table]:
    """Memory, seconds and roofline; methods are columns, so that the tables fit a terminal of 80."""
    hardware = made.request.hardware
    memory, longest = memory_by_method(made), longest_by_method(made)
    seconds = seconds_by_method(made, CONTEXTS)
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
    return [*tables, _roofline(made), _choices(made)]


def _roofline(made: Plan) -> Table:
    points = _points(made)
    rows = [
        (
            f"{on_device.phase} {format_tokens(on_device.tokens)}",
            _si(on_device.flops),
            *_under_roof(on_device),
            *(() if made.request.hardware.is_host else _under_roof(over_link)),
        )
        for on_device, over_link in zip(points[::2], points[1::2], strict=True)
    ]
    far_header = () if made.request.hardware.is_host else ("FLOP/ link byte", "FLOP/s", "bound")
    header = ("", "FLOP", "FLOP/ byte", "FLOP/s", "bound", *far_header)
    return _table("roofline: attention of one layer, from device memory and over the link", header, rows)


def _under_roof(point: OperatingPoint) -> tuple[str, str, str]:
    return f"{point.intensity:,.0f}", _si(point.flops_per_s), point.bound.removeprefix("device ")


def _si(value: float) -> str:
    """Three digits and a letter: 17.2G, 1.72T."""
    for letter in ("", "K", "M", "G", "T"):
        if value < 1000:
            return f"{value:.3g}{letter}"
        value /= 1000
    return f"{value:,.3g}P"


def _choices(made: Plan) -> Table:
    streams, resident = not made.request.hardware.is_host, f"{made.resident_text} of {made.request.context_tokens:,}"
    tiles = (("prefill", made.prefill), ("decode", made.decode))
    rows = [
        ("chunk", f"{made.chunk_tokens:,} tokens"),
        *((f"tile in {name}, KV heads x tokens", f"{x.heads_per_group} x {x.tile_tokens:,}") for name, x in tiles),
        *((("tokens resident on the device", resident),) if streams else ()),
        ("device KV budget", format_bytes(made.device_kv_budget_bytes)),
        ("prefill", f"{format_seconds(made.prefill_cost.total_s)}, bound by {made.prefill_cost.bound}"),
        ("decode, a token", f"{format_seconds(made.decode_cost.total_s)}, bound by {made.decode_cost.bound}"),
    ]
    return _table("plan", ("", ""), rows)


def _verdict(found: Footprint, request: Request) -> str:
    if request.hardware.is_host:
        return "yes" if found.device_bytes + found.host_bytes <= request.host_bytes else "no: RAM"
    if found.device_bytes > request.room_bytes:
        return "no: GPU"
    return "yes" if found.host_bytes <= request.host_bytes else "no: RAM"


def _cells(row: Sequence[tuple[Seconds, Seconds] | None], phase: int) -> list[str]:
    return ["-" if cell is None else format_seconds(cell[phase].total_s) for cell in row]


def _as_dict(model: str, made: Plan, warnings: list[str]) -> dict[str, Any]:
    seconds = seconds_by_method(made, CONTEXTS)
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
        "roofline": [dataclasses.asdict(point) | {"intensity": point.intensity} for point in _points(made)],
        "warnings": warnings,
    }
