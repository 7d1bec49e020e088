"""The demo: a real text, read twice by one model, with transformers' own cache and with the head-wise one.

The text is the Python language reference, as it ships inside every Python (`pydoc_data.topics`). The model is a
small Llama with seeded random weights: it says nothing sensible, but the scores of every token depend on the whole
text, so equal tokens, drawn with the same seed, and equal scores show that the two caches are the same to it.
"""

from __future__ import annotations

import gc
import importlib
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache

from headinfer.attention import native
from headinfer.errors import CapacityError, UsageError
from headinfer.hf.cache import HeadCache, Stats
from headinfer.hf.enable import enable
from headinfer.hf.models import resolve

__all__ = ["DEMO_MODEL", "DemoResult", "DemoRun", "python_reference", "run_demo"]

DEMO_MODEL = "random:tiny-llama"
_CHUNK_TOKENS = 2048
_BUDGET_BYTES = 4 * 1024 * 1024


@dataclass
class DemoRun:
    """One reading: what came out, and what it took."""

    name: str
    token_ids: list[int] = field(default_factory=list)
    logits: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    prefill_s: float = 0.0
    decode_s: float = 0.0
    device_kv_bytes: int = 0
    host_kv_bytes: int = 0


@dataclass
class DemoResult:
    """Both readings of the same tokens."""

    tokens_in: int
    standard: DemoRun
    head_wise: DemoRun
    stats: Stats
    text: str

    @property
    def identical(self) -> bool:
        """Whether all generated tokens are equal."""
        return bool(self.standard.token_ids) and self.standard.token_ids == self.head_wise.token_ids

    @property
    def logits_difference(self) -> float:
        """The largest difference between the logits of the two, over their spread (standard deviation)."""
        difference = (self.standard.logits - self.head_wise.logits).abs().max()
        return float(difference / self.standard.logits.std())


def python_reference() -> str:
    """The Python language reference, about 700 KB of text."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    return "\n\n".join(topics[name] for name in sorted(topics))


def run_demo(tokens: int, new_tokens: int, device: str, seed: int = 0, on_stage: Any = print) -> DemoResult:
    """Read `tokens` tokens of the reference both ways and write new_tokens, drawn with one seed, in float32.

    on_stage is called with a line before each stage. On the CPU the head-wise cache streams through the ring as it
    would on a GPU, so that its device bytes are those of a GPU. Raises UsageError for numbers out of range.
    """
    if tokens < 1 or new_tokens < 2:
        raise UsageError(f"the demo needs at least 1 token to read and 2 to write, not {tokens} and {new_tokens}")
    source = resolve(DEMO_MODEL)
    ids = source.tokenizer()(python_reference(), return_tensors="pt").input_ids[:, :tokens]
    if ids.shape[1] < tokens:
        raise CapacityError(f"the text has {ids.shape[1]:,} tokens: ask for at most that many")
    model = source.load(dtype=torch.float32, device=device, seed=seed)
    native.why_not()  # compiles the decode kernel where that was never done here, which is no part of the timing
    _spread_attention(model)
    ids = ids.to(device)
    options = {"device_kv_budget": _BUDGET_BYTES, "staging": "early" if device == "cpu" else "auto"}

    on_stage(f"reading {tokens:,} tokens with the head-wise cache ...")
    head_wise = DemoRun("head-wise (headinfer)")
    with enable(model, chunk_tokens=_CHUNK_TOKENS):
        cache = HeadCache(model.config, expected_tokens=tokens + new_tokens, **options)
        _generate(model, ids, cache, new_tokens, seed, head_wise)
    stats = cache.stats()
    head_wise.device_kv_bytes, head_wise.host_kv_bytes = stats.device_kv_peak_bytes, stats.host_kv_bytes
    cache.reset()
    gc.collect()

    on_stage(f"reading {tokens:,} tokens with transformers' DynamicCache ...")
    standard = DemoRun("standard (DynamicCache)")
    dynamic = DynamicCache(config=model.config)
    _generate(model, ids, dynamic, new_tokens, seed, standard)
    standard.device_kv_bytes = sum(
        tensor.numel() * tensor.element_size() for layer in dynamic.layers for tensor in (layer.keys, layer.values)
    )
    text = source.tokenizer().decode(head_wise.token_ids, errors="replace")
    return DemoResult(tokens, standard, head_wise, stats, text)


def _spread_attention(model: Any) -> None:
    """Make random weights choose by content: freshly initialised ones attend to everything alike."""
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(6.0)
            layer.self_attn.k_proj.weight.mul_(6.0)
            layer.self_attn.v_proj.weight.mul_(4.0)
            layer.self_attn.o_proj.weight.mul_(4.0)
        model.lm_head.weight.mul_(4.0)


def _generate(model: Any, ids: torch.Tensor, cache: Any, new_tokens: int, seed: int, run: DemoRun) -> None:
    torch.manual_seed(seed)
    start = time.perf_counter()
    first = 0.0

    class Clock:
        def put(self, value: torch.Tensor) -> None:
            nonlocal first
            if value.numel() == 1 and not first:
                first = time.perf_counter()

        def end(self) -> None:
            pass

    written = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        prefill_chunk_size=_CHUNK_TOKENS,
        max_new_tokens=new_tokens,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        streamer=Clock(),
        return_dict_in_generate=True,
        output_logits=True,
    )
    run.logits = torch.cat(written.logits).float().cpu()
    run.token_ids = written.sequences[0, ids.shape[1] :].tolist()
    run.prefill_s, run.decode_s = first - start, time.perf_counter() - first
