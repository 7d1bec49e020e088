"""Attention of the host's CPU on KV in host memory, in a decode step, while the link brings other KV to the device.

The host is one more place that computes a partial result, which is merged like that of a tile. The order is fixed: the
host's results are merged last, and the share of the host (TilePlan.cpu_share) depends on the plan alone. So the same
options give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from headinfer.attention.backends import Problem, capability_of, choose
from headinfer.attention.state import AttentionState
from headinfer.engine.layer_pass import LayerPass
from headinfer.engine.past import HostPart
from headinfer.kv.byte_counter import ByteCounter
from headinfer.kv.exchange import HostExchange

__all__ = ["HostAttention"]

_CPU = torch.device("cpu")
_MOST_ROWS = 64  # query rows per KV head in one call of the CPU's kernel, which reads K and V once for all of them


class HostAttention:
    """The host's part of the attention of one layer. The queries are sent to the host when it is made.

    Args:
        layer: the layer's attention.
        parts: what the host attends to.
        exchange: brings queries to the host, and results to the device.
        counter: counts the bytes that the host attends to.
    """

    def __init__(
        self, layer: LayerPass, parts: Sequence[HostPart], exchange: HostExchange, counter: ByteCounter
    ) -> None:
        self._layer = layer
        self._parts = parts
        self._exchange = exchange
        self._counter = counter
        heads = slice(0, layer.k.shape[1])
        after = tuple(dict.fromkeys(event for part in parts for event in part.after))
        queries = [layer.packed(part.rows, heads) for part in parts]
        self._sent = exchange.send(queries, layer.v.shape[3], after)

    def compute(self) -> list[tuple[tuple[int, ...], AttentionState]]:
        """Wait for the queries, compute on the host, and send the results to the device.

        Call it after all other work of the layer is queued, because the device and the link work on that meanwhile.

        Returns:
            For each part its rows, and the state on the device: out [Hkv, N, Dv] and lse [Hkv, N], in the order of
            LayerPass.packed().
        """
        exchange = self._exchange
        received = exchange.receive(self._sent)
        for part, q, (out, lse) in zip(self._parts, received, exchange.results(self._sent), strict=True):
            for start in range(0, q.shape[1], _MOST_ROWS):
                rows = slice(start, start + _MOST_ROWS)
                state = self._attend(q[:, rows], part)
                out[:, rows] = state.out
                lse[:, rows] = state.lse
        states = [AttentionState(*pair) for pair in exchange.reply(self._sent)]
        return [(part.rows, state) for part, state in zip(self._parts, states, strict=True)]

    def _attend(self, q: torch.Tensor, part: HostPart) -> AttentionState:
        """Compute attention of q [Hkv, N, Dk] to a part of the past, all in host memory."""
        spec = self._layer.spec
        problem = Problem(
            _CPU.type,
            q.dtype,
            q.shape[1],
            q.shape[2],
            self._layer.v.shape[3],
            spec.softcap is not None,
            capability_of(_CPU),
        )
        backend = choose(problem, self._layer.backend)
        self._layer.used.add(backend.name)
        self._counter.cpu_attended_bytes += part.nbytes
        return backend.attend_full(q, part.pieces, spec.scale, spec.softcap)
