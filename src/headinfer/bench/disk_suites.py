"""Suites that write gigabytes to a disk, so they run only where they are named: sessions, and KV beyond host memory.

Rates are shares of what the same disk gives a plain program in the same run, which reads or writes one file in order.
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch

from headinfer.bench.cpu_model import BENCH_MODEL, append_noise, fill_head_wise, kv_bytes, load_model
from headinfer.bench.measurement import Measure, Peak, Sizes, in_turns, ratio, step, timed
from headinfer.hf.cache import HeadCache
from headinfer.hf.enable import enable
from headinfer.kv.disk import DiskFile, Read
from headinfer.sessions.writer import SessionWriter

__all__ = ["DISK_SUITES"]

_BLOCK_BYTES = 16 * 2**20
_NAME = "bench"


@torch.inference_mode()
def session(sizes: Sizes, folder: Path) -> list[Measure]:
    """Writing a session against writing a file; what checkpoints cost a prefill; from `ask` to the first token."""
    model = load_model()
    with _work(folder) as work:
        with enable(model):
            measures = [_beside_prefill(model, sizes, work), _saving(model, sizes, work)]
        return [*measures, *_ask(sizes, work, kv_bytes(model.config, sizes.long_tokens))]


def _saving(model: Any, sizes: Sizes, work: Path) -> Measure:
    """Checkpoints, each of one chunk. 16,384 tokens of two layers have the bytes of 1,024 tokens of all 32."""
    nbytes = kv_bytes(model.config, sizes.long_tokens)
    file_s, session_s = [], []
    for _ in range(sizes.disk_rounds):
        file_s.append(timed(lambda: _write_file(work / "plain", nbytes)))
        session_s.append(_write_session(model, work / _NAME, sizes))
    (work / "plain").unlink()
    tokens = f"{sizes.long_tokens:,} tokens in checkpoints of {sizes.checkpoint_tokens:,}"
    details = {"bytes": nbytes, "file_s": statistics.median(file_s), "session_s": statistics.median(session_s)}
    share = 100 * ratio(file_s, session_s)
    return Measure("session", f"saving {tokens}: bytes per second / a file's", share, "%", ">= 80", details)


def _beside_prefill(model: Any, sizes: Sizes, work: Path) -> Measure:
    """Chunks with a checkpoint after each, against the same without."""
    ids = torch.full((1, sizes.chunk_tokens * sizes.chunks), 7)

    def read(writes: bool) -> None:
        cache = HeadCache(model.config)
        fill_head_wise(cache, model.config, sizes.chunk_offset)
        with tempfile.TemporaryDirectory(dir=work) as folder:
            writer = SessionWriter(Path(folder) / "s", model, {}, {})
            if writes:
                writer.checkpoint(cache)
                writer.finish()
            start = time.perf_counter()
            for chunk in ids.split(sizes.chunk_tokens, dim=1):
                model(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)
                if writes:
                    writer.checkpoint(cache)
            writer.finish()
            spent[writes].append(time.perf_counter() - start)
            writer.close()

    spent: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(min(sizes.disk_rounds, 2)):  # each takes minutes, of which the disk is a small part
        for writes in (False, True):
            read(writes)
    what = f"prefill of {sizes.chunks} chunks of {sizes.chunk_tokens:,} tokens with checkpoints: seconds / without"
    details = {"with_s": statistics.median(spent[True]), "without_s": statistics.median(spent[False])}
    return Measure("session", what, ratio(spent[True], spent[False]), "x", "<= 1.05", details)


def _ask(sizes: Sizes, root: Path, nbytes: int) -> list[Measure]:
    """A question as a process of its own, with the session's files out of the page cache and in it."""
    files = sorted((root / _NAME).glob("*.safetensors"))
    measures = []
    for state, prepare in (("from the disk", _forget), ("from the page cache", _read_files)):
        found, rates = [], []
        for _ in range(sizes.disk_rounds):
            prepare(files)
            rates.append(sum(path.stat().st_size for path in files) / timed(lambda: _read_files(files)))
            prepare(files)
            found.append(_first_token(root))
        typical = sorted(found, key=lambda one: one["total_s"])[len(found) // 2]
        rate, kv_s = statistics.median(rates), typical["kv_read_s"]
        details = {**typical, "kv_bytes": nbytes, "plain_read_bytes_per_s": rate}
        tokens = f"{sizes.long_tokens:,} tokens {state}"
        measures += [
            Measure("session", f"from `ask` to the first token, {tokens}", typical["total_s"], "s", "", details),
            Measure("session", f"KV read for it, {tokens}: bytes per second / plain reading's",
                    100 * nbytes / kv_s / rate, "%", ">= 80"),
        ]  # fmt: skip
    return measures


def _first_token(root: Path) -> dict[str, float]:
    """Seconds of the parts: the second question needs no KV from the disk, so the first one's excess is its reading."""
    arguments = [
        "ask",
        "--session",
        "bench",
        "--sessions",
        str(root),
        "--max-new-tokens",
        "1",
        "--json",
        "--",
        "q",
        "q",
    ]
    start = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-m", "headinfer", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        assert process.stdout is not None
        process.stderr.readline()  # what is said when all checks have passed
        checked_s = time.perf_counter() - start
        done = json.loads(process.stdout.read())
    first, second = (answer["first_token_s"] for answer in done["answers"])
    parts = {
        "process_start_s": checked_s - done["checks_s"],
        "checks_s": done["checks_s"],
        "model_load_s": done["model_load_s"],
        "kv_read_s": max(first - second, 1e-9),
        "compute_s": second,
    }
    return {**parts, "total_s": sum(parts.values())}


@torch.inference_mode()
def disk_tier(sizes: Sizes, folder: Path) -> list[Measure]:
    """Decode and prefill with most of the KV on disk: the disk's rate that is attained, and the memory that is held."""
    model = load_model()
    nbytes = kv_bytes(model.config, sizes.long_tokens)
    budget = nbytes // 4
    with _work(folder) as work, enable(model):
        _write_file(work / "plain", nbytes)
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
            step(model, cache)  # and what is leaving has left
            assert cache.engine.disk is not None
            tier_file = cache.engine.disk.file
            far = cache.stats().disk_kv_bytes
            calls: dict[str, Callable[[], None]] = {
                "in_order": lambda: _read_in_order(tier_file, far),
                "cached_file": lambda: _read_cold(work / "plain"),
                "token": lambda: step(model, cache),
            }
            seconds = in_turns(calls, sizes.disk_rounds)
        details = {
            "token_s": statistics.median(seconds["token"]),
            "kv_bytes": nbytes,
            "disk_bytes_of_a_token": far,
            "plain_read_past_cache_bytes_per_s": far / statistics.median(seconds["in_order"]),
            "plain_read_bytes_per_s": nbytes / statistics.median(seconds["cached_file"]),
        }
        held = cache.stats().host_kv_peak_bytes
        memory = {"budget_bytes": budget, "held_bytes": held, "resident_growth_bytes": peak.rss_bytes - before}
        context = f"{sizes.long_tokens:,} tokens, {far / nbytes:.0%} of KV on disk"
        in_order = 100 * ratio(seconds["in_order"], seconds["token"])
        cached = 100 * far / nbytes * ratio(seconds["cached_file"], seconds["token"])
        return [
            Measure("disk-tier", f"decode at {context}: rate / reading the same file in order", in_order, "%", ">= 80",
                    details),
            Measure("disk-tier", "the same / reading another file through the page cache", cached, "%"),
            Measure("disk-tier", "peak of KV in host memory / --host-kv-budget", held / budget, "x", "<= 1", memory),
            _chunk_with_tier(model, sizes, work),
        ]  # fmt: skip


def _chunk_with_tier(model: Any, sizes: Sizes, work: Path) -> Measure:
    """A chunk of prefill at the end of a store of which most is on disk, against one that is in memory."""
    at = sizes.chunk_offset
    budget = max(kv_bytes(model.config, at) // 4, 2**23)
    near = HeadCache(model.config, expected_tokens=at + sizes.chunk_tokens)
    far = HeadCache(
        model.config, expected_tokens=at + sizes.chunk_tokens, host_kv_budget_bytes=budget, disk_tier=str(work / "tier")
    )
    for cache in (near, far):
        fill_head_wise(cache, model.config, at)
    seconds = in_turns(
        {"far": lambda: step(model, far, sizes.chunk_tokens), "near": lambda: step(model, near, sizes.chunk_tokens)},
        sizes.chunks,
    )
    what = f"chunk of {sizes.chunk_tokens:,} tokens at offset {at:,}, KV on disk: seconds / KV in memory"
    details = {f"{name}_s": statistics.median(values) for name, values in seconds.items()}
    return Measure("disk-tier", what, ratio(seconds["far"], seconds["near"]), "x", "", details)


def _write_session(model: Any, folder: Path, sizes: Sizes) -> float:
    """Checkpoints of noise, as `headinfer read` makes them, into a session that `headinfer ask` finds; the seconds."""
    shutil.rmtree(folder, ignore_errors=True)
    tokens, seconds = sizes.long_tokens, 0.0
    about = {"model": BENCH_MODEL, "seed": 0, "raw": True, "document_tokens": tokens, "answers": 0}
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
    block = memoryview(os.urandom(_BLOCK_BYTES))
    with open(path, "wb", buffering=0) as file:
        for at in range(0, nbytes, _BLOCK_BYTES):
            file.write(block[: nbytes - at])
        os.fsync(file.fileno())


def _read_files(paths: list[Path]) -> None:
    buffer = mmap.mmap(-1, _BLOCK_BYTES)
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def _read_cold(path: Path) -> None:
    _forget([path])
    _read_files([path])


def _read_in_order(file: DiskFile, nbytes: int) -> None:
    """All bytes of a disk tier, one system call after the other, past the page cache where the file system can."""
    buffer = memoryview(mmap.mmap(-1, _BLOCK_BYTES))
    for at in range(0, nbytes, _BLOCK_BYTES):
        file.read([Read(at, buffer[: nbytes - at], is_aligned=True)])


def _forget(paths: list[Path]) -> None:
    """Let the system forget what it holds of files."""
    for path in paths:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def _work(folder: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=folder, prefix="headinfer-bench-") as work:
        yield Path(work)


DISK_SUITES: dict[str, Callable[[Sizes, Path], list[Measure]]] = {"session": session, "disk-tier": disk_tier}
