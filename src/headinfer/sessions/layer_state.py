"""The state of cache layers that are not offloaded, as tensors for a file and plain values for a manifest."""

from __future__ import annotations

from typing import Any

import torch

from headinfer.errors import UnsupportedError

__all__ = ["from_plain", "to_plain"]

_ATOMS = (bool, int, float, str, type(None))


def to_plain(fields: dict[str, Any], prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The fields of a layer for JSON; their tensors go into `tensors` under names that begin with the prefix.

    Raises UnsupportedError for a field of another kind.
    """
    return {name: _to_plain(value, f"{prefix}.{name}", tensors) for name, value in fields.items()}


def from_plain(plain: dict[str, Any], tensors: dict[str, torch.Tensor], device: torch.device) -> dict[str, Any]:
    """The fields that to_plain() was given, with their tensors on the device."""
    return {name: _from_plain(value, tensors, device) for name, value in plain.items()}


def _to_plain(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, _ATOMS):
        return value
    if isinstance(value, torch.Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": True}
    if isinstance(value, dict) and all(isinstance(key, int | str) for key in value):
        return {"items": [[key, _to_plain(item, f"{name}.{key}", tensors)] for key, item in value.items()]}
    raise UnsupportedError(f"a cache layer holds a {type(value).__name__} ({name}), which no session can keep")


def _from_plain(plain: Any, tensors: dict[str, torch.Tensor], device: torch.device) -> Any:
    if not isinstance(plain, dict):
        return plain
    ((kind, value),) = plain.items()
    if kind == "tensor":
        return tensors[value].to(device)
    if kind == "dtype":
        return getattr(torch, value)
    if kind == "device":
        return device
    return {key: _from_plain(item, tensors, device) for key, item in value}
