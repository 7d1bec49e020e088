"""A segment that lies in a file of a session: verified and brought in when it is first read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from headinfer.kv.disk import DiskFile
from headinfer.kv.segments import Segment
from headinfer.kv.tensor_file import TensorFile
from headinfer.kv.tiers import HostTier
from headinfer.utils.tensors import Piece

__all__ = ["StoredSegment"]


class StoredSegment(Segment):
    """K and V of one layer in a file, read there as memory that the system can take back and bring in again.

    tier: where given, they are copied to its memory instead, for devices that copy from pinned memory only; on_full is
    then called with the segment.
    """

    def __init__(
        self,
        file: TensorFile,
        key_name: str,
        value_name: str,
        tier: HostTier | None = None,
        on_full: Callable[[Sequence[Segment]], None] | None = None,
    ) -> None:
        self._mapped = file.tensor(key_name), file.tensor(value_name)
        self.tokens = self._mapped[0].shape[1]
        self.sealed = True
        self._source: tuple[TensorFile, str, str] | None = (file, key_name, value_name)
        self._tier, self._on_full = tier, on_full
        self.following: StoredSegment | None = None  # what is needed next

    @property
    def k(self) -> torch.Tensor:
        """K, verified."""
        return self._ready()[0]

    @property
    def v(self) -> torch.Tensor:
        """V, verified."""
        return self._ready()[1]

    def _ready(self) -> Piece:
        """Verify the checksums, once. Raises SessionError where the file is not what was written."""
        if self._source is not None:
            if self.following is not None:
                self.following.expect()
            file, *names = self._source
            for name in names:
                file.verify(name)
            if self._tier is not None:
                k, v = self._mapped
                super().__init__(self._tier, k.shape[0], k.shape[1], k.shape[2], v.shape[2], k.dtype)
                self.sealed = True
                for own, mapped in zip(self._pair, (k, v), strict=True):
                    own.copy_(mapped)
                self._mapped = self._pair
                if self._on_full is not None:
                    self._on_full([self])
            self._source = None
        return self._mapped

    def move_to(self, file: DiskFile, start: int) -> None:
        """As for any segment."""
        super().move_to(file, start)
        del self._mapped

    def expect(self) -> None:
        """Ask the system to read the file's part ahead."""
        if self._source is not None:
            file, *names = self._source
            for name in names:
                file.expect(name)
