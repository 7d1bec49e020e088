"""The KV of one layer: host segments per row, every KV head contiguous, and a tail of the newest tokens on the device.

    row 0:  [segment A: 16,384 tokens][segment B: 9,216 of 16,384] | tail: 200 tokens
    row 1:  [segment A               ][segment C: 9,216 of 16,384] | tail: 200 tokens

A table of spans per row says which tokens of which segment the row sees. Growing never moves old data. Reordering
beams, forking and sharing a prefix copy table entries, not segments: a segment that two rows see is sealed, and
each row goes on in a segment of its own, so nothing shared is ever written. Rows always have equal lengths.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence

import torch

from headinfer.errors import StateError
from headinfer.kv.byte_counter import ByteCounter
from headinfer.kv.resident import Share
from headinfer.kv.segments import Segment, SegmentSlice, SharedPrefix, TokenRanges, clip, group, seal
from headinfer.kv.tiers import HostTier
from headinfer.kv.write_back import Writer

__all__ = ["TAIL_UNIT_TOKENS", "LayerKV", "Segment", "SegmentSlice", "SharedPrefix", "TokenRanges", "first_of"]

TAIL_UNIT_TOKENS = 128
_SMALL_SEGMENT_TOKENS = 256
_LARGE_SEGMENT_TOKENS = 16_384
_LEAVING_SEGMENT_TOKENS = 2048  # where segments go to a disk when they are full
_SLACK = 16  # a new segment is at most 1/16 of the row: the last one is all that can be partly empty


class LayerKV:
    """K and V of all rows of one layer.

    Tensors come and go as k [B, Hkv, T, Dk] and v [B, Hkv, T, Dv] on the compute device. `write` brings new tokens to
    the host (transfer.Writer); share: what may stay on the device as well.
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
        share: Share | None = None,
        reserves: bool = False,
    ) -> None:
        """An empty store with the batch, heads, dims, dtype and device of k and v (which may have no tokens).

        on_full: called with segments that will not be written to any more; they are smaller then. reserves: memory for
        the expected length is taken with the first tokens, since to pin some makes a device wait.
        """
        self.tier, self.counter, self.write = tier, counter, write
        self.expected_tokens = expected_tokens if on_full is None else 0
        self.on_full = on_full
        self.share = share
        self._is_promoted = True
        self._reserves = reserves and self.expected_tokens > 0
        self._reserved: list[Segment] = []
        self.heads, self.key_dim, self.value_dim = k.shape[1], k.shape[3], v.shape[3]
        self.dtype, self.device = k.dtype, k.device
        self.host_tokens = 0
        self.tail_tokens = 0
        self._tables: list[list[SegmentSlice]] = [[] for _ in range(k.shape[0])]
        self._whole_prefixes: list[SharedPrefix] | None = None
        self._tail_count = _TailCount(counter)
        weakref.finalize(self, self._tail_count.set, 0).atexit = False  # also where nobody calls close()
        self._new_tail(k.shape[0])

    # -- what is in it ---------------------------------------------------------------------------------------

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return len(self._tables)

    @property
    def tokens(self) -> int:
        """Tokens of every row."""
        return self.host_tokens + self.tail_tokens

    def shared_prefixes(self, token_ranges: Sequence[TokenRanges] | None = None) -> list[SharedPrefix]:
        """The host part, cut into shared prefixes of rows that share their spans, in the order of the tokens.

        token_ranges: for each row the half-open ranges of tokens that are seen, or None where all are.
        """
        if token_ranges is None:
            if self._whole_prefixes is None:
                self._whole_prefixes = group(self._tables)
            return self._whole_prefixes
        return group([clip(table, row_ranges) for table, row_ranges in zip(self._tables, token_ranges, strict=True)])

    def tail(self, row: int, token_ranges: TokenRanges | None = None) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The tail of a row as views k [Hkv, T, Dk] and v [Hkv, T, Dv], one pair per visible range."""
        if self.tail_tokens == 0:
            return []
        found = []
        for start, stop in token_ranges if token_ranges is not None else ((0, self.tokens),):
            visible = slice(max(start - self.host_tokens, 0), min(stop - self.host_tokens, self.tail_tokens))
            if visible.start < visible.stop:
                found.append((self._tail_k[row, :, visible], self._tail_v[row, :, visible]))
        return found

    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Everything, copied: k [B, Hkv, tokens, Dk] and v [B, Hkv, tokens, Dv] in host memory. For tests."""
        self.write.settle()
        rows_k, rows_v = [], []
        for row, table in enumerate(self._tables):
            whole = [(part.segment.dense(), part.stop) for part in table]
            slices = [(k[:, :stop], v[:, :stop]) for (k, v), stop in whole]
            pairs = slices + [(k.cpu(), v.cpu()) for k, v in self.tail(row)]
            rows_k.append(torch.cat([k for k, _ in pairs] or [self._tail_k[row, :, :0].cpu()], dim=1))
            rows_v.append(torch.cat([v for _, v in pairs] or [self._tail_v[row, :, :0].cpu()], dim=1))
        return torch.stack(rows_k), torch.stack(rows_v)

    def saved_tables(self) -> list[list[SegmentSlice]]:
        """The host part of each row. Its segments are sealed: they will never be written again."""
        for table in self._tables:
            seal(table)
        return [list(table) for table in self._tables]

    def tails(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The tails of all rows as views: k [B, Hkv, T, Dk] and v [B, Hkv, T, Dv]."""
        return self._tail_k[:, :, : self.tail_tokens], self._tail_v[:, :, : self.tail_tokens]

    def restore(self, tables: Sequence[list[SegmentSlice]], tail_k: torch.Tensor, tail_v: torch.Tensor) -> None:
        """Fill an empty store with what saved_tables() and tails() gave."""
        self._tables, self._whole_prefixes = [list(table) for table in tables], None
        self.host_tokens, self.tail_tokens = sum(part.tokens for part in tables[0]), tail_k.shape[2]
        self._tail_k[:, :, : self.tail_tokens] = tail_k
        self._tail_v[:, :, : self.tail_tokens] = tail_v
        self._is_promoted = False

    def promote(self) -> None:
        """Bring to the device what of restored segments may stay there; before their first use."""
        if not self._is_promoted and self.share is not None:
            for table in self._tables:
                self.share.promote(table, self.rows)
        self._is_promoted = True

    @property
    def is_all_resident(self) -> bool:
        """Whether nothing has to come from the host."""
        return all(part.stop <= part.segment.resident_tokens for table in self._tables for part in table)

    # -- growing and shrinking -------------------------------------------------------------------------------

    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Add new tokens to every row. The newest one to two units stay in the tail, the older ones go to the host.

        An error on the way leaves the store as it was.
        """
        total = self.tail_tokens + k.shape[2]
        if total <= self._tail_k.shape[2]:
            self._tail_k[:, :, self.tail_tokens : total] = k
            self._tail_v[:, :, self.tail_tokens : total] = v
            self.tail_tokens = total
            return
        leaving = (total - TAIL_UNIT_TOKENS) // TAIL_UNIT_TOKENS * TAIL_UNIT_TOKENS
        from_tail = min(leaving, self.tail_tokens)
        from_new = leaving - from_tail
        kept = self.tail_tokens - from_tail
        # Grown tables are built beside the old ones, so that a failed allocation changes nothing. Writing past the
        # end of a row's own segment is harmless: only the table says what is seen.
        tables = [self._with_room(table, leaving) for table in self._tables]
        for row, table in enumerate(tables):
            self._fill(table, self._tail_k[row, :, :from_tail], self._tail_v[row, :, :from_tail], 0)
            self._fill(table, k[row, :, :from_new], v[row, :, :from_new], from_tail)
        self._tables = tables
        for tail, new in ((self._tail_k, k), (self._tail_v, v)):
            if kept:
                tail[:, :, :kept] = tail[:, :, from_tail : self.tail_tokens].clone()
            tail[:, :, kept : total - leaving] = new[:, :, from_new:]
        self.host_tokens += leaving
        self.tail_tokens = total - leaving
        self._whole_prefixes = None
        if self.on_full is not None:
            full = {s.segment: None for table in tables for s in table if not s.segment.sealed and s.is_to_the_end}
            self.on_full(list(full))

    def crop(self, tokens: int) -> None:
        """Keep the first `tokens` tokens of every row. Rejected tokens of the tail never touch the host."""
        if not 0 <= tokens <= self.tokens:
            raise StateError(f"cannot crop a layer of {self.tokens} tokens to {tokens}")
        if tokens >= self.host_tokens:
            self.tail_tokens = tokens - self.host_tokens
            return
        for table in self._tables:
            for part in table:  # what a ring has fetched ahead of them is not theirs any more
                part.segment.version += 0 if part.segment.sealed else 1
        self._tables = [clip(table, [(0, tokens)]) for table in self._tables]
        self.host_tokens, self.tail_tokens = tokens, 0
        self._whole_prefixes = None

    # -- rows ------------------------------------------------------------------------------------------------

    def select_rows(self, indices: Sequence[int]) -> None:
        """Row i becomes what row indices[i] was; any number of rows. Table entries move, segments do not.

        Tails are copied (and counted) unless nothing changes.
        """
        if list(indices) == list(range(self.rows)):
            return
        seen: set[int] = set()
        for index in indices:
            if index in seen:
                seal(self._tables[index])
            seen.add(index)
        self._tables = [list(self._tables[index]) for index in indices]
        chosen = torch.as_tensor(list(indices), dtype=torch.long, device=self.device)
        old_tails, old_bytes = (self._tail_k, self._tail_v), self.tail_bytes
        self._new_tail(len(indices))
        self._tail_count.set(old_bytes + self.tail_bytes)  # both exist for a moment
        for new, old in zip((self._tail_k, self._tail_v), old_tails, strict=True):
            new[:, :, : self.tail_tokens] = old[chosen, :, : self.tail_tokens]
            self.counter.tail_moved_bytes += new[:, :, : self.tail_tokens].numel() * new.element_size()
        self._tail_count.set(self.tail_bytes)
        self._whole_prefixes = None

    def fork(self) -> LayerKV:
        """A second store with the same content: segments are shared, the tail is copied."""
        twin = LayerKV(
            self._tail_k[:, :, :0],
            self._tail_v[:, :, :0],
            tier=self.tier,
            counter=self.counter,
            write=self.write,
            on_full=self.on_full,
            share=self.share,
        )
        twin._is_promoted = self._is_promoted
        for table in self._tables:
            seal(table)
        twin._tables = [list(table) for table in self._tables]
        twin.host_tokens, twin.tail_tokens = self.host_tokens, self.tail_tokens
        twin._tail_k.copy_(self._tail_k)
        twin._tail_v.copy_(self._tail_v)
        self.counter.tail_moved_bytes += self.tail_bytes
        return twin

    def close(self) -> None:
        """Let go of all memory; the store is not to be used again."""
        self._tables, self._whole_prefixes, self._reserved = [], None, []
        self._tail_k = self._tail_v = torch.empty(0, 0, 0, 0)
        self._tail_count.set(0)
        self.host_tokens = self.tail_tokens = 0

    # -- inside ----------------------------------------------------------------------------------------------

    @property
    def tail_bytes(self) -> int:
        """Device bytes of the tail, fixed while the batch is."""
        return sum(tail.numel() * tail.element_size() for tail in (self._tail_k, self._tail_v))

    def _new_tail(self, rows: int) -> None:
        shape = (rows, self.heads, 2 * TAIL_UNIT_TOKENS)
        with torch.inference_mode(False):  # a cache that was filled under it may be used without it later
            self._tail_k = torch.zeros(*shape, self.key_dim, dtype=self.dtype, device=self.device)
            self._tail_v = torch.zeros(*shape, self.value_dim, dtype=self.dtype, device=self.device)
        self._tail_count.set(self.tail_bytes)

    def _with_room(self, table: list[SegmentSlice], tokens: int) -> list[SegmentSlice]:
        """The table with spans for `tokens` more tokens, not yet written."""
        table = list(table)
        while tokens:
            last = table[-1] if table else None
            if last is not None and not last.segment.sealed and last.stop < last.segment.tokens:
                taken = min(tokens, last.segment.tokens - last.stop)
                table[-1] = SegmentSlice(last.segment, last.start, last.stop + taken)
            else:
                segment = self._new_segment(self._next_segment_tokens(table, tokens))
                if self.share is not None:
                    start = sum(part.tokens for part in table)
                    self.share.assign(segment, start, last.segment if last is not None else None, self.rows)
                taken = min(tokens, segment.tokens)
                table.append(SegmentSlice(segment, 0, taken))
            tokens -= taken
        return table

    def _new_segment(self, tokens: int) -> Segment:
        if self._reserves:
            self._reserves, sizes = False, [tokens]
            written = (self.expected_tokens // TAIL_UNIT_TOKENS - 1) * TAIL_UNIT_TOKENS  # the rest stays in the tail
            while sum(sizes) < written:
                left = self.expected_tokens - sum(sizes)
                sizes.append(min(-(-left // TAIL_UNIT_TOKENS) * TAIL_UNIT_TOKENS, _LARGE_SEGMENT_TOKENS))
            self._reserved = [self._allocate(size) for size in sizes * self.rows]
        at = next((at for at, segment in enumerate(self._reserved) if segment.tokens == tokens), None)
        return self._reserved.pop(at) if at is not None else self._allocate(tokens)

    def _allocate(self, tokens: int) -> Segment:
        return Segment(self.tier, self.heads, tokens, self.key_dim, self.value_dim, self.dtype)

    def _next_segment_tokens(self, table: list[SegmentSlice], tokens: int) -> int:
        """Small at first and after a fork, up to 16K later; to the end where the final length is known."""
        held = sum(part.tokens for part in table)
        left = self.expected_tokens - held
        if left > 0 and not (table and table[-1].segment.sealed):
            return min(max(-(-left // TAIL_UNIT_TOKENS) * TAIL_UNIT_TOKENS, tokens), _LARGE_SEGMENT_TOKENS)
        largest = _LARGE_SEGMENT_TOKENS if self.on_full is None else _LEAVING_SEGMENT_TOKENS
        own = sum(part.tokens for part in itertools.takewhile(lambda s: not s.segment.sealed, reversed(table)))
        size = max(own // _SLACK // _SMALL_SEGMENT_TOKENS * _SMALL_SEGMENT_TOKENS, _SMALL_SEGMENT_TOKENS, tokens)
        return min(size, largest)

    def _fill(self, table: list[SegmentSlice], k: torch.Tensor, v: torch.Tensor, offset: int) -> None:
        """Write k and v [Hkv, T, D] at the host position host_tokens + offset of a row's (grown) table."""
        at, done = 0, 0
        begin = self.host_tokens + offset
        for part in table:
            lo, hi = max(begin + done, at), min(begin + k.shape[1], at + part.tokens)
            if lo < hi:
                self._write(part.segment, part.start + lo - at, *(x[:, done : done + hi - lo] for x in (k, v)))
                done += hi - lo
            at += part.tokens

    def _write(self, segment: Segment, start: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Write k and v [Hkv, T, D] to a segment, from its token `start` on."""
        if segment.write_done is None:
            segment.write_done = self.write.event()
        here = slice(start, start + k.shape[1])
        self.write(segment.k[:, here], k, segment.write_done)
        self.write(segment.v[:, here], v, segment.write_done)
        segment.write_through(start, k, v)


def first_of(token_ranges: Sequence[TokenRanges] | None, tokens: int, rows: int) -> list[TokenRanges]:
    """What the token ranges of each row (None: everything is seen) show of the first `tokens` tokens."""
    whole = token_ranges if token_ranges is not None else [[(0, tokens)]] * rows
    return [[(start, min(stop, tokens)) for start, stop in row if start < tokens] for row in whole]


class _TailCount:
    """The bytes of one store's tail as the counter knows them."""

    def __init__(self, counter: ByteCounter) -> None:
        self._counter, self._nbytes = counter, 0

    def set(self, nbytes: int) -> None:
        """The tail has this many bytes now."""
        self._counter.hold_device("tail", nbytes - self._nbytes)
        self._nbytes = nbytes
