"""The caches that stay in memory with their token ids, so that a request reads only what is new in it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from headinfer.hf.cache import HeadCache
from headinfer.jobs.answering import Checkpoint as State
from headinfer.jobs.answering import can_remove, remove_after

__all__ = ["Caches", "Checkpoint", "Kept", "common_tokens"]

Checkpoint = tuple[int, State]
"""The tokens of a cache at one moment, and HeadCache.checkpoint() of it."""


@dataclass(eq=False)
class Kept:
    """A cache that is kept.

    Attributes:
        cache: the cache, of one row.
        ids: the token ids [T] that it holds, int64.
        session: the session with which these tokens begin; None if there is none.
        generation: the checkpoint of the session, if the cache holds exactly its tokens; otherwise 0. Such a cache
            stays as it is, and requests use forks of it.
        checkpoints: earlier states of the cache, the oldest first. Layers with windows or linear attention cannot be
            cut, and return to one of them.
    """

    cache: HeadCache
    ids: torch.Tensor
    session: str | None = None
    generation: int = 0
    checkpoints: tuple[Checkpoint, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens of the cache."""
        return self.ids.shape[0]

    def usable_tokens(self, common: int) -> int:
        """Return how many of the first `common` tokens the cache can be cut to."""
        if common == self.tokens or can_remove(self.cache, self.tokens - common):
            return common
        return max((at for at, _ in self.checkpoints if at <= common), default=0)


class Caches:
    """The caches that are kept, those of the last requests. Only the worker thread uses it.

    Args:
        most: caches that are kept, at most.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: list[Kept] = []  # the one that was used last comes last

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, ids: torch.Tensor) -> tuple[Kept | None, int]:
        """Find the cache that saves the most reading.

        Args:
            ids: the token ids [T] of a prompt. Its last token is read in any case, for the first token of the answer.

        Returns:
            The cache, and how many of its first tokens, with which the prompt begins, it can be cut to; None and 0 if
            there is none.
        """
        best: Kept | None = None
        tokens = 0
        for kept in self._kept:
            usable = kept.usable_tokens(min(common_tokens(kept.ids, ids), ids.shape[0] - 1))
            if usable > tokens:
                best = kept
                tokens = usable
        return best, tokens

    def use(self, kept: Kept, tokens: int) -> HeadCache:
        """Return a cache with the first tokens of one that is kept, which the caller may change.

        It is a fork, which shares the segments. But if nothing is cut, and no session belongs to the cache, it is the
        cache itself, which is no longer kept: a conversation would otherwise get a new segment with each turn.
        """
        self._kept.remove(kept)
        if tokens == kept.tokens and not kept.generation:
            return kept.cache
        self._kept.append(kept)
        fork = kept.cache.fork()
        fork.token_ids = None
        if tokens < kept.tokens:
            state = next((state for at, state in kept.checkpoints if at == tokens), [])
            remove_after(fork, tokens, state)
        return fork

    def keep(self, kept: Kept) -> None:
        """Keep a cache in place of those that hold a beginning of it only. Those of whole sessions stay.

        On the device it keeps its newest tokens, and nothing else.
        """
        if not kept.tokens:
            return
        kept.cache.park()
        self._kept = [other for other in self._kept if not _is_replaced(other, kept)]
        self._kept.append(kept)
        while len(self._kept) > self._most:
            self._kept.pop(0)

    def drop_one(self, spared: Kept | None = None) -> bool:
        """Free the memory of the cache that was not used for the longest time.

        Args:
            spared: a cache that stays.

        Returns:
            Whether there was one.
        """
        for kept in self._kept:
            if kept is not spared:
                self._kept.remove(kept)
                return True
        return False

    def drop_session(self, name: str) -> None:
        """Forget all caches that begin with a session."""
        self._kept = [kept for kept in self._kept if kept.session != name]

    def clear(self) -> None:
        """Forget all caches."""
        self._kept = []


def common_tokens(first: torch.Tensor, second: torch.Tensor) -> int:
    """Return with how many equal tokens two texts [T] begin."""
    most = min(first.shape[0], second.shape[0])
    differs = first[:most] != second[:most]
    return int(differs.int().argmax()) if bool(differs.any()) else most


def _is_replaced(old: Kept, new: Kept) -> bool:
    """Return whether a cache is of no use beside a new one."""
    if old.generation:
        return bool(new.generation) and old.session == new.session
    return old.tokens <= new.tokens and common_tokens(old.ids, new.ids) == old.tokens
