"""Options and arguments that several commands share, as types for the commands' parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from headinfer.utils.units import parse_bytes

__all__ = [
    "DEVICE_KV_BUDGET_HELP",
    "MEMORY_PANEL",
    "SAMPLING_PANEL",
    "Device",
    "DeviceKVBudget",
    "DiskTier",
    "Dtype",
    "HostKVBudget",
    "Json",
    "MaxNewTokens",
    "Model",
    "Raw",
    "SessionArgument",
    "SessionOption",
    "SessionsFolder",
    "Temperature",
    "bytes_or_none",
    "kv_options",
]

MEMORY_PANEL = "Memory and streaming"
SAMPLING_PANEL = "Sampling"

DEVICE_KV_BUDGET_HELP = "Most KV bytes on the device, at any context length, e.g. 256MiB."

Model = Annotated[
    str,
    typer.Argument(
        help="A local folder, a Hugging Face hub name, embedded (the model that ships with headinfer), or "
        "random:NAME?layers=2 (a built-in config with random weights).",
        show_default=False,
    ),
]
Device = Annotated[str, typer.Option(help="Device: cpu, cuda, cuda:N or auto (CUDA if available).")]
Dtype = Annotated[
    str,
    typer.Option(help="Type of weights and KV: float32, bfloat16, float16 or auto (the checkpoint's)."),
]
Raw = Annotated[bool, typer.Option("--raw", help="Do not use the model's chat template.")]
MaxNewTokens = Annotated[int, typer.Option(help="Generate at most this many tokens.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]

DeviceKVBudget = Annotated[
    str | None,
    typer.Option(help=DEVICE_KV_BUDGET_HELP, show_default="planned", rich_help_panel=MEMORY_PANEL),
]
HostKVBudget = Annotated[
    str | None,
    typer.Option(
        help="Most KV bytes in host RAM, e.g. 32GB. The rest goes to --disk-tier.",
        show_default="no limit",
        rich_help_panel=MEMORY_PANEL,
    ),
]
DiskTier = Annotated[
    Path | None,
    typer.Option(help="Folder on a fast disk for KV beyond --host-kv-budget.", rich_help_panel=MEMORY_PANEL),
]

Temperature = Annotated[
    float,
    typer.Option(help="0 decodes greedily. A value above 0 samples.", min=0.0, rich_help_panel=SAMPLING_PANEL),
]

SessionOption = Annotated[str, typer.Option("--session", help="Name of the session.")]
SessionArgument = Annotated[str, typer.Argument(help="Name of the session.")]
SessionsFolder = Annotated[
    Path | None,
    typer.Option(
        "--sessions",
        help="Folder of all sessions.",
        show_default="$HEADINFER_SESSIONS, or your data folder",
    ),
]


def bytes_or_none(size: str | None) -> int | None:
    """Return the bytes of a size such as 256MiB; None if the option is not given. Raise UsageError otherwise."""
    return parse_bytes(size) if size is not None else None


def kv_options(device_kv_budget: str | None, host_kv_budget: str | None, disk_tier: Path | None) -> dict[str, Any]:
    """Return the fields of Options that set where KV is stored, from the options of a command.

    Raises:
        UsageError: a budget is not a size.
    """
    return {
        "device_kv_budget_bytes": bytes_or_none(device_kv_budget),
        "host_kv_budget_bytes": bytes_or_none(host_kv_budget),
        "disk_tier": str(disk_tier) if disk_tier is not None else None,
    }
