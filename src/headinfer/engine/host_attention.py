"""Attention of the host's CPU on KV in host memory, in a decode step, while the link brings other KV to the device.

The host is one more place that computes a partial result, which is merged like that of a tile. The order is fixed: the
host merges its parts in the order of the tokens, the device merges the host's result last, and the share of the host
(TilePlan.cpu_share) depends on the plan alone. So the same options give the same bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from headinfer.attention.state import AttentionState
from headinfer.engine.layer_pass import LayerPass
from headinfer.engine.past import HostPart
from headinfer.kv.byte_counter import ByteCounter
from headinfer.kv.exchange import HostExchange
from headinfer.utils.threads import torch_threads

__all__ = ["HostAttention"]


class HostAttention:
    """The host's part of the attention of one layer. The queries are sent to the host when it is made.

    Args:
        layer: the layer's attention.
        parts: what the host attends to.
        exchange: brings queries to the host, and results to the device.
        counter: counts the bytes that the host attends to.
        threads: the number of threads that compute; None for torch.get_num_threads().
    """

    def __init__(
        self,
        layer: LayerPass,
        parts: Sequence[HostPart],
        exchange: HostExchange,
        counter: ByteCounter,
        threads: int | None = None,
    ) -> None:
        self._layer = layer
        self._parts = parts
        self._exchange = exchange
        self._counter = counter
        self._threads = threads
        after = tuple(dict.fromkeys(event for part in parts for event in part.after))
        self._sent = exchange.send(layer.q, layer.v.shape[3], after)

    def compute(self) -> AttentionState:
        """Wait for the queries, compute on the host, and send the results to the device.

        Call it after all other work of the layer is queued, because the device and the link work on that meanwhile.

        Returns:
            The state on the device: out [B, Hq, T, Dv] and lse [B, Hq, T]. Rows of the batch without a part have seen
            no key.
        """
        on_host = dataclasses.replace(self._layer, q=self._exchange.receive(self._sent))
        heads = slice(0, self._layer.k.shape[1])
        state = AttentionState(*self._exchange.results(self._sent))
        state.out.zero_()
        state.lse.fill_(-torch.inf)
        for part in self._parts:
            q = on_host.packed(part.rows, heads)
            with torch_threads(self._threads):
                computed = _attend(on_host, q, part)
            on_host.merge(heads, state, part.rows, computed)
            self._counter.cpu_attended_bytes += part.nbytes
        return AttentionState(*self._exchange.reply(self._sent))


def _attend(layer: LayerPass, q: torch.Tensor, part: HostPart) -> AttentionState:
    """Compute attention of q [Hkv, N, Dk] to a part of the past, all in host memory."""
    return layer.attend_full(q, part.pieces)
