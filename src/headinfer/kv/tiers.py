"""Host memory for KV segments: exact sizes, page-aligned, returned to the system when the last user lets go.

Neither malloc nor torch's caching pinned allocator does that: the first keeps freed blocks, the second rounds
sizes up to powers of two (179.7 GB became 275 GB in sglang issue 12266).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import mmap
import warnings
import weakref
from collections.abc import Callable

import torch

from headinfer.errors import CapacityError
from headinfer.kv.byte_counter import ByteCounter
from headinfer.kv.numa import prefer

__all__ = ["HostTier", "register"]

_HUGE_PAGES_FROM_BYTES = 4 * 1024 * 1024
# The default is shared memory, which most systems do not give huge pages; a disk fills those twice as fast too.
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}


class HostTier:
    """Allocates host memory and counts it in a counter; pins it where a CUDA device will copy from it.

    Memory is pinned by registering pages that are there, at their exact size. Where the system refuses (limits on
    locked memory, WSL2), it stays pageable, pin_refusal says why, and nothing more is tried: what lies there goes to
    the device through a few buffers (read_ahead.py). node: the NUMA node that is preferred. Tensors are ordinary ones
    under inference_mode() too, since a cache may be used without it later.
    """

    def __init__(self, counter: ByteCounter, *, device: torch.device | None = None, node: int | None = None) -> None:
        """device: that copies from it, where it has to be pinned for that."""
        self.counter = counter
        self.make_room: Callable[[int], None] = lambda nbytes: None  # before bytes are taken: see disk_tier.py
        self.device, self.node = device, node
        self.pin_refusal = ""
        self._pinned: set[int] = set()  # addresses

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of zeros in fresh pages: shape and dtype as asked, bytes exact.

        The pages are taken from the system as they are first written, or pinned. Raises CapacityError where the system
        refuses the address space.
        """
        nbytes = math.prod(shape) * dtype.itemsize
        self.make_room(nbytes)
        try:
            pages = mmap.mmap(-1, nbytes, **_PRIVATE)
        except (OSError, ValueError) as error:
            raise CapacityError(
                f"the system refused {nbytes / 2**20:.0f} MiB of host memory for the KV cache ({error}): "
                "use a shorter context, a smaller dtype, or free some memory"
            ) from error
        if nbytes >= _HUGE_PAGES_FROM_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
            pages.madvise(mmap.MADV_HUGEPAGE)
        if self.device is not None and hasattr(mmap, "MADV_DONTFORK"):
            pages.madvise(mmap.MADV_DONTFORK)  # else a fork could move our side of a page that a device writes to
        # Weak references to an mmap are cleared after its pages are gone; those to what holds it, before.
        holder = (ctypes.c_char * nbytes).from_buffer(pages)
        with torch.inference_mode(False):
            tensor = torch.frombuffer(holder, dtype=dtype).view(shape)
        self.counter.hold_host(nbytes)
        # The storage, not this view of it, lives as long as anyone reads the memory.
        address = tensor.untyped_storage().data_ptr()
        if self.node is not None:
            prefer(address, nbytes, self.node)
        if self.device is not None and not self.pin_refusal:
            self.pin_refusal = register(address, nbytes, self.device)
            if self.pin_refusal:
                warnings.warn(f"host memory stays pageable, transfers will be slower: {self.pin_refusal}", stacklevel=2)
            else:
                self._pinned.add(address)
        release: Callable[[], None] | None = None
        if self.device is not None and address in self._pinned:
            release = functools.partial(_unpin, self._pinned, address, self.device)
        weakref.finalize(holder, _release, self.counter, nbytes, release).atexit = False
        return tensor

    def buffer(self, nbytes: int) -> torch.Tensor:
        """Bytes that a device can copy from: where registering memory was refused, from CUDA's own allocator."""
        if self.device is not None and self.pin_refusal:
            try:
                with torch.inference_mode(False):
                    tensor = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
            except RuntimeError:  # that is refused too: copies from pageable memory are slower, and right
                _forget_error(self.device)
            else:
                self.make_room(nbytes)
                self.counter.hold_host(nbytes)
                weakref.finalize(tensor, self.counter.hold_host, -nbytes).atexit = False
                return tensor
        return self.allocate((nbytes,), torch.uint8)

    def is_pageable(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor that allocate() gave should be pinned and is not."""
        return self.device is not None and tensor.untyped_storage().data_ptr() not in self._pinned


def register(address: int, nbytes: int, device: torch.device) -> str:
    """Pin pages for CUDA; empty, or why that was refused."""
    with torch.cuda.device(device):
        status = int(torch.cuda.cudart().cudaHostRegister(address, nbytes, 0))
    if not status:
        return ""
    _forget_error(device)
    return f"cudaHostRegister refused {nbytes} bytes with status {status}"


def _unpin(pinned: set[int], address: int, device: torch.device) -> None:
    torch.cuda.synchronize(device)  # a copy may still read it
    with torch.cuda.device(device):
        status = int(torch.cuda.cudart().cudaHostUnregister(address))
    if status:
        _forget_error(device)
    pinned.discard(address)


def _forget_error(device: torch.device) -> None:
    """CUDA keeps the error of a call that it refused, and torch raises it after the next kernel, whatever that is.

    So a kernel is launched for it here: torch clears the error as it raises it.
    """
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device=device)  # zeros need no kernel in every torch


def _release(counter: ByteCounter, nbytes: int, unpin: Callable[[], None] | None) -> None:
    if unpin is not None:
        unpin()
    counter.hold_host(-nbytes)
