"""Exact LLM inference over very long contexts on one small GPU: the KV cache is stored in host RAM, per attention head.

with headinfer.enable(model):
    model.generate(**inputs)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headinfer.engine.options import Options
    from headinfer.errors import (
        CapacityError,
        ContextLengthWarning,
        HeadinferError,
        RereadWarning,
        SessionError,
        StateError,
        UnsupportedError,
        UsageError,
    )
    from headinfer.hf.cache import HeadCache, Stats
    from headinfer.hf.enable import Enabled, enable

__all__ = [
    "CapacityError",
    "ContextLengthWarning",
    "Enabled",
    "HeadCache",
    "HeadinferError",
    "Options",
    "RereadWarning",
    "SessionError",
    "StateError",
    "Stats",
    "UnsupportedError",
    "UsageError",
    "enable",
]

__version__ = "0.1.0"

_HOMES = {
    "headinfer.engine.options": ("Options",),
    "headinfer.errors": (
        "CapacityError",
        "ContextLengthWarning",
        "HeadinferError",
        "RereadWarning",
        "SessionError",
        "StateError",
        "UnsupportedError",
        "UsageError",
    ),
    "headinfer.hf.cache": ("HeadCache", "Stats"),
    "headinfer.hf.enable": ("Enabled", "enable"),
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, since `headinfer plan` needs neither torch nor transformers."""
    for module, names in _HOMES.items():
        if name in names:
            globals()[name] = value = getattr(importlib.import_module(module), name)
            return value
    raise AttributeError(f"module 'headinfer' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
