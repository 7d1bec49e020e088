"""Whether a long prefill waits for new host memory, on the clock of tests/support/clock.py.

The rates are those of an H200 and its host (benchmarks/results): 519 TFLOP/s, pages touched at 44.5 GB/s and then
registered at 40.5 GB/s, or registered untouched at 4.7 GB/s. Nothing is touched or registered.
"""

import pytest
import torch
from clock import DIM, HEADS, KV_HEADS, LINEAR_LAUNCHES, LINEAR_WEIGHTS, TOKEN_BYTES, Clock

from headinfer.engine import device_kv
from headinfer.engine.engine import Engine
from headinfer.engine.options import Options
from headinfer.kv import host_memory, page_work
from headinfer.plan.tiles import TileRates

LAYERS = 8
CHUNK = 5376
TOKENS = 19 * CHUNK  # about 100K
RATES = TileRates(flops_per_s=519e12, link_bytes_per_s=55.4e9, device_bytes_per_s=3.3e12, launch_s=10e-6)
TOUCHED = 1 / (1 / 44.5e9 + 1 / 40.5e9)  # bytes per second
UNTOUCHED = 4.7e9


class PreparerOnClock(page_work.Preparer):
    """Prepares pages in a thread that exists on the clock only.

    Attributes:
        clock: the clock.
        rate: bytes per second.
        runs_ahead: whether there is a thread. If not, the model prepares all pages of a layer when it reserves them.
        most_ready_bytes: a list of the most bytes that were ready and not in use.
    """

    clock = None
    rate = TOUCHED
    runs_ahead = True
    most_ready_bytes = None

    def __init__(self, pin):
        super().__init__(pin)
        self.now = 0.0
        self.current = None

    def add(self, pages, turn):
        super().add(pages, turn)
        if not self.runs_ahead:
            self.clock.now["host"] += pages.mapping.nbytes / self.rate
            self._prepare(pages, None)

    def prepare_ahead(self):
        self.advance(self.clock.now["host"])
        super().prepare_ahead()

    def wait(self, pages):
        self.advance(self.clock.now["host"])
        super().wait(pages)

    def prepare_now(self, pages):
        raise AssertionError("all pages are reserved")

    def _start(self):
        return True

    def _wait_until_ready(self, pages):
        self.advance(float("inf"), pages)
        self.clock.now["host"] = max(self.clock.now["host"], self.now)

    def advance(self, until, wanted=None):
        """Let the thread work until a time, or until pages are ready."""
        while True:
            self.current = self.current or self._next()
            if self.current is None:
                self.now = max(self.now, until)
                return
            done = self.now + self.current.mapping.nbytes / self.rate
            if done > until:
                return
            self.now = done
            self._prepare(self.current, None)
            is_wanted = self.current is wanted
            self.current = None
            self.most_ready_bytes[0] = max(self.most_ready_bytes[0], self._ready_bytes())
            if is_wanted:
                return


def prefill(monkeypatch, rate=None, *, runs_ahead=True, host_lag=20):
    """Simulate the prefill of a prompt.

    Args:
        monkeypatch: pytest's fixture.
        rate: bytes of host memory that are prepared per second; None if they need no preparation.
        runs_ahead: whether a thread prepares them.
        host_lag: the host queues the kernels of at most this many layers that the device has not computed.

    Returns:
        The seconds, and the most bytes that were ready and not in use.
    """
    clock = Clock(RATES)
    make_tier = host_memory.HostTier
    make_kv = device_kv.LayerKV
    device = torch.device("cpu") if rate is not None else None
    with monkeypatch.context() as patch:
        patch.setattr(device_kv, "open_streams", lambda *_: clock)
        patch.setattr(device_kv, "HostTier", lambda counter, **_: make_tier(counter, device=device))
        patch.setattr(device_kv, "LayerKV", lambda *both, **options: make_kv(*both, **options | {"reserves": True}))
        patch.setattr(host_memory, "register", lambda address, nbytes, device: "")
        patch.setattr(host_memory, "_unpin", lambda pinned, address, device: pinned.discard(address))
        patch.setattr(host_memory, "Preparer", PreparerOnClock)
        patch.setattr(page_work, "touch_pages", lambda address, nbytes, pool: None)
        for name, value in {"clock": clock, "rate": rate, "runs_ahead": runs_ahead, "most_ready_bytes": [0]}.items():
            patch.setattr(PreparerOnClock, name, value)
        budget = {"device_kv_budget_bytes": 256 << 20, "streaming_budget_bytes": 256 << 20}
        engine = Engine(Options(transport="lazy", rates=RATES, expected_tokens=TOKENS, **budget), LAYERS)
        k, v = (torch.zeros(1, KV_HEADS, CHUNK, DIM, dtype=torch.bfloat16) for _ in range(2))
        layer_kvs = []
        times = []
        for past in range(0, TOKENS, CHUNK):
            for layer in range(LAYERS):
                if len(layer_kvs) == layer:
                    layer_kvs.append(engine.new_layer_kv(k, v))
                if layer == 0:
                    engine.begin(layer_kvs[0], HEADS, CHUNK)
                attention = 4 * HEADS * DIM * CHUNK * (past + CHUNK / 2)
                clock.kernel(LINEAR_WEIGHTS * CHUNK / 2 + attention, 0, LINEAR_LAUNCHES // 2)
                layer_kvs[layer].append(k, v)
                clock.kernel(LINEAR_WEIGHTS * CHUNK * 3 / 2, 0, LINEAR_LAUNCHES // 2)
                times.append(clock.now["compute"])
                if len(times) > host_lag:  # the queue of the device is full
                    clock.now["host"] = max(clock.now["host"], times[-host_lag - 1])
        assert engine.counter.host_bytes == LAYERS * TOKENS * TOKEN_BYTES
        del layer_kvs, engine
        host_memory.finish_release()
        return clock.now["compute"], PreparerOnClock.most_ready_bytes[0]


@pytest.mark.parametrize("host_lag", [1, 20])
def test_a_prefill_does_not_wait_for_pages_that_are_prepared_ahead(monkeypatch, host_lag):
    needed_s, _ = prefill(monkeypatch, host_lag=host_lag)
    ahead_s, most_ready_bytes = prefill(monkeypatch, TOUCHED, host_lag=host_lag)
    assert ahead_s <= 1.01 * needed_s
    assert 0 < most_ready_bytes <= page_work.AHEAD_BYTES


def test_the_clock_shows_the_time_that_an_h200_lost(monkeypatch):
    """All pages were registered untouched with the first chunk: 2.9 s of 10.7 s."""
    needed_s, _ = prefill(monkeypatch)
    found_s, _ = prefill(monkeypatch, UNTOUCHED, runs_ahead=False)
    assert found_s / needed_s == pytest.approx(10.7 / (10.7 - 2.9), rel=0.05)
