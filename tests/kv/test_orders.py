"""The ring, the write-back and the exchange in every order that the queues allow, and faults that the check must
detect."""

import functools
import gc
import itertools
from collections import deque

import pytest
import torch
from orders import QUEUES, TORN, Recorded, cells_of, explore, unordered

from headinfer.engine import device_kv, host_attention, streaming
from headinfer.engine.device_kv import DeviceKV
from headinfer.engine.engine import Engine
from headinfer.engine.host_attention import HostAttention
from headinfer.engine.layer_pass import AttentionSpec
from headinfer.engine.options import Options
from headinfer.kv import exchange
from headinfer.kv.byte_counter import ByteCounter
from headinfer.kv.exchange import HostExchange
from headinfer.kv.transfer import SlotRing
from headinfer.kv.write_back import StagingWriter
from headinfer.plan.footprint import layer_exchange_bytes

CPU = torch.device("cpu")
TOKENS = 2


class Without(Recorded):
    """Streams in which one queue does not wait for the events of another."""

    def __init__(self, waiting, event):
        super().__init__()
        self.ignored = (waiting, event)

    def wait(self, event, queue):
        if (queue, event.queue) != self.ignored:
            super().wait(event, queue)


class RingWithoutWaits(SlotRing):
    """A ring that does not wait for a tile."""

    def wait(self, handle):
        return (self._in_use[handle][0],)


class HastyExchange(HostExchange):
    """An exchange with which the host does not wait for queries."""

    def receive(self, sent):
        return exchange._queries(self._on_host[sent.turn], sent)


class Loop:
    """Uses a ring, a write-back and an exchange like streaming.py, for layers of a few tokens, with symbols as values.

    Each pass reads the tiles of a layer and appends a new tile, which later passes read as well. The host, if it has a
    share, attends to the newest tile. It answers a layer's queries before the next ones are sent, unless `sends_ahead`.
    """

    def __init__(
        self,
        streams,
        *,
        slots,
        layers,
        tiles,
        ring=SlotRing,
        releases_early=False,
        waits_for_write_back=True,
        prefetches=True,
        exchange=None,
        host_waits_for_write_back=True,
        sends_ahead=False,
    ):
        self.streams = streams
        self.releases_early = releases_early
        self.waits_for_write_back = waits_for_write_back
        self.prefetches = prefetches
        self.ring = ring(slots, 2 * TOKENS * 4, CPU, ByteCounter(), streams)
        self.write = StagingWriter(TOKENS * 4, CPU, ByteCounter(), streams)
        self.exchange = None
        if exchange is not None:
            allocate = functools.partial(torch.zeros, dtype=torch.uint8)
            self.exchange = exchange(CPU, ByteCounter(), streams, allocate)
            self.exchange.reserve(layer_exchange_bytes(1, 4, 4, 4))
        self.host_waits_for_write_back = host_waits_for_write_back
        self.sends_ahead = sends_ahead
        self.sent = deque()
        self.start = {}
        self.host = [[self.segment(f"layer {layer} tile {tile}") for tile in range(tiles)] for layer in range(layers)]

    def segment(self, name, is_there=True):
        """Make K and V [1, T, 1] on the host. Returns them, their values, and the event of their write-back."""
        sides = tuple(torch.zeros(1, TOKENS, 1) for _ in range(2))
        values = (f"{name} K", f"{name} V")
        if is_there:
            self.start |= {cells_of(side): value for side, value in zip(sides, values, strict=True)}
        return sides, values, None if is_there else self.write.event()

    def fetch(self, tile, key, how):
        sides, _, write_done = tile
        after = (write_done,) if write_done is not None and self.waits_for_write_back else ()
        return how([sides], after, key)

    def forward(self, number):
        for layer, all_tiles in enumerate(self.host):
            following = (layer + 1) % len(self.host)
            tiles = all_tiles
            if self.exchange is not None:
                tiles = all_tiles[:-1]
                self.send(f"layer {layer} pass {number}", all_tiles[-1])
            handles = [self.fetch(tiles[0], (layer, 0), self.ring.fetch)]
            for at, (_, values, _) in enumerate(tiles):
                if at + 1 < len(tiles):
                    handles.append(self.fetch(tiles[at + 1], (layer, at + 1), self.ring.fetch))
                elif self.prefetches:
                    self.fetch(self.host[following][0], (following, 0), self.ring.prefetch)
                handle = handles.pop(0)
                ((k, v),) = self.ring.wait(handle)
                if self.releases_early:
                    self.ring.release(handle)
                self.streams.read([k, v], values)
                if not self.releases_early:
                    self.ring.release(handle)
            if len(self.sent) > self.sends_ahead:
                self.answer()
            self.append(layer, f"layer {layer} pass {number}")

    def send(self, name, tile):
        """Send queries that the host attends to a tile with."""
        _, _, write_done = tile
        queries = torch.zeros(1, 1, 1, 4)
        self.streams.write([queries], f"{name} queries")
        after = (write_done,) if write_done is not None and self.host_waits_for_write_back else ()
        self.sent.append((self.exchange.send(queries, 4, after), name, tile))

    def answer(self):
        """Let the host answer the oldest queries, and merge its results."""
        sent, name, ((k, v), values, _) = self.sent.popleft()
        queries = self.exchange.receive(sent)
        results = self.exchange.results(sent)
        self.streams.attend([queries, k, v], results, (f"{name} queries", *values), f"{name} results")
        self.streams.read(list(self.exchange.reply(sent)), f"{name} results")

    def append(self, layer, name):
        sides, values, write_done = self.segment(name, is_there=False)
        for side, value in zip(sides, values, strict=True):
            new = torch.zeros(1, TOKENS, 1)
            self.streams.write([new], value)
            self.write(side, new, write_done)
        self.host[layer].append((sides, values, write_done))


def run(streams, passes, **options):
    loop = Loop(streams, **options)
    for number in range(passes):
        loop.forward(number)
    return loop


# Slots, layers, tiles of the first pass, passes.
CASES = [(2, 1, 1, 3), (2, 2, 1, 3), (2, 2, 3, 2), (3, 1, 4, 3), (3, 2, 2, 2), (4, 1, 5, 3), (4, 2, 2, 3)]


@pytest.mark.parametrize(("slots", "layers", "tiles", "passes"), CASES)
@pytest.mark.parametrize("prefetches", [True, False])
def test_every_order_gives_the_right_values(slots, layers, tiles, passes, prefetches):
    streams = Recorded()
    loop = run(streams, passes, slots=slots, layers=layers, tiles=tiles, prefetches=prefetches)
    states, complaints = explore(streams, loop.start)
    assert not complaints
    assert states > 200
    assert not unordered(streams)


# Slots, layers, tiles of the first pass, passes.
HOST_CASES = [(2, 1, 2, 3), (2, 2, 2, 2), (2, 3, 2, 1), (3, 1, 3, 3)]


@pytest.mark.parametrize(("slots", "layers", "tiles", "passes"), HOST_CASES)
@pytest.mark.parametrize(("buffers", "sends_ahead"), [(2, False), (2, True), (1, False)])
def test_every_order_gives_the_right_values_with_the_host(
    monkeypatch, slots, layers, tiles, passes, buffers, sends_ahead
):
    """A single buffer for queries and results suffices as long as the host answers before it gets the next queries."""
    monkeypatch.setattr(exchange, "_BUFFERS", buffers)
    streams = Recorded()
    shape = {"slots": slots, "layers": layers, "tiles": tiles}
    loop = run(streams, passes, **shape, exchange=HostExchange, sends_ahead=sends_ahead)
    states, complaints = explore(streams, loop.start)
    assert not complaints
    assert states > 200
    assert len(streams.jobs["cpu"]) == layers * passes - sends_ahead
    assert not unordered(streams)


HOST_FAULTS = {
    "queries read before they have arrived": (Recorded, {"exchange": HastyExchange}),
    "queries copied before they are packed": (lambda: Without("host", "compute"), {}),
    "a result merged before it has arrived": (lambda: Without("compute", "host"), {}),
    "a segment attended to before the write-back is done": (Recorded, {"host_waits_for_write_back": False}),
    "a buffer used again before the host has answered": (Recorded, {"buffers": 1, "sends_ahead": True}),
}


@pytest.mark.parametrize("fault", HOST_FAULTS)
def test_faults_of_the_exchange_are_detected(monkeypatch, fault):
    make, options = HOST_FAULTS[fault]
    options = {"buffers": 2, "exchange": HostExchange, "slots": 2, "layers": 1, "tiles": 2} | options
    monkeypatch.setattr(exchange, "_BUFFERS", options.pop("buffers"))
    streams = make()
    loop = run(streams, 2, **options)
    assert explore(streams, loop.start)[1]
    assert unordered(streams)


FAULTS = {
    "a missing wait for a tile": (lambda: Recorded(), {"ring": RingWithoutWaits}),
    "an early release": (lambda: Recorded(), {"releases_early": True}),
    "a slot filled while it is read": (lambda: Without("fetch", "compute"), {}),
    "a fetch before the write-back is done": (lambda: Recorded(), {"waits_for_write_back": False}),
    "a write-back buffer packed before it is empty": (lambda: Without("compute", "back"), {"layers": 2, "tiles": 1}),
    "a write-back buffer read before it is packed": (lambda: Without("back", "compute"), {}),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("slots", [2, 3, 4])
def test_faults_are_detected(fault, slots):
    make, options = FAULTS[fault]
    streams = make()
    loop = run(streams, 2, **({"slots": slots, "layers": 1, "tiles": slots} | options))
    assert explore(streams, loop.start)[1]
    assert unordered(streams)


def test_reading_unwritten_memory_is_detected():
    """One kernel reads memory that was never written. Another one reads it while it is being written."""
    streams = Recorded()
    memory = torch.zeros(4)
    source = torch.zeros(4)
    streams.read([memory], "x")
    assert explore(streams)[1] == ["kernel 0 read ['nothing'] and not x"]
    streams.copy([(memory, source)], "fetch")
    states, complaints = explore(streams, {cells_of(source): "x"})
    assert states > 3
    assert any(TORN in complaint for complaint in complaints)
    assert unordered(streams) == [("compute", 0, "kernel reads", "fetch", 0, "copy")]


# -- the engine ------------------------------------------------------------------------------------------------


def record_engine(monkeypatch, streams, lengths, rows=1, resident_tokens=0, events=(), cpu_share=None):
    """Record forward passes of the engine over three layers. Every use of a tile counts as a kernel, and so does the
    first read of the host's results, which merges them."""
    monkeypatch.setattr(device_kv, "open_streams", lambda *_: streams)
    attend_tile = streaming._attend_tile

    def note(layer, heads, state, of_rows, pieces):
        streams.read([side for piece in pieces for side in piece])
        return attend_tile(layer, heads, state, of_rows, pieces)

    monkeypatch.setattr(streaming, "_attend_tile", note)
    note_host(monkeypatch, streams)
    layers = 3
    token_bytes = 2 * 32 * 4
    streaming_budget_bytes = 900_000 * rows
    budget = streaming_budget_bytes + layers * resident_tokens * token_bytes * rows
    options = Options(
        transport="lazy",
        device_kv_budget_bytes=budget,
        streaming_budget_bytes=streaming_budget_bytes,
        tile_tokens=200,
        cpu_share=cpu_share,
    )
    engine = Engine(options, layers)
    rng = torch.Generator().manual_seed(0)
    layer_kvs = []
    for tokens, event in itertools.zip_longest(lengths, events):
        for layer in range(layers):
            q, k, v = (torch.randn(rows, heads, tokens, 16, generator=rng) for heads in (4, 2, 2))
            if len(layer_kvs) == layer:
                layer_kvs.append(engine.new_layer_kv(k, v))
            if layer == 0:
                engine.begin(layer_kvs[0], 4, tokens)
            streams.write([k, v], "new")
            engine.attend(q, k, v, layer_kvs[layer], AttentionSpec(0.25))
            layer_kvs[layer].append(k, v)
        for layer_kv in layer_kvs:
            if event is not None:
                event(layer_kv)
    return engine, layer_kvs


def note_host(monkeypatch, streams):
    """Record what the host reads and where it writes its results, and the merge of these."""
    monkeypatch.setattr("headinfer.plan.cpu_share.CPU_UNIT_TOKENS", 64)
    attend = host_attention._attend
    compute = HostAttention.compute
    where_results = HostExchange.results
    written = []

    def note_results(self, sent):
        written[:] = where_results(self, sent)
        return tuple(written)

    def note_attend(layer, q, part):
        streams.attend([layer.q, *(side for piece in part.pieces for side in piece)], list(written))
        return attend(layer, q, part)

    def note_compute(self):
        state = compute(self)
        streams.read([state.out, state.lse])
        return state

    monkeypatch.setattr(HostExchange, "results", note_results)
    monkeypatch.setattr(host_attention, "_attend", note_attend)
    monkeypatch.setattr(HostAttention, "compute", note_compute)


def crop(layer_kv):
    layer_kv.crop(450)


def swap(layer_kv):
    layer_kv.select_rows([1, 0])


PASSES = [300, 500, 1, 1, 130, 1, 200, 1]
HOST_PASSES = [300, 500, 1, 16, 130, 1, 17, 1]


@pytest.mark.parametrize(
    "options",
    [{}, {"rows": 2, "events": [None, swap]}, {"events": [None, None, None, crop]}, {"resident_tokens": 256}],
    ids=["plain", "rows", "crop", "resident"],
)
def test_all_accesses_of_a_forward_pass_are_ordered(monkeypatch, options):
    streams = Recorded()
    engine, layer_kvs = record_engine(monkeypatch, streams, PASSES, **options)
    assert all(len(streams.jobs[queue]) > 30 for queue in ("compute", "fetch", "back"))
    assert not unordered(streams)
    if "resident_tokens" in options:
        assert engine.counter.device_bytes["resident"] == 3 * 256 * 2 * 32 * 4
        assert all(layer_kv._tables[0][0].segment.resident_tokens for layer_kv in layer_kvs)


@pytest.mark.parametrize("cpu_share", [0.4, 1.0])
@pytest.mark.parametrize("options", [{}, {"rows": 2, "events": [None, swap]}, {"resident_tokens": 256}],
                         ids=["plain", "rows", "resident"])  # fmt: skip
def test_all_accesses_are_ordered_if_the_host_attends_too(monkeypatch, cpu_share, options):
    streams = Recorded()
    record_engine(monkeypatch, streams, HOST_PASSES, **options, cpu_share=cpu_share)
    assert len(streams.jobs["cpu"]) >= 3 * 4, "in each layer of each pass of up to 16 tokens"
    assert len(streams.jobs["host"]) == 2 * 3 * 4
    assert not unordered(streams)


@pytest.mark.parametrize("ignored", [("compute", "host"), ("host", "compute"), ("host", "back"), ("cpu", "host")])
def test_each_event_of_the_exchange_is_needed(monkeypatch, ignored):
    streams = Without(*ignored)
    record_engine(monkeypatch, streams, HOST_PASSES, cpu_share=1.0)
    assert unordered(streams)


@pytest.mark.parametrize("ignored", [("compute", "fetch"), ("fetch", "compute"), ("fetch", "back"),
                                     ("compute", "back"), ("back", "compute")])  # fmt: skip
def test_each_event_of_a_forward_pass_is_needed(monkeypatch, ignored):
    streams = Without(*ignored)
    record_engine(monkeypatch, streams, PASSES)
    assert unordered(streams)


def test_the_host_never_waits_in_the_loop(monkeypatch):
    waits = []

    class CountingWaits(Recorded):
        def finish(self, event):
            waits.append("finish")

        def drain(self):
            waits.append("drain")

    monkeypatch.setattr(SlotRing, "close", lambda ring: None)
    held = record_engine(monkeypatch, CountingWaits(), PASSES)
    assert not waits
    del held
    gc.collect()
    assert set(waits) == {"drain"}, "only before the memory of ring and buffers is freed"


def test_the_host_waits_once_in_a_layer_after_all_other_work_is_queued(monkeypatch):
    class Counted(Recorded):
        waits = 0

        def finish(self, event):
            super().finish(event)
            self.waits += 1
            self.queued = {queue: len(self.jobs[queue]) for queue in QUEUES}

        def drain(self):
            self.waits += 1_000_000

    streams = Counted()
    found = []
    attend = Engine.attend

    def note(engine, q, *more):
        before = streams.waits
        queued = len(streams.jobs["fetch"])
        out = attend(engine, q, *more)
        waits = streams.waits - before
        found.append((q.shape[2], waits))
        if waits:
            now = {queue: len(streams.jobs[queue]) for queue in QUEUES}
            later = {queue: now[queue] - streams.queued[queue] for queue in QUEUES}
            merge_and_reply = {"compute": 1, "host": 1, "cpu": 1}
            assert {queue: jobs for queue, jobs in later.items() if jobs} == merge_and_reply
            assert now["fetch"] > queued, "the tiles of the layer, or of the next one"
            ring = engine.devices[CPU].ring
            assert len(found) < 10 or len(ring._prefetched) == 2, "from the second such pass on, all slots are filled"
        return out

    begin = DeviceKV.begin

    def begin_uncounted(kv, *more):
        """Begin a pass. The first one of 16 tokens replaces the ring, which drains the queues."""
        before = streams.waits
        begin(kv, *more)
        streams.waits = before

    monkeypatch.setattr(DeviceKV, "begin", begin_uncounted)
    monkeypatch.setattr(Engine, "attend", note)
    held = record_engine(monkeypatch, streams, HOST_PASSES, cpu_share=0.4)
    assert found == [(tokens, int(tokens <= 16)) for tokens in HOST_PASSES for _ in range(3)]
    del held


def test_the_next_layers_first_tile_is_fetched_before_the_layer_ends(monkeypatch):
    """Its copies precede the fetch queue's wait for the layer's last kernel."""
    streams = Recorded()
    engine, layer_kvs = record_engine(monkeypatch, streams, [300, 600])
    before = engine.counter.host_to_device_bytes
    order = []
    begin = SlotRing._begin
    monkeypatch.setattr(SlotRing, "_begin", lambda ring, *more: order.append("fetch") or begin(ring, *more))
    attend_tile = streaming._attend_tile
    monkeypatch.setattr(streaming, "_attend_tile", lambda *more: order.append("kernel") or attend_tile(*more))
    rng = torch.Generator().manual_seed(1)
    for _ in range(3):  # each pass fetches every tile once, and the last layer the first tile of the next token
        order.clear()
        for layer, layer_kv in enumerate(layer_kvs):
            q, k, v = (torch.randn(1, heads, 1, 16, generator=rng) for heads in (4, 2, 2))
            if layer == 0:
                engine.begin(layer_kv, 4, 1)
            order.append(f"layer {layer}")
            engine.attend(q, k, v, layer_kv, AttentionSpec(0.25))
            layer_kv.append(k, v)
    tiles = -(-layer_kvs[0].host_tokens // 200)
    assert order == [step for layer in range(3) for step in (f"layer {layer}", *["fetch", "kernel"] * tiles)]
    host_bytes = sum(layer_kv.host_tokens for layer_kv in layer_kvs) * 2 * 32 * 4
    first_tile_bytes = 200 * 2 * 32 * 4
    assert engine.counter.host_to_device_bytes - before == 3 * host_bytes + first_tile_bytes
