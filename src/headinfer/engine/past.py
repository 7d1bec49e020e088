"""The past of a layer: resident tokens, the part that the host attends to, and tiles that stream through the ring."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from headinfer.engine.packed import visible_pieces, whole_blocks
from headinfer.kv.codec import KVCodec
from headinfer.kv.device_buffer import BufferSlice
from headinfer.kv.layer_kv import LayerKV, TokenRanges
from headinfer.kv.segments import SegmentSlice, SharedPrefix
from headinfer.kv.slices import AnyPiece
from headinfer.plan.cpu_share import host_tokens, share_at_rows
from headinfer.plan.tiles import TilePlan
from headinfer.utils.kv_format import rounded_down
from headinfer.utils.tensors import Piece

__all__ = ["HostPart", "PastPart", "Tile", "divide", "host_parts", "tiles_of"]

_KEPT_SEGMENT_TOKENS = 4096  # a smaller segment is copied with its neighbours, since a tile takes launches too


@dataclass(frozen=True)
class Tile:
    """Some tokens of one head group, for the rows that share them.

    Attributes:
        rows: the rows of the batch.
        pieces: what must be fetched; empty for a resident tile.
        after: events of the write-back of these pieces.
        key: equal for tiles of the same tokens of the same segments, as long as their content is the same.
        resident: what is on the device.
        slices: the tokens, in the order of `pieces` or `resident`.
    """

    rows: tuple[int, ...]
    pieces: tuple[AnyPiece, ...] = ()
    after: tuple[Any, ...] = ()
    key: Hashable = None
    resident: tuple[BufferSlice, ...] = ()
    slices: tuple[SegmentSlice, ...] = ()


@dataclass(frozen=True)
class HostPart:
    """The part of the past that the host attends to in its own memory, for the rows that share it.

    Attributes:
        rows: the rows of the batch.
        pieces: K [Hkv, T, Dk] and V [Hkv, T, Dv] in host memory.
        after: events of the write-back of these pieces.
    """

    rows: tuple[int, ...]
    pieces: tuple[Piece, ...]
    after: tuple[Any, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of K and V."""
        return sum(k.nbytes + v.nbytes for k, v in self.pieces)


@dataclass(frozen=True)
class PastPart:
    """The past that some rows share, divided by where it is attended to.

    Attributes:
        rows: the rows of the batch.
        resident: what is on the device.
        on_host: what the host attends to in its own memory.
        streamed: what is fetched.
        codec: the format of the KV on the host, whose blocks nothing divides; None if it is not quantised.
    """

    rows: tuple[int, ...]
    resident: Sequence[SegmentSlice]
    on_host: Sequence[SegmentSlice]
    streamed: Sequence[SegmentSlice]
    codec: KVCodec | None = None


def divide(layer_kv: LayerKV, plan: TilePlan, token_ranges: Sequence[TokenRanges] | None) -> list[PastPart]:
    """Divide the past of a layer.

    Divide it once in a pass. Loading a segment may move others to a disk, which would change the host's part.

    Args:
        layer_kv: the KV of the layer.
        plan: the plan of the pass, which says what the host attends to.
        token_ranges: for each row, the ranges of tokens that are seen; None for all.
    """
    parts = []
    for shared in layer_kv.shared_prefixes(token_ranges):
        resident, others = _split_by_residency(shared)
        # All rows that share a part are one call of the CPU's kernel, while the link brings the part once.
        share = share_at_rows(plan.cpu_share, plan.cpu_rows, (plan.cpu_rows or 1) * len(shared.rows))
        on_host, streamed = _split_for_host(others, share, layer_kv.codec)
        parts.append(PastPart(shared.rows, resident, on_host, streamed, layer_kv.codec))
    return parts


def host_parts(past: Sequence[PastPart]) -> list[HostPart]:
    """Return what the host attends to."""
    found = []
    for part in past:
        if part.on_host:
            pieces = visible_pieces(
                [_in_host_memory(one, part.codec) for one in part.on_host], part.on_host, part.codec
            )
            found.append(HostPart(part.rows, tuple(pieces), _write_events(part.on_host)))
    return found


def tiles_of(past: Sequence[PastPart], heads: slice, plan: TilePlan) -> Iterator[Tile]:
    """Return the resident and the streamed past of a head group as tiles.

    Resident tokens are one tile. The plan cuts the others, or keeps large segments as tiles of their own.

    Args:
        past: the past of the layer.
        heads: the KV heads of the group.
        plan: the shape of the tiles.
    """
    for shared in past:
        codec = shared.codec
        resident = shared.resident
        streamed = shared.streamed
        if resident:
            buffers = tuple(part.segment.resident(part.start, part.stop) for part in resident)
            yield Tile(shared.rows, resident=buffers, slices=tuple(resident))
        blocks = [whole_blocks(part, codec) for part in streamed]
        most = plan.length(sum(stop - start for start, stop in blocks))
        slices: list[SegmentSlice] = []
        room = most
        for part, (start, end) in zip(streamed, blocks, strict=True):
            if plan.keeps_segments and _KEPT_SEGMENT_TOKENS <= part.tokens == part.segment.tokens <= most:
                if slices:
                    yield _tile(shared.rows, heads, slices, codec)
                yield _tile(shared.rows, heads, [part], codec)
                slices = []
                room = most
                continue
            while start < end:
                stop = min(end, start + room)
                slices.append(SegmentSlice(part.segment, max(start, part.start), min(stop, part.stop)))
                room -= stop - start
                start = stop
                if room == 0:
                    yield _tile(shared.rows, heads, slices, codec)
                    slices = []
                    room = most
        if slices:
            yield _tile(shared.rows, heads, slices, codec)


def _split_by_residency(shared: SharedPrefix) -> tuple[list[SegmentSlice], list[SegmentSlice]]:
    """Return the slices, or parts of them, that are on the device, and those that are on the host only."""
    resident: list[SegmentSlice] = []
    streamed: list[SegmentSlice] = []
    for part in shared.slices:
        stop = min(max(part.segment.resident_tokens, part.start), part.stop)
        if part.start < stop:
            resident.append(SegmentSlice(part.segment, part.start, stop))
        if stop < part.stop:
            streamed.append(SegmentSlice(part.segment, stop, part.stop))
    return resident, streamed


def _split_for_host(
    slices: list[SegmentSlice], share: float, codec: KVCodec | None
) -> tuple[list[SegmentSlice], list[SegmentSlice]]:
    """Divide slices between the host and the ring.

    The host gets the first tokens that are in host memory, as many as host_tokens() says. The first tokens are
    the oldest, so their write-back has been done for long. What is being moved to a disk counts as moved, so that the
    division does not depend on the speed of the disk.

    Returns:
        The slices of the host, and the others.
    """
    if not share:
        return [], slices
    left = host_tokens(share, sum(part.tokens for part in slices))
    on_host: list[SegmentSlice] = []
    streamed: list[SegmentSlice] = []
    for part in slices:
        stop = part.start + min(left, 0 if part.segment.is_leaving else part.tokens)
        if codec is not None and stop < part.stop:  # each block is attended to in one place
            stop = max(rounded_down(stop, codec.unit), part.start)
        left -= stop - part.start
        if part.start < stop:
            on_host.append(SegmentSlice(part.segment, part.start, stop))
        if stop < part.stop:
            streamed.append(SegmentSlice(part.segment, stop, part.stop))
    return on_host, streamed


def _in_host_memory(part: SegmentSlice, codec: KVCodec | None) -> Piece:
    """Return K and V of all heads, in whole blocks.

    If the segment has moved to a disk since the past was divided, they are a copy.
    """
    k, v = part.segment.dense()
    start, stop = whole_blocks(part, codec)
    return k[:, start:stop], v[:, start:stop]


def _write_events(slices: Sequence[SegmentSlice]) -> tuple[Any, ...]:
    """Return the events of the write-back of some slices."""
    events = [part.segment.write_done for part in slices if part.segment.write_done is not None]
    return tuple(dict.fromkeys(events))


def _tile(rows: tuple[int, ...], heads: slice, slices: Sequence[SegmentSlice], codec: KVCodec | None) -> Tile:
    """Return a tile that must be fetched, in whole blocks."""
    pieces = tuple(part.segment.piece(heads, *whole_blocks(part, codec)) for part in slices)
    key = tuple((part.segment, part.segment.version, heads.start, heads.stop, part.start, part.stop) for part in slices)
    return Tile(rows, pieces, _write_events(slices), key, slices=tuple(slices))
