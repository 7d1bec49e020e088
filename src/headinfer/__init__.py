"""Exact LLM inference over very long contexts on one small GPU: the KV cache lives in host RAM, per attention head.

with headinfer.enable(model):
    model.generate(**inputs)
"""

from headinfer.engine import Options
from headinfer.errors import CapacityError, HeadinferError, StateError, UnsupportedError, UsageError
from headinfer.hf.cache import HeadCache, Stats
from headinfer.hf.enable import Enabled, enable

__all__ = [
    "CapacityError",
    "Enabled",
    "HeadCache",
    "HeadinferError",
    "Options",
    "StateError",
    "Stats",
    "UnsupportedError",
    "UsageError",
    "enable",
]

__version__ = "0.1.0"
