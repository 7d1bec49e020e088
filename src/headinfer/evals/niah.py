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
_ANSWER_TOKENS, _LEAD_TOKENS = 16, 16  # of an answer, and of its lead where the model has to say it


def niah_documents(
    lengths: Sequence[int],
    depths: Sequence[float],
    samples: int,
    text: str,
    count: CountTokens,
    seed: int,
    *,
    gives_lead: bool = True,
) -> Iterator[Document]:
    """`samples` documents of each length; see niah_document()."""
    for length in lengths:
        for sample in range(samples):
            yield niah_document(length, depths, sample, text, count, seed, gives_lead=gives_lead)


def niah_document(
    length: int,
    depths: Sequence[float],
    sample: int,
    text: str,
    count: CountTokens,
    seed: int,
    *,
    gives_lead: bool = True,
    suits: Callable[[str], bool] = lambda word: True,
) -> Document:
    """A text of `length` tokens, question and answer included, with a needle at each depth (shares of the text).

    The text starts anywhere and is repeated where it is too short; the needles' words are none of its own, and suit.
    gives_lead: whether the beginning of the answer, up to the number, stands after the question.
    Raises UsageError for a length that cannot hold the needles.
    """
    rng = random.Random(f"{seed}/niah/{length}/{sample}")
    doubled = text + text
    needles = random_needles(len(depths), rng, held_out=True, suits=lambda word: word not in doubled and suits(word))
    start, new_tokens = rng.randrange(len(text)), _ANSWER_TOKENS + (0 if gives_lead else _LEAD_TOKENS)
    questions = tuple(
        Question(
            key=f"{depth:g}",
            text=needle.question,
            lead=needle.lead if gives_lead else "",
            references=(needle.number,),
            new_tokens=new_tokens,
            facts={"depth": depth},
        )
        for needle, depth in zip(needles, depths, strict=True)
    )
    longest = max((question.text + question.lead for question in questions), key=len)

    def build(units: int) -> str:
        characters = units * _UNIT_CHARACTERS
        cycled = text[start:] + text * (characters // len(text) + 1)
        return build_haystack(cycled[:characters], needles, depths)

    units = fit(lambda units: build(units) + longest, count, length - new_tokens)
    if units == 0:
        raise UsageError(
            f"{length} tokens can not hold {len(depths)} needles and a question: use a longer length or fewer depths"
        )
    facts = {"task": "niah", "length": length, "sample": sample}
    return Document(f"niah/{length}/{sample}", build(units), questions, facts)
