"""LayerKV against a model of plain tensors, and the bytes that each operation moves."""

import gc
import itertools

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from headinfer.errors import CapacityError, StateError
from headinfer.kv.byte_counter import ByteCounter
from headinfer.kv.device_buffer import TAIL_UNIT_TOKENS, pieces_of
from headinfer.kv.host_memory import HostTier
from headinfer.kv.layer_kv import LayerKV
from headinfer.kv.resident import LayerResidency, Residency
from headinfer.kv.streams import open_streams
from headinfer.kv.write_back import WriteInPlace
from headinfer.plan.footprint import host_kv_tokens

UNIT = TAIL_UNIT_TOKENS
HEADS = 2
KEY_DIM = 3
VALUE_DIM = 5
CPU = torch.device("cpu")
OTHERS = ("ring", "staging", "exchange", "resident", "window")  # purposes of device bytes beside the tail


@pytest.fixture(autouse=True, scope="module")
def quick_garbage_collection():
    """Exclude the objects of imported modules from garbage collection, so that gc.collect() is fast."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class LimitedTier(HostTier):
    """A tier that refuses all allocations after the next `left` ones."""

    left = None

    def allocate(self, shape, dtype):
        if self.left is not None:
            if self.left == 0:
                raise CapacityError("no more memory, on purpose")
            self.left -= 1
        return super().allocate(shape, dtype)


class CountingWriter(WriteInPlace):
    """Writes in place, and counts calls and bytes."""

    def __init__(self):
        self.calls = self.nbytes = 0

    def __call__(self, destination, source, write_done):
        assert destination.shape == source.shape
        self.calls += 1
        self.nbytes += source.numel() * source.element_size()
        super().__call__(destination, source, write_done)


class Bench:
    """Makes LayerKVs that share a byte counter, a host tier and a counting writer."""

    def __init__(self, dtype=torch.float32, heads=HEADS, dims=(KEY_DIM, VALUE_DIM)):
        self.dtype = dtype
        self.heads = heads
        self.dims = dims
        self.counter = ByteCounter()
        self.write = CountingWriter()
        self.tier = LimitedTier(self.counter)
        self.rng = torch.Generator().manual_seed(0)

    @property
    def token_bytes(self):
        return self.heads * sum(self.dims) * self.dtype.itemsize

    def layer_kv(self, rows=1, expected_tokens=0, resident_tokens=0):
        k, v = self.new(rows, 0)
        residency = None
        if resident_tokens:
            room = resident_tokens * self.token_bytes * rows
            pool = Residency(room, CPU, self.counter, open_streams("eager", CPU))
            residency = LayerResidency(pool, room, host_kv_tokens(expected_tokens))
        return LayerKV(
            k,
            v,
            tier=self.tier,
            counter=self.counter,
            write=self.write,
            expected_tokens=expected_tokens,
            residency=residency,
        )

    def new(self, rows, tokens):
        """Make new K and V in the layout of a model, tokens before heads in memory."""
        return tuple(
            torch.randn(rows, tokens, self.heads, dim, generator=self.rng).to(self.dtype).transpose(1, 2)
            for dim in self.dims
        )

    def filled(self, tokens, rows=1, **options):
        layer_kv = self.layer_kv(rows, **options)
        k, v = self.new(rows, tokens)
        layer_kv.append(k, v)
        return layer_kv, k, v


def segments_of(*layer_kvs):
    found = {
        id(part.segment): part.segment
        for layer_kv in layer_kvs
        for shared in layer_kv.shared_prefixes()
        for part in shared.slices
    }
    return list(found.values())


def segment_bytes(segment):
    return (segment.k.numel() + segment.v.numel()) * segment.k.element_size()


def assert_holds(layer_kv, k, v):
    """Assert that a LayerKV contains exactly k and v."""
    found_k, found_v = layer_kv.dense()
    assert layer_kv.tokens == k.shape[2]
    assert torch.equal(found_k, k)
    assert torch.equal(found_v, v)


def host_part(layer_kv, row, shared_prefixes):
    """Join K and V of a row's host tokens from shared prefixes."""
    slices = [part for shared in shared_prefixes if row in shared.rows for part in shared.slices]
    if not slices:
        empty = layer_kv.dense()
        return empty[0][row, :, :0], empty[1][row, :, :0]
    return tuple(
        torch.cat(
            [getattr(part.segment, side)[:, part.start : part.stop] for part in slices],
            dim=1,
        )
        for side in "kv"
    )


def assert_shared_prefixes_do_not_overlap(shared_prefixes):
    """Assert that no token of a segment is in two shared prefixes."""
    seen = {}
    for shared in shared_prefixes:
        assert shared.rows == tuple(sorted(set(shared.rows)))
        for part in shared.slices:
            assert 0 <= part.start < part.stop <= part.segment.tokens
            for start, stop in seen.setdefault(id(part.segment), []):
                assert part.stop <= start or stop <= part.start
            seen[id(part.segment)].append((part.start, part.stop))


# -- random operations -----------------------------------------------------------------------------------------


class LayerKVMachine(RuleBasedStateMachine):
    """Random operations on LayerKVs and their forks. `pairs` has each LayerKV with the K and V that it must contain."""

    def __init__(self):
        super().__init__()
        self.pairs = []  # [layer_kv, k, v]
        self.choice = 0

    @initialize(
        rows=st.integers(1, 3),
        dtype=st.sampled_from([torch.float32, torch.bfloat16]),
        expected_tokens=st.sampled_from([0, 0, 900, 5000]),
        resident_tokens=st.sampled_from([0, 300, 1500, 9000, 30_000]),
    )
    def open(self, rows, dtype, expected_tokens, resident_tokens):
        self.bench = Bench(dtype)
        self.pairs = [[self.bench.layer_kv(rows, expected_tokens, resident_tokens), *self.bench.new(rows, 0)]]

    def pick(self, which):
        return self.pairs[which % len(self.pairs)]

    @precondition(lambda self: self.pairs)
    @rule(which=st.integers(0, 3), tokens=st.one_of(st.integers(1, 700), st.sampled_from([1, 127, 128, 129, 256, 257])))
    def append(self, which, tokens):
        pair = self.pick(which)
        layer_kv, k, v = pair
        if layer_kv.tokens > 4000:
            return
        new_k, new_v = self.bench.new(layer_kv.rows, tokens)
        tail_bytes = layer_kv.tail_bytes
        layer_kv.append(new_k, new_v)
        assert layer_kv.tail_bytes == tail_bytes
        pair[1:] = [torch.cat([k, new_k], dim=2), torch.cat([v, new_v], dim=2)]

    @precondition(lambda self: self.pairs)
    @rule(which=st.integers(0, 3), tokens=st.integers(200, 1500), allowed=st.integers(0, 1))
    def append_without_memory(self, which, tokens, allowed):
        pair = self.pick(which)
        layer_kv = pair[0]
        new_k, new_v = self.bench.new(layer_kv.rows, tokens)
        self.bench.tier.left = allowed
        try:
            layer_kv.append(new_k, new_v)
        except CapacityError:
            pass  # the invariants check that nothing has changed
        else:
            pair[1:] = [torch.cat([old, new], dim=2) for old, new in zip(pair[1:], (new_k, new_v), strict=True)]
        finally:
            self.bench.tier.left = None

    @precondition(lambda self: self.pairs)
    @rule(which=st.integers(0, 3), share=st.floats(0, 1), few=st.booleans())
    def crop(self, which, share, few):
        pair = self.pick(which)
        layer_kv, k, v = pair
        keep = max(layer_kv.tokens - int(share * 20), 0) if few else int(share * layer_kv.tokens)
        writes = self.bench.write.calls
        tail_bytes = layer_kv.tail_bytes
        layer_kv.crop(keep)
        assert self.bench.write.calls == writes
        assert layer_kv.tail_bytes == tail_bytes
        pair[1:] = [k[:, :, :keep], v[:, :, :keep]]

    @precondition(lambda self: self.pairs)
    @rule(which=st.integers(0, 3), picks=st.lists(st.integers(0, 3), min_size=1, max_size=4))
    def select_rows(self, which, picks):
        pair = self.pick(which)
        layer_kv, k, v = pair
        indices = [row % layer_kv.rows for row in picks]
        writes = self.bench.write.calls
        moved = self.bench.counter.tail_moved_bytes
        host = self.bench.counter.host_bytes
        same = indices == list(range(layer_kv.rows))
        layer_kv.select_rows(indices)
        assert self.bench.write.calls == writes
        assert self.bench.counter.host_bytes <= host  # unused rows are freed
        moved = self.bench.counter.tail_moved_bytes - moved
        assert moved == (0 if same else len(indices) * layer_kv.tail_tokens * self.bench.token_bytes)
        pair[1:] = [k[indices], v[indices]]

    @precondition(lambda self: 0 < len(self.pairs) < 4)
    @rule(which=st.integers(0, 3))
    def fork(self, which):
        layer_kv, k, v = self.pick(which)
        before = self.bench.write.calls, self.bench.counter.host_bytes
        moved = self.bench.counter.tail_moved_bytes
        fork = layer_kv.fork()
        assert before == (self.bench.write.calls, self.bench.counter.host_bytes)
        assert self.bench.counter.tail_moved_bytes - moved == layer_kv.rows * fork.tail_tokens * self.bench.token_bytes
        self.pairs.append([fork, k, v])

    @precondition(lambda self: 0 < len(self.pairs) < 4)
    @rule(which=st.integers(0, 3), share=st.floats(0, 1), tokens=st.integers(200, 600))
    def fork_and_continue(self, which, share, tokens):
        """Fork, crop both sides to the same length and append different tokens to them."""
        self.fork(which)
        for index in (which % (len(self.pairs) - 1), len(self.pairs) - 1):
            self.crop(index, share, few=False)
            self.append(index, tokens)

    @precondition(lambda self: self.pairs and self.pairs[0][0].residency is not None)
    @rule(share=st.floats(0, 1))
    def shrink_residency(self, share):
        pool = self.pairs[0][0].residency.pool
        pool.shrink(int(share * pool.held_bytes))

    @precondition(lambda self: self.pairs)
    @rule(which=st.integers(0, 3), tokens=st.integers(1, 3))
    def stage_and_append(self, which, tokens):
        pair = self.pick(which)
        layer_kv, k, v = pair
        new_k, new_v = self.bench.new(layer_kv.rows, tokens)
        whole = [torch.cat([old, new], dim=2) for old, new in zip((k, v), (new_k, new_v), strict=True)]
        one_piece = layer_kv.stage_in_one_piece(new_k, new_v)
        if one_piece is not None:
            assert all(map(torch.equal, one_piece, whole))
        layer_kv.append(new_k, new_v)
        pair[1:] = whole

    @precondition(lambda self: len(self.pairs) > 1)
    @rule(which=st.integers(0, 3))
    def close(self, which):
        self.pairs.pop(which % len(self.pairs))[0].close()

    @precondition(lambda self: self.pairs)
    @rule(which=st.integers(0, 3), cuts=st.lists(st.integers(0, 4500), min_size=8, max_size=8))
    def read_token_ranges(self, which, cuts):
        layer_kv, k, v = self.pick(which)
        edges = sorted({min(cut, layer_kv.tokens) for cut in cuts})
        token_ranges = [
            list(zip(edges[row % 2 :: 2], edges[row % 2 + 1 :: 2], strict=False)) if row != 2 else []
            for row in range(layer_kv.rows)
        ]
        shared_prefixes = layer_kv.shared_prefixes(token_ranges)
        for row in range(layer_kv.rows):
            for side, (found, whole) in enumerate(zip(host_part(layer_kv, row, shared_prefixes), (k, v), strict=True)):
                seen = [
                    whole[row, :, a : min(b, layer_kv.host_tokens)]
                    for a, b in token_ranges[row]
                    if a < layer_kv.host_tokens
                ]
                wanted = torch.cat(seen, dim=1) if seen else whole[row, :, :0]
                # The order may differ if a row shares only some of its slices. The tokens are the same.
                assert sorted_tokens(found) == sorted_tokens(wanted)
                tails = [pair[side] for pair in layer_kv.tail(row, token_ranges[row])]
                wanted_tails = [
                    whole[row, :, max(a, layer_kv.host_tokens) : b]
                    for a, b in token_ranges[row]
                    if b > layer_kv.host_tokens
                ]
                assert len(tails) == len(wanted_tails)
                assert all(map(torch.equal, tails, wanted_tails))

    @invariant()
    def contents_are_right(self):
        for layer_kv, k, v in self.pairs:
            assert_holds(layer_kv, k, v)
            assert layer_kv.rows == k.shape[0]
            assert 0 <= layer_kv.tail_tokens <= 2 * UNIT

    @invariant()
    def shared_prefixes_cover_the_host_part(self):
        for layer_kv, k, v in self.pairs:
            shared_prefixes = layer_kv.shared_prefixes()
            assert_shared_prefixes_do_not_overlap(shared_prefixes)
            for row in range(layer_kv.rows):
                found_k, found_v = host_part(layer_kv, row, shared_prefixes)
                assert torch.equal(found_k, k[row, :, : layer_kv.host_tokens])
                assert torch.equal(found_v, v[row, :, : layer_kv.host_tokens])

    @invariant()
    def resident_tokens_are_right(self):
        for layer_kv, k, v in self.pairs:
            for row, table in enumerate(layer_kv._tables):
                at = 0
                for part in table:
                    stop = min(part.segment.resident_tokens, part.stop)
                    if stop > part.start:
                        (found,) = pieces_of([part.segment.resident(part.start, stop)], slice(None))
                        tokens = slice(at, at + stop - part.start)
                        assert all(map(torch.equal, found, (k[row, :, tokens], v[row, :, tokens])))
                    at += part.tokens
            one_piece = layer_kv.stage_in_one_piece(k[:, :, :0], v[:, :, :0])
            if one_piece is not None:
                assert all(map(torch.equal, one_piece, (k, v)))

    @invariant()
    def the_byte_counter_is_exact(self):
        gc.collect()
        layer_kvs = [pair[0] for pair in self.pairs]
        held = sum(segment_bytes(segment) for segment in segments_of(*layer_kvs))
        if not self.pairs:
            return
        counter = self.bench.counter
        assert counter.host_bytes == held
        assert counter.host_peak_bytes >= held
        tails = sum(layer_kv.rows * 2 * UNIT * self.bench.token_bytes for layer_kv in layer_kvs)
        residency = layer_kvs[0].residency
        if residency is not None:  # tails that were left behind stay as long as tokens beside them are resident
            buffers = {id(one): one for layer_kv in layer_kvs for one in buffers_of(layer_kv)}.values()
            assert counter.device_bytes["tail"] == sum(one.tail_bytes for one in buffers)
            assert counter.device_bytes["resident"] == sum(one.resident_bytes for one in buffers)
            assert counter.device_bytes["resident"] <= residency.pool.room_bytes
            return
        assert counter.device_bytes == {"tail": tails} | dict.fromkeys(OTHERS, 0)
        assert sum(layer_kv.tail_bytes for layer_kv in layer_kvs) == tails

    def teardown(self):
        for pair in self.pairs:
            pair[0].close()
        if self.pairs:
            self.pairs = []
            gc.collect()
            assert self.bench.counter.host_bytes == 0
            assert self.bench.counter.device_bytes["tail"] == 0


def buffers_of(layer_kv):
    """The buffers that hold a layer's tail or resident tokens."""
    found = [part.segment.resident_buffer for table in layer_kv._tables for part in table]
    return [layer_kv._buffer, *(buffer for buffer in found if buffer is not None)]


def sorted_tokens(x):
    """The tokens of x [H, T, D] as sorted lists of numbers."""
    return sorted(x.transpose(0, 1).flatten(1).tolist())


def test_random_operations():
    run_state_machine_as_test(
        LayerKVMachine,
        settings=settings(
            deadline=None,
            derandomize=True,
            max_examples=40,
            stateful_step_count=25,
            phases=(Phase.generate,),  # add Phase.shrink to shorten a failing example, which takes minutes
            suppress_health_check=list(HealthCheck),
        ),
    )


# -- growing ---------------------------------------------------------------------------------------------------


def test_appending_never_moves_old_data():
    bench = Bench()
    layer_kv = bench.layer_kv(rows=2)
    known = {}  # id of a segment: the segment, its addresses, the number of its tokens, their contents
    for tokens in (1, 300, 64, 1, 700, 128, 5, 2000, 1, 1, 400):
        layer_kv.append(*bench.new(2, tokens))
        for segment, addresses, held, k, v in known.values():
            assert (segment.k.data_ptr(), segment.v.data_ptr()) == addresses
            assert torch.equal(segment.k[:, :held], k)
            assert torch.equal(segment.v[:, :held], v)
        for shared in layer_kv.shared_prefixes():
            for part in shared.slices:
                segment = part.segment
                held = part.stop
                addresses = (segment.k.data_ptr(), segment.v.data_ptr())
                k, v = (side[:, :held].clone() for side in (segment.k, segment.v))
                known[id(segment)] = (segment, addresses, held, k, v)
    assert len(known) > 4
    assert {id(segment) for segment in segments_of(layer_kv)} == known.keys()


def test_each_token_is_written_to_the_host_at_most_once():
    bench = Bench()
    layer_kv = bench.layer_kv()
    for tokens in (1,) * 300 + (17, 500, 128, 1):
        layer_kv.append(*bench.new(1, tokens))
        assert bench.write.nbytes == layer_kv.host_tokens * bench.token_bytes
    assert layer_kv.host_tokens > 0
    assert UNIT <= layer_kv.tail_tokens <= 2 * UNIT


def test_rejected_tokens_never_touch_the_host():
    """Speculative decoding appends five tokens and rejects some of them, at every position of the tail."""
    bench = Bench()
    layer_kv, k, v = bench.filled(300)
    for step in range(200):
        new_k, new_v = bench.new(1, 5)
        layer_kv.append(new_k, new_v)
        kept = step % 4 + 1
        writes = bench.write.calls
        layer_kv.crop(k.shape[2] + kept)
        assert bench.write.calls == writes
        k = torch.cat([k, new_k[:, :, :kept]], dim=2)
        v = torch.cat([v, new_v[:, :, :kept]], dim=2)
    assert_holds(layer_kv, k, v)
    assert layer_kv.host_tokens > 300
    assert bench.write.nbytes == layer_kv.host_tokens * bench.token_bytes  # each token is written once


@pytest.mark.parametrize("keep", [0, 1, 127, 128, 500, 871, 872, 873, 999, 1000])
def test_crop_and_append(keep):
    bench = Bench()
    layer_kv, k, v = bench.filled(1000, rows=2)
    writes = bench.write.calls
    layer_kv.crop(keep)
    assert bench.write.calls == writes
    assert_holds(layer_kv, k[:, :, :keep], v[:, :, :keep])
    new_k, new_v = bench.new(2, 600)
    layer_kv.append(new_k, new_v)
    assert_holds(layer_kv, torch.cat([k[:, :, :keep], new_k], dim=2), torch.cat([v[:, :, :keep], new_v], dim=2))


@pytest.mark.parametrize("keep", [-1, 301])
def test_crop_out_of_range_is_an_error(keep):
    layer_kv, k, v = Bench().filled(300)
    with pytest.raises(StateError, match=f"300 tokens to {keep}"):
        layer_kv.crop(keep)
    assert_holds(layer_kv, k, v)


def test_each_head_of_a_segment_is_contiguous_with_v_after_k():
    bench = Bench(heads=3)
    layer_kv, _, _ = bench.filled(1500)
    for segment in segments_of(layer_kv):
        for k, v in zip(segment.k, segment.v, strict=True):
            assert k.is_contiguous()
            assert v.is_contiguous()
            assert v.data_ptr() == k.data_ptr() + k.numel() * k.element_size()
        assert segment.k.data_ptr() % 4096 == 0  # cudaHostRegister needs whole pages


@pytest.mark.parametrize("chunk", [64, 1000, 4096])
@pytest.mark.parametrize("expected_tokens", [3000, 40_000])
def test_host_memory_is_exact_if_the_length_is_known(expected_tokens, chunk):
    bench = Bench(heads=1, dims=(1, 1))
    layer_kv = bench.layer_kv(expected_tokens=expected_tokens)
    while layer_kv.tokens < expected_tokens:
        layer_kv.append(*bench.new(1, min(chunk, expected_tokens - layer_kv.tokens)))
    sizes = [segment.tokens for segment in segments_of(layer_kv)]
    rounded = -(-expected_tokens // UNIT) * UNIT
    assert sizes == ([rounded] if rounded <= 16_384 else [16_384, 16_384, rounded - 32_768])
    assert bench.counter.host_bytes == bench.counter.host_peak_bytes == rounded * bench.token_bytes


def test_an_unknown_length_wastes_at_most_a_sixteenth():
    bench = Bench(heads=1, dims=(1, 1))
    layer_kv = bench.layer_kv()
    max_waste = 0
    for _ in range(600):
        layer_kv.append(*bench.new(1, 100))
        waste = bench.counter.host_bytes // bench.token_bytes - layer_kv.host_tokens
        assert 0 <= waste <= max(256, layer_kv.host_tokens // 16)
        max_waste = max(max_waste, waste)
    assert max_waste > 1000  # segments grow with the context, so that there are few of them
    assert len(segments_of(layer_kv)) < 120


def test_a_text_may_be_longer_than_expected():
    bench = Bench()
    layer_kv, k, v = bench.filled(3000, rows=2, expected_tokens=1000)
    new_k, new_v = bench.new(2, 777)
    layer_kv.append(new_k, new_v)
    assert_holds(layer_kv, torch.cat([k, new_k], dim=2), torch.cat([v, new_v], dim=2))


# -- sharing ---------------------------------------------------------------------------------------------------


def test_reordering_and_forking_copy_no_segments():
    bench = Bench()
    layer_kv, k, v = bench.filled(1000, rows=3)
    host = bench.counter.host_bytes
    writes = bench.write.calls
    before = {id(segment): segment.k.clone() for segment in segments_of(layer_kv)}
    fork = layer_kv.fork()
    layer_kv.select_rows([2, 0, 0, 1])
    assert bench.write.calls == writes
    assert bench.counter.host_bytes == host
    assert {id(segment) for segment in segments_of(layer_kv, fork)} == before.keys()
    assert all(torch.equal(segment.k, before[id(segment)]) for segment in segments_of(layer_kv))
    assert_holds(layer_kv, k[[2, 0, 0, 1]], v[[2, 0, 0, 1]])
    assert_holds(fork, k, v)


def test_beam_search_never_copies_segments():
    """Beam search reorders rows at each step. Host memory grows only by the new tokens."""
    bench = Bench()
    layer_kv, k, v = bench.filled(2000, rows=1)
    layer_kv.select_rows([0, 0, 0])
    k = k[[0, 0, 0]]
    v = v[[0, 0, 0]]
    base = bench.counter.host_bytes
    for step in range(300):
        order = [[0, 1, 2], [0, 0, 2], [2, 1, 0], [1, 1, 1]][step % 4]
        new_k, new_v = bench.new(3, 1)
        layer_kv.append(new_k, new_v)
        layer_kv.select_rows(order)
        k = torch.cat([k, new_k], dim=2)[order]
        v = torch.cat([v, new_v], dim=2)[order]
    assert_holds(layer_kv, k, v)
    gc.collect()
    assert bench.counter.host_bytes - base <= 3 * (300 + 3 * 256) * bench.token_bytes


def test_rows_share_a_prefix_and_have_their_own_later_tokens():
    bench = Bench()
    layer_kv, k, v = bench.filled(1000)
    shared = layer_kv.host_tokens
    layer_kv.select_rows([0, 0, 0])
    (prefix,) = layer_kv.shared_prefixes()
    assert prefix.rows == (0, 1, 2)
    assert sum(part.tokens for part in prefix.slices) == shared
    new_k, new_v = bench.new(3, 500)
    layer_kv.append(new_k, new_v)
    first, *own = layer_kv.shared_prefixes()
    assert first == prefix
    assert [each.rows for each in own] == [(0,), (1,), (2,)]
    assert all(sum(part.tokens for part in each.slices) == layer_kv.host_tokens - shared for each in own)
    assert len({id(part.segment) for each in own for part in each.slices}) >= 3
    assert_holds(layer_kv, torch.cat([k[[0, 0, 0]], new_k], dim=2), torch.cat([v[[0, 0, 0]], new_v], dim=2))
    layer_kv.select_rows([1, 1, 2])
    assert [each.rows for each in layer_kv.shared_prefixes()] == [(0, 1, 2), (0, 1), (2,)]


def test_shared_tokens_are_never_overwritten():
    """After a fork, both sides are cropped into the shared part and get new tokens, which are independent."""
    bench = Bench()
    layer_kv, k, v = bench.filled(1000)
    fork = layer_kv.fork()
    for each, keep in ((layer_kv, 300), (fork, 301)):
        each.crop(keep)
    first = bench.new(1, 900)
    second = bench.new(1, 900)
    layer_kv.append(*first)
    fork.append(*second)
    assert_holds(layer_kv, torch.cat([k[:, :, :300], first[0]], dim=2), torch.cat([v[:, :, :300], first[1]], dim=2))
    assert_holds(fork, torch.cat([k[:, :, :301], second[0]], dim=2), torch.cat([v[:, :, :301], second[1]], dim=2))


def test_no_shared_prefix_if_nothing_is_on_the_host():
    layer_kv, k, v = Bench().filled(200, rows=2)
    assert layer_kv.shared_prefixes() == []
    assert layer_kv.shared_prefixes([[(0, 200)], [(5, 6)]]) == []
    (seen,) = layer_kv.tail(1, [(5, 6)])
    assert torch.equal(seen[0], k[1, :, 5:6])
    assert torch.equal(seen[1], v[1, :, 5:6])


# -- memory ----------------------------------------------------------------------------------------------------


def test_close_frees_all_memory():
    bench = Bench()
    layer_kv, _, _ = bench.filled(3000, rows=2)
    fork = layer_kv.fork()
    assert bench.counter.host_bytes > 0
    layer_kv.close()
    gc.collect()
    assert bench.counter.host_bytes > 0  # the fork still uses it
    fork.close()
    gc.collect()
    assert bench.counter.host_bytes == 0
    assert bench.counter.device_bytes == {"tail": 0} | dict.fromkeys(OTHERS, 0)
    assert bench.counter.host_peak_bytes >= 2 * 2800 * bench.token_bytes


def test_unused_segments_are_freed():
    bench = Bench()
    layer_kv, _, _ = bench.filled(3000)
    layer_kv.append(*bench.new(1, 3000))
    full = bench.counter.host_bytes
    layer_kv.crop(100)
    gc.collect()
    assert 0 < bench.counter.host_bytes < full
    layer_kv.crop(0)
    gc.collect()
    assert bench.counter.host_bytes == 0


def test_memory_exists_as_long_as_a_view_of_it():
    """A tile that is still being read keeps its pages, even if the LayerKV is closed."""
    bench = Bench()
    layer_kv, k, _ = bench.filled(1000)
    view = layer_kv.shared_prefixes()[0].slices[0].segment.k[1, 10:20]
    layer_kv.close()
    gc.collect()
    assert bench.counter.host_bytes > 0
    assert torch.equal(view, k[0, 1, 10:20])
    del view
    gc.collect()
    assert bench.counter.host_bytes == 0


@pytest.mark.parametrize("allowed", [0, 1])
def test_a_failed_allocation_changes_nothing(allowed, monkeypatch):
    bench = Bench()
    layer_kv, k, v = bench.filled(400, rows=2)
    real = bench.tier.allocate
    count = itertools.count()

    def allocate(shape, dtype):
        if next(count) >= allowed:  # before or after the first row has its segment
            raise CapacityError("no more memory, on purpose")
        return real(shape, dtype)

    host = bench.counter.host_bytes
    shared_prefixes = layer_kv.shared_prefixes()
    writes = bench.write.calls
    with monkeypatch.context() as patch:
        patch.setattr(bench.tier, "allocate", allocate)
        with pytest.raises(CapacityError):
            layer_kv.append(*bench.new(2, 900))
        assert bench.write.calls == writes
    gc.collect()
    assert bench.counter.host_bytes == host
    assert layer_kv.shared_prefixes() == shared_prefixes
    assert_holds(layer_kv, k, v)
    new_k, new_v = bench.new(2, 900)
    layer_kv.append(new_k, new_v)
    assert_holds(layer_kv, torch.cat([k, new_k], dim=2), torch.cat([v, new_v], dim=2))


@pytest.mark.parametrize("allowed", [0, 1, 3])
def test_a_failed_write_changes_nothing(allowed):
    bench = Bench()
    layer_kv, k, v = bench.filled(400, rows=2)
    shared_prefixes = layer_kv.shared_prefixes()
    count = itertools.count()

    class Failing(WriteInPlace):
        def __call__(self, destination, source, write_done):
            if next(count) >= allowed:
                raise CapacityError("no write-back buffer, on purpose")
            super().__call__(destination, source, write_done)

    layer_kv.write = Failing()
    with pytest.raises(CapacityError):
        layer_kv.append(*bench.new(2, 900))
    assert layer_kv.shared_prefixes() == shared_prefixes
    assert_holds(layer_kv, k, v)
    layer_kv.write = bench.write
    new_k, new_v = bench.new(2, 900)
    layer_kv.append(new_k, new_v)
    assert_holds(layer_kv, torch.cat([k, new_k], dim=2), torch.cat([v, new_v], dim=2))


def test_the_size_of_the_tail_depends_only_on_the_batch():
    bench = Bench()
    layer_kv = bench.layer_kv(rows=2)
    per_row = 2 * UNIT * bench.token_bytes
    for tokens in (1, 5000, 3):
        assert layer_kv.tail_bytes == bench.counter.device_bytes["tail"] == 2 * per_row
        layer_kv.append(*bench.new(2, tokens))
    layer_kv.select_rows([0, 1, 1, 0, 0])
    assert layer_kv.tail_bytes == bench.counter.device_bytes["tail"] == 5 * per_row
    layer_kv.select_rows([3])
    assert layer_kv.tail_bytes == bench.counter.device_bytes["tail"] == per_row


def test_memory_that_the_system_refuses_is_a_capacity_error():
    tier = HostTier(ByteCounter())
    with pytest.raises(CapacityError, match="refused"):
        tier.allocate((2**60,), torch.float32)
    assert tier.counter.host_bytes == 0


def test_host_memory_is_exact_and_counted():
    counter = ByteCounter()
    tier = HostTier(counter)
    tensors = [tier.allocate((3, 5), torch.float32), tier.allocate((2, 1025), torch.bfloat16)]
    assert counter.host_bytes == 3 * 5 * 4 + 2 * 1025 * 2
    assert all((tensor == 0).all() for tensor in tensors)
    assert all(tensor.data_ptr() % 4096 == 0 for tensor in tensors)
    tensors.clear()
    gc.collect()
    assert counter.host_bytes == 0
    assert counter.host_peak_bytes == 3 * 5 * 4 + 2 * 1025 * 2
