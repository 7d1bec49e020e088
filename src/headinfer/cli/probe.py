"""The command `headinfer probe`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from headinfer.cli.console import say, show
from headinfer.cli.options import Device, Json

__all__ = ["probe"]


def probe(
    device: Device = "auto",
    output: Annotated[
        Path | None,
        typer.Option(
            help="JSON file to write the measurements to.", show_default="a file in your cache folder, which plans read"
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure the speed of this machine, for `headinfer plan` and for the plans of runs.

    The machine should be idle. The measurement takes less than a minute.
    """
    from headinfer.bench.probe import probe as measure
    from headinfer.cli.report import hardware_table
    from headinfer.engine.machine import chosen_device
    from headinfer.plan.hardware import is_probe, probe_path
    from headinfer.utils.files import Output

    chosen = chosen_device(device)
    written = Output(output or probe_path(), is_ours=is_probe)
    found = measure(chosen, say)
    try:
        written.write(found.text())
    finally:  # the measurements are shown even if they cannot be written
        if as_json:
            print(json.dumps(dataclasses.asdict(found)))
        else:
            show(hardware_table(found))
    say(f"written to {written.path}")
