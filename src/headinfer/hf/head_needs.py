"""Measures how much each KV head of a model needs tokens outside of the sink and the neighbourhood.

A streaming head (DuoAttention, arXiv 2410.10819) attends to the first tokens of the context, the sink, and to its
newest ones. For chosen queries and each KV head, this module computes what that would change:

- mass: the attention weight of all other tokens, the far ones.
- error: the distance between the outputs without and with far tokens, divided by the length of the latter.
- effect: the distance between the outputs of the whole attention layer, after its output projection, if only this head
  leaves far tokens out, divided by the length of the exact output.

The model reads with its own exact attention in chunks. Its K and V are complete, in a cache of transformers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextvars import ContextVar, Token
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

from headinfer.attention.state import AttentionState, merge
from headinfer.errors import UnsupportedError
from headinfer.hf.attention import headinfer_attention, headinfer_mask
from headinfer.hf.compat import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    PreTrainedModel,
    default_layers,
    last_logits_only,
    not_compiled,
)
from headinfer.hf.enable import check_model
from headinfer.plan.model_shape import ModelShape

__all__ = ["HeadMeter", "LayerNeeds", "split_attention"]

_NAME = "headinfer-head-needs"
_MOST_SCORES = 2**24  # of one attention at once: 64 MiB in float32
_MOST_CHUNK_TOKENS = 1024
_LEAST_CHUNK_TOKENS = 16
_PROJECTIONS = ("o_proj", "out_proj", "c_proj", "dense", "wo")

_METER: ContextVar[HeadMeter | None] = ContextVar("_METER", default=None)


@dataclass
class LayerNeeds:
    """What leaving far tokens out changes in one layer, for some queries.

    Attributes:
        mass: the attention weight of far tokens, [Hkv, queries], float64: the mean of the query heads of a KV head.
        largest_mass: the same for the query head that gives the most.
        error: the relative error of the head's output, [Hkv, queries], float64, over all its query heads.
        effect: the relative change of the layer's output, [Hkv, queries], float64.
    """

    mass: torch.Tensor
    largest_mass: torch.Tensor
    error: torch.Tensor
    effect: torch.Tensor


def split_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    *,
    sink_tokens: int,
    recent_tokens: int,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute attention of some queries to all tokens, and to the sink and the neighbourhood alone, in float32.

    Args:
        q: [Hq, N, Dk].
        k: the keys of all positions from 0 on, [Hkv, T, Dk].
        v: [Hkv, T, Dv].
        positions: the position of each query, [N], int64.
        sink_tokens: the first tokens of the context, which every query sees.
        recent_tokens: a query at position i also sees the keys j with i - j < recent_tokens.
        scale: factor of the scores.
        softcap: soft cap of the scores; None applies none.
        sinks: scores [Hq] of one more key for each query head, with value 0 (gpt-oss).

    Returns:
        The outputs over all keys [Hq, N, Dv], those without the far keys, and the attention weight of the far keys
        [Hq, N].
    """
    kv_heads, tokens, _ = k.shape
    queries = q.shape[1]
    packed = q.float().reshape(kv_heads, -1, q.shape[2])  # [Hkv, G * N, Dk]
    own = positions.repeat(packed.shape[1] // queries)[:, None]
    near = AttentionState.empty(packed.shape[:2], v.shape[2], q.device)
    far = AttentionState.empty(packed.shape[:2], v.shape[2], q.device)
    step = max(_MOST_SCORES // (packed.shape[0] * packed.shape[1]), 1)
    for start in range(0, tokens, step):
        block = slice(start, min(start + step, tokens))
        scores = packed @ k[:, block].float().mT * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        keys = torch.arange(block.start, block.stop, device=q.device)
        is_seen = keys <= own
        is_near = is_seen & ((keys < sink_tokens) | (own - keys < recent_tokens))
        values = v[:, block].float()
        for state, visible in ((near, is_near), (far, is_seen & ~is_near)):
            if bool(visible.any()):
                state.merge_(_attend(scores.masked_fill(~visible, -torch.inf), values))
    whole = merge(near, far)
    outputs = [state.out.view(q.shape[0], queries, -1) for state in (whole, near)]
    lse = [state.lse.view(q.shape[0], queries) for state in (whole, near, far)]
    if sinks is not None:
        column = sinks.float()[:, None]
        outputs = [AttentionState(out, own_lse).with_sinks(column) for out, own_lse in zip(outputs, lse, strict=False)]
        lse[0] = torch.logaddexp(lse[0], column)
    return outputs[0], outputs[1], torch.exp(lse[2] - lse[0])


def _attend(scores: torch.Tensor, values: torch.Tensor) -> AttentionState:
    """Return the state of attention with masked scores [H, M, T] to values [H, T, Dv]; rows may see no key."""
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.clamp(min=torch.finfo(lse.dtype).min)[..., None])
    return AttentionState(weights @ values, lse)


class HeadMeter:
    """Measures the KV heads of a model while it reads. In its `with` block, the model has its own attention function.

    Args:
        model: the model, which headinfer must not be enabled on.
        sink_tokens: see split_attention().
        recent_tokens: see split_attention().
        on_tokens: called after each chunk with the number of tokens in the cache.

    Raises:
        UnsupportedError: the model is one that enable() refuses.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sink_tokens: int,
        recent_tokens: int,
        on_tokens: Callable[[int], None] = lambda tokens: None,
    ) -> None:
        check_model(model)
        self._on_tokens = on_tokens
        self._model = model
        self._sink_tokens = sink_tokens
        self._recent_tokens = recent_tokens
        self.shape = ModelShape.from_config(model.config)
        self._layers = self.shape.offloaded_layers
        self._query_heads = max(layer.query_heads for layer in self.shape.layers)
        self._cache: DynamicCache | None = None
        self._positions = torch.empty(0, dtype=torch.int64)
        self._found: dict[int, list[LayerNeeds]] = {}
        self._attention_before = ""
        self._token: Token[HeadMeter | None] | None = None

    def __enter__(self) -> HeadMeter:
        AttentionInterface.register(_NAME, _measured_attention)
        AttentionMaskInterface.register(_NAME, headinfer_mask)
        self._attention_before = self._model.config._attn_implementation
        self._model.set_attn_implementation(_NAME)
        self._token = _METER.set(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._token is not None
        _METER.reset(self._token)
        self._model.set_attn_implementation(self._attention_before)

    def new_cache(self) -> DynamicCache:
        """Return an empty cache for read()."""
        cache = DynamicCache(config=self._model.config)
        cache.layers = default_layers(self._model.config)
        return cache

    @torch.inference_mode()
    def read(
        self, cache: DynamicCache, ids: Sequence[int], positions: Sequence[int] = (), *, logits: int = 1
    ) -> tuple[dict[int, LayerNeeds], torch.Tensor]:
        """Let the model read tokens after those in a cache, and measure the queries at some positions.

        Args:
            cache: the tokens before, which become longer.
            ids: the token ids to read.
            positions: the ascending positions in the whole context of the queries that are measured. All are among
                the tokens that are read.
            logits: the number of last tokens whose logits are returned.

        Returns:
            What was measured, by the index of the layer whose K and V they are, and the logits [logits, V].

        Raises:
            UnsupportedError: the attention of a layer did not get the K and V of the cache.
        """
        self._cache = cache
        self._found = {layer: [] for layer in self._layers}
        start = cache.get_seq_length()
        stop = start + len(ids)
        collected = []
        chosen = torch.tensor(list(positions), dtype=torch.int64, device=self._model.device)
        while start < stop:
            end = min(start + self._chunk_tokens(stop), stop)
            self._positions = chosen[(chosen >= start) & (chosen < end)]
            chunk = torch.tensor([list(ids[len(ids) - stop + start : len(ids) - stop + end])], device=chosen.device)
            wanted = min(max(end - (stop - logits), 1), end - start)
            output = self._model(chunk, past_key_values=cache, use_cache=True, **last_logits_only(self._model, wanted))
            collected.append(output.logits[0, -wanted:])
            start = end
            self._on_tokens(start)
        missing = [layer for layer in self._layers if len(positions) and not self._found[layer]]
        if missing:
            raise UnsupportedError(
                f"{self._model.config.model_type} changes K or V between the cache and the attention, so its heads "
                "cannot be measured"
            )
        return {layer: _joined(parts) for layer, parts in self._found.items() if parts}, torch.cat(collected)[-logits:]

    def fork(self, cache: DynamicCache) -> DynamicCache:
        """Return a copy of a cache, so that what is read after it does not change it."""
        return copy.deepcopy(cache)

    def _chunk_tokens(self, tokens: int) -> int:
        """Return the tokens of a chunk. Its scores in float32, which models with soft caps make, stay small."""
        most = 16 * _MOST_SCORES // (self._query_heads * tokens)
        return max(min(most, _MOST_CHUNK_TOKENS), _LEAST_CHUNK_TOKENS)

    def take(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> None:
        """Measure one attention: query [1, Hq, Tq, Dk], and complete key [1, Hkv, T, Dk] and value [1, Hkv, T, Dv]."""
        if not len(self._positions) or self._cache is None:
            return
        layer = next((at for at in self._layers if getattr(self._cache.layers[at], "keys", None) is key), None)
        if layer is None:
            return
        positions = self._positions.to(query.device)
        first = key.shape[2] - query.shape[2]
        positions = positions[positions >= first]  # a layer that shares K and V may have fewer queries (Gemma 4)
        if not len(positions):
            return
        exact, near, mass = split_attention(
            query[0, :, positions - first],
            key[0],
            value[0],
            positions,
            sink_tokens=self._sink_tokens,
            recent_tokens=self._recent_tokens,
            scale=scale,
            softcap=softcap,
            sinks=sinks,
        )
        self._found[layer].append(_needs(module, exact, near, mass, key.shape[1]))


@not_compiled
def _measured_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Compute exact attention to complete K and V, and measure it. The arguments are those of headinfer_attention()."""
    meter = _METER.get()
    if meter is not None:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        meter.take(module, query, key, value, scale, softcap, s_aux)
    return headinfer_attention(module, query, key, value, attention_mask, dropout, scaling, softcap, s_aux, **kwargs)


def _needs(
    module: torch.nn.Module, exact: torch.Tensor, near: torch.Tensor, mass: torch.Tensor, kv_heads: int
) -> LayerNeeds:
    """Return what one attention says about its KV heads.

    Args:
        module: the attention module.
        exact: its outputs over all keys, [Hq, N, Dv].
        near: the outputs without far keys, [Hq, N, Dv].
        mass: the weight of far keys, [Hq, N].
        kv_heads: Hkv.
    """
    change = (near - exact).unflatten(0, (kv_heads, -1)).transpose(1, 2).flatten(2)  # [Hkv, N, G * Dv]
    outputs = exact.unflatten(0, (kv_heads, -1)).transpose(1, 2).flatten(2)
    weight = _projection(module, kv_heads * outputs.shape[2])
    if weight is None:
        parts = change
        whole = outputs.transpose(0, 1).flatten(1)
    else:
        by_head = weight.to(outputs.device, torch.float32).unflatten(1, (kv_heads, -1)).transpose(0, 1)  # [Hkv, H, GDv]
        parts = change @ by_head.mT
        whole = (outputs @ by_head.mT).sum(dim=0)
    of_heads = mass.unflatten(0, (kv_heads, -1)).double()
    return LayerNeeds(
        mass=of_heads.mean(dim=1).cpu(),
        largest_mass=of_heads.amax(dim=1).cpu(),
        error=_ratio(change.norm(dim=2), outputs.norm(dim=2)),
        effect=_ratio(parts.norm(dim=2), whole.norm(dim=1)),
    )


def _ratio(change: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """Return change / whole in float64 on the CPU; 0 if nothing changes."""
    whole = whole.double().cpu()
    return change.double().cpu() / whole.clamp(min=torch.finfo(torch.float32).tiny)


def _projection(module: torch.nn.Module, width: int) -> torch.Tensor | None:
    """Return the weight [H, width] of the output projection of an attention module; None if there is none to find."""
    for name in _PROJECTIONS:
        weight = getattr(getattr(module, name, None), "weight", None)
        if not isinstance(weight, torch.Tensor) or weight.is_meta or weight.ndim != 2 or width not in weight.shape:
            continue
        if not weight.is_floating_point():
            continue
        is_transposed = weight.shape[1] != width  # GPT-2's Conv1D
        return weight.detach().T if is_transposed else weight.detach()
    return None


def _joined(parts: Sequence[LayerNeeds]) -> LayerNeeds:
    """Join the measurements of the queries of one layer, in the order in which they were taken."""
    return LayerNeeds(
        *(
            torch.cat([getattr(part, name) for part in parts], dim=1)
            for name in ("mass", "largest_mass", "error", "effect")
        )
    )
