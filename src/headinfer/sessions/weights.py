"""Reads the weights that a model computes with: those that accelerate offloads too, and those of active adapters.

peft wraps a layer that has adapters in a layer of its own, which has the original layer as `base_layer` or
`original_module`. accelerate's hooks hold the weights of a module whose parameters are on the meta device. Neither
library is imported.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import xxhash

__all__ = ["active_adapters", "adapter_layers", "add_weights", "applied_adapters", "base_model"]

_SAMPLES = 4096
_ORIGINALS = ("base_layer", "original_module")
# Fields of an adapter's config that do not affect what it computes.
_NOT_IDENTITY = ("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type")


@dataclass(frozen=True)
class _Weight:
    """A parameter of a model.

    Attributes:
        name: its name in a model without adapters; for a weight of an adapter, its name in the wrapped layer.
        path: its name in the model.
        parameter: the parameter, which may be on the meta device.
        wrapper: the path of the layer of peft that holds it; None if it is no adapter's.
    """

    name: str
    path: str
    parameter: torch.nn.Parameter
    wrapper: str | None


def base_model(model: torch.nn.Module) -> torch.nn.Module:
    """Return the model that a PeftModel wraps; any other model itself."""
    get_base_model = getattr(model, "get_base_model", None)
    return get_base_model() if get_base_model is not None else model


def add_weights(model: torch.nn.Module, checksum: xxhash.xxh3_128) -> None:
    """Add up to 4,096 evenly spaced elements of each parameter to a checksum, without those of adapters.

    Args:
        model: the model.
        checksum: the checksum.
    """
    weights = [weight for weight in _weights(model) if weight.wrapper is None]
    for weight in sorted(weights, key=lambda weight: weight.name):
        _add(checksum, weight.name, weight.parameter, _data(model, weight))


def active_adapters(model: torch.nn.Module) -> dict[str, Any] | None:
    """Return what the adapters of peft add to what a model computes.

    Args:
        model: the model. Adapters that are disabled or not active do not count.

    Returns:
        The names of the adapters, those of them that are merged into the weights, their configs by name, and a checksum
        of their weights and scaling; None if no adapter is active.
    """
    wrappers = dict(_wrappers(model))
    if not wrappers:
        return None
    checksum = xxhash.xxh3_128()
    names: set[str] = set()
    merged: set[str] = set()
    weights = sorted((weight for weight in _weights(model) if weight.wrapper), key=lambda weight: weight.path)
    for path, wrapper in sorted(wrappers.items()):
        if wrapper.disable_adapters:
            continue
        merged_here = getattr(wrapper, "merged_adapters", [])
        merged.update(merged_here)
        for adapter in merged_here or wrapper.active_adapters:
            own = [one for one in weights if one.wrapper == path and adapter in one.name.split(".")]
            if not own:
                continue  # this layer does not have this adapter
            names.add(adapter)
            scaling = getattr(wrapper, "scaling", None)
            if isinstance(scaling, dict):
                scaling = scaling.get(adapter)
            checksum.update(f"{path} {adapter} {scaling};".encode())
            for weight in own:
                _add(checksum, weight.name, weight.parameter, _data(model, weight))
    if not names:
        return None
    configs = getattr(model, "peft_config", {})
    return {
        "names": sorted(names),
        "merged": sorted(merged),
        "config": {name: _plain_config(configs[name]) for name in sorted(names) if name in configs},
        "weights": checksum.hexdigest(),
    }


def adapter_layers(model: torch.nn.Module) -> list[Any]:
    """Return the layers of peft in a model."""
    return [wrapper for _, wrapper in _wrappers(model)]


def applied_adapters(layers: Iterable[Any]) -> tuple[tuple[Any, ...], ...]:
    """Return which adapters each layer of peft applies now, with their scaling, to compare it with another time.

    Unlike active_adapters() it does not read weights, so that each forward pass can call it.

    Args:
        layers: what adapter_layers() returned.

    Returns:
        A tuple for each layer, which is empty if the layer applies none. It is empty as a whole if no layer does.
    """
    applied = tuple(_applied(layer) for layer in layers)
    return applied if any(applied) else ()


def _applied(layer: Any) -> tuple[Any, ...]:
    if layer.disable_adapters:
        return ()
    scaling = getattr(layer, "scaling", None)
    names = getattr(layer, "merged_adapters", None) or layer.active_adapters
    return tuple((name, scaling.get(name) if isinstance(scaling, dict) else scaling) for name in names)


def _wrappers(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the layers of peft, with their names in the model."""
    for path, module in model.named_modules():
        children = module._modules
        if hasattr(module, "disable_adapters") and any(name in children for name in _ORIGINALS):
            yield path, module


def _weights(model: torch.nn.Module) -> Iterator[_Weight]:
    """Yield all parameters of a model."""
    wrappers = dict(_wrappers(model))
    for path, parameter in model.named_parameters():
        name: list[str] = []
        wrapper = None
        parts = path.split(".")
        for number, part in enumerate(parts):
            before = ".".join(parts[:number])
            if before not in wrappers:
                name.append(part)
            elif part not in _ORIGINALS:
                wrapper = before
                name = parts[number:]
                break
        yield _Weight(".".join(name), path, parameter, wrapper)


def _add(checksum: xxhash.xxh3_128, name: str, parameter: torch.nn.Parameter, data: torch.Tensor | None) -> None:
    """Add the name, shape and dtype of a parameter and a part of its elements to a checksum."""
    checksum.update(f"{name} {tuple(parameter.shape)} {parameter.dtype};".encode())
    if data is not None:
        flat = data.detach().reshape(-1)
        step = max(-(-flat.numel() // _SAMPLES), 1)
        checksum.update(flat[::step].contiguous().view(torch.uint8).cpu().numpy().data)


def _data(model: torch.nn.Module, weight: _Weight) -> torch.Tensor | None:
    """Return the data of a parameter; None if they cannot be found."""
    if weight.parameter.device.type != "meta":
        return weight.parameter
    parts = weight.path.split(".")
    for number in range(len(parts) - 1, -1, -1):  # the hook of a module may hold the weights of the modules in it
        module = model.get_submodule(".".join(parts[:number]))
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", [hook]):
            held = getattr(one, "weights_map", None)
            if held is None:
                continue
            with suppress(KeyError):
                data: torch.Tensor = held[".".join(parts[number:])].to(weight.parameter.dtype)
                return data
    return None


def _plain_config(config: Any) -> dict[str, Any]:
    """Return the fields of an adapter's config for JSON."""
    fields = {name: value for name, value in config.to_dict().items() if name not in _NOT_IDENTITY}
    plain: dict[str, Any] = json.loads(json.dumps(fields, sort_keys=True, default=_plain_value))
    return plain


def _plain_value(value: Any) -> Any:
    return sorted(value, key=str) if isinstance(value, set | frozenset) else str(value)
