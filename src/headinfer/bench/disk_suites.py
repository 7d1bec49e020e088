"""Suites that write gigabytes to a disk: sessions, and KV beyond host memory. They run only if they are named.

Rates are shares of those of a plain program that reads or writes one file in order, on the same disk in the same run.
"""

from __future__ import annotations

import gc
import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch

from headinfer.bench.cpu_model import append_noise, fill_head_wise, forward_and_crop, kv_bytes, load_model
from headinfer.bench.job import CpuJob
from headinfer.bench.measurement import OURS, Measurement, context_label
from headinfer.bench.sizes import CpuSizes
from headinfer.bench.timing import Call, Peak, Rounds, timed
from headinfer.hf.cache import HeadCache
from headinfer.hf.enable import enable
from headinfer.kv.disk_file import DiskFile, Read
from headinfer.sessions.writer import SessionWriter

__all__ = ["disk_tier", "session"]

_PART_BYTES = 16 * 2**20
_SESSION_NAME = "bench"
_LEAST_READ_S = 1e-9  # stands for a time that was not seen
_PREFILL_ROUNDS = 2  # each takes minutes, of which the disk is a small part


def session(job: CpuJob) -> list[Measurement]:
    """Measure saving a session, what checkpoints cost a prefill, and the time from `ask` to the first token."""
    sizes = job.sizes
    model = load_model(sizes)
    with _work(job.folder) as work:
        with enable(model):
            measurements = [_beside_prefill(job, model, work), _saving(model, sizes, work)]
        return [*measurements, *_ask(sizes, work, kv_bytes(model.config, sizes.long_tokens))]


def _saving(model: Any, sizes: CpuSizes, work: Path) -> Measurement:
    """Write checkpoints, each of one chunk. 16,384 tokens of two layers have the bytes of 1,024 tokens of all 32."""
    nbytes = kv_bytes(model.config, sizes.long_tokens)
    file_s: list[float] = []
    session_s: list[float] = []
    for _ in range(sizes.disk_rounds):
        file_s.append(timed(lambda: _write_file(work / "plain", nbytes)))
        session_s.append(_write_session(model, work / _SESSION_NAME, sizes))
    (work / "plain").unlink()
    rounds = Rounds({"file": file_s, "session": session_s})
    found = Measurement(
        "session",
        f"{context_label(sizes.long_tokens)} in checkpoints of {sizes.checkpoint_tokens:,}",
        "saving: bytes per second / a file's",
        100 * rounds.ratio("file", "session"),
        "%",
        rounds=rounds.count,
        details={"bytes": nbytes, **rounds.medians()},
    )
    return found.with_goal(">= 80 %")


def _beside_prefill(job: CpuJob, model: Any, work: Path) -> Measurement:
    """Read chunks with a checkpoint after each, in turns with the same chunks without checkpoints."""
    sizes = job.sizes
    calls = {"without": _chunks(model, sizes, work, writes=False), "with": _chunks(model, sizes, work, writes=True)}
    point = f"prefill of {sizes.chunks} chunks of {sizes.chunk_tokens:,} tokens"
    rounds = job.in_turns(point, calls, min(sizes.disk_rounds, _PREFILL_ROUNDS), warm_up=False)
    found = Measurement(
        "session",
        point,
        "seconds with checkpoints / without",
        rounds.ratio("with", "without"),
        "x",
        rounds=rounds.count,
        details={"with_s": rounds.median_s("with"), "without_s": rounds.median_s("without")},
    )
    return found.with_goal("<= 1.05 x")


def _chunks(model: Any, sizes: CpuSizes, work: Path, *, writes: bool) -> Call:
    """Return a prefill of some chunks at an offset, with or without a checkpoint after each."""
    ids = torch.full((1, sizes.chunk_tokens * sizes.chunks), 7)
    opened: dict[str, Any] = {}

    @contextmanager
    def active() -> Iterator[None]:
        cache = HeadCache(model.config)
        fill_head_wise(cache, model.config, sizes.chunk_offset)
        with (
            tempfile.TemporaryDirectory(dir=work) as folder,
            SessionWriter(Path(folder) / "s", model, {}, {}) as writer,
        ):
            if writes:  # what the cache holds before the chunks is written before the clock starts
                writer.checkpoint(cache)
                writer.finish()
            opened.update(cache=cache, writer=writer)
            yield
            opened.clear()

    def run() -> None:
        cache = opened["cache"]
        writer = opened["writer"]
        for chunk in ids.split(sizes.chunk_tokens, dim=1):
            model(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)
            if writes:
                writer.checkpoint(cache)
        writer.finish()

    return Call(run, active=active)


def _ask(sizes: CpuSizes, root: Path, nbytes: int) -> list[Measurement]:
    """Ask a question in a process of its own, with the session's files out of the page cache and in it."""
    files = sorted((root / _SESSION_NAME).glob("*.safetensors"))
    measurements: list[Measurement] = []
    for state, prepare in (("from the disk", _drop_from_page_cache), ("from the page cache", _read_files)):
        answers: list[dict[str, float]] = []
        rates: list[float] = []
        for _ in range(sizes.disk_rounds):
            prepare(files)
            rates.append(sum(path.stat().st_size for path in files) / timed(lambda: _read_files(files)))
            prepare(files)
            answers.append(_first_token(root))
        typical = sorted(answers, key=lambda answer: answer["total_s"])[len(answers) // 2]
        rate = statistics.median(rates)
        details = {**typical, "kv_bytes": nbytes, "plain_read_bytes_per_s": rate}
        point = f"{context_label(sizes.long_tokens)} {state}"
        total_s = typical["total_s"]
        # On a busy machine the answer that read KV may have been the faster one.
        is_seen = typical["kv_read_s"] > _LEAST_READ_S
        share = 100 * nbytes / typical["kv_read_s"] / rate if is_seen else None
        note = "" if is_seen else "not measured: the answers differed by more than the reading took"
        what = "KV read for it: bytes per second / plain reading's"
        reading = Measurement("session", point, what, share, "%", rounds=len(answers), note=note)
        first = "from `ask` to the first token"
        measurements += [
            Measurement("session", point, first, total_s, "s", rounds=len(answers), details=details),
            reading.with_goal(">= 80 %"),
        ]
    return measurements


def _first_token(root: Path) -> dict[str, float]:
    """Return the seconds of the parts of an answer, and their sum.

    Two questions are asked. The second one needs no KV from the disk, so the excess of the first one is its reading.
    """
    arguments = ["ask", "--session", _SESSION_NAME, "--sessions", str(root), "--max-new-tokens", "1", "--json"]
    command = [sys.executable, "-m", "headinfer", *arguments, "--", "q", "q"]
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stdout is not None
        process.stderr.readline()  # the command writes it when all checks have passed
        checked_s = time.perf_counter() - start
        done = json.loads(process.stdout.read())
    first, second = (answer["first_token_s"] for answer in done["answers"])
    parts = {
        "process_start_s": checked_s - done["checks_s"],
        "checks_s": done["checks_s"],
        "model_load_s": done["model_load_s"],
        "kv_read_s": max(first - second, _LEAST_READ_S),
        "compute_s": second,
    }
    return {**parts, "total_s": sum(parts.values())}


def disk_tier(job: CpuJob) -> list[Measurement]:
    """Measure decode and prefill with most of the KV on disk: the share of the disk's rate, and the host memory."""
    sizes = job.sizes
    model = load_model(sizes)
    nbytes = kv_bytes(model.config, sizes.long_tokens)
    with _work(job.folder) as work, enable(model):
        _write_file(work / "plain", nbytes)
        return [*_decode_with_tier(job, model, work, nbytes), _chunk_with_tier(job, model, work)]


def _decode_with_tier(job: CpuJob, model: Any, work: Path, nbytes: int) -> list[Measurement]:
    """Decode with a host KV budget of a quarter of the KV. The file work/plain has as many bytes as the KV."""
    sizes = job.sizes
    budget = nbytes // 4
    process = psutil.Process()
    gc.collect()
    before = process.memory_info().rss
    options: dict[str, Any] = {
        "host_kv_budget_bytes": budget,
        "disk_tier": str(work / "tier"),
        "expected_tokens": sizes.long_tokens + 1,
    }
    with Peak(process) as peak:
        cache = HeadCache(model.config, **options)
        fill_head_wise(cache, model.config, sizes.long_tokens)
        forward_and_crop(model, cache)  # after it, all segments that leave memory are on disk
        assert cache.engine.disk is not None
        tier_file = cache.engine.disk.file
        on_disk = cache.stats().disk_kv_bytes
        calls = {
            "in_order": Call(lambda: _read_in_order(tier_file, on_disk)),
            "cached_file": Call(lambda: _read_cold(work / "plain")),
            "token": Call(lambda: forward_and_crop(model, cache)),
        }
        context = context_label(sizes.long_tokens)
        rounds = job.in_turns(f"a token after {context}", calls, sizes.disk_rounds)
    held = cache.stats().host_kv_peak_bytes
    point = f"decode at {context}, {on_disk / nbytes:.0%} of KV on disk"
    in_order = 100 * rounds.ratio("in_order", "token")
    cached = 100 * on_disk / nbytes * rounds.ratio("cached_file", "token")
    rates = {
        "token_s": rounds.median_s("token"),
        "kv_bytes": nbytes,
        "disk_bytes_of_a_token": on_disk,
        "plain_read_past_cache_bytes_per_s": on_disk / rounds.median_s("in_order"),
        "plain_read_bytes_per_s": nbytes / rounds.median_s("cached_file"),
    }
    memory = {"budget_bytes": budget, "held_bytes": held, "resident_growth_bytes": peak.rss_bytes - before}
    count = rounds.count
    what = "rate / reading the same file in order"
    by_order = Measurement("disk-tier", point, what, in_order, "%", rounds=count, details=rates)
    what = "rate / reading another file through the page cache"
    by_cache = Measurement("disk-tier", point, what, cached, "%", rounds=count)
    by_budget = Measurement(
        "disk-tier", point, "peak of KV in host memory / --host-kv-budget", held / budget, "x", details=memory
    )
    return [by_order.with_goal(">= 80 %"), by_cache, by_budget.with_goal("<= 1 x")]


def _chunk_with_tier(job: CpuJob, model: Any, work: Path) -> Measurement:
    """Read a chunk after a past that is mostly on disk, in turns with the same past in memory."""
    sizes = job.sizes
    past = sizes.chunk_offset
    budget = max(kv_bytes(model.config, past) // 4, 2**23)
    expected = past + sizes.chunk_tokens
    in_memory = HeadCache(model.config, expected_tokens=expected)
    on_disk = HeadCache(
        model.config, expected_tokens=expected, host_kv_budget_bytes=budget, disk_tier=str(work / "tier")
    )
    for cache in (in_memory, on_disk):
        fill_head_wise(cache, model.config, past)
    calls = {
        "on_disk": Call(lambda: forward_and_crop(model, on_disk, sizes.chunk_tokens)),
        "in_memory": Call(lambda: forward_and_crop(model, in_memory, sizes.chunk_tokens)),
    }
    point = f"{sizes.chunk_tokens:,} tokens after {context_label(past)}"
    rounds = job.in_turns(point, calls, sizes.chunks)
    return Measurement(
        "disk-tier",
        point,
        f"{OURS}'s time with KV on disk / in memory",
        rounds.ratio("on_disk", "in_memory"),
        "x",
        rounds=rounds.count,
        details=rounds.medians(),
    )


def _write_session(model: Any, folder: Path, sizes: CpuSizes) -> float:
    """Write checkpoints of noise as `headinfer read` does, to a session that `headinfer ask` finds. Returns seconds."""
    shutil.rmtree(folder, ignore_errors=True)
    tokens = sizes.long_tokens
    seconds = 0.0
    about = {"model": sizes.model, "seed": 0, "raw": True, "document_tokens": tokens, "answers": 0}
    ids = torch.full((1, tokens), 7)
    with SessionWriter(folder, model, {}, about) as writer:
        cache = HeadCache(model.config)
        for at in range(0, tokens, sizes.checkpoint_tokens):
            append_noise(cache, model.config, min(sizes.checkpoint_tokens, tokens - at))
            start = time.perf_counter()
            writer.checkpoint(cache, ids)
            writer.finish()
            seconds += time.perf_counter() - start
    return seconds


def _write_file(path: Path, nbytes: int) -> None:
    part = memoryview(os.urandom(_PART_BYTES))
    with open(path, "wb", buffering=0) as file:
        for at in range(0, nbytes, _PART_BYTES):
            file.write(part[: nbytes - at])
        os.fsync(file.fileno())


def _read_files(paths: list[Path]) -> None:
    buffer = mmap.mmap(-1, _PART_BYTES)
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def _read_cold(path: Path) -> None:
    _drop_from_page_cache([path])
    _read_files([path])


def _read_in_order(file: DiskFile, nbytes: int) -> None:
    """Read all bytes of a disk tier in order, past the page cache if the file system can."""
    buffer = memoryview(mmap.mmap(-1, _PART_BYTES))
    for at in range(0, nbytes, _PART_BYTES):
        file.read([Read(at, buffer[: nbytes - at], is_aligned=True)])


def _drop_from_page_cache(paths: list[Path]) -> None:
    for path in paths:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def _work(folder: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=folder, prefix="headinfer-bench-") as work:
        yield Path(work)
