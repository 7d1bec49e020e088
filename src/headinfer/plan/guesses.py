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

__all__ = [
    "MOST_GUESSES",
    "Guesses",
    "best_width",
    "guesses_as_dict",
    "guesses_option",
    "guesses_sentences",
    "least_chance",
    "speedup",
    "tokens_per_pass",
]

MOST_GUESSES = FEW_QUERY_TOKENS - 1
"""A decode step verifies at most so many guesses: it has one token more, and more tokens are a prefill chunk."""

Guesses = Literal["auto", "off"] | int
"""The option: "auto", "off", or how many guesses a pass verifies at most."""

_SHOWN_WIDTHS = (1, 2, 4, 8, MOST_GUESSES)
_SHOWN_CHANCES = {0.5: "half of them", 0.9: "90%"}

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
    gains = [speedup(costs, width, chance) for width in range(len(costs))]
    width = max(range(len(gains)), key=lambda width: gains[width])
    return width if gains[width] >= _CLEARLY else 0


def speedup(costs: Sequence[float], width: int, chance: float) -> float:
    """Return the tokens per second with so many guesses in each pass, in units of those without guesses.

    Args:
        costs: seconds of a pass with 0, 1, 2 ... guesses, in units of those of a pass without guesses.
        width: guesses of a pass.
        chance: how likely a guess is right, if those before it are: 0 to 1.
    """
    return tokens_per_pass(width, chance) / costs[width]


def least_chance(costs: Sequence[float]) -> float | None:
    """Return how likely a guess must be right for guesses to pay, rounded up to 0.01; None if they never pay.

    Args:
        costs: seconds of a pass with 0, 1, 2 ... guesses, in units of those of a pass without guesses.
    """
    return next((percent / 100 for percent in range(1, 101) if best_width(costs, percent / 100)), None)


def guesses_sentences(costs: Sequence[float]) -> list[str]:
    """Return what guesses cost and when they pay, for people.

    Args:
        costs: seconds of a pass with 0, 1, 2 ... MOST_GUESSES guesses, in units of those of a pass without guesses.
    """
    *widths, widest = (str(width) for width in _SHOWN_WIDTHS)
    *times, longest = (f"{costs[width]:.2f}" for width in _SHOWN_WIDTHS)
    takes = (
        f"Guesses: a pass that verifies {', '.join(widths)} or {widest} of them takes {', '.join(times)} or {longest} "
        "times as long as a new token without guesses."
    )
    least = least_chance(costs)
    if least is None:
        return [takes, "Guesses do not pay, even if all of them are right."]
    gains = []
    for chance, text in _SHOWN_CHANCES.items():
        width = best_width(costs, chance)
        if width:
            gain = f"{speedup(costs, width, chance):.2g} times the tokens per second"
            gains.append(f"If {text} are right, {width} in a pass are best: {gain}.")
    return [takes, " ".join([f"Guesses pay if at least {least:.0%} of them are right.", *gains])]


def guesses_as_dict(costs: Sequence[float]) -> dict[str, Any]:
    """Return what guesses cost and when they pay, for JSON.

    Args:
        costs: seconds of a pass with 0, 1, 2 ... MOST_GUESSES guesses, in units of those of a pass without guesses.
    """
    widths = {chance: best_width(costs, chance) for chance in (0.25, 0.5, 0.75, 0.9, 1.0)}
    return {
        "pass_costs": list(costs),
        "least_chance": least_chance(costs),
        "best": [
            {"chance": chance, "guesses": width, "speedup": speedup(costs, width, chance)}
            for chance, width in widths.items()
        ],
    }


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
