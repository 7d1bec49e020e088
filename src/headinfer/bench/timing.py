"""Clocks of the benchmarks: alternatives are timed in turns, and compared round by round.

The load of a machine changes within minutes, and a figure drifts with it. So alternatives run one after the other in
each round, and two of them are compared by the median over the rounds of the ratio of their times.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import psutil
import torch

__all__ = ["Call", "Peak", "Rounds", "Timer", "Turn", "device_timer", "in_turns", "median_s", "run_turn", "timed"]

Timer = Callable[[Callable[[], object]], float]
"""Calls a function and returns the wall seconds that it took."""


def timed(call: Callable[[], object]) -> float:
    """Return the wall seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def device_timer(device: torch.device) -> Timer:
    """Return a timer that also counts the work that a call queues on a device."""
    if device.type != "cuda":
        return timed

    def timed_with_device(call: Callable[[], object]) -> float:
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        torch.cuda.synchronize(device)
        return time.perf_counter() - start

    return timed_with_device


def median_s(call: Callable[[], object], timer: Timer = timed, *, rounds: int = 5) -> float:
    """Return the median of the seconds of a call, after one call that warms up."""
    timer(call)
    return statistics.median(timer(call) for _ in range(rounds))


class Turn(Protocol):
    """One alternative of a comparison. Only run() is timed."""

    def active(self) -> AbstractContextManager[Any]:
        """Return a context that is entered before run() and left after after()."""

    def run(self) -> object:
        """Do the work that is timed."""

    def after(self) -> object:
        """Restore the state from before run()."""


def _nothing() -> None:
    """Do nothing."""


@dataclass(frozen=True)
class Call:
    """A turn that is made of functions.

    Attributes:
        run: does the work that is timed.
        active: returns a context around the turn.
        after: restores the state from before run().
    """

    run: Callable[[], object]
    active: Callable[[], AbstractContextManager[Any]] = nullcontext
    after: Callable[[], object] = _nothing


@dataclass(frozen=True)
class Rounds:
    """Times of alternatives that were measured in the same rounds.

    Attributes:
        seconds: for each alternative its seconds, one a round.
    """

    seconds: Mapping[str, Sequence[float]]

    @property
    def count(self) -> int:
        """The number of rounds."""
        return len(next(iter(self.seconds.values())))

    def median_s(self, name: str) -> float:
        """Return the median of the seconds of one alternative."""
        return statistics.median(self.seconds[name])

    def medians(self) -> dict[str, float]:
        """Return the medians of all alternatives, for JSON: NAME_s in seconds."""
        return {f"{name}_s": self.median_s(name) for name in self.seconds}

    def ratio(self, name: str, other: str) -> float:
        """Return the median over the rounds of the time of one alternative over the time of another."""
        pairs = zip(self.seconds[name], self.seconds[other], strict=True)
        return statistics.median(one_s / other_s for one_s, other_s in pairs)


def run_turn(turn: Turn, timer: Timer = timed) -> float:
    """Run one turn, and return the seconds of its run()."""
    with turn.active():
        seconds = timer(turn.run)
        turn.after()
    return seconds


def in_turns(
    turns: Mapping[str, Turn],
    rounds: int,
    timer: Timer = timed,
    *,
    warm_up: bool = True,
    expect: Callable[[float], object] | None = None,
) -> Rounds:
    """Time alternatives in turns.

    Args:
        turns: the alternatives by name, in the order in which they run in each round.
        rounds: how often each of them is timed.
        timer: measures the seconds of each run().
        warm_up: run each of them once before the first round.
        expect: called when each of them has run once, with the seconds that the rounds from then on will take.
    """
    start = time.perf_counter()
    if warm_up:
        for turn in turns.values():
            run_turn(turn, timer)
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for done in range(rounds):
        if expect is not None and done == (0 if warm_up else 1):
            expect((time.perf_counter() - start) * (rounds - done))
        for name, turn in turns.items():
            seconds[name].append(run_turn(turn, timer))
    return Rounds(seconds)


class Peak:
    """Context manager that samples the resident memory of a process every two milliseconds.

    Attributes:
        rss_bytes: the most that was seen.
    """

    def __init__(self, process: psutil.Process) -> None:
        self.rss_bytes = process.memory_info().rss
        self._process = process
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._stop.is_set():
            self.rss_bytes = max(self.rss_bytes, self._process.memory_info().rss)
            time.sleep(0.002)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.rss_bytes = max(self.rss_bytes, self._process.memory_info().rss)
