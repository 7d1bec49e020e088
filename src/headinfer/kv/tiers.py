"""Host memory for KV segments: exact sizes, page-aligned, returned to the system when the last user lets go.

Neither malloc nor torch's caching pinned allocator does that: the first keeps freed blocks, the second rounds
sizes up to powers of two (179.7 GB became 275 GB in sglang issue 12266).
"""

from __future__ import annotations

import math
import mmap
import warnings
import weakref
from collections.abc import Callable

import torch

from headinfer.errors import CapacityError
from headinfer.kv.ledger import Ledger

__all__ = ["HostTier"]

_HUGE_PAGES_FROM_BYTES = 4 * 1024 * 1024
# The default is shared memory, which most systems do not give huge pages; a disk fills those twice as fast too.
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}


class HostTier:
    """Allocates host memory and counts it in a ledger; pins it where a CUDA device will copy from it."""

    def __init__(self, ledger: Ledger, *, pin: bool = False) -> None:
        self.ledger = ledger
        self.make_room: Callable[[int], None] = lambda nbytes: None  # before bytes are taken: see disk_tier.py
        self.pin = pin
        self.pin_refusal = ""

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of zeros in fresh pages: shape and dtype as asked, bytes exact.

        The pages are taken from the system as they are first written. Raises CapacityError where the system
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
        tensor = torch.frombuffer(pages, dtype=dtype).view(shape)
        self.ledger.hold_host(nbytes)
        # The storage, not this view of it, lives as long as anyone reads the memory.
        storage = tensor.untyped_storage()
        address = storage.data_ptr() if self.pin and self._register(storage.data_ptr(), nbytes) else 0
        weakref.finalize(pages, _release, self.ledger, nbytes, address).atexit = False
        return tensor

    def _register(self, address: int, nbytes: int) -> bool:
        status = int(torch.cuda.cudart().cudaHostRegister(address, nbytes, 0))
        if status and not self.pin_refusal:
            self.pin_refusal = f"cudaHostRegister refused {nbytes} bytes with status {status}"
            warnings.warn(f"host memory stays pageable, transfers will be slow: {self.pin_refusal}", stacklevel=3)
        return status == 0


def _release(ledger: Ledger, nbytes: int, registered_address: int) -> None:
    if registered_address:
        torch.cuda.synchronize()  # a copy stream may still read it
        torch.cuda.cudart().cudaHostUnregister(registered_address)
    ledger.hold_host(-nbytes)
