"""The CPU suite `host`: the host's time of a decode step, in microseconds a layer, without the work of a device.

A model with 32 tiny layers leaves little to compute, so a token takes about as long as Python and torch need to prepare
it. On a GPU this time is the floor of a token after a short context.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from headinfer.bench.cpu_model import fill_dynamic, fill_head_wise
from headinfer.bench.job import CpuJob
from headinfer.bench.measurement import OURS, Measurement, context_label
from headinfer.bench.timing import Call, run_turn
from headinfer.hf.cache import HeadCache
from headinfer.hf.enable import enable
from headinfer.hf.models import resolve

__all__ = ["host"]

_DTYPE = torch.float32
_RESIDENT_BYTES = 2**30  # of device KV, more than the model has
_STREAMING_BYTES = 16 * 2**20
_IN_PLACE = f"{OURS}, read in place"
_BASELINE = "DynamicCache"


class _Operations(TorchDispatchMode):
    """Counts the torch operations that run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def host(job: CpuJob) -> list[Measurement]:
    """Measure a token with all KV resident behind a ring, with KV read in place, and with DynamicCache, in turns."""
    sizes = job.sizes
    tokens = sizes.short_tokens
    model = resolve(sizes.host_model).load(dtype=_DTYPE, device="cpu", seed=0)
    ours_model = resolve(sizes.host_model).load(dtype=_DTYPE, device="cpu", seed=0)
    enable(ours_model)
    config = model.config
    dynamic = DynamicCache(config=config)
    fill_dynamic(dynamic, config, tokens, _DTYPE)
    resident = HeadCache(
        config,
        expected_tokens=tokens + 1,
        transport="eager",
        device_kv_budget_bytes=_RESIDENT_BYTES,
        streaming_budget_bytes=_STREAMING_BYTES,
    )
    in_place = HeadCache(config, expected_tokens=tokens + 1)
    for cache in (resident, in_place):
        fill_head_wise(cache, config, tokens, _DTYPE)
    turns = {
        OURS: _decode(ours_model, resident),
        _IN_PLACE: _decode(ours_model, in_place),
        _BASELINE: _decode(model, dynamic),
    }
    layers = config.num_hidden_layers
    point = f"{context_label(tokens)}, {layers} tiny layers"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run_turn(turns[OURS])  # what is resident comes in the first pass
        before = resident.stats().link_to_device_bytes
        rounds = job.in_turns(point, turns, sizes.short_steps)
        streamed = resident.stats().link_to_device_bytes - before
        operations = {name: _operations(call) for name, call in turns.items()}
    finally:
        torch.set_num_threads(threads)
    counts = {name: sum(found.values()) / layers for name, found in operations.items()}

    def line(name: str, who: str) -> Measurement:
        return Measurement(
            "host",
            point,
            who,
            1e6 * rounds.median_s(name) / layers,
            "us/layer",
            rounds.ratio(name, OURS),
            rounds=rounds.count,
            note=f"{counts[name]:.1f} torch operations a layer",
            details={"operations": dict(operations[name].most_common()), "streamed_bytes": streamed},
        )

    ratio = rounds.ratio(OURS, _BASELINE)
    return [
        line(OURS, f"{OURS}, all KV resident"),
        line(_IN_PLACE, _IN_PLACE),
        line(_BASELINE, _BASELINE),
        Measurement("host", point, f"{OURS}, all KV resident / {_BASELINE}", ratio, "x", rounds=rounds.count),
    ]


def _decode(model: Any, cache: Any) -> Call:
    """Return a decode step at the end of a cache."""
    ids = torch.full((1, 1), 7)

    def run() -> None:
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

    return Call(run, after=lambda: cache.crop(-1))


def _operations(call: Call) -> Counter[str]:
    """Return how often each torch operation runs in a pass, without those of a native kernel."""
    mode = _Operations()
    with mode:
        call.run()
    call.after()
    return mode.counts
