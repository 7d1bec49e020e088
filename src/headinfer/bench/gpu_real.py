"""The GPU suite `real`: a whole prompt that is really read, with KV of its own in each layer, and really continued.

The other suites fill caches with noise and measure single passes. This one runs `generate()` as a user does, with the
plan that headinfer makes for the machine. It takes minutes for a million tokens.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from headinfer.bench.job import GpuJob
from headinfer.bench.measurement import OURS, Measurement, context_label, reason_of
from headinfer.errors import CapacityError
from headinfer.hf.cache import HeadCache
from headinfer.hf.enable import enable
from headinfer.plan.memory import available_host_bytes
from headinfer.utils.units import format_bytes, format_seconds, format_tokens

__all__ = ["context_limit", "longest_tokens", "real"]

_HOST_SHARE = 0.85  # of the free host memory that the KV of the longest prompt takes
_PIN_BYTES_PER_S = 4e9
_SAY_EVERY_S = 10.0


class _OutOfTimeError(Exception):
    """The limit of time has passed."""


def real(job: GpuJob) -> Iterator[list[Measurement]]:
    """Read prompts of several lengths, the shortest first, and decode tokens after each."""
    own = job.with_model(job.sizes.real_model)
    lengths = own.sizes.real_tokens or (longest_tokens(own),)
    for tokens in sorted(lengths):
        yield _at(own, tokens)
        own.clean()


def longest_tokens(job: GpuJob) -> int:
    """Return the longest prompt whose KV fits free host memory with a margin, of at most the model's context."""
    fits = int(_HOST_SHARE * available_host_bytes()) // job.kv_bytes(1)
    longest = min(fits, context_limit(job.model.config) - job.sizes.real_new_tokens)
    return longest // 1024 * 1024 or max(longest, 1)


def context_limit(config: Any) -> int:
    """Return the most tokens that a model is made for; a huge number if its config does not say it."""
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return int(limit) if limit else 2**40


def _at(job: GpuJob, tokens: int) -> list[Measurement]:
    """Read one prompt and decode after it."""
    name = f"all of {context_label(tokens)}, {job.sizes.model}"

    def refused(note: str, **details: Any) -> list[Measurement]:
        return [Measurement("real", name, OURS, note=note, details=details)]

    new = job.sizes.real_new_tokens
    kv = job.kv_bytes(tokens + new)
    free = available_host_bytes()
    if kv > free:
        return refused(f"does not fit: {format_bytes(kv)} of KV, {format_bytes(free)} of host memory are free")
    about_s = job.pass_s(0, tokens) + new * job.pass_s(tokens, 1)
    if job.is_cuda:
        about_s += kv / _PIN_BYTES_PER_S
    if about_s > job.left_s:
        left = format_seconds(max(job.left_s, 0.0))
        return refused(f"not measured: it would take about {format_seconds(about_s)}, and {left} are left")
    job.begin(f"real, {name}", about_s)
    watch = _Watch(job, tokens)
    ids = torch.randint(0, job.shape.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(2))
    job.reset_peak()
    try:
        with enable(job.model, on_forward=watch.on_forward, **job.options()) as enabled:
            job.model.generate(
                ids.to(job.device),
                attention_mask=torch.ones_like(ids, device=job.device),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                use_cache=True,
            )
            assert enabled.last_cache is not None
            stats = enabled.last_cache.stats()
            plan = enabled.plan
    except (torch.OutOfMemoryError, CapacityError) as error:
        return refused(f"ran out of memory: {reason_of(error)}")
    except _OutOfTimeError:
        return refused(
            f"stopped after {format_tokens(watch.read_tokens)} tokens and {format_seconds(watch.elapsed_s)}: out of "
            "time",
            chunks=watch.chunks,
        )
    token_s = statistics.median(watch.token_s)
    flops_per_s = job.flops(0, tokens) / watch.read_s
    details = {
        "is_whole": True,
        "tokens": tokens,
        "new_tokens": new,
        "model": job.sizes.model,
        "seconds": watch.read_s,
        "flops_per_s": flops_per_s,
        "chunks": watch.chunks,
        "token_seconds": watch.token_s,
        "kv_bytes": job.kv_bytes(tokens),
        "peak_device_bytes": job.peak_device_bytes(),
        "plan": plan.as_dict() if plan is not None else None,
        "stats": dataclasses.asdict(stats),
    }
    held = stats.device_kv_peak_bytes
    of_product = 100 * flops_per_s / job.rates.flops_per_s
    measurements = [
        Measurement("real", name, f"{OURS}: reading", watch.read_s, "s", None, held, 1, details=details),
        Measurement("real", name, f"{OURS}: reading, of the matrix product", of_product, "%", rounds=1),
        Measurement("real", name, f"{OURS}: decode", token_s, "s/token", None, held, len(watch.token_s)),
    ]
    if watch.streamed_bytes:  # else all of the KV fits the device
        share = 100 * watch.streamed_bytes / sum(watch.token_s) / job.rates.link_bytes_per_s
        who = f"{OURS}: streamed, of the pinned link"
        measurements.append(Measurement("real", name, who, share, "%", rounds=len(watch.token_s)))
    return measurements


class _Watch:
    """Notes the times of a run, shows its progress, and ends it when its time has passed.

    Attributes:
        read_tokens: tokens of the prompt that are read.
        read_s: seconds of reading the whole prompt.
        token_s: seconds of each token after it.
        chunks: after each chunk, the tokens that are read and the seconds since the beginning.
        streamed_bytes: bytes of KV that went over the link for the tokens after the prompt.
    """

    def __init__(self, job: GpuJob, tokens: int) -> None:
        self.read_tokens = 0
        self.read_s = math.nan
        self.token_s: list[float] = []
        self.chunks: list[Sequence[float]] = []
        self.streamed_bytes = 0
        self._job = job
        self._tokens = tokens
        self._bytes_of_reading = 0
        self._start = time.perf_counter()
        self._said = self._start
        self._last = self._start

    @property
    def elapsed_s(self) -> float:
        """Seconds since the beginning."""
        return time.perf_counter() - self._start

    def on_forward(self, cache: HeadCache) -> None:
        """Note a chunk or a token.

        Raises:
            _OutOfTimeError: the prompt is not read, and no time is left.
        """
        tokens = cache.head_layers[0].get_seq_length()
        if tokens >= self._tokens:
            self._job.synchronize()
        now = time.perf_counter()
        if tokens > self._tokens:
            self.token_s.append(now - self._last)
            self.streamed_bytes = cache.stats().link_to_device_bytes - self._bytes_of_reading
        else:
            self.read_tokens = tokens
            self.chunks.append((tokens, now - self._start))
        self._last = now
        if tokens == self._tokens:
            self.read_s = now - self._start
            self._bytes_of_reading = cache.stats().link_to_device_bytes
        elif tokens < self._tokens:
            self._progress(now)

    def _progress(self, now: float) -> None:
        """Say how far the prompt is read, every ten seconds."""
        if self._job.left_s <= 0:
            raise _OutOfTimeError
        if now - self._said < _SAY_EVERY_S:
            return
        self._said = now
        share = self._job.flops(0, self.read_tokens) / self._job.flops(0, self._tokens)
        whole_s = (now - self._start) / share
        self._job.say(
            f"  {format_tokens(self.read_tokens)} of {format_tokens(self._tokens)} tokens, "
            f"{format_seconds(now - self._start)} of about {format_seconds(whole_s)}"
        )
