"""Restores a cache after an error or Ctrl-C in the middle of a forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from headinfer.hf.cache import HeadCache

__all__ = ["rollback_on_error"]


@contextmanager
def rollback_on_error(cache: HeadCache, *, empties: bool = False) -> Iterator[list[dict[str, Any]]]:
    """Restore a cache if the block ends with an exception, KeyboardInterrupt included, and raise the exception again.

    A forward pass appends to one layer after another. After an exception, some layers would have the chunk and others
    not. Every layer returns to its state before the block; for an offloaded layer this is its length.

    Args:
        cache: the cache that the block fills.
        empties: whether the cache is emptied first. It keeps the number of copies of its rows.

    Yields:
        The checkpoint of the cache at the beginning of the block, for HeadCache.rollback().
    """
    if empties:
        kept = cache.fork()
        try:
            cache.reset()
            cache.copies = kept.copies
            yield cache.checkpoint()
        except BaseException:
            cache.take_back(kept)
            raise
        return
    before = cache.checkpoint()
    try:
        yield before
    except BaseException:
        cache.rollback(before)
        raise
