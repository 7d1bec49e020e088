"""Options and arguments that several commands share, as types for the commands' parameters.

Every number of the command line is converted and its range checked by a function of utils/values.py, which number() and
its like attach to an option.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from headinfer.errors import CapacityError, UsageError
from headinfer.plan import guesses
from headinfer.plan.memory import address_space_limit
from headinfer.utils.head_pattern import read_pattern
from headinfer.utils.units import format_bytes
from headinfer.utils.values import byte_count, check_text, real_number, shown, token_count, whole_number

__all__ = [
    "CPU_SHARE_HELP",
    "DEVICE_KV_BUDGET_HELP",
    "KV_DTYPE_HELP",
    "MEMORY_PANEL",
    "SAMPLING_PANEL",
    "SPARSE_HEADS_HELP",
    "ChunkTokens",
    "Command",
    "CpuShare",
    "Device",
    "DeviceKVBudget",
    "DiskTier",
    "Dtype",
    "HostKVBudget",
    "Json",
    "KVDtypeOption",
    "LightCommand",
    "MaxNewTokens",
    "Model",
    "QuestionsFile",
    "Raw",
    "SessionArgument",
    "SessionOption",
    "SessionsFolder",
    "SparseHeads",
    "SparseShare",
    "approximate_options",
    "cpu_share",
    "kv_options",
    "number",
    "real",
    "seed",
    "session_options",
    "size",
    "text_argument",
    "text_option",
    "tokens",
]

_LIBRARIES_BYTES = 2 * 2**30  # of address space; measured: 1.6 GiB for torch without CUDA
# The options that become fields of headinfer.Options or of a job, whose errors have Python's names.
_CACHE_OPTIONS = (
    "backend",
    "cpu_share",
    "device_kv_budget",
    "disk_tier",
    "dtype",
    "heads_per_group",
    "host_kv_budget",
    "kv_dtype",
    "sparse_heads",
    "tile_tokens",
    "transport",
)
MEMORY_PANEL = "Memory and streaming"
SAMPLING_PANEL = "Sampling"

DEVICE_KV_BUDGET_HELP = "Most KV bytes on the device, at any context length, e.g. 256MiB."


class Command(TyperCommand):
    """A command that checks its environment, and that each option is given once.

    Otherwise all but the last value of an option would be dropped. Errors name options as on the command line.
    """

    needs_bytes = _LIBRARIES_BYTES

    def invoke(self, ctx: Any) -> Any:
        """Run the command.

        Raises:
            CapacityError: the process may not have enough memory for the libraries, which would crash or hang.
        """
        limit_bytes = address_space_limit()
        if limit_bytes is not None and limit_bytes < self.needs_bytes:
            raise CapacityError(
                f"the limit of this process's memory (ulimit -v) is {format_bytes(limit_bytes)}, and torch and "
                f"transformers alone need {format_bytes(self.needs_bytes)}: raise it"
            )
        try:
            return super().invoke(ctx)
        except (UsageError, CapacityError) as error:
            error.args = (self._with_options(str(error)),)
            raise

    def _with_options(self, message: str) -> str:
        """Replace names of headinfer.Options in a message by those of this command's options.

        A name that is a usual word, such as transport, is replaced only if it is the subject of the sentence.
        """
        for parameter in self.params:
            name = str(parameter.name)
            if parameter.param_type_name != "option" or name not in _CACHE_OPTIONS:
                continue
            pattern = rf"(?<![\w/.'-]){name}(_bytes)?(?![\w/.'-])" if "_" in name else f"^{name}(?= is )"
            message = re.sub(pattern, parameter.opts[0], message)
        return message

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse a command line.

        Raises:
            UsageError: an option is repeated.
        """
        _, _, given = self.make_parser(ctx).parse_args(args=list(args))
        for parameter in given:
            if parameter.param_type_name == "option" and not parameter.multiple and given.count(parameter) > 1:
                raise UsageError(f"{parameter.opts[0]} is given {given.count(parameter)} times: give it once")
        return super().parse_args(ctx, args)


class LightCommand(Command):
    """A command that does not load transformers."""

    needs_bytes = 0


def _converted(convert: Callable[[Any, str], Any], name: str) -> dict[str, Any]:
    """Return the arguments of a typer parameter that is converted by a function of utils/values.py.

    The function is a callback, since typer would catch its UsageError, which is a ValueError, in a parser.
    """

    def callback(value: Any) -> Any:
        if value is None:
            return None
        return [convert(one, name) for one in value] if isinstance(value, list) else convert(value, name)

    return {"parser": _unchanged, "callback": callback}


def _unchanged(value: Any) -> Any:
    return value


def number(name: str, help: str, *, low: int = 1, high: int = 2**31 - 1, **more: Any) -> Any:
    """Return a typer option for a whole number in a range."""
    convert = partial(whole_number, low=low, high=high)
    return typer.Option(name, help=help, metavar="NUMBER", **_converted(convert, name), **more)


def real(name: str, help: str, *, low: float, high: float, allows_zero: bool = False, **more: Any) -> Any:
    """Return a typer option for a number in a range."""
    convert = partial(real_number, low=low, high=high, allows_zero=allows_zero)
    return typer.Option(name, help=help, metavar="NUMBER", **_converted(convert, name), **more)


def tokens(name: str, help: str, **more: Any) -> Any:
    """Return a typer option for a number of tokens, such as 300 or 4K."""
    return typer.Option(name, help=help, metavar="TOKENS", **_converted(token_count, name), **more)


def size(name: str, help: str, **more: Any) -> Any:
    """Return a typer option for a number of bytes, such as 256MiB."""
    return typer.Option(name, help=help, metavar="SIZE", **_converted(byte_count, name), **more)


def cpu_share(help: str, **more: Any) -> Any:
    """Return the typer option --cpu-share. auto becomes None."""
    return typer.Option("--cpu-share", help=help, metavar="SHARE", **_converted(_share, "--cpu-share"), **more)


def _share(value: Any, name: str) -> float | None:
    """Return a share, or None for auto."""
    if value == "auto":
        return None
    try:
        return real_number(value, name, low=0.0, high=1.0)
    except UsageError as error:
        raise UsageError(f"{name} is {shown(value)}: it must be auto or a number from 0 to 1") from error


def seed(help: str) -> Any:
    """Return the typer option --seed."""
    return number("--seed", help, low=0, high=2**63 - 1)


def guesses_option(help: str, **more: Any) -> Any:
    """Return the typer option --guesses."""
    converted = _converted(guesses.guesses_option, "--guesses")
    return typer.Option("--guesses", help=help, metavar="GUESSES", **converted, **more)


def text_option(name: str, help: str, **more: Any) -> Any:
    """Return a typer option for a text that the model reads."""
    return typer.Option(name, help=help, metavar="TEXT", **_converted(check_text, name), **more)


def text_argument(name: str, help: str, **more: Any) -> Any:
    """Return a typer argument for texts that the model reads."""
    return typer.Argument(help=help, metavar=name.upper(), **_converted(check_text, name), **more)


Model = Annotated[
    str,
    typer.Argument(
        help="A local folder, a Hugging Face hub name, embedded (the model that ships with headinfer), or "
        "random:NAME?layers=2 (a built-in config with random weights, drawn on --device: with the same seed, a CPU and "
        "a GPU draw different ones).",
        show_default=False,
    ),
]
QuestionsFile = Annotated[
    Path | None,
    typer.Option(
        "--questions",
        help="A file with a question in each line, or, in JSON Lines, an object with the field question in each line, "
        "whose other fields --json repeats; - reads standard input.",
        show_default=False,
    ),
]
Device = Annotated[str, typer.Option(help="Device: cpu, cuda, cuda:N or auto (CUDA if available).")]
Dtype = Annotated[
    str,
    typer.Option(help="Type of weights and KV: float32, bfloat16, float16 or auto (the checkpoint's)."),
]
Raw = Annotated[bool, typer.Option("--raw", help="Do not use the model's chat template.")]
MaxNewTokens = Annotated[int, tokens("--max-new-tokens", "Generate at most this many tokens.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]

ChunkTokens = Annotated[
    int | None,
    tokens(
        "--chunk-tokens",
        "Prefill in chunks of this many tokens.",
        show_default="planned",
        rich_help_panel=MEMORY_PANEL,
    ),
]
DeviceKVBudget = Annotated[
    int | None,
    size("--device-kv-budget", DEVICE_KV_BUDGET_HELP, show_default="planned", rich_help_panel=MEMORY_PANEL),
]
HostKVBudget = Annotated[
    int | None,
    size(
        "--host-kv-budget",
        "Most KV bytes in host RAM, e.g. 32GB. The rest goes to --disk-tier.",
        show_default="no limit",
        rich_help_panel=MEMORY_PANEL,
    ),
]
DiskTier = Annotated[
    Path | None,
    typer.Option(help="Folder on a fast disk for KV beyond --host-kv-budget.", rich_help_panel=MEMORY_PANEL),
]

CPU_SHARE_HELP = "In decode, the share of the KV in host RAM that the CPU attends to while the link brings the rest."
CpuShare = Annotated[
    float | None,
    cpu_share(CPU_SHARE_HELP, show_default="auto: what headinfer probe has measured", rich_help_panel=MEMORY_PANEL),
]

KV_DTYPE_HELP = "Store KV in int8 or int4, which is approximate (docs/approximations.md); auto is the model's dtype."
KVDtypeOption = Annotated[
    str | None,
    typer.Option("--kv-dtype", help=KV_DTYPE_HELP, show_default="auto", rich_help_panel=MEMORY_PANEL),
]

SPARSE_HEADS_HELP = (
    "File of `headinfer heads`, or of DuoAttention: which KV heads see only the first and the newest tokens. "
    "This is approximate (docs/approximations.md)."
)
SparseHeads = Annotated[
    Path | None,
    typer.Option(
        "--sparse-heads",
        help=SPARSE_HEADS_HELP,
        metavar="FILE",
        show_default="all heads see all tokens",
        rich_help_panel=MEMORY_PANEL,
    ),
]
SparseShare = Annotated[
    float | None,
    real(
        "--sparse-share",
        "Share of the KV heads that --sparse-heads applies to, those that need the whole context least.",
        low=0.0,
        high=1.0,
        allows_zero=True,
        show_default="by the threshold of the file",
        rich_help_panel=MEMORY_PANEL,
    ),
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


def kv_options(
    device_kv_budget: int | None,
    host_kv_budget: int | None,
    disk_tier: Path | None,
    cpu_share: float | None = None,
    kv_dtype: str | None = None,
    sparse_heads: Path | None = None,
    sparse_share: float | None = None,
) -> dict[str, Any]:
    """Return the fields of Options that set where KV is stored and who attends to it, from the options of a command.

    Raises:
        UsageError: as for approximate_options().
    """
    return approximate_options(kv_dtype, sparse_heads, sparse_share) | {
        "cpu_share": cpu_share,
        "device_kv_budget_bytes": device_kv_budget,
        "host_kv_budget_bytes": host_kv_budget,
        "disk_tier": disk_tier,
    }


def approximate_options(
    kv_dtype: str | None, sparse_heads: Path | None = None, sparse_share: float | None = None
) -> dict[str, Any]:
    """Return the fields of Options that make KV approximate, from the options of a command: those that are given.

    Raises:
        UsageError: the file is not a head pattern, the share leaves no full head, or there is a share without a file.
    """
    given: dict[str, Any] = {} if kv_dtype is None else {"kv_dtype": kv_dtype}
    if sparse_heads is not None:
        given["sparse_heads"] = read_pattern(sparse_heads, sparse_share)
    elif sparse_share is not None:
        raise UsageError(
            f"--sparse-share is {sparse_share:g}, and --sparse-heads is not given: name the file of `headinfer heads` "
            "or of DuoAttention with which the share is chosen"
        )
    return given


def session_options(given: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of kv_options() that replace those of a session. Where KV is stored is not in the session."""
    chosen = dict(given)
    if chosen["device_kv_budget_bytes"] is None:
        del chosen["device_kv_budget_bytes"]  # the session's own budget applies
    if chosen["cpu_share"] is None:
        del chosen["cpu_share"]
    else:
        chosen["cpu_rows"] = None  # the session's share was planned for them, this one was not
    return chosen
