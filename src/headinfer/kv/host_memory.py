"""Allocates host memory for KV: exact sizes, page-aligned, and returned to the system when the last tensor is freed.

malloc and torch's caching pinned allocator do not do that. The first keeps freed memory, the second rounds sizes up to
powers of two (179.7 GB became 275 GB in sglang issue 12266).
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
# mmap's default is shared memory, which has no huge pages on most systems. A disk fills huge pages twice as fast, too.
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}


class HostTier:
    """Allocates host memory for KV, counts it, and pins it if a CUDA device copies from it.

    Memory is pinned by registering its pages with CUDA, at their exact size. If the system refuses this (limits on
    locked memory, WSL2), `pin_refusal` is set, and this and all later memory stays pageable; read_ahead.py then copies
    it to the device through a few pinned buffers.

    Tensors are ordinary ones under inference_mode() too, because the cache may be used without it later.

    Args:
        counter: counts the bytes.
        device: the CUDA device that copies from the memory; None if the memory does not have to be pinned.
        node: the preferred NUMA node; None for no preference.

    Attributes:
        make_room: called with a number of bytes before these are allocated; disk_tier.py sets it.
        pin_refusal: why memory cannot be pinned; empty if it can.
    """

    def __init__(self, counter: ByteCounter, *, device: torch.device | None = None, node: int | None = None) -> None:
        self.counter = counter
        self.device = device
        self.node = node
        self.make_room: Callable[[int], None] = lambda nbytes: None
        self.pin_refusal = ""
        self._pinned: set[int] = set()  # addresses

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Allocate a tensor of zeros in pages of its own.

        Unless the memory is pinned, the system provides each page when it is first written to.

        Raises:
            CapacityError: the system refuses the address space.
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
            # After a fork, copy-on-write could give this process a new copy of a page that a device writes to.
            pages.madvise(mmap.MADV_DONTFORK)
        # The storage of the tensor keeps this array alive, and the array the pages. The finalizer below is the array's,
        # because it must run before the pages are unmapped; the finalizer of an mmap object runs after that.
        holder = (ctypes.c_char * nbytes).from_buffer(pages)
        with torch.inference_mode(False):
            tensor = torch.frombuffer(holder, dtype=dtype).view(shape)
        self.counter.hold_host(nbytes)
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
        """Allocate a uint8 buffer that a device can copy from.

        If the system refused to register memory, CUDA's own pinned allocator is tried. If that fails too, the buffer is
        pageable: copies from it are slower, but correct.
        """
        if self.device is not None and self.pin_refusal:
            try:
                with torch.inference_mode(False):
                    tensor = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
            except RuntimeError:
                _clear_error(self.device)
            else:
                self.make_room(nbytes)
                self.counter.hold_host(nbytes)
                weakref.finalize(tensor, self.counter.hold_host, -nbytes).atexit = False
                return tensor
        return self.allocate((nbytes,), torch.uint8)

    def is_pageable(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor from allocate() should be pinned, but is not."""
        return self.device is not None and tensor.untyped_storage().data_ptr() not in self._pinned


def register(address: int, nbytes: int, device: torch.device) -> str:
    """Pin pages by registering them with CUDA.

    Args:
        address: the first byte, at the beginning of a page.
        nbytes: the size of the range.
        device: the CUDA device in whose context the call is made.

    Returns:
        Why CUDA refused; empty if the pages are pinned.
    """
    with torch.cuda.device(device):
        status = int(torch.cuda.cudart().cudaHostRegister(address, nbytes, 0))
    if not status:
        return ""
    _clear_error(device)
    return f"cudaHostRegister refused {nbytes} bytes with status {status}"


def _unpin(pinned: set[int], address: int, device: torch.device) -> None:
    torch.cuda.synchronize(device)  # a copy may still read the memory
    with torch.cuda.device(device):
        status = int(torch.cuda.cudart().cudaHostUnregister(address))
    if status:
        _clear_error(device)
    pinned.discard(address)


def _clear_error(device: torch.device) -> None:
    """Clear the error that CUDA keeps of a call that it refused.

    torch raises such an error after the next kernel launch, whichever that is, and clears it. So launch a kernel here.
    """
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device=device)  # torch.zeros() launches no kernel in some versions of torch


def _release(counter: ByteCounter, nbytes: int, unpin: Callable[[], None] | None) -> None:
    if unpin is not None:
        unpin()
    counter.hold_host(-nbytes)
