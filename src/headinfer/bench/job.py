"""What the GPU suites share: the device, how large they run, the time that is left, and what a line of the result says.

Nothing but `Job` knows CUDA's clocks and limits. On a CPU the engine's twin of the ring stands for the link, so that
all of it runs, and is tested, where there is no GPU; seconds mean nothing there.
"""

from __future__ import annotations

import gc
import math
import operator
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from headinfer.engine.machine import free_device_bytes
from headinfer.hf.models import resolve
from headinfer.plan.memory import available_host_bytes
from headinfer.plan.model_shape import ModelShape
from headinfer.plan.tiles import DEFAULT_BUDGET_BYTES
from headinfer.utils.units import format_tokens

__all__ = ["QUICK", "GpuSizes", "Job", "Line", "Rates", "goal_reached"]

K, M = 2**10, 2**20
_COMPARE = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt, "==": operator.eq}
_SPARE_DEVICE_BYTES = 512 * M  # activations of a token, libraries' workspaces, the allocator's gaps
_MARGIN = 1.5  # of a chunk's arithmetic over its copies
_MOST_CHUNK_TOKENS = 15_872  # with two units more it fits a segment of 16,384
_KERNEL_SHARE = 0.6  # of a matrix product's FLOP/s: about what attention attains
_REAL_KV_SHARE = 0.6  # of the host memory that is free: KV beyond that is one layer's, for all layers


@dataclass(frozen=True)
class GpuSizes:
    """How large the suites run. Contexts and offsets stand in the order of their importance: time may run out.

    floor_bytes: the device KV budget of the engine's own lines. chunk_tokens: of a prefill chunk; None: from the rates
    that are measured. real_kv_bytes: the largest KV that is really there, beyond it layers share one layer's (None:
    what host memory allows). longest_pass_s: a baseline that would take longer for one pass is left out.
    """

    model: str = "random:llama-3-8b?vocab=128256&context=4194304"
    dtype: torch.dtype = torch.bfloat16
    decode_tokens: tuple[int, ...] = (64 * K, 1024 * K, K, 4096 * K, 256 * K, 16 * K, 4 * K)
    chunk_offsets: tuple[int, ...] = (64 * K, 1024 * K)
    whole_tokens: tuple[int, ...] = (10 * K, 40 * K, 100 * K, 200 * K)
    chunk_tokens: int | None = None
    floor_bytes: int = DEFAULT_BUDGET_BYTES
    real_kv_bytes: int | None = None
    copy_bytes: tuple[int, ...] = (256 * M, 1024 * M)
    matrix: int = 8192
    rounds: int = 7
    rounds_s: float = 4.0
    longest_pass_s: float = 40.0


QUICK = GpuSizes(
    model="random:llama-3-8b?layers=2&context=4194304",
    decode_tokens=(16 * K, K),
    chunk_offsets=(16 * K,),
    whole_tokens=(10 * K,),
    copy_bytes=(64 * M,),
    matrix=4096,
    rounds=2,
)


@dataclass(frozen=True)
class Line:
    """One line of the result: of a suite, at a point of it, for one way of doing it.

    value None: it was not measured, and the note says why. ratio: its time over headinfer's, in turns with it.
    device_kv_bytes: KV on the device at its peak. goal: a comparison that `reached` answers; both empty where there
    is nothing to reach. details: figures and facts, for JSON.
    """

    suite: str
    point: str
    who: str
    value: float | None = None
    unit: str = ""
    ratio: float | None = None
    device_kv_bytes: int | None = None
    goal: str = ""
    reached: bool | None = None
    note: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)


def goal_reached(goal: str, value: float) -> bool | None:
    """Whether a value is as a goal such as ">= 92" or "<= 1.03 x" wants it; None where there is no goal."""
    if not goal:
        return None
    comparison, bound = goal.split()[:2]
    return bool(_COMPARE[comparison](value, float(bound)))


@dataclass(frozen=True)
class Rates:
    """What the machine attains in this run; FLOP and bytes per second. link: pinned host memory to the device."""

    flops_per_s: float
    device_bytes_per_s: float
    link_bytes_per_s: float
    back_bytes_per_s: float


class Job:
    """A run of the suites on one device."""

    def __init__(
        self,
        device: torch.device,
        sizes: GpuSizes,
        say: Callable[[str], None],
        *,
        limit_s: float = 480.0,
        gpu_memory_bytes: int | None = None,
    ) -> None:
        """gpu_memory_bytes: of a smaller card that the device stands for; the process is held to it."""
        self.device, self.sizes, self.say, self.gpu_memory_bytes = device, sizes, say, gpu_memory_bytes
        self.is_cuda = device.type == "cuda"
        self.until = time.monotonic() + limit_s
        self.rates = Rates(1.0, 1.0, 1.0, 1.0)
        if self.is_cuda:
            torch.cuda.set_device(device)
            if gpu_memory_bytes is not None:
                total = torch.cuda.get_device_properties(device).total_memory
                torch.cuda.set_per_process_memory_fraction(min(gpu_memory_bytes / total, 1.0), device)

    # -- the model -------------------------------------------------------------------------------------------

    @cached_property
    def model(self) -> Any:
        """The model of all suites: its shape is real, its weights are noise made on the device."""
        self.say(f"making {self.sizes.model} ...")
        torch.manual_seed(0)
        with self.device:
            made = AutoModelForCausalLM.from_config(resolve(self.sizes.model).config, dtype=self.sizes.dtype)
        return made.to(self.device).eval()

    @cached_property
    def shape(self) -> ModelShape:
        """Its layers, heads and bytes."""
        return ModelShape.from_config(resolve(self.sizes.model).config)

    def kv_bytes(self, tokens: int) -> int:
        """Bytes of K and V of so many tokens of all layers."""
        return tokens * self.shape.kv_bytes_per_token(self.sizes.dtype.itemsize)

    def options(self, **more: Any) -> dict[str, Any]:
        """Options of a HeadCache here: on a CPU the ring's twin, since its segments would be read in place."""
        return more if self.is_cuda else {"transport": "eager", **more}

    def chunk_tokens(self) -> int:
        """Tokens of a prefill chunk whose arithmetic takes half as long again as its KV's way over the link.

        Tq >= 1.5 F e / (2 G W), F and W as measured in this run; a multiple of 256, and room for it in one segment.
        """
        if self.sizes.chunk_tokens is not None:
            return self.sizes.chunk_tokens
        layer = self.shape.layers[self.shape.offloaded_layers[0]]
        group = layer.query_heads // layer.kv_heads
        needed = (
            _MARGIN * self.rates.flops_per_s * self.sizes.dtype.itemsize / (2 * group * self.rates.link_bytes_per_s)
        )
        return min(math.ceil(needed / 256) * 256, _MOST_CHUNK_TOKENS)

    def flops(self, past_tokens: int, tokens: int) -> float:
        """Floating-point operations of a pass of so many tokens after a past: matrices and causal attention."""
        pairs = tokens * (past_tokens + (tokens + 1) / 2)
        active = sum(layer.active_weights or layer.weights for layer in self.shape.layers)
        return 2 * active * tokens + sum(layer.flops_per_pair for layer in self.shape.layers) * pairs

    def pass_s(self, past_tokens: int, tokens: int) -> float:
        """About what such a pass takes where nothing but the device's arithmetic, its memory and the link bound it."""
        weights_s = self.shape.weights * self.sizes.dtype.itemsize / self.rates.device_bytes_per_s
        link_s = self.kv_bytes(past_tokens) / self.rates.link_bytes_per_s
        return max(self.flops(past_tokens, tokens) / (_KERNEL_SHARE * self.rates.flops_per_s), link_s) + weights_s

    # -- the clock -------------------------------------------------------------------------------------------

    @property
    def left_s(self) -> float:
        """Seconds until the suite that runs has to end."""
        return self.until - time.monotonic()

    def synchronize(self) -> None:
        """Return when the device has done all that it was given."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def timed(self, call: Callable[[], object]) -> float:
        """Wall seconds of a call and of all that it gave to the device."""
        self.synchronize()
        start = time.perf_counter()
        call()
        self.synchronize()
        return time.perf_counter() - start

    def stream(self) -> tuple[AbstractContextManager[Any], Callable[[], Any]]:
        """A queue of its own to give work to, and what takes a time stamp in it."""
        if not self.is_cuda:
            return nullcontext(), time.perf_counter
        queue = torch.cuda.Stream(self.device)

        def stamp() -> torch.cuda.Event:
            event = torch.cuda.Event(enable_timing=True)
            event.record(queue)
            return event

        return torch.cuda.stream(queue), stamp

    def between_s(self, first: Any, second: Any) -> float:
        """Seconds from one time stamp to another, after synchronize()."""
        return float(first.elapsed_time(second)) / 1000 if self.is_cuda else second - first

    # -- memory ----------------------------------------------------------------------------------------------

    def free_device_bytes(self) -> int:
        """Bytes of device memory for KV: what is free for this process, less a reserve."""
        if not self.is_cuda:
            free = available_host_bytes()
            return min(free, self.gpu_memory_bytes) if self.gpu_memory_bytes is not None else free
        return max(free_device_bytes(self.device) - _SPARE_DEVICE_BYTES, 0)

    def peak_device_bytes(self) -> int:
        """The most that tensors have taken on the device since forget_peak(), the weights included; 0 on a CPU."""
        return torch.cuda.max_memory_allocated(self.device) if self.is_cuda else 0

    def forget_peak(self) -> None:
        """Begin to look for a new peak."""
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats(self.device)

    def is_simulated(self, tokens: int) -> bool:
        """Whether host memory is short of the KV of so many tokens, so that all layers read one layer's."""
        room = self.sizes.real_kv_bytes
        return self.kv_bytes(tokens) > (_REAL_KV_SHARE * available_host_bytes() if room is None else room)

    def clean(self) -> None:
        """Give back what nobody holds any more, on the device and pinned on the host."""
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()
            empty_host_cache = getattr(torch.accelerator, "empty_host_cache", None)  # not in every torch
            if empty_host_cache is not None:
                empty_host_cache()

    def point(self, tokens: int) -> str:
        """A context for people."""
        return f"{format_tokens(tokens)} tokens"
