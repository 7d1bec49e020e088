"""The caches that stay in memory with their token ids, so that a request reads only what is new in it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from headinfer.hf.cache import HeadCache
from headinfer.jobs.answering import can_remove

__all__ = ["Caches", "Kept", "common_tokens"]


@dataclass(eq=False)
class Kept:
    """A cache that is kept.

    Attributes:
        cache: the cache, of one row.
        ids: the token ids [T] that it holds, int64.
        session: the session with which these tokens begin; None if there is none.
        generation: the checkpoint of the session, if the cache holds exactly its tokens; otherwise 0. Such a cache
            stays as it is, and requests use forks of it.
    """

    cache: HeadCache
    ids: torch.Tensor
    session: str | None = None
    generation: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of the cache."""
        return self.ids.shape[0]


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
            The cache, and how many of its first tokens the prompt begins with; None and 0 if there is none.
        """
        best: Kept | None = None
        tokens = 0
        for kept in self._kept:
            common = min(common_tokens(kept.ids, ids), ids.shape[0] - 1)
            surplus = kept.tokens - common
            if common > tokens and (not surplus or can_remove(kept.cache, surplus)):
                best = kept
                tokens = common
        return best, tokens

    def session(self, name: str, generation: int) -> Kept | None:
        """Return the cache of a session at a checkpoint; None if it is not in memory."""
        found = (kept for kept in self._kept if kept.session == name and kept.generation == generation)
        return next(found, None)

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
            fork.crop(tokens)
        return fork

    def keep(self, kept: Kept) -> None:
        """Keep a cache in place of those that hold a beginning of it only. Those of whole sessions stay."""
        if not kept.tokens:
            return
        self._kept = [
            other
            for other in self._kept
            if other.generation or common_tokens(other.ids, kept.ids) < other.tokens or other.tokens > kept.tokens
        ]
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
