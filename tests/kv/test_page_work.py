"""Host memory that is touched, pinned and released in background threads. Pinning is simulated."""

import gc
import itertools
import os
import threading

import pytest
import torch

from headinfer.kv import host_memory, page_work
from headinfer.kv.byte_counter import ByteCounter
from headinfer.kv.host_memory import HostTier

PAGES = 1 << 20
LAYERS = 3
SEGMENTS = 4
in_use = []  # the tensors that take() returned


class System:
    """Simulates CUDA's functions: notes the order of the calls, and refuses or fails at chosen ones.

    Attributes:
        pinned: the addresses, in the order in which they were pinned.
        refused_from: the number of the first call that is refused, from 1.
        failing: the numbers of the calls that raise an error.
        before: called at the beginning of each call.
    """

    def __init__(self, monkeypatch):
        self.pinned = []
        self.unpinned = []
        self.calls = 0
        self.refused_from = 10_000
        self.failing = ()
        self.before = lambda: None
        monkeypatch.setattr(host_memory, "register", self.register)
        monkeypatch.setattr(host_memory, "_unpin", self.unpin)

    def register(self, address, nbytes, device):
        self.before()
        self.calls += 1
        if self.calls in self.failing:
            raise RuntimeError("CUDA error: on purpose")
        if self.calls >= self.refused_from:
            return "the limit on locked memory is reached"
        self.pinned.append(address)
        return ""

    def unpin(self, pinned, address, device):
        self.unpinned.append(address)
        pinned.discard(address)


@pytest.fixture
def system(monkeypatch):
    host_memory.finish_release()
    yield System(monkeypatch)
    in_use.clear()
    for thread in threading.enumerate():
        if thread.name == "headinfer-pin":
            thread.join()
    host_memory.finish_release()
    assert not own_threads()


def own_threads():
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.startswith(("headinfer-pin", "headinfer-touch", "headinfer-unpin"))]


def new_tier(ahead_pages=2):
    tier = HostTier(ByteCounter(), device=torch.device("cpu"))
    tier.preparer._ahead_bytes = ahead_pages * PAGES
    return tier


def reserve(tier, rows=1):
    return tier.reserve([(PAGES,)] * SEGMENTS * rows, torch.uint8, rows)


def take(memory):
    in_use.append(memory.allocate((PAGES,), torch.uint8))
    return in_use[-1]


def settle(tier):
    """Wait until the thread of a tier has done all that the limit allows."""
    thread = tier.preparer._thread
    if thread is not None:
        thread.join()


def test_pages_are_touched_in_parts_that_cover_them_once(monkeypatch):
    ranges = []
    monkeypatch.setattr(page_work, "_touch", lambda address, nbytes: ranges.append((address, nbytes)))
    monkeypatch.setattr(page_work, "_threads", lambda: 5)
    start = 4096 * 7
    nbytes = 37 * 2**20 + 4096
    with page_work.ThreadPoolExecutor(5) as pool:
        page_work.touch_pages(start, nbytes, pool)
    ranges.sort()
    assert len(ranges) == 5
    for (address, size), (after, _) in itertools.pairwise(ranges):
        assert address + size == after
        assert after % 2**21 == 0
    assert ranges[0][0] == start
    assert sum(size for _, size in ranges) == nbytes


@pytest.mark.parametrize("has_madvise", [True, False])
def test_touched_pages_are_zero(monkeypatch, has_madvise):
    if not has_madvise:
        monkeypatch.setattr(page_work, "_LIBC", None)
    pages = HostTier(ByteCounter())._map((PAGES,), torch.uint8)
    page_work.touch_pages(pages.mapping.address, PAGES)
    assert not pages.tensor.any()


def test_pages_are_prepared_in_the_order_of_their_use_and_never_too_far_ahead(system):
    tier = new_tier(ahead_pages=2)
    layers = []
    used = []
    for _ in range(LAYERS):  # the first pass
        layers.append(reserve(tier))
        used.append(take(layers[-1]).data_ptr())
        assert system.pinned == used, "nothing is pinned ahead before all layers have reserved"
    assert tier.counter.host_bytes == LAYERS * SEGMENTS * PAGES
    assert tier.counter.host_untouched_bytes == LAYERS * (SEGMENTS - 1) * PAGES
    for _ in range(SEGMENTS - 1):
        tier.prepare_ahead()
        for memory in layers:
            settle(tier)
            waited = tier.preparer.times.waited_s
            assert len(system.pinned) == min(len(used) + 2, LAYERS * SEGMENTS)
            used.append(take(memory).data_ptr())
            assert tier.preparer.times.waited_s == waited, "the pages are ready, so nothing waits"
        assert system.pinned[: len(used)] == used
    settle(tier)
    assert system.pinned == used
    assert len(set(used)) == LAYERS * SEGMENTS
    assert tier.counter.host_untouched_bytes == 0
    times = tier.preparer.times
    assert times.touched_bytes == times.registered_bytes == LAYERS * SEGMENTS * PAGES


def test_a_layer_that_overtakes_the_thread_waits_for_its_pages_only(system):
    tier = new_tier(ahead_pages=1)
    layers = [reserve(tier) for _ in range(LAYERS)]
    tier.prepare_ahead()
    settle(tier)
    assert system.calls == 1
    for memory in layers:
        take(memory)
        take(memory)  # of the next pages, which are beyond the limit
    settle(tier)
    assert system.calls == LAYERS * 2 + 1, "and one ahead"


def test_rows_need_their_pages_at_the_same_time(system):
    tier = new_tier(ahead_pages=100)
    one, two = (reserve(tier, rows=2) for _ in range(2))
    tier.prepare_ahead()
    settle(tier)
    order = {address: number for number, address in enumerate(system.pinned)}
    taken = [[order[take(memory).data_ptr()] for _ in range(2)] for _ in range(SEGMENTS) for memory in (one, two)]
    assert [number for pair in taken for number in pair] == list(range(4 * SEGMENTS))


@pytest.mark.parametrize("refused_from", [1, 3, 6, 12])
@pytest.mark.parametrize("settles", [True, False])
def test_a_refusal_is_reported_where_the_pages_are_used(system, refused_from, settles, recwarn):
    system.refused_from = refused_from
    tier = new_tier(ahead_pages=100)
    layers = []
    pageable = []

    def take_next(memory):
        tensor = take(memory)
        pageable.append(tier.is_pageable(tensor))
        assert bool(tier.pin_refusal) == (len(pageable) >= refused_from)
        assert [str(one.message) for one in recwarn] == [
            "host memory stays pageable, transfers will be slower: the limit on locked memory is reached"
        ] * (len(pageable) >= refused_from)

    for _ in range(LAYERS):
        layers.append(reserve(tier))
        take_next(layers[-1])
    for _ in range(SEGMENTS - 1):
        tier.prepare_ahead()
        for memory in layers:
            if settles:
                settle(tier)
            take_next(memory)
    assert pageable == [number >= refused_from for number in range(1, LAYERS * SEGMENTS + 1)]
    assert system.calls == min(refused_from, LAYERS * SEGMENTS), "nothing is tried after a refusal"
    assert tier.is_pageable(take(reserve(tier)))


def test_an_error_is_raised_where_the_pages_are_used(system):
    system.failing = (2, 5)
    tier = new_tier(ahead_pages=100)
    memory = reserve(tier)
    take(memory)
    tier.prepare_ahead()
    settle(tier)
    with pytest.raises(RuntimeError, match="on purpose"):
        take(memory)
    assert not tier.is_pageable(take(memory))
    assert not tier.is_pageable(take(memory))
    with pytest.raises(RuntimeError, match="on purpose"):
        take(memory)  # none is left, so it is allocated now
    assert not tier.is_pageable(take(memory))
    assert not tier.pin_refusal


def test_an_interrupted_wait_leaves_the_pages_reserved(system, monkeypatch):
    tier = new_tier()
    memory = reserve(tier)

    def interrupted(pages):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tier.preparer, "_wait_until_ready", interrupted)
        with pytest.raises(KeyboardInterrupt):
            take(memory)
    assert take(memory).data_ptr() == system.pinned[0]


def test_pausing_ends_the_thread_and_a_later_pass_goes_on(system):
    tier = new_tier(ahead_pages=100)
    memory = reserve(tier)
    begun = threading.Event()
    goes_on = threading.Event()

    def before():
        begun.set()
        goes_on.wait()
        tier.preparer._goes_ahead = False  # as pause() sets it, which waits for this thread

    system.before = before
    tier.prepare_ahead()
    begun.wait()
    assert "headinfer-pin" in own_threads()
    goes_on.set()
    tier.pause()
    assert not own_threads()
    assert system.calls == 1
    system.before = lambda: None
    take(memory)
    take(memory)
    assert system.calls == 2
    tier.prepare_ahead()
    settle(tier)
    assert system.calls == SEGMENTS


def test_memory_that_is_dropped_is_not_prepared(system):
    tier = new_tier(ahead_pages=100)
    first, second = reserve(tier), reserve(tier)
    take(first)
    del first
    tier.prepare_ahead()
    settle(tier)
    assert system.calls == 1 + SEGMENTS
    assert tier.counter.host_bytes == (1 + SEGMENTS) * PAGES
    del second, tier
    in_use.clear()
    gc.collect()
    host_memory.finish_release()
    assert sorted(system.unpinned) == sorted(system.pinned)


def test_without_threads_pages_are_prepared_when_they_are_used(system, monkeypatch):
    def refuse(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    tier = new_tier()
    memory = reserve(tier)
    tier.prepare_ahead()
    used = [take(memory).data_ptr() for _ in range(SEGMENTS)]
    assert system.pinned == used
    in_use.clear()
    assert len(system.unpinned) == SEGMENTS


def test_a_tier_without_a_device_has_no_thread_and_pins_nothing(system):
    tier = HostTier(ByteCounter())
    memory = reserve(tier)
    tier.prepare_ahead()
    tensors = [take(memory) for _ in range(SEGMENTS + 1)]
    tier.pause()
    assert tier.counter.host_bytes == (SEGMENTS + 1) * PAGES
    assert tier.counter.host_untouched_bytes == 0
    assert not any(map(tier.is_pageable, tensors))
    assert system.calls == 0
    assert not own_threads()


def test_one_wait_for_the_device_releases_many_ranges(system, monkeypatch):
    begun = threading.Event()
    goes_on = threading.Event()
    unpinned_at_waits = []

    def wait_for_device(device):
        begun.set()
        goes_on.wait()
        unpinned_at_waits.append(len(system.unpinned))

    monkeypatch.setattr(host_memory._releasers[-1], "_wait_for_device", wait_for_device)
    tier = new_tier()
    tensors = [tier.allocate((PAGES,), torch.uint8) for _ in range(10)]
    addresses = {tensor.data_ptr() for tensor in tensors}
    tensors.pop()
    begun.wait()
    tensors.clear()
    assert tier.counter.host_bytes == 0
    assert host_memory.releasing_bytes() == 10 * PAGES
    assert not system.unpinned, "the device may still read"
    goes_on.set()
    host_memory.finish_release()
    assert host_memory.releasing_bytes() == 0
    assert set(system.unpinned) == addresses
    assert unpinned_at_waits == [0, 1], "the other nine ranges are released after one wait"


def test_a_fork_releases_nothing(system, monkeypatch):
    tier = new_tier()
    tensor = tier.allocate((PAGES,), torch.uint8)
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: -1)
        del tensor
    assert host_memory._KEPT.pop().memory is not None
    assert not system.unpinned
    assert tier.counter.host_bytes == PAGES
