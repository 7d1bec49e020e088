"""Fingerprints of models and tokenizers, so that no model reads the KV of another one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash

from headinfer.errors import SessionError
from headinfer.sessions.weights import active_adapters, add_weights, base_model
from headinfer.utils.head_pattern import HeadPattern

__all__ = [
    "check_config",
    "check_fingerprint",
    "check_tokenizer",
    "config_fingerprint",
    "fingerprint",
    "of_stored_kv",
    "tokenizer_fingerprint",
]

# Fields of a config that do not affect what the model computes.
_NOT_IDENTITY = (
    "_name_or_path",
    "architectures",
    "chunk_size_feed_forward",
    "dtype",
    "id2label",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "problem_type",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)


def config_fingerprint(config: Any) -> dict[str, Any]:
    """Return the part of a model's fingerprint that its config determines, rope settings included, for JSON."""
    plain: dict[str, Any] = json.loads(json.dumps(config.to_dict(), default=str))
    return {"config": _identity(plain)}


def fingerprint(model: torch.nn.Module) -> dict[str, Any]:
    """Return the fingerprint of a loaded model: config, architecture, dtype, weights, and its active adapters if any.

    The checksum of the weights covers up to 4,096 evenly spaced elements of each parameter, with its name, shape and
    dtype. Another checkpoint or fine-tuning changes it. A change of single elements may not, so it is no protection
    against tampering. Adapters of peft count if they are active, and weights that accelerate offloads are read.

    Args:
        model: the model.

    Returns:
        The fingerprint as plain values for JSON.
    """
    model = base_model(model)
    adapters = active_adapters(model)
    checksum = xxhash.xxh3_128()
    add_weights(model, checksum)
    dtype = str(model.dtype).removeprefix("torch.")
    return {
        **config_fingerprint(model.config),
        "architecture": type(model).__name__,
        "dtype": dtype,
        **({"adapters": adapters} if adapters is not None else {}),
        "weights": checksum.hexdigest(),
    }


def of_stored_kv(model: dict[str, Any], arithmetic: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fingerprint of a model for a session whose KV is stored, and attended to, in a certain way.

    So sessions share what they begin with only if their KV is exact, or approximate in the same way.

    Args:
        model: the fingerprint of the model.
        arithmetic: as in Manifest.
    """
    found = dict(model)
    if arithmetic.get("kv_dtype", "auto") != "auto":
        found["kv_dtype"] = arithmetic["kv_dtype"]
    if "sparse_heads" in arithmetic:
        found["sparse_heads"] = HeadPattern.from_dict(arithmetic["sparse_heads"]).digest
    return found


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return a checksum of what determines a tokenizer's output: its vocabulary, its rules and its chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)  # slow tokenizers have none
    vocabulary = sorted(tokenizer.get_vocab().items())
    parts = [backend.to_str() if backend is not None else "", vocabulary, getattr(tokenizer, "chat_template", None)]
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True, default=str).encode("utf-8"))


def check_config(saved: dict[str, Any], config: Any, folder: Path) -> None:
    """Check, before any weights are loaded, that a session was made with a config.

    Args:
        saved: the fingerprint of the model in the session.
        config: the config to compare.
        folder: the session's folder, for the message.

    Raises:
        SessionError: the configs differ.
    """
    _compare(saved, config_fingerprint(config), folder)


def check_fingerprint(saved: dict[str, Any], model: torch.nn.Module, folder: Path) -> None:
    """Check that a session was made with a model.

    Args:
        saved: the fingerprint of the model in the session.
        model: the model to compare.
        folder: the session's folder, for the message.

    Raises:
        SessionError: the models differ.
    """
    ours = fingerprint(model)
    names = [" and ".join(one.get("adapters", {}).get("names", ())) for one in (saved, ours)]
    if names[0] != names[1]:
        there, here = (f"the adapter {name}" if name else "no adapter" for name in names)
        raise SessionError(
            f"the session {folder} was made with {there} active, and the model has {here} active: activate the same "
            "ones, or read the document again into another session"
        )
    _compare(saved, ours, folder)


def check_tokenizer(saved: str | None, tokenizer: Any, folder: Path) -> None:
    """Check that a session was made with a tokenizer.

    Args:
        saved: the fingerprint of the tokenizer in the session; None if it is unknown, which passes.
        tokenizer: the tokenizer to compare.
        folder: the session's folder, for the message.

    Raises:
        SessionError: the tokenizers or their chat templates differ.
    """
    if saved is not None and saved != tokenizer_fingerprint(tokenizer):
        raise SessionError(
            f"the session {folder} was made with another tokenizer or chat template: give it the model that read it, "
            "or read the document again into another session"
        )


def _compare(saved: dict[str, Any], ours: dict[str, Any], folder: Path) -> None:
    difference = _difference(saved, ours)
    if difference:
        raise SessionError(
            f"the session {folder} was made with another model ({difference}): give it the model that read it, or read "
            "the document again into another session"
        )


def _difference(saved: Any, ours: Any, name: str = "") -> str:
    """Describe the first difference of two fingerprints; empty if there is none.

    Keys that only one of them has are ignored, because another version may have written them.
    """
    if isinstance(saved, dict) and isinstance(ours, dict):
        for key, value in ours.items():
            difference = _difference(saved[key], value, key) if key in saved else ""
            if difference:
                return difference
        return ""
    if saved == ours:
        return ""
    return "other weights" if name == "weights" else f"{name} is {saved} there and {ours} here"


def _identity(value: Any) -> Any:
    """Remove the fields in _NOT_IDENTITY from a config and from the dictionaries in it."""
    if isinstance(value, dict):
        return {key: _identity(item) for key, item in value.items() if key not in _NOT_IDENTITY}
    return value
