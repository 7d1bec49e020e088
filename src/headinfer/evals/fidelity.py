"""Compares the next-token distributions of a model on approximate KV with those on exact KV, token by token.

Both caches read the same tokens (teacher forcing) in the same chunks, one cache after the other. Only the last tokens
of a length count, since the KV of all tokens before them has left the exact tail by then. They are read in blocks of a
few tokens, so that about as many tokens are exact as in decode. The exact logits wait in a temporary file.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from headinfer.errors import CapacityError, UnsupportedError
from headinfer.hf.cache import HeadCache
from headinfer.hf.compat import PreTrainedModel, last_logits_only
from headinfer.hf.enable import enable
from headinfer.plan.memory import free_disk_bytes
from headinfer.utils.units import format_bytes

__all__ = ["BLOCK_TOKENS", "Differences", "check_disk", "compare", "differences", "read_window"]

BLOCK_TOKENS = 16
"""Tokens of the window that are read in one pass. They attend to each other exactly."""

_LOGIT_BYTES = 4
_NO_SPACE = "free some space on this disk, or name a folder on another one with the environment variable TMPDIR"


@dataclass(frozen=True)
class Differences:
    """What approximate KV changes in the predictions of some tokens. All tensors are [N], float64 or bool.

    Attributes:
        kl: the Kullback-Leibler divergence KL(exact || approximate) of the distributions of the next token, in nats.
        agrees: whether both distributions have the same most likely token.
        exact_nll: the negative log-likelihood of the text's token, in nats, with exact KV.
        nll: the same with approximate KV.
    """

    kl: torch.Tensor
    agrees: torch.Tensor
    exact_nll: torch.Tensor
    nll: torch.Tensor

    def summary(self) -> dict[str, float]:
        """Return the figures of the tokens, for JSON: of the divergence, agreement, and perplexity of both.

        Raises:
            UnsupportedError: a figure is infinite or not a number.
        """
        median, p99 = torch.quantile(self.kl, torch.tensor([0.5, 0.99], dtype=self.kl.dtype)).tolist()
        found = {
            "kl_mean": float(self.kl.mean()),
            "kl_median": median,
            "kl_p99": p99,
            "kl_max": float(self.kl.max()),
            "top1_agreement": float(self.agrees.double().mean()),
            "exact_perplexity": float(self.exact_nll.mean().exp()),
            "perplexity": float(self.nll.mean().exp()),
        }
        if not all(torch.isfinite(torch.tensor(list(found.values())))):
            raise UnsupportedError(
                "the logits of the model are not finite, so they cannot be compared: keys and values beyond 65,504 "
                "cannot be stored in int8 or int4, and other infinities come from the model or its dtype "
                "(docs/approximations.md)"
            )
        return found


def differences(exact: torch.Tensor, other: torch.Tensor, next_ids: torch.Tensor) -> Differences:
    """Compare logits, in float64.

    Args:
        exact: logits [N, V] with exact KV.
        other: logits [N, V] with approximate KV.
        next_ids: the token of the text that follows each one [N].
    """
    p = exact.double().log_softmax(-1)
    q = other.double().log_softmax(-1)
    terms = torch.where(p.isneginf(), torch.zeros_like(p), p.exp() * (p - q))  # tokens that are impossible add nothing
    return Differences(
        kl=terms.sum(-1).clamp_min(0),
        agrees=exact.argmax(-1) == other.argmax(-1),
        exact_nll=-p.gather(-1, next_ids[:, None])[:, 0],
        nll=-q.gather(-1, next_ids[:, None])[:, 0],
    )


def compare(
    model: PreTrainedModel,
    ids: torch.Tensor,
    *,
    window: int,
    exact: Mapping[str, Any],
    others: Sequence[Mapping[str, Any]],
    on_tokens: Callable[[int], None] = lambda tokens: None,
    on_read: Callable[[], None] = lambda: None,
) -> list[Differences]:
    """Read a text with exact KV, then with each of other options, and compare the predictions of its last tokens.

    Args:
        model: the model.
        ids: the tokens of the text [1, T].
        window: how many of the last tokens are predicted and compared.
        exact: the keyword arguments of enable() for exact KV, with chunk_tokens.
        others: the same for what is compared with it.
        on_tokens: called after each forward pass with the number of tokens in the cache.
        on_read: called after each reading.

    Returns:
        The differences of each of `others`.

    Raises:
        CapacityError: the disk of temporary files is full.
    """
    with _KeptLogits() as kept:
        read_window(model, ids, window, exact, kept.write, on_tokens)
        on_read()
        found = []
        for options in others:
            blocks = _Blocks(kept, ids[0, -window:].cpu())
            read_window(model, ids, window, options, blocks.take, on_tokens)
            found.append(blocks.joined())
            on_read()
    return found


class _Blocks:
    """The differences of the blocks of a window.

    Args:
        kept: the exact logits.
        next_ids: the tokens of the window [N], which the logits predict.
    """

    def __init__(self, kept: _KeptLogits, next_ids: torch.Tensor) -> None:
        kept.rewind()
        self._kept = kept
        self._next_ids = iter(next_ids.split(BLOCK_TOKENS))
        self._found: list[Differences] = []

    def take(self, logits: torch.Tensor) -> None:
        """Compare the logits [N, V] of the next block."""
        self._found.append(differences(self._kept.read(logits), logits, next(self._next_ids)))

    def joined(self) -> Differences:
        """Return the differences of all blocks."""
        parts = zip(*(vars(one).values() for one in self._found), strict=True)
        return Differences(*(torch.cat(part) for part in parts))


@torch.inference_mode()
def read_window(
    model: PreTrainedModel,
    ids: torch.Tensor,
    window: int,
    options: Mapping[str, Any],
    on_logits: Callable[[torch.Tensor], None],
    on_tokens: Callable[[int], None],
) -> None:
    """Read a text, and pass on the logits that predict its last tokens.

    Args:
        model: the model.
        ids: the tokens of the text [1, T].
        window: the number of tokens that are predicted.
        options: keyword arguments of enable().
        on_logits: called with the logits of each block [N, V], float32 on the CPU, in order.
        on_tokens: called after each forward pass with the number of tokens in the cache.
    """

    def after_forward(cache: HeadCache) -> None:
        on_tokens(cache.head_layers[0].get_seq_length())

    first = ids.shape[1] - 1 - window  # the last token is predicted, and not read
    with enable(model, on_forward=after_forward, **options) as enabled:
        cache = enabled.new_cache(ids.shape[1])
        model(input_ids=ids[:, :first], past_key_values=cache, use_cache=True, **last_logits_only(model))
        for block in ids[:, first:-1].split(BLOCK_TOKENS, dim=1):
            logits = model(input_ids=block, past_key_values=cache, use_cache=True).logits
            on_logits(logits[0].float().cpu())
        cache.reset()


def check_disk(window: int, vocab_size: int) -> None:
    """Check that the disk of temporary files holds the exact logits of a window.

    Raises:
        CapacityError: it does not.
    """
    folder = Path(tempfile.gettempdir())
    needed = window * vocab_size * _LOGIT_BYTES
    free = free_disk_bytes(folder)
    if needed > free:
        raise CapacityError(
            f"the exact logits of {window:,} tokens take {format_bytes(needed)}, and {folder} has {format_bytes(free)} "
            f"free: choose a smaller --window; or {_NO_SPACE}"
        )


class _KeptLogits:
    """Logits in a temporary file, as float32, written and read block by block."""

    def __enter__(self) -> _KeptLogits:
        self._file = tempfile.TemporaryFile()
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, logits: torch.Tensor) -> None:
        try:
            self._file.write(logits.numpy().tobytes())
            self._file.flush()
        except OSError as error:
            raise CapacityError(
                f"cannot write the exact logits to {tempfile.gettempdir()} ({error.strerror or error}): {_NO_SPACE}"
            ) from error

    def rewind(self) -> None:
        self._file.seek(0)

    def read(self, like: torch.Tensor) -> torch.Tensor:
        """Return the next block, which has the shape of `like`."""
        data = bytearray(self._file.read(like.numel() * _LOGIT_BYTES))
        return torch.frombuffer(data, dtype=torch.float32).view(like.shape)
