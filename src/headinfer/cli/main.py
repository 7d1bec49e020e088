"""The command line. Text and JSON go to stdout, everything else to stderr; a user's mistake exits with 2."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import os
import sys
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from headinfer.cli.bench import bench
from headinfer.cli.demo import demo
from headinfer.cli.evals import app as eval_app
from headinfer.cli.plan import plan
from headinfer.cli.session import app as session_app
from headinfer.cli.session import ask, read
from headinfer.errors import HeadinferError, UsageError
from headinfer.hf.ranks import Ranks
from headinfer.utils.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from headinfer.jobs.generate import Prepared, Summary

__all__ = ["app", "main", "parse_bytes"]

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Exact LLM inference over very long contexts on one small GPU: the KV cache lives in host RAM, per head.",
)
app.command()(plan)
app.command()(demo)
app.command()(bench)
app.command()(read)
app.command()(ask)
app.add_typer(session_app, name="session")
app.add_typer(eval_app, name="eval")
_stderr = Console(stderr=True)

MODEL_HELP = "A local folder, a hub name, embedded, or random:NAME?layers=2 (a known shape, seeded random weights)."


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help=MODEL_HELP, show_default=False)],
    file: Annotated[Path | None, typer.Option(help="A UTF-8 text file to read before the prompt.")] = None,
    prompt: Annotated[str, typer.Option(help="The question, after the document.")] = "",
    max_new_tokens: Annotated[int, typer.Option(help="Write at most this many tokens.")] = 256,
    chunk_tokens: Annotated[
        int | None, typer.Option(help="Read the prompt in chunks of this many tokens; planned where not given.")
    ] = None,
    device_kv_budget: Annotated[
        str | None, typer.Option(help="KV bytes on the device at any context length, e.g. 256MiB; else planned.")
    ] = None,
    host_kv_budget: Annotated[
        str | None, typer.Option(help="KV bytes in host RAM, e.g. 32GB; the rest goes to --disk-tier.")
    ] = None,
    disk_tier: Annotated[Path | None, typer.Option(help="A folder on a fast disk for KV beyond the budget.")] = None,
    heads_per_group: Annotated[
        int | None, typer.Option(help="KV heads streamed together; chosen before each pass where not given.")
    ] = None,
    tile_tokens: Annotated[
        int | None, typer.Option(help="Tokens streamed together; chosen before each pass where not given.")
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help="Attention kernels to try first, with commas between; see headinfer info.")
    ] = None,
    transport: Annotated[
        str, typer.Option(help="auto, in_place, eager or lazy. The last two use the ring of a GPU on a CPU, for tests.")
    ] = "auto",
    staging: Annotated[str | None, typer.Option(hidden=True, help="Deprecated: use --transport.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    seed: Annotated[int, typer.Option(help="For sampling and random weights.")] = 0,
    temperature: Annotated[float, typer.Option(help="0 is greedy; above 0 samples.", min=0.0, show_default=True)] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Sample among the k best tokens.", min=1)] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample among the tokens that make up p.", min=0, max=1)] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1 discourages repetition.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Do not use the model's chat template.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the text.")] = False,
) -> None:
    """Read a document, answer a question about it, streaming the text to stdout."""
    from headinfer.engine.options import Options
    from headinfer.hf import parallel
    from headinfer.jobs import generate as generation

    ranks = Ranks.from_environment()
    if staging is not None and ranks.is_first:
        _say("headinfer: warning: --staging is deprecated: use --transport")

    def check() -> Prepared:
        if prompt == "" and file is None:
            raise UsageError("the prompt is empty: give a question with --prompt, a document with --file, or both")
        options = Options(
            device_kv_budget_bytes=parse_bytes(device_kv_budget) if device_kv_budget is not None else None,
            host_kv_budget_bytes=parse_bytes(host_kv_budget) if host_kv_budget is not None else None,
            disk_tier=str(disk_tier) if disk_tier is not None else None,
            heads_per_group=heads_per_group,
            tile_tokens=tile_tokens,
            backend=backend,
            transport=transport,  # type: ignore[arg-type]
            staging=staging,
        )
        sampling: dict[str, Any] = {"top_k": top_k, "top_p": top_p, "repetition_penalty": repetition_penalty}
        sampling = {name: value for name, value in sampling.items() if value is not None}
        if temperature > 0:
            sampling |= {"do_sample": True, "temperature": temperature}
        elif top_k is not None or top_p is not None:
            raise UsageError("--top-k and --top-p choose among samples: give --temperature above 0 as well")
        job = generation.Job(
            model=model,
            document=generation.read_text(file) if file is not None else "",
            prompt=prompt,
            max_new_tokens=max_new_tokens,
            chunk_tokens=chunk_tokens,
            dtype=dtype,
            device=device,
            seed=seed,
            raw=raw,
            sampling=sampling,
            options=options,
        )
        return generation.prepare(job, ranks)

    with parallel.group(ranks):
        prepared = parallel.together(ranks, check)
        if ranks.is_first:
            summary = _show_generation(prepared, as_json=as_json)
        else:
            summary = generation.run(prepared, on_text=lambda _: None)
    if summary.interrupted:
        raise typer.Exit(130)


def _show_generation(prepared: Prepared, *, as_json: bool) -> Summary:
    """Generate with warnings and progress on stderr, the text or a JSON object on stdout."""
    from headinfer.cli import report
    from headinfer.jobs import generate as generation

    for warning in prepared.warnings:
        _stderr.print(f"headinfer: warning: {warning}", style="yellow", highlight=False)
    to_terminal = sys.stdout.isatty() and not as_json
    progress = report.GenerationProgress(
        _stderr,
        prepared.shape,
        prepared.input_ids.shape[1],
        prepared.job.max_new_tokens,
        show_decode=not to_terminal,
    )
    with progress:
        summary = generation.run(
            prepared, on_text=(lambda _: None) if as_json else _write, on_forward=progress.on_forward
        )
    if as_json:
        print(json.dumps(summary.as_dict()))
    else:
        print(flush=True)
        _stderr.print(report.summary_table(summary))
    return summary


@app.command()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Versions, devices, memory, attention backends and model families of this installation."""
    from headinfer.cli.report import columns_table
    from headinfer.info import gather_info

    found = gather_info()
    if as_json:
        print(json.dumps(found))
        return
    console = Console()
    gpus = [f"{gpu['name']} ({format_bytes(gpu['total_bytes'])})" for gpu in found["cuda_devices"]] or ["none"]
    memory = found["memory"]
    rows = [
        *((name, version) for name, version in found["versions"].items()),
        ("CPU", f"{found['cpu']['name']}, {found['cpu']['cores']} cores, {found['cpu']['capability']}"),
        ("CUDA devices", ", ".join(gpus)),
        *(("host memory pinned", _pinning_of(gpu)) for gpu in found["cuda_devices"]),
        ("host memory available", format_bytes(memory["host_available_bytes"])),
        ("native decode kernel", found["native_kernel"]),
        ("model families", ", ".join(found["families"])),
    ]
    console.print(columns_table("headinfer", ("", ""), rows, "left"))
    backends = [tuple(backend.values()) for backend in found["attention_backends"]]
    console.print(
        columns_table("attention backends, in the order tried", ("name", "device", "what", "here"), backends, "left")
    )


def _pinning_of(gpu: dict[str, Any]) -> str:
    near = "" if gpu["numa_node"] is None else f", on NUMA node {gpu['numa_node']} where there is room"
    return f"{gpu['pinned_host_memory']} ({gpu['name']}{near})"


@app.command()
def probe(
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    output: Annotated[
        Path | None, typer.Option(help="Write the measures to this file; else to your cache folder, where plan reads.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure what this machine attains, for headinfer plan and for the plans of runs; wants an idle machine."""
    import torch

    from headinfer.bench.probe import probe as measure
    from headinfer.cli.report import hardware_table
    from headinfer.jobs.generate import checked_device
    from headinfer.plan.hardware import is_probe, probe_path
    from headinfer.utils.files import Output

    chosen = torch.device(checked_device(device))
    written = Output(output or probe_path(), is_ours=is_probe)
    found = measure(chosen, _say)
    try:
        written.write(found.text())
    finally:  # what took half a minute is shown also if it cannot be written
        if as_json:
            print(json.dumps(dataclasses.asdict(found)))
        else:
            Console().print(hardware_table(found))
    _stderr.print(f"written to {written.path}", highlight=False, markup=False)


def _say(line: str) -> None:
    _stderr.print(line, highlight=False, markup=False)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def main() -> None:
    """The entry point: headinfer's own errors become one sentence on stderr and exit code 2; ranks speak once."""
    for library in ("transformers", "huggingface_hub", "torchao", "torch.utils._pytree"):
        logging.getLogger(library).setLevel(logging.ERROR)  # we say ourselves what a person must know
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    where = "" if world == "1" or rank == "0" else f" on rank {rank} of {world}"
    try:
        with ExitStack() as quiet:
            if where:  # the first rank says what all have to say; errors are said below
                quiet.enter_context(redirect_stdout(io.StringIO()))
                quiet.enter_context(redirect_stderr(io.StringIO()))
            app()
    except HeadinferError as error:
        _stderr.print(f"headinfer: error{where}: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        if not where:
            _stderr.print("headinfer: interrupted", highlight=False)
        sys.exit(130)
