"""The streaming loop against the float64 oracle, and the bytes that it moves."""

import gc
import math
from dataclasses import dataclass

import pytest
import torch
from engine_runs import attend_all
from hypothesis import given, settings
from hypothesis import strategies as st

from headinfer.attention.backends import BACKENDS as ALL
from headinfer.attention.reference import attend_reference, causal_mask
from headinfer.engine import layer_pass, past, streaming
from headinfer.engine.layer_pass import AttentionSpec
from headinfer.engine.options import Options
from headinfer.engine.past import divide, tiles_of
from headinfer.engine.streaming import attend_streaming
from headinfer.kv.byte_counter import ByteCounter
from headinfer.kv.device_buffer import pieces_of
from headinfer.kv.host_memory import HostTier
from headinfer.kv.layer_kv import LayerKV
from headinfer.kv.resident import LayerResidency, Residency
from headinfer.kv.streams import open_streams
from headinfer.kv.transfer import SlotRing
from headinfer.kv.write_back import StagingWriter, WriteInPlace
from headinfer.plan.tiles import TilePlan

PROPERTY = settings(deadline=None, derandomize=True, max_examples=60)
CPU = torch.device("cpu")
TRANSPORTS = ("in_place", "eager", "lazy")
BOUND = 3e-6
BACKENDS = {backend.name: backend for backend in ALL}


def ranges_of(visible):
    """The half-open ranges of True in each row of a bool tensor [B, T]."""
    return [
        [
            (start, next((t for t in range(start, len(row)) if not row[t]), len(row)))
            for start in range(len(row))
            if row[start] and (start == 0 or not row[start - 1])
        ]
        for row in visible.tolist()
    ]


@dataclass
class Shape:
    """The shape and dtype of a layer."""

    rows: int = 1
    kv_heads: int = 2
    group: int = 2
    key_dim: int = 16
    value_dim: int = 16
    dtype: torch.dtype = torch.float32

    @property
    def token_bytes(self):
        return self.kv_heads * (self.key_dim + self.value_dim) * self.dtype.itemsize


class Bench:
    """One layer with its LayerKV and ring, and all its K and V for the oracle."""

    def __init__(
        self,
        shape,
        transport="in_place",
        heads_per_group=None,
        tile_tokens=512,
        seed=0,
        model_layout=True,
        resident_tokens=0,
        even_tokens=0,
        keeps_segments=False,
    ):
        self.shape = shape
        self.plan = TilePlan(heads_per_group or shape.kv_heads, tile_tokens, "", even_tokens, keeps_segments)
        self.rng = torch.Generator().manual_seed(seed)
        self.counter = ByteCounter()
        self.model_layout = model_layout
        write = WriteInPlace()
        self.ring = None
        residency = None
        self.streams = streams = open_streams(transport, CPU)
        if streams is not None:
            write = StagingWriter(64 * shape.token_bytes, CPU, self.counter, streams)
            head_token_bytes = shape.token_bytes // shape.kv_heads
            slot_bytes = -(-self.plan.heads_per_group * tile_tokens * head_token_bytes // 256) * 256
            self.ring = SlotRing(2, slot_bytes, CPU, self.counter, streams)
            resident_bytes = resident_tokens * shape.token_bytes * shape.rows
            residency = LayerResidency(Residency(resident_bytes, CPU, self.counter, streams), resident_bytes, 0)
        _, self.k, self.v = self.chunk(0)
        self.layer_kv = LayerKV(
            self.k, self.v, tier=HostTier(self.counter), counter=self.counter, write=write, residency=residency
        )
        self.used = set()

    def chunk(self, tokens):
        """Make q, k, v of a chunk in the layout of a model (tokens before heads in memory) or with heads first."""
        shape = self.shape
        sizes = (
            (shape.kv_heads * shape.group, shape.key_dim),
            (shape.kv_heads, shape.key_dim),
            (shape.kv_heads, shape.value_dim),
        )
        made = (
            torch.randn(shape.rows, tokens, heads, dim, generator=self.rng).to(shape.dtype).transpose(1, 2)
            for heads, dim in sizes
        )
        return tuple(made) if self.model_layout else tuple(x.contiguous() for x in made)

    def fill(self, tokens):
        """Append a chunk without attention."""
        _, k, v = self.chunk(tokens)
        self.keep(k, v)

    def keep(self, k, v):
        self.layer_kv.append(k, v)
        self.k = torch.cat([self.k, k], dim=2)
        self.v = torch.cat([self.v, v], dim=2)

    def select_rows(self, indices):
        self.layer_kv.select_rows(indices)
        self.k = self.k[indices]
        self.v = self.v[indices]
        self.shape.rows = len(indices)

    def attend(self, q, k, v, *, visible=None, backend=None, softcap=None, sinks=None, **options):
        """Run the loop on a chunk that is not appended yet."""
        token_ranges = ranges_of(visible[:, : self.layer_kv.tokens + q.shape[2]]) if visible is not None else None
        spec = AttentionSpec(self.shape.key_dim**-0.5, softcap, sinks, token_ranges)
        return attend_streaming(
            q,
            k,
            v,
            self.layer_kv,
            spec,
            plan=self.plan,
            ring=self.ring,
            backend=backend,
            used=self.used,
            **options,
        )

    def oracle(self, q, k, v, *, visible=None, softcap=None, sinks=None):
        """Compute the output [B, T, Hq, Dv] in float64, and which queries see any key [B, T]."""
        k = torch.cat([self.k, k], dim=2)
        v = torch.cat([self.v, v], dim=2)
        mask = causal_mask(q.shape[2], k.shape[2]).expand(len(q), 1, -1, -1)
        if visible is not None:
            mask = mask & visible[:, None, None, : k.shape[2]]
        state = attend_reference(q, k, v, scale=self.shape.key_dim**-0.5, mask=mask, softcap=softcap)
        out = state.out if sinks is None else state.with_sinks(sinks[:, None])
        return out.transpose(1, 2), mask.any(dim=-1)[:, 0]

    def assert_step(self, tokens, *, bound=BOUND, visible=None, backend=None, **options):
        """Run one forward pass of the layer, compare it with the oracle, and append the chunk."""
        q, k, v = self.chunk(tokens)
        found = self.attend(q, k, v, visible=visible, backend=backend, **options)
        wanted, sees = self.oracle(q, k, v, visible=visible, **options)
        assert found.shape == wanted.shape
        assert found.dtype == q.dtype
        assert found.isfinite().all()
        assert (found[~sees] == 0).all()
        usual = math.sqrt(wanted[0].numel() / (self.layer_kv.tokens + tokens))  # some outputs may cancel to less
        for row in range(len(q)):  # row by row, so that a large row does not hide the error of a small one
            assert float((found[row].double() - wanted[row]).norm()) <= bound * max(usual, float(wanted[row].norm()))
        self.keep(k, v)


def tiles_in(bench, heads, plan):
    """The tiles of a head group."""
    return tiles_of(divide(bench.layer_kv, plan, None), heads, plan)


# -- against the oracle ----------------------------------------------------------------------------------------

chunk_lengths = st.lists(st.sampled_from([1, 1, 2, 5, 17, 130, 256, 300, 513]), min_size=2, max_size=5)


@st.composite
def benches(draw):
    shape = Shape(
        rows=draw(st.integers(1, 3)),
        kv_heads=draw(st.integers(1, 4)),
        group=draw(st.sampled_from([1, 2, 3])),
        key_dim=draw(st.sampled_from([16, 32, 5])),
        value_dim=draw(st.sampled_from([16, 48, 7])),
    )
    return Bench(
        shape,
        transport=draw(st.sampled_from(TRANSPORTS)),
        heads_per_group=draw(st.integers(1, shape.kv_heads)),
        tile_tokens=draw(st.sampled_from([1000, 128, 100, 37, 16])),
        seed=draw(st.integers(0, 2**31 - 1)),
        resident_tokens=draw(st.sampled_from([0, 0, 128, 256, 640, 10_000])),
        even_tokens=draw(st.sampled_from([0, 128])),
        keeps_segments=draw(st.booleans()),
    )


@PROPERTY
@given(bench=benches(), lengths=chunk_lengths)
def test_any_past_and_chunk(bench, lengths):
    for tokens in lengths:
        bench.assert_step(tokens)
    assert bench.counter.device_to_host_bytes in (
        0,
        bench.shape.rows * bench.layer_kv.host_tokens * bench.shape.token_bytes,
    )


@PROPERTY
@given(
    bench=benches(),
    lengths=chunk_lengths,
    softcap=st.sampled_from([None, 3.0]),
    with_sinks=st.booleans(),
    backend=st.sampled_from([None, "cpu-flash", "eager"]),
)
def test_soft_caps_and_sinks(bench, lengths, softcap, with_sinks, backend):
    heads = bench.shape.kv_heads * bench.shape.group
    sinks = 2 * torch.randn(heads, generator=bench.rng) if with_sinks else None
    for tokens in lengths:
        bench.assert_step(tokens, softcap=softcap, sinks=sinks, backend=backend)
    if softcap is not None:
        assert bench.used <= {"cpu-native", "eager"}  # torch's kernels support no soft caps
    else:
        assert (bench.used == {"eager"}) == (backend == "eager")


def padding(rows, tokens, draw):
    """Draw a mask [rows, tokens] with left padding, right padding, holes, or rows that see nothing."""
    visible = torch.ones(rows, tokens, dtype=torch.bool)
    for row in range(rows):
        kind = draw(st.sampled_from(["whole", "left", "right", "holes", "holes", "nothing"]))
        cuts = sorted(draw(st.lists(st.integers(0, tokens), min_size=4, max_size=4)))
        if kind == "left":
            visible[row, : cuts[0]] = False
        elif kind == "right":
            visible[row, cuts[3] :] = False
        elif kind == "holes":
            visible[row, cuts[0] : cuts[1]] = False
            visible[row, cuts[2] : cuts[3]] = False
        elif kind == "nothing":
            visible[row] = False
    return visible


@PROPERTY
@given(bench=benches(), lengths=chunk_lengths, data=st.data())
def test_padding_and_holes_are_ignored(bench, lengths, data):
    visible = padding(bench.shape.rows, sum(lengths), data.draw)
    sinks = torch.randn(bench.shape.kv_heads * bench.shape.group, generator=bench.rng)
    options = data.draw(st.sampled_from([{}, {"sinks": sinks}, {"softcap": 2.0}]))
    for tokens in lengths:
        bench.assert_step(tokens, visible=visible, **options)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("tokens", [1, 7])
def test_rows_that_see_no_key_give_zero(transport, tokens):
    bench = Bench(Shape(rows=3), transport, tile_tokens=100, model_layout=False)
    bench.fill(600)
    visible = torch.ones(3, 600 + tokens, dtype=torch.bool)
    visible[1] = False
    q, k, v = bench.chunk(tokens)
    out = bench.attend(q, k, v, visible=visible, sinks=torch.zeros(4))
    assert (out[1] == 0).all()
    assert (out[0] != 0).all()
    assert (out[2] != 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_half_precision(dtype, transport):
    """All steps use float32, and only the output is rounded, by at most half an ulp of the type."""
    ulp = torch.finfo(dtype).eps
    bench = Bench(Shape(rows=2, kv_heads=3, group=4, dtype=dtype), transport, heads_per_group=2, tile_tokens=190)
    for tokens in (400, 300, 1, 2):
        bench.assert_step(tokens, bound=0.5 * ulp)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("backend", ["cpu-native", "cpu-flash", "eager"])
def test_a_long_past_with_every_backend(transport, backend):
    bench = Bench(Shape(kv_heads=2, group=4, key_dim=64, value_dim=64), transport, tile_tokens=3000)
    bench.fill(9000)
    for tokens in (1, 4, 50):
        bench.assert_step(tokens, backend=backend)


# -- repeatability ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads_per_group", [1, 2, 4])
@pytest.mark.parametrize("tokens", [1, 3, 64])
def test_same_plan_gives_the_same_bits(tokens, heads_per_group):
    found = []
    for transport in ("in_place", "in_place", "eager", "eager", "lazy"):
        bench = Bench(Shape(rows=2, kv_heads=4, group=3), transport, heads_per_group, 130, seed=9)
        bench.fill(900)
        q, k, v = bench.chunk(tokens)
        found.append(bench.attend(q, k, v))
        assert torch.equal(found[-1], bench.attend(q, k, v))  # repeated with the same ring
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[2], found[3])
    assert torch.equal(found[2], found[4])  # the streams differ only in when they copy


# -- bytes over the link ---------------------------------------------------------------------------------------


@PROPERTY
@given(bench=benches(), lengths=chunk_lengths)
def test_each_past_byte_crosses_the_link_at_most_once_per_pass(bench, lengths):
    for tokens in lengths:
        bench.fill(tokens)
        before = bench.counter.host_to_device_bytes
        slices = [part for table in bench.layer_kv._tables for part in table]
        bench.attend(*bench.chunk(3))
        crossed = bench.counter.host_to_device_bytes - before
        on_host_only = sum(max(part.stop - part.segment.resident_tokens, 0) for part in slices)
        assert crossed == (on_host_only * bench.shape.token_bytes if bench.ring else 0)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("tokens", [1, 6])
def test_rows_that_share_a_document_fetch_it_once(transport, tokens):
    bench = Bench(Shape(), transport, heads_per_group=1, tile_tokens=150)
    bench.fill(1000)
    shared = bench.layer_kv.host_tokens
    bench.select_rows([0, 0, 0])

    def crossed():
        before = bench.counter.host_to_device_bytes
        bench.assert_step(tokens)
        return bench.counter.host_to_device_bytes - before

    tokens_crossed = crossed() / bench.shape.token_bytes
    assert tokens_crossed == (shared if bench.ring else 0)
    bench.fill(600)  # the rows get different tokens
    own = bench.layer_kv.host_tokens - shared
    assert own > 0
    assert crossed() / bench.shape.token_bytes == (shared + 3 * own if bench.ring else 0)
    bench.select_rows([2, 0, 0, 1])
    assert crossed() / bench.shape.token_bytes == (shared + 3 * own if bench.ring else 0)


@PROPERTY
@given(
    bench=benches(),
    moves=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=3), min_size=1, max_size=3),
    tokens=st.sampled_from([1, 3, 40, 300]),
)
def test_rows_that_share_a_part_of_their_tokens(bench, moves, tokens):
    bench.fill(400)
    for picks in moves:
        bench.select_rows([row % bench.shape.rows for row in picks])
        bench.assert_step(tokens)
        bench.fill(150)
        bench.assert_step(1)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_masked_tokens_do_not_cross_the_link(transport):
    bench = Bench(Shape(rows=2), transport, tile_tokens=64, model_layout=False)
    bench.fill(900)
    host = bench.layer_kv.host_tokens
    visible = torch.ones(2, 901, dtype=torch.bool)
    visible[0, :500] = False
    visible[1, 10:20] = False
    before = bench.counter.host_to_device_bytes
    bench.assert_step(1, visible=visible)
    crossed = (bench.counter.host_to_device_bytes - before) / bench.shape.token_bytes
    assert crossed == ((host - 500) + (host - 10) if bench.ring else 0)


def test_an_empty_past_moves_nothing():
    bench = Bench(Shape(rows=2), "lazy")
    bench.assert_step(5)
    bench.assert_step(1)
    assert bench.layer_kv.host_tokens == 0
    assert bench.counter.host_to_device_bytes == 0


def test_tiles_have_the_planned_size():
    bench = Bench(Shape(rows=2, kv_heads=3))
    bench.fill(700)
    bench.fill(400)
    host = bench.layer_kv.host_tokens
    tiles = list(tiles_in(bench, slice(1, 3), TilePlan(2, 250, "")))
    for row in (0, 1):
        mine = [tile for tile in tiles if tile.rows == (row,)]
        assert [sum(k.shape[1] for k, _ in tile.pieces) for tile in mine] == [250] * (host // 250) + [host % 250]
        sides = zip(*(piece for tile in mine for piece in tile.pieces), strict=True)
        k, v = (torch.cat(side, dim=1) for side in sides)
        assert torch.equal(k, bench.k[row, 1:3, :host])
        assert torch.equal(v, bench.v[row, 1:3, :host])
    segment = bench.layer_kv.shared_prefixes()[0].slices[0].segment
    assert tiles[0].pieces[0][0].data_ptr() == segment.k[1].data_ptr()  # a view, not a copy


def test_used_backends_are_recorded():
    bench = Bench(Shape())
    bench.fill(300)
    bench.attend(*bench.chunk(1), backend="eager")
    assert bench.used == {"eager"}
    bench.attend(*bench.chunk(1), backend="cpu-flash")
    assert bench.used == {"eager", "cpu-flash"}


# -- resident tokens -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["eager", "lazy"])
@pytest.mark.parametrize("resident_tokens", range(0, 1281, 128))
def test_any_split_between_device_and_host(transport, resident_tokens):
    bench = Bench(Shape(rows=2, kv_heads=3, group=2), transport, 2, 190, resident_tokens=resident_tokens)
    for tokens in (300, 600, 1, 1, 200, 3):
        bench.assert_step(tokens)
    held = bench.counter.device_bytes["resident"]
    assert held <= 2 * resident_tokens * bench.shape.token_bytes
    on_device = min(resident_tokens, bench.layer_kv.host_tokens)
    for table in bench.layer_kv._tables:
        assert sum(min(part.segment.resident_tokens, part.stop) for part in table) == on_device
    before = bench.counter.host_to_device_bytes
    bench.assert_step(1)
    crossed = bench.counter.host_to_device_bytes - before
    assert (
        crossed
        == 2 * (bench.layer_kv.host_tokens - min(resident_tokens, bench.layer_kv.host_tokens)) * bench.shape.token_bytes
    )


@pytest.mark.parametrize("transport", ["eager", "lazy"])
def test_removing_resident_tokens_changes_nothing(transport):
    bench = Bench(Shape(rows=2), transport, 1, 150, resident_tokens=2000)
    bench.fill(700)
    pool = bench.layer_kv.residency.pool
    token_bytes = bench.shape.token_bytes
    assert bench.layer_kv.is_all_resident
    for tokens in (500, 256, 128, 0):
        bench.assert_step(2)
        bench.fill(130)
        pool.shrink(2 * tokens * token_bytes)
        gc.collect()
        assert pool.held_bytes <= 2 * tokens * token_bytes
        assert not bench.layer_kv.is_all_resident
    bench.assert_step(5)
    assert pool.held_bytes == 0


@pytest.mark.parametrize("transport", ["eager", "lazy"])
def test_resident_tokens_are_shared_and_rewritten_after_a_crop(transport):
    bench = Bench(Shape(), transport, 1, 150, resident_tokens=4000)
    bench.fill(900)
    held = bench.counter.device_bytes["resident"]
    bench.select_rows([0, 0, 0])
    bench.assert_step(3)
    assert bench.counter.device_bytes["resident"] == held
    bench.fill(300)  # the rows get different tokens
    bench.assert_step(1)
    for tokens in (800, 130, 0):
        bench.layer_kv.crop(tokens)
        bench.k = bench.k[:, :, :tokens]
        bench.v = bench.v[:, :, :tokens]
        bench.assert_step(400)
        bench.assert_step(1)


def test_resident_tokens_of_a_known_length_are_one_piece():
    """Attention over the past is then a single call, as without offloading."""
    bench = Bench(Shape(rows=2), "eager", resident_tokens=4000)
    residency = bench.layer_kv.residency
    bench.layer_kv.residency = LayerResidency(residency.pool, residency.nbytes, 2048)
    bench.layer_kv.expected_tokens = 2048
    for tokens in (300, 600, 700):
        bench.fill(tokens)
        (first, second) = tiles_in(bench, slice(0, 2), TilePlan(2, 100, ""))
        assert [len(pieces_of(tile.resident, slice(0, 2))) for tile in (first, second)] == [1, 1]
        assert first.resident[-1].stop == bench.layer_kv.host_tokens
    assert bench.counter.device_bytes["resident"] == 2 * 2048 * bench.shape.token_bytes
    bench.assert_step(3)


@pytest.mark.parametrize("transport", ["eager", "lazy"])
def test_a_large_segment_is_a_tile_and_one_copy(transport, monkeypatch):
    """Parts of a segment are a copy for each head's K and V: of one that is partly resident, or longer than a tile."""
    monkeypatch.setattr(past, "_KEPT_SEGMENT_TOKENS", 256)
    bench = Bench(Shape(rows=1, kv_heads=2), transport, 2, 1024, keeps_segments=True, resident_tokens=128)
    bench.layer_kv.expected_tokens = 0
    for tokens in (128, 512, 100, 300, 128, 1024, 1500):
        bench.fill(tokens)
    segments = [part.segment.tokens for part in bench.layer_kv.shared_prefixes()[0].slices]
    assert segments == [512, 384, 256, 896, 1408]
    tiles = [tile for tile in tiles_in(bench, slice(0, 2), bench.plan) if not tile.resident]
    lengths = [[k.shape[1] for k, _ in tile.pieces] for tile in tiles]
    assert lengths == [[384], [384], [256], [896], [1024], [384]]
    before = bench.counter.copies
    bench.assert_step(1)
    assert bench.counter.copies - before == 3 * 1 + 3 * 4


@settings(deadline=None, max_examples=60, derandomize=True)
@given(tokens=st.integers(1, 5000), tile_tokens=st.integers(1, 3000), resident=st.sampled_from([0, 256]))
def test_even_tiles_have_similar_sizes_and_contain_all_streamed_tokens(tokens, tile_tokens, resident):
    bench = Bench(Shape(rows=1, kv_heads=1, group=1), "eager", 1, tile_tokens, resident_tokens=resident)
    bench.fill(tokens)
    even, usual = (
        [tile for tile in tiles_in(bench, slice(0, 1), plan) if not tile.resident]
        for plan in (TilePlan(1, tile_tokens, "", even_tokens=128), TilePlan(1, tile_tokens, ""))
    )
    lengths = [sum(k.shape[1] for k, _ in tile.pieces) for tile in even]
    assert sum(lengths) == max(bench.layer_kv.host_tokens - min(resident, bench.layer_kv.host_tokens), 0)
    assert all(length <= tile_tokens for length in lengths)
    assert len(set(lengths[:-1])) <= 1
    assert len(even) <= len(usual)
    if lengths:
        assert lengths[-1] > lengths[0] - 128 * len(lengths)


@pytest.mark.parametrize("transport", ["eager", "lazy"])
def test_kernels_for_equal_shapes_get_blocks_of_equal_shapes(transport, monkeypatch):
    """Like cuDNN on Hopper: one kernel gets blocks of tiles and of resident tokens, another one gets the rest."""
    served = []

    def choose(problem, preferred):
        served.append((problem.is_full, problem.key_tokens, problem.query_rows))
        return BACKENDS["cpu-flash" if problem.is_full else "eager"]

    monkeypatch.setattr(layer_pass, "choose", choose)
    for module in (layer_pass, streaming):
        monkeypatch.setattr(module, "BLOCK_TOKENS", (170, 40))
    bench = Bench(Shape(rows=2, kv_heads=3, group=2), transport, 1, 190, resident_tokens=384)
    for tokens in (300, 600, 300, 100):
        bench.assert_step(tokens)
    assert bench.used == {"cpu-flash", "eager"}
    full = {keys for is_full, keys, rows in served if is_full and rows}
    assert full == {170, 40}
    assert any(keys == 4 for is_full, keys, rows in served if not is_full), "384 - 2 * 170 - 40"
    served.clear()
    bench.assert_step(1)
    assert not any(is_full for is_full, _, _ in served), "decoding computes all pieces in one call"


@pytest.mark.parametrize("lengths", [(300, 300), (300, 1, 1)])
def test_backends_are_chosen_once_in_a_pass(lengths, monkeypatch):
    chosen = []

    def counted(problem, preferred):
        chosen.append(problem)
        return choose(problem, preferred)

    choose = layer_pass.choose
    monkeypatch.setattr(layer_pass, "choose", counted)
    options = Options(transport="eager", tile_tokens=100, heads_per_group=1)
    counts = []
    for layers in (1, 3):
        chosen.clear()
        attend_all("cpu", torch.float32, lengths, options, layers=layers)
        counts.append(len(chosen))
    assert counts[0] == counts[1] >= len(lengths)
