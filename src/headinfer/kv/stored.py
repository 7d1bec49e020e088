"""A segment in a file of a session, which is verified and loaded when it is first read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from headinfer.kv.disk_file import DiskFile
from headinfer.kv.host_memory import HostTier
from headinfer.kv.segments import Segment
from headinfer.kv.tensor_file import TensorFile
from headinfer.utils.tensors import Piece

__all__ = ["StoredSegment"]


class StoredSegment(Segment):
    """K and V of some tokens of one layer in a file of a session.

    Without a tier the file is mapped and read in place, so the system can free the memory and read it again. With a
    tier, K and V are copied to memory of the tier, for devices that copy from pinned memory only.

    Args:
        file: the file.
        key_name: the name of K in the file; K is [Hkv, tokens, Dk].
        value_name: the name of V in the file; V is [Hkv, tokens, Dv].
        tier: allocates memory for a copy; None: none is made.
        on_full: called with the segment after it has been copied.

    Attributes:
        following: the segment that is needed next. The system reads it ahead when this one is first read.
    """

    def __init__(
        self,
        file: TensorFile,
        key_name: str,
        value_name: str,
        tier: HostTier | None = None,
        on_full: Callable[[Sequence[Segment]], None] | None = None,
    ) -> None:
        self._current: Piece = (file.tensor(key_name), file.tensor(value_name))  # on the file, or the copy of a tier
        self.tokens = self._current[0].shape[1]
        self.sealed = True
        self._unverified: tuple[TensorFile, str, str] | None = (file, key_name, value_name)
        self._tier = tier
        self._on_full = on_full
        self.following: StoredSegment | None = None

    @property
    def k(self) -> torch.Tensor:
        """K, verified."""
        return self._ready()[0]

    @property
    def v(self) -> torch.Tensor:
        """V, verified."""
        return self._ready()[1]

    def _ready(self) -> Piece:
        """Return K and V; the first call verifies their checksums.

        Raises:
            SessionError: the file is not as it was written.
        """
        if self._unverified is not None:
            if self.following is not None:
                self.following.prefetch()
            file, *names = self._unverified
            for name in names:
                file.verify(name)
            if self._tier is not None:
                k, v = self._current
                super().__init__(self._tier, k.shape[0], k.shape[1], k.shape[2], v.shape[2], k.dtype)
                self.sealed = True
                for own, mapped in zip(self._pair, (k, v), strict=True):
                    own.copy_(mapped)
                self._current = self._pair
                if self._on_full is not None:
                    self._on_full([self])
            self._unverified = None
        return self._current

    def move_to(self, file: DiskFile, start: int) -> None:
        """Move the segment to a file, as Segment.move_to() does."""
        super().move_to(file, start)
        del self._current

    def prefetch(self) -> None:
        """Ask the system to read the segment from the file soon, unless it has been read."""
        if self._unverified is not None:
            file, *names = self._unverified
            for name in names:
                file.prefetch(name)
