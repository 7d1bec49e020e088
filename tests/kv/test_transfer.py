"""The ring of slots and the write-back. EagerStreams and LazyStreams make mistakes in their use visible."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headinfer.attention.reference import attend_reference, causal_mask
from headinfer.engine.engine import Engine
from headinfer.engine.layer_pass import AttentionSpec
from headinfer.engine.options import Options
from headinfer.engine.streaming import attend_streaming
from headinfer.errors import CapacityError, StateError
from headinfer.kv import streams
from headinfer.kv.byte_counter import ByteCounter
from headinfer.kv.host_memory import HostTier
from headinfer.kv.layer_kv import LayerKV
from headinfer.kv.segments import Segment
from headinfer.kv.streams import EagerStreams, LazyStreams
from headinfer.kv.transfer import InPlace, SlotRing
from headinfer.kv.write_back import StagingWriter, WriteInPlace
from headinfer.plan.tiles import TilePlan

PROPERTY = settings(deadline=None, derandomize=True, max_examples=60)
CPU = torch.device("cpu")
both_streams = pytest.mark.parametrize("kind", [EagerStreams, LazyStreams])


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def random_pieces(rng, heads, sizes, dims, dtype=torch.float32):
    """Make pieces of K and V with other data between the heads, as in a segment."""
    return [
        tuple(torch.randn(heads, size + 3, dim, generator=rng).to(dtype)[:, 1 : size + 1] for dim in dims)
        for size in sizes
    ]


def joined(pieces):
    return tuple(torch.cat(sides, dim=1) for sides in zip(*pieces, strict=True))


def nbytes(*tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# -- the ring --------------------------------------------------------------------------------------------------


@both_streams
@PROPERTY
@given(data=st.data())
def test_tiles_contain_their_pieces(kind, data):
    draw = data.draw
    rng = seeded(draw(st.integers(0, 2**31 - 1)))
    counter = ByteCounter()
    slots = draw(st.integers(2, 4))
    ring = SlotRing(slots, 4096, CPU, counter, kind())
    total = copies = 0
    handles = []
    for _ in range(draw(st.integers(1, 8))):
        dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
        heads = draw(st.sampled_from([1, 2, 3]))
        dims = draw(st.sampled_from([(4, 4), (3, 5), (16, 1)]))
        sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
        pieces = random_pieces(rng, heads, sizes, dims, dtype)
        handles.append((ring.fetch(pieces), joined(pieces)))
        total += nbytes(*joined(pieces))
        copies += 2 * heads * len(pieces)
        if len(handles) == slots:  # the oldest tile is read while the newest one is fetched, as in the loop
            handle, wanted = handles.pop(0)
            found = joined(ring.wait(handle))
            assert all(map(torch.equal, found, wanted))
            assert all(side.dtype == dtype for side, dtype in zip(found, (x.dtype for x in wanted), strict=True))
            ring.release(handle)
    for handle, wanted in handles:
        assert all(map(torch.equal, joined(ring.wait(handle)), wanted))
        ring.release(handle)
    assert counter.host_to_device_bytes == total
    assert counter.copies == copies
    assert counter.device_to_host_bytes == 0
    assert counter.device_bytes["ring"] == counter.device_peak_bytes == slots * 4096
    ring.close()
    assert counter.device_bytes["ring"] == 0


@both_streams
@PROPERTY
@given(data=st.data())
def test_whole_heads_of_a_segment_are_one_copy(kind, data):
    """The tile has the segment's layout. Fewer tokens than the segment's are two copies for each head."""
    draw = data.draw
    rng = seeded(draw(st.integers(0, 2**31 - 1)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    heads = draw(st.integers(1, 4))
    tokens = draw(st.integers(1, 9))
    key_dim, value_dim = draw(st.sampled_from([(4, 4), (3, 5), (16, 1)]))
    counter = ByteCounter()
    segment = Segment(HostTier(counter), heads, tokens, key_dim, value_dim, dtype)
    segment.k.copy_(torch.randn(segment.k.shape, generator=rng))
    segment.v.copy_(torch.randn(segment.v.shape, generator=rng))
    ring = SlotRing(2, heads * tokens * (key_dim + value_dim) * dtype.itemsize + draw(st.integers(0, 1)) * 64, CPU,
                    counter, kind())  # fmt: skip
    first = draw(st.integers(0, heads - 1))
    last = draw(st.integers(first + 1, heads))
    start = draw(st.integers(0, tokens - 1))
    for chosen, copies in ((slice(0, tokens), 1), (slice(start, tokens), 1 if start == 0 else 2 * (last - first))):
        piece = segment.piece(slice(first, last), chosen.start, chosen.stop)
        before = counter.copies
        handle = ring.fetch([piece])
        assert counter.copies - before == copies
        ((k, v),) = ring.wait(handle)
        assert torch.equal(k, segment.k[first:last, chosen])
        assert torch.equal(v, segment.v[first:last, chosen])
        assert k.is_contiguous() == piece[0].is_contiguous() or start
        ring.release(handle)
    assert (
        counter.host_to_device_bytes == (2 * tokens - start) * (last - first) * (key_dim + value_dim) * dtype.itemsize
    )


@both_streams
def test_fetching_into_a_slot_in_use_is_an_error(kind):
    ring = SlotRing(2, 1024, CPU, ByteCounter(), kind())
    pieces = random_pieces(seeded(0), 1, [4], (4, 4))
    first = ring.fetch(pieces)
    second = ring.fetch(pieces)
    with pytest.raises(StateError, match="still in use"):
        ring.fetch(pieces)
    ring.release(second)  # the next slot to fill is still the first one
    with pytest.raises(StateError, match="still in use"):
        ring.fetch(pieces)
    ring.release(first)
    ring.fetch(pieces)


@both_streams
def test_a_failed_fetch_changes_nothing(kind):
    counter = ByteCounter()
    ring = SlotRing(2, 1024, CPU, counter, kind())
    pieces = random_pieces(seeded(0), 1, [4], (4, 4))
    first = ring.fetch(pieces)
    _ = ring.fetch(pieces)
    wanted = joined(pieces)
    moved = counter.host_to_device_bytes
    with pytest.raises(StateError):
        ring.fetch(random_pieces(seeded(1), 1, [4], (4, 4)))
    assert counter.host_to_device_bytes == moved
    assert all(map(torch.equal, joined(ring.wait(first)), wanted))


@both_streams
def test_a_tile_larger_than_a_slot_is_an_error(kind):
    ring = SlotRing(2, 2 * 8 * (4 + 4) * 4, CPU, ByteCounter(), kind())
    ring.fetch(random_pieces(seeded(0), 2, [5, 3], (4, 4)))  # fills a slot to the last byte
    with pytest.raises(StateError, match="exceeds a slot"):
        ring.fetch(random_pieces(seeded(0), 2, [5, 4], (4, 4)))
    ring.fetch(random_pieces(seeded(0), 2, [16], (4, 4), torch.bfloat16))


@both_streams
def test_abandon_frees_all_slots(kind):
    ring = SlotRing(2, 1024, CPU, ByteCounter(), kind())
    pieces = random_pieces(seeded(0), 1, [4], (4, 4))
    ring.fetch(pieces)
    ring.fetch(pieces)
    ring.abandon()
    fresh = random_pieces(seeded(5), 1, [6], (4, 4))
    handles = [ring.fetch(fresh), ring.fetch(fresh)]
    for handle in handles:
        assert all(map(torch.equal, joined(ring.wait(handle)), joined(fresh)))


@both_streams
def test_a_released_handle_cannot_be_used_again(kind):
    ring = SlotRing(2, 1024, CPU, ByteCounter(), kind())
    handle = ring.fetch(random_pieces(seeded(0), 1, [4], (4, 4)))
    ring.release(handle)
    with pytest.raises(KeyError):
        ring.wait(handle)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lazy_streams_show_a_missing_wait_as_nan(dtype):
    ring = SlotRing(2, 1024, CPU, ByteCounter(), LazyStreams())
    pieces = random_pieces(seeded(0), 2, [4, 3], (4, 5), dtype)
    for _ in range(3):  # the third tile replaces an older one
        handle = ring.fetch(pieces)
        unwaited = ring._in_use[handle][0]  # what a kernel reads without waiting
        assert all(side.isnan().all() for side in unwaited)
        assert all(map(torch.equal, joined(ring.wait(handle)), joined(pieces)))
        ring.release(handle)


def test_eager_streams_show_a_slot_that_is_reused_too_early():
    ring = SlotRing(2, 1024, CPU, ByteCounter(), EagerStreams())
    tiles = [random_pieces(seeded(seed), 2, [7], (4, 5)) for seed in range(3)]
    first = ring.fetch(tiles[0])
    _ = ring.fetch(tiles[1])
    ((k, v),) = ring.wait(first)
    ring.release(first)  # too early: k and v have not been read yet
    ring.fetch(tiles[2])
    assert not torch.equal(k, tiles[0][0][0])
    assert torch.equal(k, tiles[2][0][0])
    assert torch.equal(v, tiles[2][0][1])


@both_streams
def test_a_prefetched_tile_is_fetched_once(kind):
    counter = ByteCounter()
    ring = SlotRing(2, 1024, CPU, counter, kind())
    tiles = [random_pieces(seeded(seed), 2, [7], (4, 5)) for seed in range(4)]
    size = nbytes(*joined(tiles[0]))
    handle = ring.fetch(tiles[0], key="0")
    ring.prefetch(tiles[1], key="1")
    ring.prefetch(tiles[2], key="2")  # no slot is free: nothing happens
    assert counter.host_to_device_bytes == 2 * size
    ring.release(handle)
    handle = ring.fetch(tiles[1], key="1")
    assert counter.host_to_device_bytes == 2 * size
    assert all(map(torch.equal, joined(ring.wait(handle)), joined(tiles[1])))
    ring.prefetch(tiles[2], key="2")
    ring.release(handle)
    for key in ("3", None):  # another tile than the prefetched one, or a tile without a key
        handle = ring.fetch(tiles[3], key=key)
        assert all(map(torch.equal, joined(ring.wait(handle)), joined(tiles[3])))
        ring.prefetch(tiles[2], key=key)
        ring.release(handle)
    ring.drop_prefetched()
    handles = [ring.fetch(tiles[0]), ring.fetch(tiles[1])]
    assert all(map(torch.equal, joined(ring.wait(handles[1])), joined(tiles[1])))


@both_streams
def test_another_tile_is_fetched_in_place_of_the_second_prefetched_one(kind):
    """As after beams have changed places: the first tile of a layer is the prefetched one, and the second is not."""
    ring = SlotRing(2, 1024, CPU, ByteCounter(), kind())
    tiles = [random_pieces(seeded(seed), 2, [7], (4, 5)) for seed in range(4)]
    for wanted in (2, 3):
        assert ring.prefetch(tiles[0], key=0)
        assert ring.prefetch(tiles[1], key=1)
        handles = [ring.fetch(tiles[key], key=key) for key in (0, wanted)]
        for handle, key in zip(handles, (0, wanted), strict=True):
            assert all(map(torch.equal, joined(ring.wait(handle)), joined(tiles[key])))
            ring.release(handle)


@both_streams
@pytest.mark.parametrize("queue", ["fetch", "back"])
def test_copies_between_other_layouts_are_errors(kind, queue):
    contiguous = torch.zeros(4, 6)
    strided = torch.zeros(6, 4).T
    cpu_streams = kind()
    cpu_streams.copy([(contiguous, torch.ones(4, 6))], queue)
    cpu_streams.drain()
    assert (contiguous == 1).all()
    for sides in ((contiguous, strided), (strided, contiguous)):
        with pytest.raises(AssertionError, match="contiguous on both sides"):
            cpu_streams.copy([sides], queue)


def test_in_place_tiles_are_the_pieces_themselves():
    ring = InPlace()
    tiles = [random_pieces(seeded(seed), 2, [3, 4], (4, 5)) for seed in range(3)]
    handles = [ring.fetch(pieces) for pieces in tiles]
    for handle, pieces in zip(handles, tiles, strict=True):
        for found, wanted in zip(ring.wait(handle), pieces, strict=True):
            assert [x.data_ptr() for x in found] == [x.data_ptr() for x in wanted]
        ring.release(handle)
        with pytest.raises(KeyError):
            ring.wait(handle)
    handle = ring.fetch(tiles[0])
    ring.abandon()
    with pytest.raises(KeyError):
        ring.wait(handle)


# -- mistakes in the loop --------------------------------------------------------------------------------------


class Overwriting(SlotRing):
    """A ring that overwrites the slot that is read next."""

    def _is_in_use(self, handle):
        return False


class RingWithoutWaits(SlotRing):
    """A ring that does not wait for a tile."""

    def wait(self, handle):
        return (self._in_use[handle][0],)


def stream_with(ring, counter, backend):
    """Decode over 700 tokens in tiles of 100. Returns the relative error against the oracle."""
    rng = seeded(3)
    k, v = (torch.randn(1, 2, 701, 16, generator=rng) for _ in range(2))
    q = torch.randn(1, 4, 1, 16, generator=rng)
    layer_kv = LayerKV(k, v, tier=HostTier(counter), counter=counter, write=WriteInPlace())
    layer_kv.append(k[:, :, :700], v[:, :, :700])
    out = attend_streaming(
        q,
        k[:, :, 700:],
        v[:, :, 700:],
        layer_kv,
        AttentionSpec(0.5),
        plan=TilePlan(2, 100, ""),
        ring=ring,
        backend=backend,
    )
    wanted = attend_reference(q, k, v, scale=0.5).out.transpose(1, 2)
    return float((out.double() - wanted).norm() / wanted.norm())


@both_streams
@pytest.mark.parametrize("backend", [None, "cpu-flash", "eager"])
def test_the_loop_uses_the_ring_correctly(kind, backend):
    counter = ByteCounter()
    assert stream_with(SlotRing(2, 2 * 100 * 32 * 4, CPU, counter, kind()), counter, backend) < 2e-6


@pytest.mark.parametrize("backend", [None, "cpu-flash", "eager"])
def test_an_overwritten_slot_gives_wrong_numbers(backend):
    counter = ByteCounter()
    assert stream_with(Overwriting(1, 2 * 100 * 32 * 4, CPU, counter, EagerStreams()), counter, backend) > 0.01


@pytest.mark.parametrize("backend", [None, "cpu-flash", "eager"])
def test_a_missing_wait_gives_nan(backend):
    counter = ByteCounter()
    error = stream_with(RingWithoutWaits(2, 2 * 100 * 32 * 4, CPU, counter, LazyStreams()), counter, backend)
    assert math.isnan(error)


# -- write-back ------------------------------------------------------------------------------------------------

LAYOUTS = {
    "heads first": lambda x: x.contiguous(),
    "tokens first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "dims first": lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "every other": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
    "one head for all": lambda x: x[:1].expand_as(x),
}


@both_streams
@PROPERTY
@given(data=st.data())
def test_write_back_of_any_layout(kind, data):
    draw = data.draw
    rng = seeded(draw(st.integers(0, 2**31 - 1)))
    counter = ByteCounter()
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    heads = draw(st.integers(1, 4))
    tokens = draw(st.integers(0, 40))
    dim = draw(st.sampled_from([1, 3, 8]))
    row_bytes = heads * dim * dtype.itemsize
    buffer_bytes = row_bytes * draw(st.integers(1, 12)) + draw(st.sampled_from([0, dtype.itemsize]))
    source = LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](torch.randn(heads, tokens, dim, generator=rng).to(dtype))
    memory = torch.full((heads, tokens + 7, dim), 99.0, dtype=dtype)
    write = StagingWriter(buffer_bytes, CPU, counter, kind())
    write(memory[:, 2 : tokens + 2], source, write.event())
    write.settle()
    assert torch.equal(memory[:, 2 : tokens + 2], source)
    assert (memory[:, :2] == 99).all()
    assert (memory[:, tokens + 2 :] == 99).all()
    assert counter.device_to_host_bytes == nbytes(source)
    assert counter.copies == heads * -(-tokens // (buffer_bytes // row_bytes))
    assert counter.host_to_device_bytes == 0
    assert counter.device_bytes["staging"] == counter.device_peak_bytes == 2 * buffer_bytes
    write.close()
    assert counter.device_bytes["staging"] == 0


def test_a_write_back_buffer_too_small_for_a_token_is_an_error():
    write = StagingWriter(31, CPU, ByteCounter(), EagerStreams())
    with pytest.raises(CapacityError, match="holds no token of 32 bytes"):
        write(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), None)


def test_a_write_back_buffer_is_not_reused_before_it_is_copied():
    class WithoutComputeWaits(LazyStreams):
        """Streams whose compute queue does not wait."""

        def wait(self, event, queue):
            if queue != "compute":
                super().wait(event, queue)

    source = torch.randn(2, 9, 4, generator=seeded(0))
    for kind, is_right in ((LazyStreams, True), (WithoutComputeWaits, False)):
        memory = torch.zeros(2, 9, 4)
        write = StagingWriter(2 * 4 * 4 * 2, CPU, ByteCounter(), kind())
        write(memory, source, write.event())
        write.settle()
        assert torch.equal(memory, source) == is_right


def test_writing_in_place_copies():
    destination = torch.zeros(2, 3, 4)
    source = torch.randn(3, 2, 4, generator=seeded(0)).transpose(0, 1)
    WriteInPlace()(destination, source)
    assert torch.equal(destination, source)
    assert destination.data_ptr() != source.data_ptr()


# -- a whole forward pass --------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["eager", "lazy"])
def test_every_transfer_of_a_forward_pass_is_contiguous_and_counted(transport, monkeypatch):
    """Two layers with two rows get chunks in a model's layout. One function checks every copy over the link."""
    moved = []

    checked = streams.check_contiguous

    def spy(copies):
        for destination, source in checked(copies):
            assert destination.dtype == source.dtype
            assert destination.numel() == source.numel() > 0
            moved.append(nbytes(source))
            yield destination, source

    def refuse(*_):
        raise AssertionError("a write without a staging buffer")

    monkeypatch.setattr(streams, "check_contiguous", spy)
    monkeypatch.setattr(WriteInPlace, "__call__", refuse)
    rng = seeded(1)
    layers = 2
    scale = 0.25
    engine = Engine(Options(transport=transport, device_kv_budget_bytes=700_000, tile_tokens=300), layers)
    layer_kvs = []
    appended = [[], []]
    for tokens in (300, 600, 1, 5, 1):
        for layer in range(layers):
            q, k, v = (torch.randn(2, tokens, heads, 16, generator=rng).transpose(1, 2) for heads in (4, 2, 2))
            if len(layer_kvs) == layer:
                layer_kvs.append(engine.new_layer_kv(k, v))
            if layer == 0:
                engine.begin(layer_kvs[0], 4, tokens)
            appended[layer].append((k, v))
            out = engine.attend(q, k, v, layer_kvs[layer], AttentionSpec(scale))
            layer_kvs[layer].append(k, v)
            all_k, all_v = (torch.cat(sides, dim=2) for sides in zip(*appended[layer], strict=True))
            mask = causal_mask(tokens, all_k.shape[2])
            wanted = attend_reference(q, all_k, all_v, scale=scale, mask=mask).out.transpose(1, 2)
            torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)
    counter = engine.counter
    host_bytes = sum(layer_kv.rows * layer_kv.host_tokens * 2 * 32 * 4 for layer_kv in layer_kvs)
    assert counter.device_to_host_bytes == host_bytes  # each new token is written back once
    assert counter.host_to_device_bytes > 3 * host_bytes
    assert sum(moved) == counter.host_to_device_bytes + counter.device_to_host_bytes
    assert len(moved) == counter.copies
    assert sum(counter.device_bytes.values()) <= counter.device_peak_bytes <= 700_000
