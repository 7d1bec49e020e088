"""Simulates the time of the engine's queues (kv/streams.py) without computing or copying anything.

`Clock` is a `Streams` in which each queue has its own time. A copy or kernel begins when its queue is free, the events
that the queue waits for are done, and the host has queued it. It takes the time of its bytes or FLOP at the machine's
rates. Unhidden transfers, early waits and missing prefetches therefore increase the total time. No GPU is needed.

If the host's CPU attends to a share of the past, the host takes the time of its kernel, and the link is slower
meanwhile. Results go to the device through the copy engine of the tiles: behind the tile that is being copied.
"""

from collections import Counter, deque
from dataclasses import dataclass, field

import torch

from headinfer.attention.state import AttentionState
from headinfer.engine import device_kv, host_attention, streaming
from headinfer.engine.engine import Engine
from headinfer.engine.layer_pass import AttentionSpec, LayerPass
from headinfer.engine.options import Options
from headinfer.plan.cpu_share import SharedRates
from headinfer.plan.tiles import MERGE_BYTES, TileRates

# Llama-3-8B.
HEADS = 32
KV_HEADS = 8
DIM = 128
LAYERS = 32
LINEAR_WEIGHTS = 218_103_808  # in each layer
LINEAR_LAUNCHES = 20  # kernels of a layer other than attention
TOKEN_BYTES = 2 * KV_HEADS * DIM * 2  # K and V of a token in one layer, bfloat16


@dataclass(eq=False)
class Event:
    """The time at which all earlier work of a queue is done."""

    seconds: float = 0.0


@dataclass
class Clock:
    """Streams that only add up times.

    Attributes:
        rates: the rates of the machine.
        shared: the rates of the host's CPU and of the link while the CPU attends.
        now: the time of each queue and of the host, in seconds since the start. The queue "host" is "exchange" here.
        busy: the seconds of work, by queue or by the name of the work.
        attending: when the CPU attends in the last layers: begin and end.
        fetching: when the last copies to the device begin and end.
    """

    rates: TileRates
    shared: SharedRates | None = None
    now: Counter = field(default_factory=Counter)
    busy: Counter = field(default_factory=Counter)
    attending: deque = field(default_factory=lambda: deque(maxlen=4))
    fetching: deque = field(default_factory=lambda: deque(maxlen=200))

    def event(self):
        return Event()

    def record(self, event, queue):
        event.seconds = self.now[self._name(queue)]

    def wait(self, event, queue):
        name = self._name(queue)
        self.now[name] = max(self.now[name], event.seconds)

    def copy(self, copies, queue):
        rate = self.rates.device_bytes_per_s / 2 if queue == "compute" else self.rates.link_bytes_per_s
        copy_s = 0.0 if queue == "compute" else self.rates.copy_s
        for destination, source in copies:
            assert destination.shape == source.shape
            seconds = source.numel() * source.element_size() / rate + copy_s
            if queue == "fetch":
                self._fetch(seconds)
                continue
            if queue == "host" and destination.dtype == torch.float32:  # results, which go to the device
                self._wait_for_tile()
            self.work(self._name(queue), seconds)

    @staticmethod
    def _name(queue):
        return "exchange" if queue == "host" else queue

    def _fetch(self, seconds):
        """Add a copy to the device that takes so long if the CPU does not attend."""
        begin = max(self.now["fetch"], self.now["host"] + self.rates.launch_s)
        end = begin
        left_s = seconds
        for start, stop in self.attending:  # in the order of time
            alone_s = min(max(start - end, 0.0), left_s)
            end += alone_s
            left_s -= alone_s
            slower = self.shared.link_bytes_per_s / self.shared.alone_bytes_per_s
            beside_s = min(max(stop - end, 0.0), left_s / slower)
            end += beside_s
            left_s -= beside_s * slower
        end += left_s
        self.work("fetch", end - begin)
        self.fetching.append((begin, end))

    def _wait_for_tile(self):
        """Let the exchange wait for the copy that the engine is busy with."""
        now = max(self.now["exchange"], self.now["host"])
        ends = [end for begin, end in self.fetching if begin < now < end]
        self.now["exchange"] = max([self.now["exchange"], *ends])

    def attend(self, nbytes):
        """Let the host attend to so many bytes of K and V."""
        self.now["host"] += nbytes / self.shared.cpu_bytes_per_s
        self.busy["attending"] += nbytes / self.shared.cpu_bytes_per_s

    def finish(self, event):
        self.now["host"] = max(self.now["host"], event.seconds)

    def write_back_done(self):
        return lambda: None

    def drain(self):
        self.now["host"] = max(self.now.values(), default=0.0)

    def work(self, queue, seconds, launches=1, what=""):
        """Add work to a queue, which the host queues with a number of launches."""
        self.now["host"] += launches * self.rates.launch_s
        self.now[queue] = max(self.now[queue], self.now["host"]) + seconds
        self.busy[what or queue] += seconds

    def kernel(self, flops, nbytes, launches=1, what=""):
        seconds = max(flops / self.rates.flops_per_s, nbytes / self.rates.device_bytes_per_s)
        self.work("compute", seconds, launches, what)


def install(monkeypatch, clock):
    """Replace the engine's queues and kernels by those of a clock."""

    def attend_tile(layer, heads, state, rows, pieces):
        tokens = sum(k.shape[1] for k, _ in pieces)
        group = layer.q.shape[1] // layer.k.shape[1]
        own = heads.stop - heads.start
        outputs = own * group * layer.q.shape[2] * DIM
        clock.kernel(4 * outputs * tokens, 4 * own * tokens * DIM)
        if state is not None:
            clock.kernel(0, MERGE_BYTES * outputs, what="merging")
        return state or streaming._empty(layer, heads)

    def own_state(layer, heads, past_ranges):
        state, own = own_state_before(layer, heads, past_ranges)
        if state is not None:
            outputs = state.out.numel()
            clock.kernel(2 * outputs * layer.q.shape[2], 10 * outputs, 3)
        return state, own

    class NoKernel:
        """A backend that only returns a state of the right shape."""

        name = "none"

        def attend_causal(self, q, k, v, scale, softcap):
            return AttentionState(torch.empty(q.shape), torch.empty(q.shape[:3]))

    class OnHost(host_attention.HostAttention):
        """The host's part of a layer. When its queries have arrived, the link gets slower."""

        def __init__(self, layer, parts, exchange, counter, threads):
            super().__init__(layer, parts, exchange, counter, threads)
            arrived_s = exchange._arrived[self._sent.turn].seconds
            busy_s = sum(part.nbytes for part in parts) / clock.shared.cpu_bytes_per_s
            clock.attending.append((arrived_s, arrived_s + busy_s))

        def compute(self):
            state = super().compute()
            clock.kernel(0, MERGE_BYTES * state.out.numel(), what="merging")
            return state

    def attend_on_host(layer, q, part):
        clock.attend(part.nbytes)
        return AttentionState(torch.zeros(*q.shape[:2], DIM), torch.zeros(q.shape[:2]))

    own_state_before = streaming._own_state
    monkeypatch.setattr(streaming, "HostAttention", OnHost)
    monkeypatch.setattr(host_attention, "_attend", attend_on_host)
    monkeypatch.setattr(device_kv, "open_streams", lambda *_: clock)
    monkeypatch.setattr(streaming, "_attend_tile", attend_tile)
    monkeypatch.setattr(streaming, "_own_state", own_state)
    monkeypatch.setattr(LayerPass, "kernel", lambda layer, rows, keys=0: NoKernel())


@dataclass(frozen=True)
class Pass:
    """A forward pass.

    Attributes:
        seconds: the total time.
        needed_s: the time of the kernels, without merging tiles.
        fetched_bytes: the bytes that were copied to the device.
        fetch_s: the time in which the link copied to the device.
        copies: the copies between host and device.
        attending_s: the time in which the host's CPU attended.
    """

    seconds: float
    needed_s: float
    fetched_bytes: int
    fetch_s: float
    copies: int
    attending_s: float = 0.0


def last_pass(
    monkeypatch, rates, past_tokens, query_tokens, count=3, host_waits=False, shared=None, layers=LAYERS, **options
):
    """Simulate forward passes of Llama-3-8B after a past, and return the last one.

    The host queues the chunks of a prompt without waiting. In decode it waits for each token.

    Args:
        monkeypatch: pytest's fixture.
        rates: the rates of the machine.
        past_tokens: the tokens on the host.
        query_tokens: the tokens of each pass.
        count: the number of passes.
        host_waits: let the host wait for each layer, as some models do.
        shared: the rates of the host's CPU and of the link, if the option cpu_share gives the CPU a share.
        layers: the layers of the model.
        options: further options of the engine.
    """
    clock = Clock(rates, shared)
    install(monkeypatch, clock)
    past_tokens += 256  # the tail
    budget = {"device_kv_budget_bytes": 256 << 20, "streaming_budget_bytes": 256 << 20} | options
    expected = past_tokens + 8 * query_tokens
    engine = Engine(Options(transport="lazy", rates=rates, expected_tokens=expected, **budget), layers)
    new = [torch.zeros(1, KV_HEADS, 16_384, DIM, dtype=torch.bfloat16) for _ in range(2)]
    layer_kvs = [engine.new_layer_kv(*new) for _ in range(layers)]
    for layer_kv in layer_kvs:
        for start in range(0, past_tokens, 16_384):
            layer_kv.append(*(x[:, :, : past_tokens - start] for x in new))
    q = torch.zeros(1, HEADS, query_tokens, DIM, dtype=torch.bfloat16)
    k, v = (x[:, :, :query_tokens] for x in new)
    flops = 2 * LINEAR_WEIGHTS * query_tokens
    nbytes = 2 * LINEAR_WEIGHTS
    clock.drain()
    for _ in range(count):
        start = clock.now["compute"]
        busy_before = clock.busy["compute"]
        fetched_before = engine.counter.host_to_device_bytes
        fetch_before = clock.busy["fetch"]
        copies_before = engine.counter.copies
        attending_before = clock.busy["attending"]
        for layer_kv in layer_kvs:
            if layer_kv is layer_kvs[0]:
                engine.begin(layer_kv, HEADS, query_tokens)
            clock.kernel(flops // 4, nbytes // 4, LINEAR_LAUNCHES // 2)  # Q, K, V
            engine.attend(q, k, v, layer_kv, AttentionSpec(1.0))
            layer_kv.append(k, v)
            clock.kernel(flops * 3 // 4, nbytes * 3 // 4, LINEAR_LAUNCHES // 2)
            if host_waits:
                clock.finish(Event(clock.now["compute"]))
        if query_tokens == 1:
            clock.finish(Event(clock.now["compute"]))
    assert engine.counter.device_peak_bytes <= budget["device_kv_budget_bytes"]
    return Pass(
        clock.now["compute"] - start,
        clock.busy["compute"] - busy_before,
        engine.counter.host_to_device_bytes - fetched_before,
        clock.busy["fetch"] - fetch_before,
        engine.counter.copies - copies_before,
        clock.busy["attending"] - attending_before,
    )
