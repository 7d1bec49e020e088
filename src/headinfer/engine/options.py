"""The options of a cache: memory budgets, tiles, kernels, and where KV is stored."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import InitVar, dataclass
from typing import Any, Literal, TypedDict

from headinfer.attention.backends import preferences
from headinfer.errors import UsageError
from headinfer.plan.tiles import TileRates
from headinfer.utils.stacklevel import stacklevel_of_user

__all__ = ["OptionFields", "Options", "current_names", "known_fields"]

# Names and values of version 0.1.0, which sessions on disk hold and callers may still use.
_RENAMED = {
    "device_kv_budget": "device_kv_budget_bytes",
    "streaming_budget": "streaming_budget_bytes",
    "host_kv_budget": "host_kv_budget_bytes",
    "staging": "transport",
}
_RENAMED_TRANSPORTS = {"none": "in_place", "early": "eager", "late": "lazy"}
_TRANSPORTS = ("auto", "in_place", "eager", "lazy")
# Where KV is stored may differ each time that a session is loaded.
_NOT_IN_SESSIONS = ("host_kv_budget_bytes", "disk_tier")


class OptionFields(TypedDict, total=False):
    """The fields of Options, as keywords of `headinfer.enable()` and `headinfer.HeadCache()`."""

    device_kv_budget_bytes: int | None
    streaming_budget_bytes: int | None
    heads_per_group: int | None
    tile_tokens: int | None
    backend: str | None
    transport: Literal["auto", "in_place", "eager", "lazy"]
    expected_tokens: int
    rates: TileRates | None
    host_kv_budget_bytes: int | None
    disk_tier: str | None


@dataclass(frozen=True)
class Options:
    """The options of a cache. None leaves a choice to the engine.

    The same options give the same tiles, merges and kernels, and so the same bits on one machine.

    Attributes:
        device_kv_budget_bytes: upper bound of KV bytes on each device, at any context length: resident tokens, ring,
            tails and write-back buffers. None takes what is free on the device, less a reserve.
        streaming_budget_bytes: the part of the device budget for ring, tails and write-back buffers. The rest keeps
            the first tokens resident. None is 256 MiB.
        heads_per_group: KV heads that are streamed together.
        tile_tokens: tokens that are streamed together.
        backend: attention backends to try first, separated by commas. See `headinfer info`.
        transport: how KV reaches the device. "auto" streams through a ring on CUDA, and reads segments in place on a
            CPU. "in_place" always reads in place. "eager" and "lazy" use the ring on a CPU, for tests
            (kv/streams.py).
        expected_tokens: the final length of the context; 0 if it is unknown.
        rates: the rates that tiles are chosen for. None takes those of the machine.
        host_kv_budget_bytes: upper bound of KV bytes in host memory. It needs disk_tier.
        disk_tier: the folder for KV beyond the host budget. It needs host_kv_budget_bytes.

    Raises:
        UsageError: a value is out of range, or a backend is unknown.
    """

    device_kv_budget_bytes: int | None = None
    streaming_budget_bytes: int | None = None
    heads_per_group: int | None = None
    tile_tokens: int | None = None
    backend: str | None = None
    transport: Literal["auto", "in_place", "eager", "lazy"] = "auto"
    expected_tokens: int = 0
    rates: TileRates | None = None
    host_kv_budget_bytes: int | None = None
    disk_tier: str | None = None
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
        for name, value in current_names(given).items():
            object.__setattr__(self, name, value)
        for name in given:
            message = f"{name} is deprecated: use {_RENAMED[name]}"
            warnings.warn(message, DeprecationWarning, stacklevel=stacklevel_of_user())
        if isinstance(self.rates, dict):  # from JSON
            object.__setattr__(self, "rates", TileRates(**self.rates))
        self._check()

    def _check(self) -> None:
        budgets = ("device_kv_budget_bytes", "streaming_budget_bytes", "host_kv_budget_bytes")
        for name in (*budgets, "heads_per_group", "tile_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}: it must be a positive number")
        if self.expected_tokens < 0:
            raise UsageError(f"expected_tokens is {self.expected_tokens}: it must not be negative")
        if (self.host_kv_budget_bytes is None) != (self.disk_tier is None):
            raise UsageError(
                "host_kv_budget_bytes and disk_tier go together: the first is the KV in host memory, the second the "
                "folder for the rest"
            )
        preferences(self.backend)  # raises if a name is unknown
        if self.transport not in _TRANSPORTS:
            raise UsageError(f"transport is {self.transport!r}: it must be one of {', '.join(_TRANSPORTS)}")

    def arithmetic(self) -> dict[str, Any]:
        """Return the fields that a session keeps, for JSON: all but those that say where KV is stored."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in _NOT_IN_SESSIONS}


def known_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of Options among those of a JSON object, under their current names.

    Fields that this version does not have are left out.
    """
    known = {field.name for field in dataclasses.fields(Options)}
    return {name: value for name, value in current_names(fields).items() if name in known}


def current_names(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON object of an earlier version, such as a session's, with the current names of options."""
    current = {_RENAMED.get(name, name): value for name, value in fields.items()}
    if "transport" in current:
        current["transport"] = _RENAMED_TRANSPORTS.get(current["transport"], current["transport"])
    return current
