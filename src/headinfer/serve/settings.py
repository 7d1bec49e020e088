"""The settings of a service."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from headinfer.engine.options import Options
from headinfer.jobs.sampling import Sampling

__all__ = ["Limits", "ServeSettings"]


@dataclass(frozen=True)
class Limits:
    """What a client may ask for, at most.

    Attributes:
        document_bytes: bytes of a document.
        documents: documents that are stored or wait to be stored.
        messages: messages of a chat.
        new_tokens: tokens of an answer.
        prompt_tokens: tokens of a prompt, those of its document included; None for what the memory holds.
    """

    document_bytes: int = 1 << 30
    documents: int = 1000
    messages: int = 1000
    new_tokens: int = 32768
    prompt_tokens: int | None = None


@dataclass(frozen=True)
class ServeSettings:
    """The settings of a `Service`.

    Attributes:
        model: a local folder, a hub name, `embedded`, or random:NAME (hf/models.py).
        root: the folder of all sessions.
        device: auto, cpu, cuda or cuda:N.
        dtype: auto, float32, bfloat16 or float16.
        seed: the seed of random weights.
        chunk_tokens: tokens of a prefill chunk; None is planned.
        options: Options of the caches; what they leave open is planned.
        sampling: how tokens are chosen if a request does not say it. The HTTP layer reads it.
        max_new_tokens: tokens of an answer, at most, if a request does not say it.
        queue_limit: requests that wait, at most, documents included.
        caches_kept: caches that stay in memory for the next requests, at most.
        limits: what a client may ask for.
    """

    model: str
    root: Path
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 0
    chunk_tokens: int | None = None
    options: Options = field(default_factory=Options)
    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int = 1024
    queue_limit: int = 64
    caches_kept: int = 4
    limits: Limits = field(default_factory=Limits)

    @property
    def approximation(self) -> str:
        """What is approximate about the KV, in one sentence for people; empty if it is exact."""
        return self.options.approximation
