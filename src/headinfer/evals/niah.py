"""The needle in a haystack: one fact at each depth of a text, asked for one by one (the paper's figure 6).

The needles of all depths lie in one text, so that it is read once; those not asked for are distractors.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

from headinfer.errors import UsageError
from headinfer.evals.needles import build_haystack, random_needles
from headinfer.evals.tasks import CountTokens, Document, Question, fit

__all__ = ["niah_document", "niah_documents"]

_UNIT_CHARACTERS = 16
_ANSWER_TOKENS = 16


def niah_documents(
    lengths: Sequence[int], depths: Sequence[float], samples: int, text: str, count: CountTokens, seed: int
) -> Iterator[Document]:
    """`samples` documents of each length; see niah_document()."""
    for length in lengths:
        for sample in range(samples):
            yield niah_document(length, depths, sample, text, count, seed)


def niah_document(
    length: int,
    depths: Sequence[float],
    sample: int,
    text: str,
    count: CountTokens,
    seed: int,
    suits: Callable[[str], bool] = lambda word: True,
) -> Document:
    """A text of `length` tokens, question and answer included, with a needle at each depth (shares of the text).

    The text starts anywhere and is repeated where it is too short; the needles' words are none of its own, and suit.
    Raises UsageError for a length that cannot hold the needles.
    """
    rng = random.Random(f"{seed}/niah/{length}/{sample}")
    doubled = text + text
    needles = random_needles(len(depths), rng, held_out=True, suits=lambda word: word not in doubled and suits(word))
    start = rng.randrange(len(text))
    questions = tuple(
        Question(
            key=f"{depth:g}",
            text=needle.question,
            lead=needle.lead,
            references=(needle.number,),
            new_tokens=_ANSWER_TOKENS,
            facts={"depth": depth},
        )
        for needle, depth in zip(needles, depths, strict=True)
    )
    longest = max((question.text + question.lead for question in questions), key=len)

    def build(units: int) -> str:
        characters = units * _UNIT_CHARACTERS
        cycled = text[start:] + text * (characters // len(text) + 1)
        return build_haystack(cycled[:characters], needles, depths)

    units = fit(lambda units: build(units) + longest, count, length - _ANSWER_TOKENS)
    if units == 0:
        raise UsageError(
            f"{length} tokens can not hold {len(depths)} needles and a question: use a longer length or fewer depths"
        )
    facts = {"task": "niah", "length": length, "sample": sample}
    return Document(f"niah/{length}/{sample}", build(units), questions, facts)
