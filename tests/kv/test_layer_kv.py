"""LayerKV against a plain model of lists of tensors, and its promises about what moves and what does not."""

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
from headinfer.kv.layer_kv import TAIL_UNIT_TOKENS, LayerKV
from headinfer.kv.tiers import HostTier
from headinfer.kv.write_back import WriteInPlace

UNIT = TAIL_UNIT_TOKENS
HEADS, KEY_DIM, VALUE_DIM = 2, 3, 5


@pytest.fixture(autouse=True, scope="module")
def quick_garbage_collection():
    """What the imports left behind is not looked at again: gc.collect() then takes no time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class LimitedTier(HostTier):
    """A tier that refuses after `left` more allocations."""

    left = None

    def allocate(self, shape, dtype):
        if self.left is not None:
            if self.left == 0:
                raise CapacityError("no more memory, on purpose")
            self.left -= 1
        return super().allocate(shape, dtype)


class CountingWriter(WriteInPlace):
    """Writes in place and counts what it wrote."""

    def __init__(self):
        self.calls = self.nbytes = 0

    def __call__(self, destination, source, write_done):
        assert destination.shape == source.shape
        self.calls += 1
        self.nbytes += source.numel() * source.element_size()
        super().__call__(destination, source, write_done)


class Bench:
    """A counter, a tier and a counting writer, and stores that use them."""

    def __init__(self, dtype=torch.float32, heads=HEADS, dims=(KEY_DIM, VALUE_DIM)):
        self.dtype, self.heads, self.dims = dtype, heads, dims
        self.counter, self.write = ByteCounter(), CountingWriter()
        self.tier = LimitedTier(self.counter)
        self.rng = torch.Generator().manual_seed(0)

    @property
    def token_bytes(self):
        return self.heads * sum(self.dims) * self.dtype.itemsize

    def layer_kv(self, rows=1, expected_tokens=0):
        k, v = self.new(rows, 0)
        return LayerKV(k, v, tier=self.tier, counter=self.counter, write=self.write, expected_tokens=expected_tokens)

    def new(self, rows, tokens):
        """Fresh K and V, in the layout of a model: tokens before heads in memory."""
        return tuple(
            torch.randn(rows, tokens, self.heads, dim, generator=self.rng).to(self.dtype).transpose(1, 2)
            for dim in self.dims
        )

    def filled(self, tokens, rows=1, **options):
        layer_kv, (k, v) = self.layer_kv(rows, **options), self.new(rows, tokens)
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
    """The store's content is exactly k and v."""
    found_k, found_v = layer_kv.dense()
    assert layer_kv.tokens == k.shape[2]
    assert torch.equal(found_k, k)
    assert torch.equal(found_v, v)


def host_part(layer_kv, row, shared_prefixes):
    """K and V of a row's host tokens, put together from shared prefixes."""
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
    """No token of a segment is in two shared prefixes: what rows share is there once."""
    seen = {}
    for shared in shared_prefixes:
        assert shared.rows == tuple(sorted(set(shared.rows)))
        for part in shared.slices:
            assert 0 <= part.start < part.stop <= part.segment.tokens
            for start, stop in seen.setdefault(id(part.segment), []):
                assert part.stop <= start or stop <= part.start
            seen[id(part.segment)].append((part.start, part.stop))


# -- against the model -----------------------------------------------------------------------------------------


class StoreMachine(RuleBasedStateMachine):
    """Random use of stores and their forks; `model` holds what each must contain: k and v of every row."""

    def __init__(self):
        super().__init__()
        self.pairs = []  # [store, k, v]
        self.choice = 0

    @initialize(
        rows=st.integers(1, 3),
        dtype=st.sampled_from([torch.float32, torch.bfloat16]),
        expected_tokens=st.sampled_from([0, 0, 900, 5000]),
    )
    def open(self, rows, dtype, expected_tokens):
        self.bench = Bench(dtype)
        self.pairs = [[self.bench.layer_kv(rows, expected_tokens), *self.bench.new(rows, 0)]]

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
            pass  # and nothing has changed: the invariants look
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
        writes, tail_bytes = self.bench.write.calls, layer_kv.tail_bytes
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
        writes, moved, host = self.bench.write.calls, self.bench.counter.tail_moved_bytes, self.bench.counter.host_bytes
        same = indices == list(range(layer_kv.rows))
        layer_kv.select_rows(indices)
        assert self.bench.write.calls == writes
        assert self.bench.counter.host_bytes <= host  # rows that nobody has any more are given back
        moved = self.bench.counter.tail_moved_bytes - moved
        assert moved == (0 if same else len(indices) * layer_kv.tail_tokens * self.bench.token_bytes)
        pair[1:] = [k[indices], v[indices]]

    @precondition(lambda self: 0 < len(self.pairs) < 4)
    @rule(which=st.integers(0, 3))
    def fork(self, which):
        layer_kv, k, v = self.pick(which)
        before = self.bench.write.calls, self.bench.counter.host_bytes
        moved = self.bench.counter.tail_moved_bytes
        twin = layer_kv.fork()
        assert before == (self.bench.write.calls, self.bench.counter.host_bytes)
        assert self.bench.counter.tail_moved_bytes - moved == twin.tail_bytes == layer_kv.tail_bytes
        self.pairs.append([twin, k, v])

    @precondition(lambda self: 0 < len(self.pairs) < 4)
    @rule(which=st.integers(0, 3), share=st.floats(0, 1), tokens=st.integers(200, 600))
    def part_ways(self, which, share, tokens):
        """Fork, take the same tokens back on both sides and go on with different ones."""
        self.fork(which)
        for index in (which % (len(self.pairs) - 1), len(self.pairs) - 1):
            self.crop(index, share, few=False)
            self.append(index, tokens)

    @precondition(lambda self: len(self.pairs) > 1)
    @rule(which=st.integers(0, 3))
    def close(self, which):
        self.pairs.pop(which % len(self.pairs))[0].close()

    @precondition(lambda self: self.pairs)
    @rule(which=st.integers(0, 3), cuts=st.lists(st.integers(0, 4500), min_size=8, max_size=8))
    def look_through_runs(self, which, cuts):
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
                # A row that shares some spans and not others may see them out of order: the tokens are the same.
                assert sorted_tokens(found) == sorted_tokens(wanted)
                tails = [pair[side] for pair in layer_kv.tail(row, token_ranges[row])]
                late = [
                    whole[row, :, max(a, layer_kv.host_tokens) : b]
                    for a, b in token_ranges[row]
                    if b > layer_kv.host_tokens
                ]
                assert len(tails) == len(late)
                assert all(map(torch.equal, tails, late))

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
        assert counter.device_bytes == {"ring": 0, "tail": tails, "staging": 0, "resident": 0}
        assert sum(layer_kv.tail_bytes for layer_kv in layer_kvs) == tails

    def teardown(self):
        for pair in self.pairs:
            pair[0].close()
        if self.pairs:
            self.pairs = []
            gc.collect()
            assert self.bench.counter.host_bytes == 0
            assert self.bench.counter.device_bytes["tail"] == 0


def sorted_tokens(x):
    """The tokens of x [H, T, D], each as a list of its numbers, in an order of their own."""
    return sorted(x.transpose(0, 1).flatten(1).tolist())


def test_stores_and_their_forks_hold_what_they_should():
    run_state_machine_as_test(
        StoreMachine,
        settings=settings(
            deadline=None,
            derandomize=True,
            max_examples=60,
            stateful_step_count=25,
            phases=(Phase.generate,),  # a failure shows at once; add Phase.shrink for a short one, in minutes
            suppress_health_check=list(HealthCheck),
        ),
    )


# -- growing ---------------------------------------------------------------------------------------------------


def test_growing_never_moves_old_data():
    bench = Bench()
    layer_kv = bench.layer_kv(rows=2)
    known = {}  # id of a segment -> the segment, its addresses, the tokens it held, their contents
    for tokens in (1, 300, 64, 1, 700, 128, 5, 2000, 1, 1, 400):
        layer_kv.append(*bench.new(2, tokens))
        for segment, addresses, held, k, v in known.values():
            assert (segment.k.data_ptr(), segment.v.data_ptr()) == addresses
            assert torch.equal(segment.k[:, :held], k)
            assert torch.equal(segment.v[:, :held], v)
        for shared in layer_kv.shared_prefixes():
            for part in shared.slices:
                segment, held = part.segment, part.stop
                contents = segment.k[:, :held].clone(), segment.v[:, :held].clone()
                known[id(segment)] = segment, (segment.k.data_ptr(), segment.v.data_ptr()), held, *contents
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
    """Speculative decoding: five tokens are tried, some are taken back, at every place of the tail."""
    bench = Bench()
    layer_kv, k, v = bench.filled(300)
    for step in range(200):
        new_k, new_v = bench.new(1, 5)
        layer_kv.append(new_k, new_v)
        kept, writes = step % 4 + 1, bench.write.calls
        layer_kv.crop(k.shape[2] + kept)
        assert bench.write.calls == writes
        k, v = torch.cat([k, new_k[:, :, :kept]], dim=2), torch.cat([v, new_v[:, :, :kept]], dim=2)
    assert_holds(layer_kv, k, v)
    assert layer_kv.host_tokens > 300
    assert bench.write.nbytes == layer_kv.host_tokens * bench.token_bytes  # nothing twice, nothing in vain


@pytest.mark.parametrize("keep", [0, 1, 127, 128, 500, 871, 872, 873, 999, 1000])
def test_crop_anywhere_and_go_on(keep):
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
def test_crop_out_of_range_is_refused(keep):
    layer_kv, k, v = Bench().filled(300)
    with pytest.raises(StateError, match=f"300 tokens to {keep}"):
        layer_kv.crop(keep)
    assert_holds(layer_kv, k, v)


def test_heads_are_contiguous_in_a_segment_with_k_and_v_next_to_each_other():
    bench = Bench(heads=3)
    layer_kv, _, _ = bench.filled(1500)
    for segment in segments_of(layer_kv):
        for k, v in zip(segment.k, segment.v, strict=True):
            assert k.is_contiguous()
            assert v.is_contiguous()
            assert v.data_ptr() == k.data_ptr() + k.numel() * k.element_size()
        assert segment.k.data_ptr() % 4096 == 0  # page-aligned, as cudaHostRegister wants


@pytest.mark.parametrize("chunk", [64, 1000, 4096])
@pytest.mark.parametrize("expected_tokens", [3000, 40_000])
def test_a_known_length_gives_exact_host_memory(expected_tokens, chunk):
    bench = Bench(heads=1, dims=(1, 1))
    layer_kv = bench.layer_kv(expected_tokens=expected_tokens)
    while layer_kv.tokens < expected_tokens:
        layer_kv.append(*bench.new(1, min(chunk, expected_tokens - layer_kv.tokens)))
    sizes = [segment.tokens for segment in segments_of(layer_kv)]
    rounded = -(-expected_tokens // UNIT) * UNIT
    assert sizes == ([rounded] if rounded <= 16_384 else [16_384, 16_384, rounded - 32_768])
    assert bench.counter.host_bytes == bench.counter.host_peak_bytes == rounded * bench.token_bytes


def test_an_unknown_length_wastes_at_most_one_segment_of_a_sixteenth():
    bench = Bench(heads=1, dims=(1, 1))
    layer_kv, most = bench.layer_kv(), 0
    for _ in range(600):
        layer_kv.append(*bench.new(1, 100))
        waste = bench.counter.host_bytes // bench.token_bytes - layer_kv.host_tokens
        assert 0 <= waste <= max(256, layer_kv.host_tokens // 16)
        most = max(most, waste)
    assert most > 1000  # segments do get larger: few copies for a long context
    assert len(segments_of(layer_kv)) < 120


def test_a_longer_text_than_expected_goes_on():
    bench = Bench()
    layer_kv, k, v = bench.filled(3000, rows=2, expected_tokens=1000)
    new_k, new_v = bench.new(2, 777)
    layer_kv.append(new_k, new_v)
    assert_holds(layer_kv, torch.cat([k, new_k], dim=2), torch.cat([v, new_v], dim=2))


# -- sharing ---------------------------------------------------------------------------------------------------


def test_reordering_and_forking_copy_no_segment():
    bench = Bench()
    layer_kv, k, v = bench.filled(1000, rows=3)
    host, writes = bench.counter.host_bytes, bench.write.calls
    before = {id(segment): segment.k.clone() for segment in segments_of(layer_kv)}
    twin = layer_kv.fork()
    layer_kv.select_rows([2, 0, 0, 1])
    assert bench.write.calls == writes
    assert bench.counter.host_bytes == host
    assert {id(segment) for segment in segments_of(layer_kv, twin)} == before.keys()
    assert all(torch.equal(segment.k, before[id(segment)]) for segment in segments_of(layer_kv))
    assert_holds(layer_kv, k[[2, 0, 0, 1]], v[[2, 0, 0, 1]])
    assert_holds(twin, k, v)


def test_beam_search_never_copies_segments():
    """Reordering at each step, as beam search does: host bytes grow by what is new, not by what is old."""
    bench = Bench()
    layer_kv, k, v = bench.filled(2000, rows=1)
    layer_kv.select_rows([0, 0, 0])
    k, v = k[[0, 0, 0]], v[[0, 0, 0]]
    base = bench.counter.host_bytes
    for step in range(300):
        order = [[0, 1, 2], [0, 0, 2], [2, 1, 0], [1, 1, 1]][step % 4]
        new_k, new_v = bench.new(3, 1)
        layer_kv.append(new_k, new_v)
        layer_kv.select_rows(order)
        k, v = torch.cat([k, new_k], dim=2)[order], torch.cat([v, new_v], dim=2)[order]
    assert_holds(layer_kv, k, v)
    gc.collect()
    assert bench.counter.host_bytes - base <= 3 * (300 + 3 * 256) * bench.token_bytes


def test_rows_that_share_a_prefix_are_read_together_until_they_go_on():
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


def test_what_is_shared_is_never_written():
    """A fork, a crop into the shared part and new tokens on both sides: neither sees the other's."""
    bench = Bench()
    layer_kv, k, v = bench.filled(1000)
    twin = layer_kv.fork()
    for each, keep in ((layer_kv, 300), (twin, 301)):
        each.crop(keep)
    first, second = bench.new(1, 900), bench.new(1, 900)
    layer_kv.append(*first)
    twin.append(*second)
    assert_holds(layer_kv, torch.cat([k[:, :, :300], first[0]], dim=2), torch.cat([v[:, :, :300], first[1]], dim=2))
    assert_holds(twin, torch.cat([k[:, :, :301], second[0]], dim=2), torch.cat([v[:, :, :301], second[1]], dim=2))


def test_no_shared_prefix_if_nothing_is_on_the_host():
    layer_kv, k, v = Bench().filled(200, rows=2)
    assert layer_kv.shared_prefixes() == []
    assert layer_kv.shared_prefixes([[(0, 200)], [(5, 6)]]) == []
    (seen,) = layer_kv.tail(1, [(5, 6)])
    assert torch.equal(seen[0], k[1, :, 5:6])
    assert torch.equal(seen[1], v[1, :, 5:6])


# -- memory ----------------------------------------------------------------------------------------------------


def test_all_memory_comes_back_on_close():
    bench = Bench()
    layer_kv, _, _ = bench.filled(3000, rows=2)
    twin = layer_kv.fork()
    assert bench.counter.host_bytes > 0
    layer_kv.close()
    gc.collect()
    assert bench.counter.host_bytes > 0  # the twin sees it all
    twin.close()
    gc.collect()
    assert bench.counter.host_bytes == 0
    assert bench.counter.device_bytes == {"ring": 0, "tail": 0, "staging": 0, "resident": 0}
    assert bench.counter.host_peak_bytes >= 2 * 2800 * bench.token_bytes


def test_segments_are_given_back_as_soon_as_nobody_sees_them():
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


def test_memory_lives_as_long_as_a_view_of_it():
    """A tile that is still being read keeps its pages, whatever happens to the store."""
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
def test_a_failed_allocation_leaves_the_store_as_it_was(allowed, monkeypatch):
    bench = Bench()
    layer_kv, k, v = bench.filled(400, rows=2)
    real, count = bench.tier.allocate, itertools.count()

    def allocate(shape, dtype):
        if next(count) >= allowed:  # after the first row has its segment, or before
            raise CapacityError("no more memory, on purpose")
        return real(shape, dtype)

    host, shared_prefixes, writes = bench.counter.host_bytes, layer_kv.shared_prefixes(), bench.write.calls
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
def test_a_failed_write_leaves_the_store_as_it_was(allowed):
    bench = Bench()
    layer_kv, k, v = bench.filled(400, rows=2)
    shared_prefixes, count = layer_kv.shared_prefixes(), itertools.count()

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
    layer_kv.write, (new_k, new_v) = bench.write, bench.new(2, 900)
    layer_kv.append(new_k, new_v)
    assert_holds(layer_kv, torch.cat([k, new_k], dim=2), torch.cat([v, new_v], dim=2))


def test_the_tail_is_fixed_while_the_batch_is():
    bench = Bench()
    layer_kv, per_row = bench.layer_kv(rows=2), 2 * UNIT * bench.token_bytes
    for tokens in (1, 5000, 3):
        assert layer_kv.tail_bytes == bench.counter.device_bytes["tail"] == 2 * per_row
        layer_kv.append(*bench.new(2, tokens))
    layer_kv.select_rows([0, 1, 1, 0, 0])
    assert layer_kv.tail_bytes == bench.counter.device_bytes["tail"] == 5 * per_row
    layer_kv.select_rows([3])
    assert layer_kv.tail_bytes == bench.counter.device_bytes["tail"] == per_row


def test_the_system_s_refusal_is_a_capacity_error():
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
