"""Tells where an answer came from: the exact attention mass of stretches of a document for each token of an answer.

After an answer its tokens are computed once more, on a fork of the cache, in passes of up to 64 tokens. Their queries
are those of decode. A recorder (engine/recorder.py) gets the mass of each stretch for each head, and the heads that
look far count.

A head looks far at a token if more than 70 % of its attention mass is on one stretch of the document, without the first
4 tokens of the context. Other heads attend to these first tokens (attention sinks, arXiv 2309.17453), to the question
and the answer, which are their neighbourhood, or to the whole document, so they say little about where an answer is
from. benchmarks/where.py compares shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from headinfer.engine.recorder import Mass, MassRecorder
from headinfer.errors import UnsupportedError, UsageError
from headinfer.hf.batch import EnabledModel
from headinfer.hf.cache import HeadCache
from headinfer.hf.compat import last_logits_only
from headinfer.hf.rotary import RotaryLengths, keeps_frequencies
from headinfer.utils.tensors import integer_tensor

__all__ = ["FAR_SHARE", "SINK_TOKENS", "STRETCH_TOKENS", "TokenIds", "Where", "even_edges", "where"]

TokenIds = Sequence[int] | torch.Tensor
"""The ids of some tokens, as a list or a tensor [T]."""

STRETCH_TOKENS = 256
"""Tokens of a stretch."""

SINK_TOKENS = 4
"""The first tokens of a context, to which heads attend that look for nothing (arXiv 2309.17453, section 3)."""

FAR_SHARE = 0.7
"""A head looks far at a token if more than this share of its mass is on one stretch of the document."""

_PASS_TOKENS = 64  # the mass of a head group of one attention is [heads, 64, stretches]


@dataclass(frozen=True)
class Where:
    """The attention mass of the stretches of a document for each token of an answer.

    Attributes:
        edges: the positions of the tokens at which the stretches begin, and the end of the last one: S + 1 numbers.
        mass: the mass of each stretch for each token of the answer, [tokens, S], float64: the sum over the heads that
            look far at the token.
        heads: how many heads of all layers look far at each token, [tokens], int64.
    """

    edges: list[int]
    mass: torch.Tensor
    heads: torch.Tensor

    @property
    def shares(self) -> torch.Tensor:
        """The share of each stretch in the mass of all tokens of the answer, [S], float64.

        Their sum is 1, or 0 if no head looks far at any token.
        """
        of_stretches = self.mass.sum(dim=0)
        return of_stretches / of_stretches.sum().clamp(min=torch.finfo(of_stretches.dtype).tiny)


def even_edges(start: int, stop: int) -> list[int]:
    """Return the edges of stretches of the tokens [start, stop), each of 128 to 383 tokens, if there are as many.

    All edges but the first and the last are multiples of STRETCH_TOKENS, as the edges of most tiles are.
    """
    half = STRETCH_TOKENS // 2
    first = -(-(start + half) // STRETCH_TOKENS) * STRETCH_TOKENS
    return [start, *range(first, stop - half + 1, STRETCH_TOKENS), stop]


@torch.inference_mode()
def where(
    enabled: EnabledModel,
    cache: HeadCache,
    question: TokenIds,
    answer: TokenIds,
    *,
    edges: Sequence[int] | None = None,
) -> Where:
    """Compute where an answer came from; see Enabled.where()."""
    model = enabled.model
    past_tokens = cache.get_seq_length()
    asked = _ids(question, "question")
    answered = _ids(answer, "answer")
    chosen = even_edges(0, past_tokens) if edges is None else list(edges)
    is_ascending = all(start < stop for start, stop in pairwise(chosen))
    if len(chosen) < 2 or not is_ascending or chosen[0] < 0 or chosen[-1] > past_tokens + len(asked):
        raise UsageError(
            f"the edges of the stretches must be at least two ascending positions from 0 to {past_tokens + len(asked)},"
            " the tokens before the answer"
        )
    if past_tokens and cache.head_layers[0].rows != 1:
        raise UsageError(f"the cache holds {cache.head_layers[0].rows} rows: give one with one row, such as a fork")
    if (getattr(model, "tp_size", None) or 1) > 1:
        raise UnsupportedError("each rank has the attention of its own heads only: use one process to see where from")
    if not keeps_frequencies(RotaryLengths.from_config(model.config), cache, len(asked) + len(answered)):
        raise UnsupportedError(
            "the model's rotary frequencies change between the document and the end of the answer: give the cache "
            "expected_tokens for all of them, so that one pass can repeat the answer"
        )
    ids = torch.cat([asked, answered])[:-1]  # the last token asks nothing
    collected = []
    fork = cache.fork()
    try:
        for start in range(len(asked) - 1, len(ids), _PASS_TOKENS):  # the first query chose the first token
            stop = min(start + _PASS_TOKENS, len(ids))
            new_ids = ids[fork.get_seq_length() - past_tokens : stop]
            heads = _FarHeads(chosen, past_tokens + start, past_tokens + stop, model.device)
            fork.engine.recorder = MassRecorder(heads.edges, past_tokens + start, heads.take)
            model(
                new_ids[None].to(model.device),
                past_key_values=fork,
                use_cache=True,
                **last_logits_only(model, stop - start),
            )
            collected.append((heads.mass.cpu(), heads.count.cpu()))
    finally:
        fork.engine.recorder = None
        fork.reset()
    return Where(chosen, torch.cat([mass for mass, _ in collected]), torch.cat([count for _, count in collected]))


def _ids(given: TokenIds, name: str) -> torch.Tensor:
    """Return the token ids [T] of a question or an answer."""
    ids = integer_tensor(given, name, (1,)).cpu()
    if not ids.numel():
        raise UsageError(f"the {name} has no tokens: give at least one")
    return ids


class _FarHeads:
    """Adds up the mass of the heads that look far, for the queries of one pass.

    Args:
        edges: the edges of the stretches of the document.
        first: the position of the first query.
        last: the position after the last query.
        device: the device of the sums.

    Attributes:
        edges: all edges: of the first tokens, which do not count, the stretches, and what follows them.
        mass: the sums for each query and stretch of the document.
        count: how many heads look far for each query.
    """

    def __init__(self, edges: Sequence[int], first: int, last: int, device: torch.device) -> None:
        self.edges = [0, *(max(edge, SINK_TOKENS) for edge in edges), max(last, SINK_TOKENS)]
        self.mass = torch.zeros(last - first, len(edges) - 1, dtype=torch.float64, device=device)
        self.count = torch.zeros(last - first, dtype=torch.int64, device=device)
        self._first = first
        self._before = (-1, -1)  # the attention and the head of the mass that was taken last

    def take(self, found: Mass) -> None:
        """Add the mass of some heads of one attention."""
        document = found.mass[..., 1:-1].to(self.mass.device)
        begin = found.first_query - self._first
        queries = slice(begin, begin + document.shape[1])
        now = (found.attention, found.first_head)
        if now <= self._before:  # the pass begins anew
            self.mass[queries] = 0
            self.count[queries] = 0
        self._before = now
        looks_far = document.amax(dim=-1) > FAR_SHARE
        self.mass[queries] += document.masked_fill_(~looks_far[..., None], 0).sum(dim=0, dtype=torch.float64)
        self.count[queries] += looks_far.sum(dim=0)
