"""The needle-in-a-haystack test of the paper (arXiv 2502.12574, figure 6).

A document holds one needle at each depth, so that it is read only once for all of them. For each question the needles
that it does not ask for are distractors.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

from headinfer.errors import UsageError
from headinfer.evals.needles import build_haystack, random_needles
from headinfer.evals.tasks import CountTokens, Document, Question, largest_fitting

__all__ = ["niah_document", "niah_documents"]

_UNIT_CHARACTERS = 16
_ANSWER_TOKENS = 16
_LEAD_TOKENS = 16  # added to the answer's tokens if the model has to write the lead itself


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
    """Yield `samples` documents of each length. The other arguments are those of `niah_document()`."""
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
    accepts: Callable[[str], bool] = lambda word: True,
) -> Document:
    """Make a document with one needle and one question for each depth.

    The document starts at a random position of the text and repeats the text if it is too short.

    Args:
        length: the tokens of the document, the longest question and its answer together.
        depths: the positions of the needles, from 0 (the beginning of the document) to 1 (its end).
        sample: the number of the document among those with the same arguments. It changes the needles and the start.
        text: the text that the needles are hidden in.
        count: counts the tokens of a text.
        seed: the seed of the random numbers.
        gives_lead: append the beginning of the answer, up to the number, to each question.
        accepts: decides whether a word may be a needle's word. Words that the text contains are never used.

    Returns:
        The document.

    Raises:
        UsageError: the length is too short for the needles.
    """
    rng = random.Random(f"{seed}/niah/{length}/{sample}")
    doubled = text + text  # a word may also appear where one copy of the text ends and the next one begins

    def is_usable(word: str) -> bool:
        return word not in doubled and accepts(word)

    needles = random_needles(len(depths), rng, held_out=True, accepts=is_usable)
    start = rng.randrange(len(text))
    new_tokens = _ANSWER_TOKENS + (0 if gives_lead else _LEAD_TOKENS)
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

    units = largest_fitting(lambda units: build(units) + longest, count, length - new_tokens)
    if units == 0:
        raise UsageError(
            f"{length} tokens cannot hold {len(depths)} needles and a question: use a longer length or fewer needles"
        )
    facts = {"task": "niah", "length": length, "sample": sample}
    return Document(f"niah/{length}/{sample}", build(units), questions, facts)
