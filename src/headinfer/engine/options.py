"""The options of a cache: memory budgets, tiles, kernels, and where KV is stored."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from dataclasses import InitVar, dataclass
from functools import partial
from os import PathLike
from typing import Any, Literal, TypedDict, cast

from headinfer.attention.backends import preferences
from headinfer.errors import UsageError
from headinfer.plan.tiles import TileRates
from headinfer.utils.approximation import approximation
from headinfer.utils.head_pattern import HeadPattern, read_pattern
from headinfer.utils.kv_format import KV_DTYPES, UNIT, KVDtype
from headinfer.utils.stacklevel import stacklevel_of_user
from headinfer.utils.values import (
    byte_count,
    choice,
    optional,
    path_text,
    real_number,
    shown,
    token_count,
    whole_number,
)

__all__ = ["OptionFields", "Options", "current_names", "known_fields", "merged"]

# Names and values of version 0.1.0, which sessions on disk hold and callers may still use.
_RENAMED = {
    "device_kv_budget": "device_kv_budget_bytes",
    "streaming_budget": "streaming_budget_bytes",
    "host_kv_budget": "host_kv_budget_bytes",
    "staging": "transport",
}
_RENAMED_TRANSPORTS = {"none": "in_place", "early": "eager", "late": "lazy"}
_TRANSPORTS = ("auto", "in_place", "eager", "lazy")
# Where KV is stored, and the threads of the CPU, may differ each time that a session is loaded.
_NOT_IN_SESSIONS = ("host_kv_budget_bytes", "disk_tier", "cpu_threads")


class OptionFields(TypedDict, total=False):
    """The fields of Options, as keywords of `headinfer.enable()` and `headinfer.HeadCache()`.

    Bytes and tokens may be texts with a unit.
    """

    device_kv_budget_bytes: int | str | None
    streaming_budget_bytes: int | str | None
    heads_per_group: int | None
    tile_tokens: int | str | None
    backend: str | None
    transport: Literal["auto", "in_place", "eager", "lazy"]
    expected_tokens: int | str
    rates: TileRates | None
    cpu_share: float | None
    cpu_rows: int | None
    cpu_threads: int | None
    host_kv_budget_bytes: int | str | None
    disk_tier: str | PathLike[str] | None
    kv_dtype: KVDtype
    sparse_heads: HeadPattern | str | PathLike[str] | None


def _rates(value: Any, name: str) -> TileRates:
    if isinstance(value, Mapping) and value:  # from JSON
        try:
            value = TileRates(**value)
        except TypeError as error:
            raise UsageError(f"{name} has other fields than TileRates: {error}") from error
    if not isinstance(value, TileRates):
        raise UsageError(f"{name} is {shown(value)}: it must be a TileRates")
    for field in dataclasses.fields(value):
        real_number(getattr(value, field.name), f"{name}.{field.name}", low=1e-12, high=1e30)
    return value


def _backend(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise UsageError(f"{name} is {shown(value)}: it must be names of attention backends, separated by commas")
    preferences(value)  # raises if a name is unknown
    return value


def _sparse_heads(value: Any, name: str) -> HeadPattern:
    if isinstance(value, HeadPattern):
        return value
    if isinstance(value, Mapping):  # from JSON
        return HeadPattern.from_dict(value, name)
    return read_pattern(path_text(value, name))


def _option(convert: Callable[[Any, str], Any], default: Any = None) -> Any:
    """Declare a field of Options. `convert` gets the given value and the name of the field; None stays None."""
    return dataclasses.field(default=default, metadata={"convert": optional(convert) if default is None else convert})


@dataclass(frozen=True)
class Options:
    """The options of a cache. None leaves a choice to the engine.

    Bytes and tokens are whole numbers, or texts with a unit, such as "256MiB" and "4K" (1K tokens are 1,024 tokens).
    The fields hold whole numbers.

    The same options give the same tiles, merges and kernels, and so the same bits on one machine.

    Attributes:
        device_kv_budget_bytes: upper bound of KV bytes on each device, at any context length: resident tokens, ring,
            tails, windows of streaming heads, write-back buffers and the buffers for cpu_share. None takes what is
            free on the device, less a reserve.
        streaming_budget_bytes: the part of the device budget for all of these but resident tokens. The rest keeps the
            first tokens resident. None is 256 MiB.
        heads_per_group: KV heads that are streamed together.
        tile_tokens: tokens that are streamed together.
        backend: attention backends to try first, separated by commas. See `headinfer info`.
        transport: how KV reaches the device. "auto" streams through a ring on CUDA, and reads segments in place on a
            CPU. "in_place" always reads in place. "eager" and "lazy" use the ring on a CPU, for tests
            (kv/streams.py).
        expected_tokens: the final length of the context; 0 if it is unknown. Models whose rotary frequencies depend on
            the length use those of this length from the first token.
        rates: the rates that tiles are chosen for. None takes those of the machine.
        cpu_share: in decode, the share of the streamed tokens that the host's CPU attends to in host memory while the
            link brings the others: 0 to 1. None is the plan's choice, and 0 without a plan. Unless the user gives one,
            it is 1 as soon as the system refuses to pin host memory.
        cpu_rows: the query rows per KV head that cpu_share was planned for; a plan gives it. If a pass has n times as
            many, or n rows of the batch share tokens, the CPU's kernel takes up to n times as long, and the share of
            these tokens becomes s / (s + n (1 - s)). None applies cpu_share to any number of rows.
        cpu_threads: the threads with which the CPU attends to its share. None is the number that `headinfer probe`
            found to be the fastest while the link copies, and torch.get_num_threads() without a probe. The bits of the
            CPU's kernel do not depend on it.
        host_kv_budget_bytes: upper bound of KV bytes in host memory. It needs disk_tier.
        disk_tier: the folder for KV beyond the host budget. It needs host_kv_budget_bytes.
        kv_dtype: how KV is stored in host memory, on disk and in sessions. "auto" is the model's dtype, which is exact.
            "int8" and "int4" are approximate: KV takes about half or a quarter of the bytes, and results differ
            (docs/approximations.md). The newest tokens, and all that stays on the device, are exact in any case.
        sparse_heads: which KV heads see the first and the newest tokens only, as a HeadPattern, or the path of a file
            of `headinfer heads` or DuoAttention. Nothing else of these heads is stored, moved or computed, which is
            approximate (docs/approximations.md). None lets all heads see all tokens, which is exact.

    Raises:
        UsageError: a value is of another type or out of range, or a backend is unknown. The message names the field.
    """

    device_kv_budget_bytes: int | None = _option(byte_count)
    streaming_budget_bytes: int | None = _option(byte_count)
    heads_per_group: int | None = _option(whole_number)
    tile_tokens: int | None = _option(token_count)
    backend: str | None = _option(_backend)
    transport: Literal["auto", "in_place", "eager", "lazy"] = _option(partial(choice, choices=_TRANSPORTS), "auto")
    expected_tokens: int = _option(partial(token_count, low=0), 0)
    rates: TileRates | None = _option(_rates)  # noqa: RUF009  a field, not a TileRates
    cpu_share: float | None = _option(partial(real_number, low=0.0, high=1.0))
    cpu_rows: int | None = _option(whole_number)
    cpu_threads: int | None = _option(whole_number)
    host_kv_budget_bytes: int | None = _option(byte_count)
    disk_tier: str | None = _option(path_text)
    kv_dtype: KVDtype = _option(partial(choice, choices=KV_DTYPES), "auto")  # noqa: RUF009  a field
    sparse_heads: HeadPattern | None = _option(_sparse_heads)  # noqa: RUF009  a field
    # Deprecated names.
    device_kv_budget: InitVar[int | None] = None
    streaming_budget: InitVar[int | None] = None
    host_kv_budget: InitVar[int | None] = None
    staging: InitVar[str | None] = None

    def __post_init__(
        self,
        device_kv_budget: int | None,
        streaming_budget: int | None,
        host_kv_budget: int | None,
        staging: str | None,
    ) -> None:
        old = {
            "device_kv_budget": device_kv_budget,
            "streaming_budget": streaming_budget,
            "host_kv_budget": host_kv_budget,
            "staging": staging,
        }
        given = {name: value for name, value in old.items() if value is not None}
        for field in dataclasses.fields(self):
            old_name = next((name for name in given if _RENAMED[name] == field.name), None)
            if old_name is not None and getattr(self, field.name) != field.default:
                raise UsageError(f"{old_name} is the old name of {field.name}: give one of them")
        for name, value in current_names(given).items():
            object.__setattr__(self, name, value)
        for name in given:
            message = f"{name} is deprecated: use {_RENAMED[name]}"
            warnings.warn(message, DeprecationWarning, stacklevel=stacklevel_of_user())
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, field.metadata["convert"](getattr(self, field.name), field.name))
        budget = self.device_kv_budget_bytes
        if budget is not None and self.streaming_budget_bytes is not None and self.streaming_budget_bytes > budget:
            raise UsageError(
                f"streaming_budget_bytes is {self.streaming_budget_bytes:,}: it is a part of device_kv_budget_bytes, "
                f"which is {budget:,}, so it must be at most that"
            )
        if self.kv_dtype != "auto" and self.tile_tokens is not None and self.tile_tokens % UNIT:
            raise UsageError(
                f"tile_tokens is {self.tile_tokens:,}: with kv_dtype {self.kv_dtype} it must be a multiple of {UNIT}, "
                "since so many tokens have scales in common"
            )
        if (self.host_kv_budget_bytes is None) != (self.disk_tier is None):
            raise UsageError(
                "host_kv_budget_bytes and disk_tier go together: the first is the KV in host memory, the second the "
                "folder for the rest"
            )

    @classmethod
    def from_fields(cls, fields: OptionFields, function: str) -> Options:
        """Make options of the keywords that a function such as `enable()` was given.

        Raises:
            UsageError: there is no option of a name, or a value is wrong.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        unknown = next((name for name in fields if name not in (*names, *_RENAMED)), None)
        if unknown is not None:
            raise UsageError(f"{function} has no option {unknown!r}: its options are {', '.join(names)}")
        return cls(**cast("dict[str, Any]", fields))

    @property
    def is_approximate(self) -> bool:
        """Whether KV is stored approximately, or some heads do not see all tokens."""
        return self.kv_dtype != "auto" or self.sparse_heads is not None

    @property
    def approximation(self) -> str:
        """What is approximate, in one sentence for people; empty if all is exact."""
        return approximation(self.kv_dtype, self.sparse_heads)

    def as_dict(self) -> dict[str, Any]:
        """Return all fields for JSON. A head pattern has the values 0 and 1."""
        pattern = self.sparse_heads.reduced().as_dict() if self.sparse_heads is not None else None
        return {**dataclasses.asdict(self), "sparse_heads": pattern}

    def arithmetic(self) -> dict[str, Any]:
        """Return the fields that a session keeps, for JSON: all but those of _NOT_IN_SESSIONS.

        Without kv_dtype and sparse_heads KV is exact, as it is in sessions of earlier versions.
        """
        fields = {name: value for name, value in self.as_dict().items() if name not in _NOT_IN_SESSIONS}
        if self.kv_dtype == "auto":
            del fields["kv_dtype"]
        if self.sparse_heads is None:
            del fields["sparse_heads"]
        return fields


def known_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of Options among those of a JSON object, under their current names.

    Fields that this version does not have are left out.
    """
    known = {field.name for field in dataclasses.fields(Options)}
    return {name: value for name, value in current_names(fields).items() if name in known}


def merged(kept: Mapping[str, Any], changed: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of Options that a session keeps, with those that a user changes.

    A kept streaming budget becomes smaller if the changed device budget, whose part it is, is smaller.

    Raises:
        UsageError: kv_dtype or sparse_heads would change. What was read approximately does not go on as if it were
            exact.
    """
    names = current_names(changed)
    kept_dtype = kept.get("kv_dtype", "auto")
    if names.get("kv_dtype", kept_dtype) != kept_dtype:
        form = f"in {kept_dtype}, which is approximate" if kept_dtype != "auto" else "exactly, in the model's dtype"
        raise UsageError(
            f"kv_dtype is {shown(names['kv_dtype'])}, and the session holds its KV {form}: leave kv_dtype out, or read "
            "the document again into another session"
        )
    if "sparse_heads" in names:
        given, held = (Options(sparse_heads=each.get("sparse_heads")).sparse_heads for each in (names, kept))
        if (given and given.digest) != (held and held.digest):
            form = f"with the head pattern {held.digest}" if held is not None else "with all heads full"
            raise UsageError(
                f"sparse_heads is {f'the head pattern {given.digest}' if given is not None else 'None'}, and the "
                f"session was read {form}: leave sparse_heads out, or read the document again into another session"
            )
    fields = {name: value for name, value in kept.items() if name not in names}
    budget = names.get("device_kv_budget_bytes")
    if budget is not None and fields.get("streaming_budget_bytes") is not None:
        most = byte_count(budget, "device_kv_budget_bytes")
        fields["streaming_budget_bytes"] = min(fields["streaming_budget_bytes"], most)
    return {**fields, **changed}


def current_names(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON object of an earlier version, such as a session's, with the current names of options."""
    current = {_RENAMED.get(name, name): value for name, value in fields.items()}
    if "transport" in current:
        current["transport"] = _RENAMED_TRANSPORTS.get(current["transport"], current["transport"])
    return current
