"""RULER's synthetic tasks that need no external data (Hsieh et al., arXiv 2404.06654), written anew.

Templates, sizes and the metric are those of the published benchmark (NVIDIA/RULER, synthetic.yaml). Two things differ:
the essays are the text that headinfer ships, or your own; and cwe takes pairs of words where a list needs more words
than there are.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
import string
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from headinfer.errors import UsageError
from headinfer.evals.needles import hide
from headinfer.evals.tasks import CountTokens, Document, Question, fit

__all__ = ["RULER_TASKS", "ruler_documents"]

_NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_SHORT_TOKENS = 4096  # below that, cwe uses smaller counts
_DEPTHS = tuple(round(100 * step / 39) / 100 for step in range(40))
_ESSAY_UNIT_CHARACTERS = 16

Build = Callable[[int], "tuple[str, Question]"]


@dataclass(frozen=True)
class Setting:
    """What a task draws from. rng: seeded for one document, so that a build can be repeated."""

    essay: str
    most_tokens: int
    seed: str

    def rng(self, what: str = "") -> random.Random:
        """A generator that depends on the document and `what` only."""
        return random.Random(f"{self.seed}/{what}")


@dataclass(frozen=True)
class Task:
    """A task: build(setting) gives units -> (document, question). least_units: the fewest that hold all its parts."""

    build: Callable[[Setting], Build]
    least_units: int = 1


@dataclass(frozen=True)
class Niah:
    """Needles in noise, in an essay, or among other needles."""

    haystack: str = "essay"
    keys: str = "words"
    values: str = "numbers"
    key_count: int = 1
    values_per_key: int = 1
    queries: int = 1

    def __call__(self, setting: Setting) -> Build:
        rng = setting.rng("needles")
        keys = [_draw(self.keys, rng) for _ in range(max(self.key_count, self.queries))]
        values = [[_draw(self.values, rng) for _ in range(self.values_per_key)] for _ in keys]
        needles = [self._needle(key, value) for key, group in zip(keys, values, strict=True) for value in group]
        rng.shuffle(needles)
        asked = rng.sample(range(len(keys)), self.queries)
        names = [keys[index] for index in asked]
        query = names[0] if len(names) == 1 else ", ".join(names[:-1]) + ", and " + names[-1]
        is_one = self.queries * self.values_per_key == 1
        kind, be, some = (self.values[:-1], "is", "A") if is_one else (self.values, "are all", "Some")
        before = (
            f"{some} special magic {kind} {'is' if is_one else 'are'} hidden within the following text. Make sure to "
            f"memorize it. I will quiz you about the {kind} afterwards.\n"
        )
        references = tuple(value for index in asked for value in values[index])
        question = Question(
            key="0",
            text=f"\nWhat {be} the special magic {kind} for {query} mentioned in the provided text?",
            lead=f" The special magic {kind} for {query} mentioned in the provided text {'is' if is_one else 'are'}",
            references=references,
            new_tokens=128,
        )
        return lambda units: (before + self._context(setting, needles, units), question)

    def _needle(self, key: str, value: str) -> str:
        return f"One of the special magic {self.values} for {key} is: {value}."

    def _context(self, setting: Setting, needles: list[str], units: int) -> str:
        rng = setting.rng("haystack")
        if self.haystack == "essay":
            depths = rng.sample(_DEPTHS, len(needles))
            return hide(_cycled(setting.essay, units * _ESSAY_UNIT_CHARACTERS), [f" {one}" for one in needles], depths)
        if self.haystack == "noise":
            lines = [_NOISE] * units
        else:
            lines = [self._needle(_draw(self.keys, rng), _draw(self.values, rng)) for _ in range(units)]
        positions = sorted(setting.rng("places").sample(range(units), len(needles)), reverse=True)
        for position, needle in zip(positions, needles, strict=True):
            lines.insert(position, needle)
        return "\n".join(lines)


def _variable_tracking(setting: Setting) -> Build:
    """A chain of four assignments in noise, after one worked example."""
    rng, hops = setting.rng("chain"), 4
    task = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"

    def chain(letters: int) -> tuple[list[str], str, list[str]]:
        names: list[str] = []
        while len(names) <= hops:
            name = "".join(rng.choices(string.ascii_uppercase, k=letters))
            names += [name] if name not in names else []
        value = str(rng.randrange(10_000, 99_999))
        lines = [f"VAR {names[0]} = {value}"]
        lines += [f"VAR {after} = VAR {before} " for before, after in itertools.pairwise(names)]
        return names, value, lines

    def context(lines: Sequence[str], units: int) -> str:
        parts, positions = [_NOISE] * units, sorted(setting.rng("places").sample(range(units), len(lines)))
        for index, (position, line) in enumerate(zip(positions, lines, strict=True)):
            parts.insert(position + index, line)
        return "\n".join(parts).replace(". \n", ".\n")

    def ask(value: str) -> tuple[str, str]:
        return (
            f"\nQuestion: Find all variables that are assigned the value {value} in the text above.",
            f" Answer: According to the chain(s) of variable assignment in the text above, {hops + 1} variables are "
            f"assigned the value {value}, they are: ",
        )

    names, value, lines = chain(3)
    example = task + context(lines, 5) + "".join(ask(value)) + " " + " ".join(names) + "\n"
    names, value, lines = chain(5)
    text, lead = ask(value)
    question = Question(key="0", text=text, lead=lead, references=tuple(names), new_tokens=30)
    return lambda units: (example + task + context(lines, units), question)


def _common_words(setting: Setting) -> Build:
    """The ten words that stand in a numbered list more often than the others, after one worked example."""
    rng, common = setting.rng("words"), 10
    task = (
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
        "appear most often.\n"
    )
    is_short = setting.most_tokens < _SHORT_TOKENS
    text = f"\nQuestion: What are the {common} most common words in the above list?"
    lead = f" Answer: The top {common} words that appear most often in the list are:"

    def numbered(words: Sequence[str], often: int, seldom: int) -> str:
        listed = [*list(words[:common]) * often, *list(words[common:]) * seldom]
        setting.rng("order").shuffle(listed)
        return " ".join(f"{index}. {word}" for index, word in enumerate(listed, 1))

    shown = rng.sample(_words(40), 20 if is_short else 40)
    example = task + numbered(shown, *((3, 1) if is_short else (10, 3))) + text + lead + " "
    example += " ".join(f"{index}. {word}" for index, word in enumerate(shown[:common], 1)) + "\n"

    def build(units: int) -> tuple[str, Question]:
        words = setting.rng("list").sample(_words(units), units)
        references = tuple(words[:common])
        question = Question(key="0", text=text, lead=lead, references=references, new_tokens=120)
        return example + task + numbered(words, *((6, 1) if is_short else (30, 3))), question

    return build


def _frequent_words(setting: Setting) -> Build:
    """The three most frequent of made-up words whose counts fall with the square of their rank (a zeta law)."""
    rng, vocabulary = setting.rng("vocabulary"), []
    for _ in range(max(setting.most_tokens // 50, 8)):
        vocabulary.append("".join(rng.choices(string.ascii_lowercase, k=6)))
    vocabulary = ["...", *dict.fromkeys(vocabulary)]  # the most frequent "word" is noise
    question = Question(
        key="0",
        text="\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most "
        "frequently appeared words in the above coded text?",
        lead=" Answer: According to the coded text above, the three most frequently appeared words are:",
        references=tuple(vocabulary[1:4]),
        new_tokens=50,
    )
    task = (
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
        "appeared coded words. "
    )

    def build(units: int) -> tuple[str, Question]:
        counts = (int(units / rank**2 / (math.pi**2 / 6)) for rank in range(1, len(vocabulary) + 1))
        words = [word for word, times in zip(vocabulary, counts, strict=True) for _ in range(times)]
        setting.rng("order").shuffle(words)
        return task + " ".join(words), question

    return build


RULER_TASKS: dict[str, Task] = {
    "niah_single_1": Task(Niah("noise")),
    "niah_single_2": Task(Niah()),
    "niah_single_3": Task(Niah(values="uuids")),
    "niah_multikey_1": Task(Niah(key_count=4)),
    "niah_multikey_2": Task(Niah("needle")),
    "niah_multikey_3": Task(Niah("needle", keys="uuids", values="uuids")),
    "niah_multivalue": Task(Niah(values_per_key=4)),
    "niah_multiquery": Task(Niah(queries=4)),
    "vt": Task(_variable_tracking, least_units=5),
    "cwe": Task(_common_words, least_units=11),
    "fwe": Task(_frequent_words, least_units=30),
}


def ruler_documents(
    name: str, lengths: Sequence[int], samples: int, essay: str, count: CountTokens, seed: int
) -> Iterator[Document]:
    """`samples` documents of a task of each length, which prompt and answer together do not exceed.

    Raises UsageError for a name that is no task and for a length that holds nothing.
    """
    if name not in RULER_TASKS:
        raise UsageError(f"RULER has no task {name!r} here: choose among {', '.join(RULER_TASKS)}")
    for length in lengths:
        for sample in range(samples):
            yield _document(name, length, sample, essay, count, seed)


def _document(name: str, length: int, sample: int, essay: str, count: CountTokens, seed: int) -> Document:
    task = RULER_TASKS[name]
    build = task.build(Setting(essay, length, f"{seed}/{name}/{length}/{sample}"))

    def whole(units: int) -> str:
        text, question = build(units)
        return text + question.text + question.lead

    new_tokens = build(task.least_units)[1].new_tokens
    units = fit(whole, count, length - new_tokens, task.least_units)
    if units == 0:
        raise UsageError(f"{length} tokens are too few for RULER's {name}: its questions alone need more")
    text, question = build(units)
    facts = {"task": name, "length": length, "sample": sample}
    return Document(f"{name}/{length}/{sample}", text, (question,), facts)


def _draw(kind: str, rng: random.Random) -> str:
    if kind == "numbers":
        return str(rng.randrange(10**6, 10**7))
    if kind == "uuids":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    nouns, adjectives, _ = _word_lists()
    return f"{rng.choice(adjectives)}-{rng.choice(nouns)}"


def _words(count: int) -> list[str]:
    """At least `count` words: single ones, or pairs where there are not enough."""
    nouns, adjectives, verbs = _word_lists()
    single = sorted({*nouns, *adjectives, *verbs})
    if count <= len(single):
        return single
    return [f"{adjective}-{noun}" for noun in nouns for adjective in adjectives]


@functools.cache
def _word_lists() -> tuple[list[str], list[str], list[str]]:
    """Nouns, adjectives and verbs, in a fixed order."""
    try:
        from wonderwords import RandomWord
    except ImportError as error:
        raise UsageError("RULER's words come from wonderwords: pip install 'headinfer[eval]'") from error
    words = RandomWord()
    nouns, adjectives, verbs = (
        sorted(set(words.filter(include_parts_of_speech=[kind]))) for kind in ("noun", "adjective", "verb")
    )
    return nouns, adjectives, verbs


def _cycled(text: str, characters: int) -> str:
    return (text * (characters // len(text) + 1))[:characters]
