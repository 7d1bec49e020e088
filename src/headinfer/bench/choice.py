"""Which suites and which sizes the options of `headinfer bench --device cuda` ask for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from headinfer.bench.gpu_real import context_limit
from headinfer.bench.run import GPU_SUITES, check_suites
from headinfer.bench.sizes import BASELINES, GpuSizes
from headinfer.errors import UsageError
from headinfer.hf.models import resolve
from headinfer.kv.layer_kv import TAIL_UNIT_TOKENS
from headinfer.utils.units import format_tokens
from headinfer.utils.values import token_count

__all__ = ["SUITES_OF", "choose", "parse_lengths"]

# The suites that an option is for. If no suite is named, the first ones of each option run.
SUITES_OF: Mapping[str, tuple[str, ...]] = {
    "--tokens": ("decode",),
    "--offsets": ("prefill",),
    "--whole": ("prefill", "real"),
    "--baselines": ("decode", "prefill"),
    "--model": ("real",),
}
_LEAST_PAST = 3 * TAIL_UNIT_TOKENS  # so that KV is in host memory and in the tail
_NONE = "none"


def choose(suites: Sequence[str], sizes: GpuSizes, **given: str | None) -> tuple[list[str], GpuSizes]:
    """Return the suites that run, and their sizes.

    Args:
        suites: the suites that the user named.
        sizes: the sizes without options.
        **given: texts of the options by their names in SUITES_OF without dashes; None for those that are not given.

    Raises:
        UsageError: a suite or a baseline is unknown, a length is out of range, or an option is for other suites.
    """
    check_suites(suites, is_gpu=True)
    options = {f"--{name}": text for name, text in given.items() if text is not None}
    for option in options:
        wanted = SUITES_OF[option]
        if suites and not set(wanted) & set(suites):
            raise UsageError(
                f"{option} is for the {' and '.join(wanted)} suite{'s' if len(wanted) > 1 else ''}, and you named "
                f"{', '.join(suites)}: name such a suite too, or leave {option} out"
            )
    names = list(suites) or _suites_of(options)
    limit = _context(sizes.model)
    changes: dict[str, Any] = {}
    if "--tokens" in options:
        changes["decode_tokens"] = _pasts(options["--tokens"], "--tokens", limit)
    if "--offsets" in options:
        changes["chunk_offsets"] = _pasts(options["--offsets"], "--offsets", limit)
        changes["whole_tokens"] = ()
    if "--baselines" in options:
        changes["baselines"] = _baselines(options["--baselines"])
    if "--model" in options:
        resolve(options["--model"])
        changes["real_model"] = options["--model"]
    if "--whole" in options:
        lengths = parse_lengths(options["--whole"], "--whole")
        if "real" in names:
            model = changes.get("real_model", sizes.real_model)
            _check_most(lengths, "--whole", _context(model) - sizes.real_new_tokens, model)
            changes["real_tokens"] = lengths
        if "prefill" in names or not names:
            _check_most(lengths, "--whole", limit, "the model of this suite")
            changes["whole_tokens"] = lengths
            changes.setdefault("chunk_offsets", ())
    return names, dataclasses.replace(sizes, **changes)


def _suites_of(options: Mapping[str, str]) -> list[str]:
    """Return the suites of options that were given without suites; empty if there are none."""
    chosen = {SUITES_OF[option][0] for option in options if option != "--baselines"}
    if not chosen and options:
        chosen = set(SUITES_OF["--baselines"])
    return [name for name in GPU_SUITES if name in chosen]


def parse_lengths(text: str, option: str) -> tuple[int, ...]:
    """Parse a list of lengths such as "1K,1M,4M". A length that is repeated counts once.

    Raises:
        UsageError: a part is not a number of tokens, or is out of range.
    """
    return tuple(dict.fromkeys(token_count(part.strip(), option) for part in text.split(",")))


def _pasts(text: str, option: str, limit: int) -> tuple[int, ...]:
    """Parse contexts that are filled with noise, whose last tokens are a whole tail."""
    lengths = parse_lengths(text, option)
    _check_most(lengths, option, limit, "the model of this suite")
    for tokens in lengths:
        if tokens % TAIL_UNIT_TOKENS or tokens < _LEAST_PAST:
            raise UsageError(
                f"{option} has a context of {tokens:,} tokens: it must be a multiple of {TAIL_UNIT_TOKENS}, of at "
                f"least {_LEAST_PAST}, such as 1K or 1M"
            )
    return lengths


def _check_most(lengths: Sequence[int], option: str, limit: int, model: str) -> None:
    """Check that no length exceeds the context of a model."""
    if max(lengths) > limit:
        raise UsageError(
            f"{option} has {max(lengths):,} tokens, and {model} takes at most {limit:,} ({format_tokens(limit)}): "
            "choose a shorter length"
        )


def _baselines(text: str) -> tuple[str, ...]:
    """Parse names of baselines."""
    names = [part.strip() for part in text.split(",")]
    if names == [_NONE]:
        return ()
    for name in names:
        if name not in BASELINES:
            raise UsageError(
                f"there is no baseline {name[:40]!r}: choose among {', '.join(BASELINES)}, or {_NONE} alone"
            )
    return tuple(dict.fromkeys(names))


def _context(model: str) -> int:
    """Return the most tokens that a model is made for."""
    return context_limit(resolve(model).config)
