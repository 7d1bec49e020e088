"""The KV of one layer: host segments per row, every KV head contiguous, and a tail of the newest tokens on the device.

    row 0:  [segment A: 16,384 tokens][segment B: 9,216 of 16,384] | tail: 200 tokens
    row 1:  [segment A               ][segment C: 9,216 of 16,384] | tail: 200 tokens

Each row has a table of slices, which says which tokens of which segment it sees. Growing never moves old data.
Reordering beams, forking and sharing a prefix copy table entries, not segments: a segment that two rows see is sealed,
and each row continues in a segment of its own, so a shared segment is never written. All rows have equal lengths.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch

from headinfer.errors import StateError
from headinfer.kv.byte_counter import ByteCounter
from headinfer.kv.codec import KVCodec, tokens_of_cut_block
from headinfer.kv.device_buffer import (
    TAIL_TOKENS,
    TAIL_UNIT_TOKENS,
    BufferShape,
    BufferSlice,
    DeviceBuffer,
    no_action,
    pieces_of,
)
from headinfer.kv.host_memory import HostTier, ReservedMemory
from headinfer.kv.resident import LEAST_BUFFER_TOKENS, LayerResidency
from headinfer.kv.segment_sizes import expected_sizes, next_size
from headinfer.kv.segments import Segment, SegmentSlice, SharedPrefix, TokenRanges, clip, group, seal
from headinfer.kv.write_back import Writer
from headinfer.utils.kv_format import rounded_down
from headinfer.utils.tensors import Piece

__all__ = ["TAIL_UNIT_TOKENS", "LayerKV", "Segment", "SegmentSlice", "SharedPrefix", "TokenRanges"]


class LayerKV:
    """K and V of all rows of one layer.

    New tokens come as k [B, Hkv, T, Dk] and v [B, Hkv, T, Dv] on the compute device.

    Args:
        k: gives the batch, heads, dim, dtype and device; it may have no tokens.
        v: gives the dim of V.
        tier: allocates host memory.
        counter: counts the bytes of the tail.
        write: writes new tokens to the host.
        expected_tokens: the final length; 0 if it is unknown.
        on_full: called with segments that are never written again. Segments are smaller if it is given.
        residency: the resident memory of the layer, if it has any.
        reserves: whether host memory for the expected length is reserved with the first tokens, and pinned ahead of
            its use.
        codec: quantises what is written to the host; None keeps it as it is. What is on the device stays exact.
    """

    def __init__(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        tier: HostTier,
        counter: ByteCounter,
        write: Writer,
        expected_tokens: int = 0,
        on_full: Callable[[Sequence[Segment]], None] | None = None,
        residency: LayerResidency | None = None,
        reserves: bool = False,
        codec: KVCodec | None = None,
    ) -> None:
        self.tier = tier
        self.counter = counter
        self.write = write
        self.expected_tokens = expected_tokens if on_full is None else 0
        self.on_full = on_full
        self.residency = residency
        self.codec = codec
        self.is_promoted = True  # False: promote() copies the first tokens to the device
        self._reserves = reserves and self.expected_tokens > 0
        self._reserved: ReservedMemory | None = None
        self.heads = k.shape[1]
        self.key_dim = k.shape[3]
        self.value_dim = v.shape[3]
        self.dtype = k.dtype
        self._stored_dims = (self.key_dim, self.value_dim) if codec is None else codec.stored_dims
        self._stored_dtype = self.dtype if codec is None else torch.uint8
        self.device = k.device
        self.host_tokens = 0
        self.tail_tokens = 0
        self._tables: list[list[SegmentSlice]] = [[] for _ in range(k.shape[0])]
        self._whole_prefixes: list[SharedPrefix] | None = None
        self._buffer = self._new_buffer(0)
        self._is_in_order = True  # whether the resident tokens of each row are in the buffer's row of the same number
        self._staged: torch.Tensor | None = None  # K of the chunk that stage() has written behind the tail

    # -- content ---------------------------------------------------------------------------------------------

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return len(self._tables)

    @property
    def tokens(self) -> int:
        """Tokens of each row."""
        return self.host_tokens + self.tail_tokens

    def shared_prefixes(self, token_ranges: Sequence[TokenRanges] | None = None) -> list[SharedPrefix]:
        """Return the host part, grouped by the rows that share it, in the order of the tokens.

        Args:
            token_ranges: for each row, the ranges of tokens that are seen; None for all.
        """
        if token_ranges is None:
            if self._whole_prefixes is None:
                self._whole_prefixes = group(self._tables)
            return self._whole_prefixes
        return group([clip(table, ranges) for table, ranges in zip(self._tables, token_ranges, strict=True)])

    def tail(self, row: int, token_ranges: TokenRanges | None = None) -> list[Piece]:
        """Return the tail of a row as views k [Hkv, T, Dk] and v [Hkv, T, Dv], one pair for each range that is seen."""
        return pieces_of(self.tail_slices(row, token_ranges), slice(None))

    def tail_slices(
        self, row: int, token_ranges: TokenRanges | None = None, chunk_tokens: int = 0
    ) -> list[BufferSlice]:
        """Return where the tail of a row is in device memory: one slice for each range that is seen.

        Args:
            row: the row.
            token_ranges: the ranges of the row's tokens that are seen; None for all.
            chunk_tokens: tokens of the chunk that stage() has written behind the tail; 0 leaves it out.
        """
        return self._buffer.tail_slices(row, self.host_tokens, self.tail_tokens + chunk_tokens, token_ranges)

    def dense(self) -> Piece:
        """Return a copy of everything in host memory: k [B, Hkv, tokens, Dk] and v [B, Hkv, tokens, Dv]. For tests."""
        self.write.settle()
        rows_k = []
        rows_v = []
        for row, table in enumerate(self._tables):
            pairs = []
            for part in table:
                k, v = self._decoded(part.segment.dense())
                pairs.append((k[:, : part.stop], v[:, : part.stop]))
            pairs += [(k.cpu(), v.cpu()) for k, v in self.tail(row)]
            rows_k.append(torch.cat([k for k, _ in pairs] or [self._buffer.k[row, :, :0].cpu()], dim=1))
            rows_v.append(torch.cat([v for _, v in pairs] or [self._buffer.v[row, :, :0].cpu()], dim=1))
        return torch.stack(rows_k), torch.stack(rows_v)

    def saved_tables(self) -> list[list[SegmentSlice]]:
        """Return the tables of all rows. Their segments are sealed: they are never written again."""
        self._seal()
        return [list(table) for table in self._tables]

    def tails(self) -> Piece:
        """Return the tails of all rows as views k [B, Hkv, T, Dk] and v [B, Hkv, T, Dv]."""
        return self._buffer.views(self._buffer.tail_start(self.host_tokens), self.tail_tokens)

    def restore(self, tables: Sequence[list[SegmentSlice]], tail_k: torch.Tensor, tail_v: torch.Tensor) -> None:
        """Fill an empty LayerKV with what saved_tables() and tails() returned."""
        self._tables = [list(table) for table in tables]
        self._whole_prefixes = None
        self.host_tokens = sum(part.tokens for part in tables[0])
        self._buffer.first = self.host_tokens
        self.tail_tokens = tail_k.shape[2]
        for own, restored in zip(self.tails(), (tail_k, tail_v), strict=True):
            own.copy_(restored)
        self.is_promoted = False

    def promote(self) -> None:
        """Copy the first tokens of restored rows to the device, as many as the residency allows.

        Called before the tokens are first used.
        """
        if self.is_promoted:
            return
        self.is_promoted = True
        buffer = None
        if self.residency is not None:
            buffer = self.residency.promote(self._tables, self._shape, self._decoded)
        if buffer is not None:
            self._use_buffer(buffer)
            self._is_in_order = True

    @property
    def is_all_resident(self) -> bool:
        """Whether all host tokens are on the device too."""
        return self.is_one_piece or all(
            part.stop <= part.segment.resident_tokens for table in self._tables for part in table
        )

    @property
    def is_one_piece(self) -> bool:
        """Whether the buffer holds all tokens of each row in order, one behind the other."""
        buffer = self._buffer
        return self.host_tokens == 0 or (
            self._is_in_order and buffer.first == 0 and self.host_tokens <= buffer.resident_tokens
        )

    # -- attention -------------------------------------------------------------------------------------------

    def stage(self, k: torch.Tensor, v: torch.Tensor) -> bool:
        """Write a chunk behind the tail, so that attention finds it there. append() then does not copy it again.

        Args:
            k: [B, Hkv, T, Dk] on the device.
            v: [B, Hkv, T, Dv] on the device.

        Returns:
            Whether the chunk fits behind the tail.
        """
        start = self._buffer.tail_start(self.host_tokens) + self.tail_tokens
        if start + k.shape[2] > self._buffer.tokens:
            return False
        self._buffer.put(start, k, v)
        self._staged = k
        return True

    def stage_in_one_piece(self, k: torch.Tensor, v: torch.Tensor) -> Piece | None:
        """Write a chunk behind the tail, as stage() does, if it fits there and `is_one_piece`.

        Returns:
            Views k [B, Hkv, T, Dk] and v [B, Hkv, T, Dv] of all tokens and the chunk; None if nothing was written.
        """
        if not self.is_one_piece or not self.stage(k, v):
            return None
        return self._buffer.views(0, self.tokens + k.shape[2])  # the buffer begins with the first token

    # -- growing and shrinking -------------------------------------------------------------------------------

    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Append new tokens to every row.

        The newest one to two units stay in the tail, older tokens go to the host. If an error occurs, nothing has
        changed.

        Args:
            k: [B, Hkv, T, Dk] on the device.
            v: [B, Hkv, T, Dv] on the device.
        """
        is_staged = self._staged is k
        self._staged = None
        added = k.shape[2]
        total = self.tail_tokens + added
        if total <= TAIL_TOKENS:
            if not is_staged:
                self._buffer.put(self._buffer.tail_start(self.host_tokens) + self.tail_tokens, k, v)
            self.tail_tokens = total
            return
        leaving = (total - TAIL_UNIT_TOKENS) // TAIL_UNIT_TOKENS * TAIL_UNIT_TOKENS
        from_tail = min(leaving, self.tail_tokens)
        from_new = leaving - from_tail
        self._grow_resident(self.host_tokens + leaving)
        # All memory is allocated before anything changes. Writing past the end of a row's last slice is harmless, since
        # only the table says what is seen.
        tables = [self._with_room(row, table, leaving) for row, table in enumerate(self._tables)]
        tail_k, tail_v = self.tails()
        for row, table in enumerate(tables):
            pieces = [
                (tail_k[row, :, :from_tail], tail_v[row, :, :from_tail]),
                (k[row, :, :from_new], v[row, :, :from_new]),
            ]
            if self.codec is not None:  # a block may begin in the tail and end in the chunk
                whole_k, whole_v = (torch.cat(sides, dim=1) for sides in zip(*pieces, strict=True))
                pieces = [self.codec.encode(whole_k, whole_v)]
            offset = 0
            for new_k, new_v in pieces:
                self._fill(table, new_k, new_v, offset)
                offset += new_k.shape[1]
        self._buffer.advance(k, v, leaving, host_tokens=self.host_tokens, tail_tokens=self.tail_tokens)
        self._tables = tables
        self.host_tokens += leaving
        self.tail_tokens = total - leaving
        self._whole_prefixes = None
        if self.on_full is not None:
            parts = [part for table in tables for part in table]
            full = [part.segment for part in parts if not part.segment.sealed and part.is_to_the_end]
            self.on_full(list(dict.fromkeys(full)))

    def crop(self, tokens: int) -> None:
        """Keep the first `tokens` tokens of every row. Removing tokens of the tail does not change the host part.

        Quantised KV is cut at whole blocks. What is kept of another block becomes the tail, as it is stored.
        """
        if not 0 <= tokens <= self.tokens:
            raise StateError(f"cannot crop a layer of {self.tokens} tokens to {tokens}")
        self._staged = None
        if tokens >= self.host_tokens:
            self.tail_tokens = tokens - self.host_tokens
            return
        for table in self._tables:
            for part in table:
                if not part.segment.sealed:
                    part.segment.version += 1  # prefetched copies are outdated
        kept_tail: Piece | None = None
        if self.codec is not None and tokens % self.codec.unit:
            self.write.settle()
            kept_tail = tokens_of_cut_block(self._tables, tokens, self.codec, self.device)
            tokens = rounded_down(tokens, self.codec.unit)
        is_shared = any(self._shares_buffer_after(table, tokens) for table in self._tables)
        self._tables = [clip(table, [(0, tokens)]) for table in self._tables]
        self.host_tokens = tokens
        self.tail_tokens = 0
        self._whole_prefixes = None
        if is_shared or tokens < self._buffer.first:
            self._seal()
            self._replace_buffer(self._new_buffer(tokens))
        if kept_tail is not None:
            self.tail_tokens = kept_tail[0].shape[2]
            self._buffer.put(self._buffer.tail_start(tokens), *kept_tail)

    def _decoded(self, piece: Piece) -> Piece:
        """Return stored K and V in the dtype of the layer."""
        return piece if self.codec is None else self.codec.decode(*piece)

    def _shares_buffer_after(self, table: list[SegmentSlice], tokens: int) -> bool:
        """Return whether sealed segments, which another row or fork may see, have resident tokens in the buffer behind
        the first `tokens` tokens of a row."""
        stop = 0
        for part in table:
            stop += part.tokens
            if stop > tokens and part.segment.sealed and part.segment.resident_buffer is self._buffer:
                return True
        return False

    # -- rows ------------------------------------------------------------------------------------------------

    def select_rows(self, indices: Sequence[int]) -> None:
        """Replace each row i by row indices[i]. The number of rows may change.

        Table entries are copied, segments are not. Tails are copied, and counted, unless nothing changes.
        """
        if list(indices) == list(range(self.rows)):
            return
        self._seal()  # each row goes on in a segment of its own, whose resident tokens are in its own row of the buffer
        self._tables = [list(self._tables[index]) for index in indices]
        tails = self.tails()
        if len(indices) == self._buffer.k.shape[0]:
            chosen = torch.as_tensor(list(indices), dtype=torch.long, device=self.device)
            for tail in tails:
                moved = tail[chosen]
                nbytes = moved.numel() * moved.element_size()
                self.counter.hold_device("tail", nbytes)  # both exist until the copy is done
                tail.copy_(moved)
                self.counter.hold_device("tail", -nbytes)
        else:
            self._replace_buffer(self._new_buffer(self.host_tokens))
            for own, tail in zip(self.tails(), tails, strict=True):
                for row, index in enumerate(indices):
                    own[row].copy_(tail[index])
        self.counter.tail_moved_bytes += sum(tail.numel() * tail.element_size() for tail in self.tails())
        self._is_in_order = False
        self._whole_prefixes = None

    def fork(self) -> LayerKV:
        """Return a second LayerKV with the same content. Segments are shared, the tail is copied."""
        self.promote()  # so that this one, not the fork, has its tail behind the resident tokens
        twin = LayerKV(
            self._buffer.k[:, :, :0],
            self._buffer.v[:, :, :0],
            tier=self.tier,
            counter=self.counter,
            write=self.write,
            on_full=self.on_full,
            residency=self.residency,
            codec=self.codec,
        )
        twin.is_promoted = self.is_promoted
        twin._tables = self.saved_tables()
        twin.host_tokens = self.host_tokens
        twin.tail_tokens = self.tail_tokens
        twin._buffer.first = twin.host_tokens
        for own, tail in zip(twin.tails(), self.tails(), strict=True):
            own.copy_(tail)
            self.counter.tail_moved_bytes += tail.numel() * tail.element_size()
        return twin

    def close(self) -> None:
        """Release all memory. The object must not be used after this."""
        self._tables = []
        self._whole_prefixes = None
        self.tier.pause()
        self._reserved = None
        self._staged = None
        self.host_tokens = 0
        self.tail_tokens = 0
        self._replace_buffer(self._new_buffer(0))  # of no rows

    # -- inside ----------------------------------------------------------------------------------------------

    @property
    def tail_bytes(self) -> int:
        """Device bytes of the tail, which depend on the batch only."""
        return self._buffer.tail_bytes

    @property
    def _shape(self) -> BufferShape:
        return BufferShape(self.rows, self.heads, self.key_dim, self.value_dim, self.dtype, self.device)

    def _new_buffer(self, first: int) -> DeviceBuffer:
        """Return a buffer for a tail behind `first` tokens, without resident tokens."""
        return DeviceBuffer(self._shape, first, 0, self.counter)

    def _replace_buffer(self, buffer: DeviceBuffer) -> None:
        """Use another buffer. The old one stays as long as segments have resident tokens in it."""
        self._buffer.on_drop = no_action
        self._buffer = buffer
        buffer.on_drop = weakref.WeakMethod(self._leave_dropped)
        self._staged = None

    def _use_buffer(self, buffer: DeviceBuffer) -> None:
        """Use another buffer, and move the tail to it."""
        tails = self.tails()
        self._replace_buffer(buffer)
        for own, tail in zip(self.tails(), tails, strict=True):
            own.copy_(tail)

    def _leave_dropped(self) -> None:
        """Move the tail, because the resident tokens of its buffer were dropped."""
        self._use_buffer(self._new_buffer(self.host_tokens))

    def _seal(self) -> None:
        """Seal the segments of all rows: each row goes on in a new segment."""
        for table in self._tables:
            seal(table)

    def _grow_resident(self, tokens: int) -> None:
        """Make memory for the first `tokens` tokens of each row to be resident, as far as the residency allows.

        The buffer is replaced by a larger one, or, if there is no memory for both, followed by another one. Only tokens
        that follow resident tokens become resident.
        """
        buffer = self._buffer
        if self.residency is None or tokens - buffer.first <= buffer.resident_tokens:
            return
        if self.host_tokens - buffer.first > buffer.resident_tokens or not self.is_all_resident:
            return
        grown = self.residency.buffer_for(self._shape, buffer.first, tokens, buffer.resident_tokens)
        if grown is not None:
            grown.copy_from(buffer, self.host_tokens - buffer.first)
        else:
            grown = self.residency.buffer_for(self._shape, self.host_tokens, tokens, 0, LEAST_BUFFER_TOKENS)
            if grown is not None:
                self._seal()
        if grown is not None:
            self._use_buffer(grown)

    def _with_room(self, row: int, table: list[SegmentSlice], tokens: int) -> list[SegmentSlice]:
        """Return the table of a row with slices for `tokens` more tokens, which are not written yet."""
        table = list(table)
        at = self.host_tokens - self._buffer.first
        while tokens:
            last = table[-1] if table else None
            if last is not None and not last.segment.sealed and last.stop < last.segment.tokens:
                taken = min(tokens, last.segment.tokens - last.stop)
                table[-1] = SegmentSlice(last.segment, last.start, last.stop + taken)
            else:
                size = next_size(table, tokens, self.expected_tokens, has_disk=self.on_full is not None)
                segment = self._new_segment(size)
                segment.keep_resident(self._buffer, row, at)
                taken = min(tokens, segment.tokens)
                table.append(SegmentSlice(segment, 0, taken))
            tokens -= taken
            at += taken
        return table

    def _new_segment(self, tokens: int) -> Segment:
        if self._reserves:
            self._reserves = False
            sizes = [size for size in expected_sizes(tokens, self.expected_tokens) for _ in range(self.rows)]
            shapes = [(self.heads, size * sum(self._stored_dims)) for size in sizes]
            self._reserved = self.tier.reserve(shapes, self._stored_dtype, self.rows)
        memory = self._reserved or self.tier
        return Segment(memory, self.heads, tokens, *self._stored_dims, self._stored_dtype)

    def _fill(self, table: list[SegmentSlice], k: torch.Tensor, v: torch.Tensor, offset: int) -> None:
        """Write k and v [Hkv, T, D] to the tokens from host_tokens + offset on of a row's (grown) table."""
        begin = self.host_tokens + offset
        at = 0
        done = 0
        for part in table:
            first = max(begin + done, at)
            last = min(begin + k.shape[1], at + part.tokens)
            if first < last:
                new = slice(done, done + last - first)
                self._write(part.segment, part.start + first - at, k[:, new], v[:, new])
                done += last - first
            at += part.tokens

    def _write(self, segment: Segment, start: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Write k and v [Hkv, T, D] to a segment, from its token `start` on."""
        if segment.write_done is None:
            segment.write_done = self.write.event()
        tokens = slice(start, start + k.shape[1])
        self.write(segment.k[:, tokens], k, segment.write_done)
        self.write(segment.v[:, tokens], v, segment.write_done)
