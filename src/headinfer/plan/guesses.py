"""How many guessed tokens a decode step should verify at once.

A pass over a long past is bound by the bytes of KV and weights that it reads, so w guessed tokens more cost little. If
each guess is right with the chance p, provided that those before it are, a pass with w guesses gives on average

    1 + p + p^2 + ... + p^w

tokens: the accepted guesses, and one token that follows them. It takes c(w) times as long as a pass without guesses, as
the roofline model says. The best w gives the most tokens per second. This is the analysis of speculative decoding
(arXiv 2211.17192, section 3.3), with guesses that cost nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from headinfer.errors import UsageError
from headinfer.plan.tiles import FEW_QUERY_TOKENS
from headinfer.utils.values import shown

__all__ = ["MOST_GUESSES", "Guesses", "best_width", "guesses_option", "tokens_per_pass"]

MOST_GUESSES = FEW_QUERY_TOKENS - 1
"""A decode step verifies at most so many guesses: it has one token more, and more tokens are a prefill chunk."""

Guesses = Literal["auto", "off"] | int
"""The option: "auto", "off", or how many guesses a pass verifies at most."""

_CLEARLY = 1.05  # guesses must be predicted to give 5 % more tokens per second, since the model is not more exact


def tokens_per_pass(width: int, chance: float) -> float:
    """Return the average number of tokens that a pass gives.

    Args:
        width: guesses of the pass.
        chance: how likely a guess is right, if those before it are: 0 to 1.
    """
    return sum(chance**power for power in range(width + 1))


def best_width(costs: Sequence[float], chance: float) -> int:
    """Return the number of guesses with the most tokens per second; 0 if guesses do not clearly pay.

    Args:
        costs: seconds of a pass with 0, 1, 2 ... guesses, in units of those of a pass without guesses.
        chance: how likely a guess is right, if those before it are: 0 to 1.
    """
    gains = [tokens_per_pass(width, chance) / cost for width, cost in enumerate(costs)]
    width = max(range(len(gains)), key=lambda width: gains[width])
    return width if gains[width] >= _CLEARLY else 0


def guesses_option(value: Any, name: str) -> Guesses:
    """Check the option `guesses`.

    Raises:
        UsageError: it is neither "auto", "off", nor a whole number from 1 to MOST_GUESSES.
    """
    if value in ("auto", "off") and isinstance(value, str):
        return "auto" if value == "auto" else "off"
    text = str(value) if not isinstance(value, bool) else ""
    if text.isdecimal() and 1 <= int(text[:9]) <= MOST_GUESSES:
        return int(text)
    raise UsageError(f"{name} is {shown(value)}: choose auto, off, or a number from 1 to {MOST_GUESSES}")
