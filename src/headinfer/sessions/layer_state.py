"""Converts the fields of cache layers to tensors for a file and plain values for a manifest, and back."""

from __future__ import annotations

from typing import Any

import torch

from headinfer.errors import UnsupportedError

__all__ = ["from_plain", "to_plain"]

_JSON_SCALARS = (bool, int, float, str, type(None))


def to_plain(fields: dict[str, Any], prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Convert the fields of a layer to values for JSON. docs/session-format.md describes them under `layers`.

    Args:
        fields: the fields by name: scalars, tensors, dtypes, devices, and dictionaries of these.
        prefix: the beginning of the names of the layer's tensors.
        tensors: the tensors of the fields are added to it, by name.

    Returns:
        The values by name. A tensor is represented by its name in `tensors`.

    Raises:
        UnsupportedError: a field has another type.
    """
    return {name: _to_plain(value, f"{prefix}.{name}", tensors) for name, value in fields.items()}


def from_plain(plain: dict[str, Any], tensors: dict[str, torch.Tensor], device: torch.device) -> dict[str, Any]:
    """Restore the fields that to_plain() converted.

    Args:
        plain: what to_plain() returned.
        tensors: the tensors by name.
        device: the device of the layer. Tensors are moved to it, and it replaces the device fields.

    Returns:
        The fields by name.
    """
    return {name: _from_plain(value, tensors, device) for name, value in plain.items()}


def _to_plain(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, _JSON_SCALARS):
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
    raise UnsupportedError(f"a cache layer holds a {type(value).__name__} ({name}), which cannot be saved in a session")


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
