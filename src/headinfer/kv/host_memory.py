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
import os
import warnings
import weakref
from collections.abc import Callable, Sequence

import torch

from headinfer.errors import CapacityError
from headinfer.kv.byte_counter import ByteCounter
from headinfer.kv.numa import interleave, memory_nodes, prefer
from headinfer.kv.page_work import Mapping, Pages, Preparer, Releaser

__all__ = ["HostTier", "ReservedMemory", "finish_release", "register", "releasing_bytes"]

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
        node: the preferred NUMA node; None for no preference. Without a device, pages are interleaved among the nodes.

    Attributes:
        make_room: called with a number of bytes before these are allocated; disk_tier.py sets it.
        pin_refusal: why memory cannot be pinned; empty if it can.
        preparer: prepares memory that is pinned; None without a device.
    """

    def __init__(self, counter: ByteCounter, *, device: torch.device | None = None, node: int | None = None) -> None:
        self.counter = counter
        self.device = device
        self.node = node
        self.make_room: Callable[[int], None] = lambda nbytes: None
        self.pin_refusal = ""
        self._pinned: set[int] = set()  # addresses
        self.preparer: Preparer | None = None
        if device is not None:
            self.preparer = Preparer(functools.partial(_register_on, device))

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Allocate a tensor of zeros in pages of its own.

        Unless the memory is pinned, the system provides each page when it is first written to.

        Raises:
            CapacityError: the system refuses the address space.
        """
        pages = self._map(shape, dtype)
        if self.preparer is not None and not self.pin_refusal:
            self.preparer.prepare_now(pages)
            self.note(pages)
        return pages.tensor

    def reserve(self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, rows: int) -> ReservedMemory:
        """Reserve address space for tensors that a layer will need, and prepare their pages ahead of their use.

        All bytes are counted at once.

        Args:
            shapes: the shapes of the tensors, in the order of their use.
            dtype: their dtype.
            rows: how many tensors are needed at the same time: one for each row of the batch.

        Raises:
            CapacityError: the system refuses the address space.
        """
        reserved = [self._map(shape, dtype) for shape in shapes]
        if self.preparer is not None:
            for number, pages in enumerate(reserved):
                self.preparer.add(pages, number // rows)
        return ReservedMemory(self, reserved)

    def wait(self, pages: Pages) -> None:
        """Wait until reserved pages are ready."""
        if self.preparer is not None:
            self.preparer.wait(pages)

    def prepare_ahead(self) -> None:
        """Prepare reserved memory in the background. Call it when all layers have reserved theirs."""
        if self.preparer is not None:
            self.preparer.prepare_ahead()

    def pause(self) -> None:
        """Stop preparing memory in the background, until prepare_ahead() is called again."""
        if self.preparer is not None:
            self.preparer.pause()

    def _map(self, shape: tuple[int, ...], dtype: torch.dtype) -> Pages:
        """Map pages for a tensor of zeros, and count them."""
        nbytes = math.prod(shape) * dtype.itemsize
        self.make_room(nbytes)
        try:
            memory = mmap.mmap(-1, nbytes, **_PRIVATE)
        except (OSError, ValueError) as error:
            raise CapacityError(
                f"the system refused {nbytes / 2**20:.0f} MiB of host memory for the KV cache ({error}): "
                "use a shorter context, a smaller dtype, or free some memory"
            ) from error
        if nbytes >= _HUGE_PAGES_FROM_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        if self.device is not None and hasattr(mmap, "MADV_DONTFORK"):
            # After a fork, copy-on-write could give this process a new copy of a page that a device writes to.
            memory.madvise(mmap.MADV_DONTFORK)
        # The storage of the tensor keeps this array alive. Its finalizer gets the pages, because they must be unpinned
        # before they are unmapped.
        holder = (ctypes.c_char * nbytes).from_buffer(memory)
        with torch.inference_mode(False):
            tensor = torch.frombuffer(holder, dtype=dtype).view(shape)
        self.counter.hold_host(nbytes)
        address = tensor.untyped_storage().data_ptr()
        if self.node is not None:
            prefer(address, nbytes, self.node)
        elif self.device is None:
            nodes = memory_nodes()
            if len(nodes) > 1:
                interleave(address, nbytes, nodes)
        mapping = Mapping(memory, address, nbytes, self.device, self._pinned, self.counter)
        weakref.finalize(holder, _release, mapping).atexit = False
        return Pages(tensor, mapping)

    def note(self, pages: Pages) -> None:
        """Raise the error that ended the preparation of pages, and warn once if the system refused to pin them."""
        if pages.error is not None:
            raise pages.error
        if pages.refusal and not self.pin_refusal:
            self.pin_refusal = pages.refusal
            warnings.warn(f"host memory stays pageable, transfers will be slower: {self.pin_refusal}", stacklevel=3)

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


def _register_on(device: torch.device, address: int, nbytes: int) -> str:
    return register(address, nbytes, device)


def _unpin(pinned: set[int], address: int, device: torch.device) -> None:
    pinned.discard(address)
    if not _is_in_use(device):
        return
    with torch.cuda.device(device):
        status = int(torch.cuda.cudart().cudaHostUnregister(address))
    if status:
        _clear_error(device)


def _is_in_use(device: torch.device) -> bool:
    """Return whether this process may have copies queued on a device, or memory registered with it."""
    return device.type == "cuda" and torch.cuda.is_initialized()


def _clear_error(device: torch.device) -> None:
    """Clear the error that CUDA keeps of a call that it refused.

    torch raises such an error after the next kernel launch, whichever that is, and clears it. So launch a kernel here.
    """
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device=device)  # torch.zeros() launches no kernel in some versions of torch


def _wait_for_device(device: torch.device) -> None:
    """Wait until no queued copy reads host memory."""
    if _is_in_use(device):
        with contextlib.suppress(RuntimeError):  # an earlier error of the device
            torch.cuda.synchronize(device)


def _unpin_mapping(mapping: Mapping) -> None:
    assert mapping.device is not None
    _unpin(mapping.pinned, mapping.address, mapping.device)


def _release(mapping: Mapping) -> None:
    """Release the pages of a tensor that no longer exists: at once, or in a thread if they are pinned."""
    if mapping.process != os.getpid():
        _KEPT.append(mapping)  # a fork does not have the pages, and something else may be at their address
        return
    mapping.counter.hold_host(-mapping.nbytes)
    mapping.note_untouched(False)
    if mapping.address in mapping.pinned:
        _releasers[-1].add(mapping)


def releasing_bytes() -> int:
    """Return the bytes of host memory that are no longer counted, and that a thread is about to free."""
    return _releasers[-1].nbytes


def finish_release() -> None:
    """Wait until all host memory that is no longer used is free. Call it before free memory is measured."""
    _releasers[-1].finish()


def _new_releaser() -> None:
    """Begin without threads and locks, in a new process or after a fork."""
    _releasers.append(Releaser(_wait_for_device, _unpin_mapping))


_KEPT: list[Mapping] = []
_releasers: list[Releaser] = []  # the last one is used; after a fork, the others are those of other processes
_new_releaser()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_releaser)


class ReservedMemory:
    """Memory that is reserved for a layer. It allocates as a HostTier does, from the reserved memory if that fits.

    Args:
        tier: the tier that has reserved it.
        pages: the reserved tensors and their pages.
    """

    def __init__(self, tier: HostTier, pages: list[Pages]) -> None:
        self._tier = tier
        self._pages = pages

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return a reserved tensor of this shape, when its pages are ready, or allocate one if none is left.

        Raises:
            CapacityError: the system refuses the address space.
        """
        for pages in self._pages:
            if pages.tensor.shape == shape and pages.tensor.dtype == dtype:
                self._tier.wait(pages)
                self._pages.remove(pages)
                self._tier.note(pages)
                return pages.tensor
        return self._tier.allocate(shape, dtype)

    def is_pageable(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor from allocate() should be pinned, but is not."""
        return self._tier.is_pageable(tensor)
