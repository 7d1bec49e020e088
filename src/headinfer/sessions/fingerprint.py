"""Who a model and its tokenizer are, so that KV made by one is never read by another."""

from __future__ import annotations

import json
from typing import Any

import torch
import xxhash

from headinfer.errors import SessionError

__all__ = [
    "check_config",
    "check_fingerprint",
    "check_tokenizer",
    "config_fingerprint",
    "fingerprint",
    "tokenizer_fingerprint",
]

_SAMPLES = 4096
# What says how the model is run or where it came from, not what it computes.
_NOT_IDENTITY = (
    "_name_or_path",
    "architectures",
    "chunk_size_feed_forward",
    "dtype",
    "id2label",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "problem_type",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)


def config_fingerprint(config: Any) -> dict[str, Any]:
    """What the config alone says, rope settings included, as plain values for JSON."""
    plain: dict[str, Any] = json.loads(json.dumps(config.to_dict(), default=str))
    return {"config": _identity(plain)}


def fingerprint(model: torch.nn.Module) -> dict[str, Any]:
    """The config's, and architecture, dtype and weights of a loaded model.

    weights: a checksum of up to 4,096 evenly spaced elements of each parameter, with names and shapes. Another
    checkpoint or fine-tuning differs in them; single changed elements may not, so it is no proof against tampering.
    """
    whole = xxhash.xxh3_128()
    for name, parameter in sorted(model.named_parameters()):
        whole.update(f"{name} {tuple(parameter.shape)} {parameter.dtype};".encode())
        if parameter.device.type != "meta":  # weights that an offloading library holds elsewhere
            flat = parameter.detach().reshape(-1)
            step = max(-(-flat.numel() // _SAMPLES), 1)
            whole.update(flat[::step].contiguous().view(torch.uint8).cpu().numpy().data)
    dtype = str(model.dtype).removeprefix("torch.")
    return {
        **config_fingerprint(model.config),
        "architecture": type(model).__name__,
        "dtype": dtype,
        "weights": whole.hexdigest(),
    }


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A checksum of what a tokenizer makes of texts: its vocabulary and rules, and its chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)  # slow tokenizers have none
    vocabulary = sorted(tokenizer.get_vocab().items())
    parts = [backend.to_str() if backend is not None else "", vocabulary, getattr(tokenizer, "chat_template", None)]
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True, default=str).encode("utf-8"))


def check_config(found: dict[str, Any], config: Any, where: object) -> None:
    """Raise SessionError where KV of one config would be read by another; before weights are loaded."""
    _compare(found, config_fingerprint(config), where)


def check_fingerprint(found: dict[str, Any], model: torch.nn.Module, where: object) -> None:
    """Raise SessionError where KV of one model would be read by another."""
    _compare(found, fingerprint(model), where)


def check_tokenizer(found: str | None, tokenizer: Any, where: object) -> None:
    """Raise SessionError where a text would become other tokens than those of the session. found: None is unknown."""
    if found is not None and found != tokenizer_fingerprint(tokenizer):
        raise SessionError(
            f"the session {where} was made with another tokenizer or chat template: give it the model that read it, or "
            "read the document again"
        )


def _compare(found: Any, ours: dict[str, Any], where: object) -> None:
    if difference := _difference(found, ours):
        raise SessionError(
            f"the session {where} was made with another model ({difference}): give it the model that read it, or read "
            "the document again"
        )


def _difference(found: Any, ours: Any, name: str = "") -> str:
    """Where two fingerprints differ; empty where they do not. What only one of them has may be of another version."""
    if isinstance(found, dict) and isinstance(ours, dict):
        return next((text for key in ours if key in found and (text := _difference(found[key], ours[key], key))), "")
    if found == ours:
        return ""
    return "other weights" if name == "weights" else f"{name} is {found} there and {ours} here"


def _identity(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _identity(item) for key, item in value.items() if key not in _NOT_IDENTITY}
    return value
