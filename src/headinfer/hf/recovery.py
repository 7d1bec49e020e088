"""Goes on with a forward pass after a device has run out of memory.

The host has all KV, so resident KV can be dropped from the device at any time. After an error the cache returns to its
state before the chunk, and the chunk is computed again with more free memory: first with half of the resident KV, down
to none, then in chunks of half the length. Other tiles and chunks change the order of sums, so the logits are equal up
to rounding.
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from headinfer.engine.machine import free_device_bytes
from headinfer.errors import CapacityError, is_out_of_memory
from headinfer.hf.cache import HeadCache
from headinfer.hf.chunks import chunks_of
from headinfer.hf.compat import PreTrainedModel
from headinfer.hf.inputs import number_of_tokens
from headinfer.plan.footprint import activation_bytes
from headinfer.plan.memory import available_host_bytes
from headinfer.plan.model_shape import ModelShape
from headinfer.utils.stacklevel import stacklevel_of_user
from headinfer.utils.units import format_bytes

__all__ = ["LEAST_CHUNK_TOKENS", "Recovery"]

LEAST_CHUNK_TOKENS = 64
"""Chunks are not made shorter than this when memory runs out."""

Checkpoint = list[dict[str, Any]]


class Recovery:
    """Runs the chunks of one forward pass, and goes on if a device runs out of memory.

    Args:
        cache: the cache that the pass fills.
        model: the model. If other ranks compute parts of its layers, they would wait in vain for a rank that computes a
            chunk again, so memory that runs out is an error then.
        shape: the shape of the model, or of this rank's shard.
    """

    def __init__(self, cache: HeadCache, model: PreTrainedModel, shape: ModelShape) -> None:
        self._cache = cache
        self._engine = cache.engine
        self._model = model
        self._shape = shape
        self._is_sharded = (getattr(model, "tp_size", None) or 1) > 1

    def run(
        self,
        chunks: Iterator[dict[str, Any]],
        compute: Callable[[dict[str, Any]], Any],
        between: Callable[[], None],
        before: Checkpoint,
    ) -> Any:
        """Compute the chunks of a pass in order.

        Args:
            chunks: the arguments of each chunk.
            compute: computes a chunk, given its arguments.
            between: called between two chunks.
            before: the checkpoint of the cache before the first chunk.

        Returns:
            The result of the last chunk.

        Raises:
            CapacityError: a device has run out of memory, and nothing is left to give back.
        """
        result = None
        waits_for_next = False  # whether a chunk is done and between() has not been called since
        checkpoint: Checkpoint | None = before
        stack = [chunks]
        while stack:
            chunk = next(stack[-1], None)
            if chunk is None:
                stack.pop()
                continue
            shorter = self._cut(chunk, self._engine.shortage.chunk_tokens)
            if shorter:
                stack.append(iter(shorter))
                continue
            if waits_for_next:
                between()
                waits_for_next = False
            found = self._compute(chunk, compute, checkpoint or self._cache.checkpoint())
            if found is None:
                stack.append(iter([chunk]))  # it is cut now
                continue
            result = found
            waits_for_next = True
            checkpoint = None
        return result

    def _compute(self, chunk: dict[str, Any], compute: Callable[[dict[str, Any]], Any], before: Checkpoint) -> Any:
        """Compute a chunk, again if memory runs out, with less resident KV.

        Returns:
            The result; None if the chunk must be cut first.
        """
        shortage = self._engine.shortage
        is_first = True
        while True:
            error: RuntimeError | None = None
            try:
                result = compute(chunk)
            except RuntimeError as caught:
                if not _is_out_of_device_memory(caught):
                    raise
                _release_frames(caught)
                error = caught
            if error is None:
                self._warn_once()
                return result
            if self._is_sharded:
                raise self._refusal(chunk) from error
            self._cache.rollback(before)
            is_given = self._engine.give_back() > 0
            tokens = max(number_of_tokens(chunk) // 2 // LEAST_CHUNK_TOKENS, 1) * LEAST_CHUNK_TOKENS
            is_cut = not is_given and bool(self._cut(chunk, tokens))
            # Without both, one more attempt may find the memory that torch had cached in pieces in one piece.
            if not is_given and not is_cut and not is_first:
                raise self._refusal(chunk) from error
            is_first = False
            shortage.retries += 1
            if is_cut:
                shortage.chunk_tokens = tokens
                return None

    def _cut(self, chunk: dict[str, Any], tokens: int) -> list[dict[str, Any]]:
        """Return the parts of a chunk with at most `tokens` tokens each; none if it is short or cannot be cut."""
        if not tokens or number_of_tokens(chunk) <= tokens:
            return []
        parts = list(chunks_of(chunk, self._model.config, lambda _: tokens))
        return parts if len(parts) > 1 else []

    def _warn_once(self) -> None:
        """Say, once for each cache, that memory ran out and what was done."""
        shortage = self._engine.shortage
        if not shortage.retries or shortage.has_warned:
            return
        shortage.has_warned = True
        done = []
        if shortage.given_back_bytes:
            done.append(f"{format_bytes(shortage.given_back_bytes)} of resident KV were dropped from the device")
        if shortage.chunk_tokens:
            done.append(f"chunks have at most {shortage.chunk_tokens:,} tokens from here on")
        what = " and ".join(done) or "the memory that torch had cached was freed"
        warnings.warn(
            f"a device ran out of memory in a forward pass, which was computed again: {what}",
            stacklevel=stacklevel_of_user(),
        )

    def _refusal(self, chunk: dict[str, Any]) -> CapacityError:
        """Return the error for a chunk that does not fit, with what would fit."""
        tokens = number_of_tokens(chunk)
        begin = f"a device ran out of memory in a forward pass of {tokens:,} tokens"
        if self._is_sharded:
            return CapacityError(
                f"{begin}, and a rank cannot compute it again, since the other ranks do not: use a smaller "
                "chunk_tokens or device_kv_budget_bytes"
            )
        devices = [device for device in self._engine.devices if device.type == "cuda"]
        free_bytes = min((free_device_bytes(device) for device in devices), default=available_host_bytes())
        rows = self._cache.head_layers[0].rows or 1
        element_bytes = self._model.dtype.itemsize
        fixed = activation_bytes(self._shape, 0, element_bytes)
        token_bytes = activation_bytes(self._shape, rows, element_bytes) - fixed
        is_whole = not chunk.get("logits_to_keep")
        if is_whole:
            token_bytes += rows * self._shape.vocab_size * element_bytes
        fitting = min(max(free_bytes - fixed, 0) // max(token_bytes, 1), tokens - 1)
        begin += f", and no resident KV is left to drop: {format_bytes(free_bytes)} are free, "
        if tokens > LEAST_CHUNK_TOKENS and fitting > 0:
            logits = "; logits_to_keep=1 lets a longer pass be cut into chunks" if is_whole else ""
            return CapacityError(f"{begin}which hold a pass of about {fitting:,} tokens{logits}")
        held = sum(kv.held_bytes for kv in self._engine.devices.values())
        return CapacityError(
            f"{begin}{format_bytes(held)} hold the ring and the newest tokens, and the activations need about "
            f"{format_bytes(fixed + tokens * token_bytes)}: use fewer rows or a smaller device_kv_budget_bytes"
        )


def _is_out_of_device_memory(error: RuntimeError) -> bool:
    """Return whether an error says that a device has no memory left: for a tensor, a handle of a library, or a kernel.

    cuBLAS, cuDNN, CUDA itself and Triton allocate without torch, and each has an error of its own.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return True
    text = str(error)
    return is_out_of_memory(error) and any(name in text for name in ("CUDA", "CUBLAS", "CUDNN", "HIP"))


def _release_frames(error: BaseException) -> None:
    """Release the calls that an error ended. Their variables and closures keep the tensors of the failed pass."""
    queue: list[BaseException | None] = [error]
    while queue:
        one = queue.pop()
        if one is not None and one.__traceback__ is not None:
            traceback.clear_frames(one.__traceback__)
            one.__traceback__ = None
            queue += [one.__cause__, one.__context__]
