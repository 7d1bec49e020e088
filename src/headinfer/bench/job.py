"""Jobs: one run of suites on a CPU or on a GPU, with its sizes, its clock and the time that is left.

Only `GpuJob` uses CUDA's clocks and limits. On a CPU the engine's "eager" transport stands for the link, so that every
GPU suite also runs, and is tested, on a machine without a GPU; its seconds mean nothing there.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import math
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from headinfer.bench.sizes import CpuSizes, GpuSizes, Sizes
from headinfer.bench.timing import Rounds, Turn, device_timer, in_turns
from headinfer.engine.machine import free_device_bytes
from headinfer.errors import UsageError
from headinfer.hf.models import resolve
from headinfer.kv.host_memory import finish_release
from headinfer.plan.memory import available_host_bytes
from headinfer.plan.model_shape import ModelShape
from headinfer.utils.files import check_folder
from headinfer.utils.units import format_seconds

__all__ = ["CpuJob", "GpuJob", "Job", "Rates"]

_SPARE_DEVICE_BYTES = 512 * 2**20  # activations of a token, workspaces of libraries, gaps of the allocator
_CHUNK_MARGIN = 1.5  # the arithmetic of a chunk over its copies
_MOST_CHUNK_TOKENS = 15_872  # with two tail units of 256 tokens more it fits a segment of 16,384
_KERNEL_SHARE = 0.6  # about the share of a matrix product's FLOP/s that attention reaches
_REAL_KV_SHARE = 0.6  # of the free host memory; larger KV is simulated by one layer's


@dataclass(frozen=True)
class Rates:
    """What a GPU and its link reach in this run.

    Attributes:
        flops_per_s: floating-point operations per second of a matrix product.
        device_bytes_per_s: bytes per second that the device's memory reads and writes.
        link_bytes_per_s: bytes per second from pinned host memory to the device.
        back_bytes_per_s: bytes per second from the device to pinned host memory.
    """

    flops_per_s: float
    device_bytes_per_s: float
    link_bytes_per_s: float
    back_bytes_per_s: float


class Job:
    """A run of suites on one device.

    Args:
        device: the device that computes.
        sizes: how large the suites run.
        say: called with a line of progress.
        limit_s: seconds for all suites together.
    """

    def __init__(
        self, device: torch.device, sizes: Sizes, say: Callable[[str], None], *, limit_s: float = math.inf
    ) -> None:
        self.device = device
        self.say = say
        self.limit_s = limit_s
        self.until = time.monotonic() + limit_s
        self.timed = device_timer(device)
        self._sizes = sizes

    @property
    def left_s(self) -> float:
        """Seconds until the running suite has to end."""
        return self.until - time.monotonic()

    def begin(self, what: str, about_s: float) -> None:
        """Say what begins, about how long it will take, and how much time its suite has left."""
        left = "" if math.isinf(self.until) else f"; {format_seconds(max(self.left_s, 0.0))} are left"
        self.say(f"{what}: about {format_seconds(max(about_s, 0.1))}{left}")

    def in_turns(self, what: str, turns: Mapping[str, Turn], rounds: int, *, warm_up: bool = True) -> Rounds:
        """Time alternatives in turns, and say how long it will take when each of them has run once."""
        count = "a round" if rounds == 1 else f"{rounds} rounds"
        return in_turns(
            turns, rounds, self.timed, warm_up=warm_up, expect=lambda about_s: self.begin(f"{what}, {count}", about_s)
        )

    def clean(self) -> None:
        """Free the memory that nothing refers to any more."""
        gc.collect()

    def facts(self) -> dict[str, Any]:
        """Return the facts about the run for the JSON of a result, without the machine."""
        return {"model": self._sizes.model, "dtype": str(self._sizes.dtype).removeprefix("torch.")}


class CpuJob(Job):
    """A run of the CPU's suites.

    Args:
        sizes: how large the suites run.
        say: called with a line of progress.
        folder: a folder on the disk that is measured; None: the system's folder for temporary files.

    Raises:
        UsageError: there is no such folder, or it is not writable.
    """

    def __init__(self, sizes: CpuSizes, say: Callable[[str], None], *, folder: Path | None = None) -> None:
        super().__init__(torch.device("cpu"), sizes, say)
        self.sizes = sizes
        self.folder = folder or Path(tempfile.gettempdir())
        if not self.folder.is_dir():
            raise UsageError(f"there is no folder {self.folder}: name one on the disk that is to be measured")
        if folder is not None:
            check_folder(folder, "measure the disk")


class GpuJob(Job):
    """A run of the GPU's suites.

    Args:
        device: the CUDA device, or a CPU in tests.
        sizes: how large the suites run.
        say: called with a line of progress.
        limit_s: seconds for all suites together.
        gpu_memory_bytes: the memory of a smaller card, to which the process is held.
    """

    def __init__(
        self,
        device: torch.device,
        sizes: GpuSizes,
        say: Callable[[str], None],
        *,
        limit_s: float = 480.0,
        gpu_memory_bytes: int | None = None,
    ) -> None:
        super().__init__(device, sizes, say, limit_s=limit_s)
        self.sizes = sizes
        self.gpu_memory_bytes = gpu_memory_bytes
        self.is_cuda = device.type == "cuda"
        self.rates = Rates(1.0, 1.0, 1.0, 1.0)
        if self.is_cuda:
            torch.cuda.set_device(device)
            if gpu_memory_bytes is not None:
                total = torch.cuda.get_device_properties(device).total_memory
                torch.cuda.set_per_process_memory_fraction(min(gpu_memory_bytes / total, 1.0), device)

    def facts(self) -> dict[str, Any]:
        """Return the facts about the run for the JSON of a result, without the machine."""
        return {
            "gpu_memory_bytes": self.gpu_memory_bytes,
            **super().facts(),
            "weights_bytes": self.shape.weights * self.sizes.dtype.itemsize,
            "rates": dataclasses.asdict(self.rates),
        }

    # -- the model -------------------------------------------------------------------------------------------

    @cached_property
    def model(self) -> Any:
        """The model of all suites. Its shape is real; its weights are noise that the device draws."""
        self.say(f"making {self.sizes.model} ...")
        return resolve(self.sizes.model).load(dtype=self.sizes.dtype, device=str(self.device), seed=0)

    def with_model(self, model: str) -> GpuJob:
        """Return this run with another model, and free the memory of this one's."""
        self.__dict__.pop("model", None)
        self.clean()
        other = copy.copy(self)
        for name in ("model", "shape"):
            other.__dict__.pop(name, None)
        other.sizes = dataclasses.replace(self.sizes, model=model)
        return other

    @cached_property
    def shape(self) -> ModelShape:
        """The model's layers, heads and bytes."""
        return ModelShape.from_config(resolve(self.sizes.model).config)

    def kv_bytes(self, tokens: int) -> int:
        """Return the bytes of K and V of `tokens` tokens in all layers."""
        return tokens * self.shape.kv_bytes_per_token(self.sizes.dtype.itemsize)

    def options(self, **more: Any) -> dict[str, Any]:
        """Return options of a HeadCache for this device: on a CPU the "eager" transport, so that there is a ring.

        The host's CPU attends to nothing, unless an option gives it a share.
        """
        return {"cpu_share": 0.0, **({} if self.is_cuda else {"transport": "eager"}), **more}

    def chunk_tokens(self) -> int:
        """Return the tokens of a prefill chunk that computes for 1.5 times as long as its KV is copied.

        T >= 1.5 F e / (2 G W), with F FLOP/s and W bytes per second of the link as measured in this run, e bytes of an
        element, and G query heads a KV head. The result is a multiple of 256 that fits one segment.
        """
        if self.sizes.chunk_tokens is not None:
            return self.sizes.chunk_tokens
        layer = self.shape.layers[self.shape.offloaded_layers[0]]
        group = layer.query_heads // layer.kv_heads
        arithmetic = _CHUNK_MARGIN * self.rates.flops_per_s * self.sizes.dtype.itemsize
        needed = arithmetic / (2 * group * self.rates.link_bytes_per_s)
        return min(math.ceil(needed / 256) * 256, _MOST_CHUNK_TOKENS)

    def flops(self, past_tokens: int, tokens: int) -> float:
        """Return the floating-point operations of a pass after a past: matrices and causal attention."""
        pairs = tokens * (past_tokens + (tokens + 1) / 2)
        active = sum(layer.active_weights or layer.weights for layer in self.shape.layers)
        return 2 * active * tokens + sum(layer.flops_per_pair for layer in self.shape.layers) * pairs

    def pass_s(self, past_tokens: int, tokens: int) -> float:
        """Estimate the seconds of such a pass if only arithmetic, the device's memory and the link bound it."""
        weights_s = self.shape.weights * self.sizes.dtype.itemsize / self.rates.device_bytes_per_s
        link_s = self.kv_bytes(past_tokens) / self.rates.link_bytes_per_s
        return max(self.flops(past_tokens, tokens) / (_KERNEL_SHARE * self.rates.flops_per_s), link_s) + weights_s

    # -- the device's clock ----------------------------------------------------------------------------------

    def synchronize(self) -> None:
        """Wait until the device has done all queued work."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def stream(self) -> tuple[AbstractContextManager[Any], Callable[[], Any]]:
        """Return the context of a new queue, and a function that records a time stamp in that queue."""
        if not self.is_cuda:
            return nullcontext(), time.perf_counter
        queue = torch.cuda.Stream(self.device)

        def stamp() -> torch.cuda.Event:
            event = torch.cuda.Event(enable_timing=True)
            event.record(queue)
            return event

        return torch.cuda.stream(queue), stamp

    def between_s(self, first: Any, second: Any) -> float:
        """Return the seconds between two time stamps; call synchronize() before."""
        return float(first.elapsed_time(second)) / 1000 if self.is_cuda else second - first

    # -- memory ----------------------------------------------------------------------------------------------

    def free_device_bytes(self) -> int:
        """Return the bytes of device memory for KV: what is free for this process, less a reserve."""
        if not self.is_cuda:
            free = available_host_bytes()
            return min(free, self.gpu_memory_bytes) if self.gpu_memory_bytes is not None else free
        return max(free_device_bytes(self.device) - _SPARE_DEVICE_BYTES, 0)

    def peak_device_bytes(self) -> int:
        """Return the peak of all tensors on the device, weights included, since reset_peak(); 0 on a CPU."""
        return torch.cuda.max_memory_allocated(self.device) if self.is_cuda else 0

    def reset_peak(self) -> None:
        """Begin to look for a new peak."""
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats(self.device)

    def is_simulated(self, tokens: int) -> bool:
        """Return whether the KV of `tokens` tokens exceeds host memory, so that all layers read the KV of one layer."""
        most = self.sizes.real_kv_bytes
        return self.kv_bytes(tokens) > (_REAL_KV_SHARE * available_host_bytes() if most is None else most)

    def clean(self) -> None:
        """Free the memory that nothing refers to any more, on the device and pinned memory of the host."""
        super().clean()
        finish_release()
        if self.is_cuda:
            torch.cuda.empty_cache()
            empty_host_cache = getattr(torch.accelerator, "empty_host_cache", None)  # not in every torch
            if empty_host_cache is not None:
                empty_host_cache()
