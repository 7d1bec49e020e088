"""An implementation of RULER's synthetic tasks that need no external data (Hsieh et al., arXiv 2404.06654).

Templates, sizes and the metric are those of the published benchmark (NVIDIA/RULER, synthetic.yaml). There are two
differences. The essays are replaced by the text that ships with headinfer, or by your own. The task cwe uses pairs of
words if a list needs more words than the vocabulary has.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
import string
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from headinfer.errors import UsageError
from headinfer.evals.needles import insert_sentences
from headinfer.evals.tasks import CountTokens, Document, Question, largest_fitting

__all__ = ["RULER_TASKS", "ruler_documents"]

_NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_SHORT_TOKENS = 4096  # for shorter documents cwe uses smaller counts
_VARIABLE_HOPS = 4
_COMMON_WORDS = 10
_DEPTHS = tuple(round(100 * step / 39) / 100 for step in range(40))
_ESSAY_UNIT_CHARACTERS = 16
_POSITIONS_LABEL = "places"  # a part of seeds: another label would change the documents of a seed

Build = Callable[[int], "tuple[str, Question]"]
"""Makes the text and the question of a document with a given number of units (lines, words or characters)."""


@dataclass(frozen=True)
class Setting:
    """The text, the size and the seed of one document.

    Attributes:
        essay: the text that needles are hidden in.
        max_tokens: the length of the document with question and answer.
        seed: the seed of all random numbers of this document.
    """

    essay: str
    max_tokens: int
    seed: str

    def rng(self, purpose: str) -> random.Random:
        """Create a generator for one purpose. It always returns the same numbers, so that a build can be repeated."""
        return random.Random(f"{self.seed}/{purpose}")


@dataclass(frozen=True)
class Task:
    """A task of RULER.

    Attributes:
        build: returns the function that makes a document.
        min_units: the smallest number of units that the function accepts.
    """

    build: Callable[[Setting], Build]
    min_units: int = 1


@dataclass(frozen=True)
class Niah:
    """The needle tasks (niah_*): numbers or UUIDs by key, hidden in noise, in an essay or among other needles.

    Attributes:
        haystack: "essay", "noise" or "needle".
        keys: the kind of the keys, "words" or "uuids".
        values: the kind of the values, "numbers" or "uuids".
        key_count: the number of keys in the document.
        values_per_key: the number of values of each key.
        queries: the number of keys that the question asks for.
    """

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
        kind = self.values[:-1] if is_one else self.values
        article = "A" if is_one else "Some"
        verb = "is" if is_one else "are"
        question_verb = "is" if is_one else "are all"
        before = (
            f"{article} special magic {kind} {verb} hidden within the following text. Make sure to "
            f"memorize it. I will quiz you about the {kind} afterwards.\n"
        )
        references = tuple(value for index in asked for value in values[index])
        question = Question(
            key="0",
            text=f"\nWhat {question_verb} the special magic {kind} for {query} mentioned in the provided text?",
            lead=f" The special magic {kind} for {query} mentioned in the provided text {verb}",
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
            essay = _cycled(setting.essay, units * _ESSAY_UNIT_CHARACTERS)
            return insert_sentences(essay, [f" {needle}" for needle in needles], depths)
        if self.haystack == "noise":
            lines = [_NOISE] * units
        else:
            lines = [self._needle(_draw(self.keys, rng), _draw(self.values, rng)) for _ in range(units)]
        positions = sorted(setting.rng(_POSITIONS_LABEL).sample(range(units), len(needles)), reverse=True)
        for position, needle in zip(positions, needles, strict=True):
            lines.insert(position, needle)
        return "\n".join(lines)


def _variable_tracking(setting: Setting) -> Build:
    """Return the task vt: a chain of assignments in noise, after one worked example."""
    rng = setting.rng("chain")
    task = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"

    def chain(letters: int) -> tuple[list[str], str, list[str]]:
        names: list[str] = []
        while len(names) <= _VARIABLE_HOPS:
            name = "".join(rng.choices(string.ascii_uppercase, k=letters))
            if name not in names:
                names.append(name)
        value = str(rng.randrange(10_000, 99_999))
        lines = [f"VAR {names[0]} = {value}"]
        lines += [f"VAR {after} = VAR {before} " for before, after in itertools.pairwise(names)]
        return names, value, lines

    def context(lines: Sequence[str], units: int) -> str:
        parts = [_NOISE] * units
        positions = sorted(setting.rng(_POSITIONS_LABEL).sample(range(units), len(lines)))
        for index, (position, line) in enumerate(zip(positions, lines, strict=True)):
            parts.insert(position + index, line)
        return "\n".join(parts).replace(". \n", ".\n")

    def ask(value: str) -> tuple[str, str]:
        return (
            f"\nQuestion: Find all variables that are assigned the value {value} in the text above.",
            " Answer: According to the chain(s) of variable assignment in the text above, "
            f"{_VARIABLE_HOPS + 1} variables are assigned the value {value}, they are: ",
        )

    names, value, lines = chain(3)
    example = task + context(lines, 5) + "".join(ask(value)) + " " + " ".join(names) + "\n"
    names, value, lines = chain(5)
    text, lead = ask(value)
    question = Question(key="0", text=text, lead=lead, references=tuple(names), new_tokens=30)
    return lambda units: (example + task + context(lines, units), question)


def _common_words(setting: Setting) -> Build:
    """Return the task cwe: the ten most common words of a numbered list, after one worked example."""
    rng = setting.rng("words")
    task = (
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
        "appear most often.\n"
    )
    is_short = setting.max_tokens < _SHORT_TOKENS
    example_counts = (3, 1) if is_short else (10, 3)
    counts = (6, 1) if is_short else (30, 3)
    text = f"\nQuestion: What are the {_COMMON_WORDS} most common words in the above list?"
    lead = f" Answer: The top {_COMMON_WORDS} words that appear most often in the list are:"

    def numbered(words: Sequence[str], common_count: int, rare_count: int) -> str:
        listed = [*list(words[:_COMMON_WORDS]) * common_count, *list(words[_COMMON_WORDS:]) * rare_count]
        setting.rng("order").shuffle(listed)
        return " ".join(f"{index}. {word}" for index, word in enumerate(listed, 1))

    shown = rng.sample(_words(40), 20 if is_short else 40)
    example = task + numbered(shown, *example_counts) + text + lead + " "
    example += " ".join(f"{index}. {word}" for index, word in enumerate(shown[:_COMMON_WORDS], 1)) + "\n"

    def build(units: int) -> tuple[str, Question]:
        words = setting.rng("list").sample(_words(units), units)
        references = tuple(words[:_COMMON_WORDS])
        question = Question(key="0", text=text, lead=lead, references=references, new_tokens=120)
        return example + task + numbered(words, *counts), question

    return build


def _frequent_words(setting: Setting) -> Build:
    """Return the task fwe: the three most frequent of made-up words. Counts fall with rank squared (a zeta law)."""
    rng = setting.rng("vocabulary")
    vocabulary = []
    for _ in range(max(setting.max_tokens // 50, 8)):
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
        words = list(Counter(dict(zip(vocabulary, counts, strict=True))).elements())
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
    "vt": Task(_variable_tracking, min_units=5),
    "cwe": Task(_common_words, min_units=11),
    "fwe": Task(_frequent_words, min_units=30),
}
"""The tasks by their names in RULER."""


def ruler_documents(
    name: str, lengths: Sequence[int], samples: int, essay: str, count: CountTokens, seed: int
) -> Iterator[Document]:
    """Yield documents of a task.

    Args:
        name: the name of the task, one of RULER_TASKS.
        lengths: the lengths. Prompt and answer together do not exceed them.
        samples: the number of documents of each length.
        essay: the text that needles are hidden in.
        count: counts the tokens of a text.
        seed: the seed of the random numbers.

    Yields:
        The documents, each with one question.

    Raises:
        UsageError: there is no such task, or a length is too short for it.
    """
    if name not in RULER_TASKS:
        raise UsageError(f"RULER has no task {name!r} here: choose among {', '.join(RULER_TASKS)}")
    for length in lengths:
        for sample in range(samples):
            yield _document(name, length, sample, essay, count, seed)


def _document(name: str, length: int, sample: int, essay: str, count: CountTokens, seed: int) -> Document:
    task = RULER_TASKS[name]
    build = task.build(Setting(essay, length, f"{seed}/{name}/{length}/{sample}"))

    def prompt(units: int) -> str:
        text, question = build(units)
        return text + question.text + question.lead

    _, question = build(task.min_units)
    units = largest_fitting(prompt, count, length - question.new_tokens, task.min_units)
    if units == 0:
        raise UsageError(f"{length} tokens are too few for RULER's {name}: the task needs more without any context")
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
    """Return at least `count` words; pairs of words if there are not enough single ones."""
    nouns, adjectives, verbs = _word_lists()
    single = sorted({*nouns, *adjectives, *verbs})
    if count <= len(single):
        return single
    return [f"{adjective}-{noun}" for noun in nouns for adjective in adjectives]


@functools.cache
def _word_lists() -> tuple[list[str], list[str], list[str]]:
    """Return nouns, adjectives and verbs, in a fixed order."""
    try:
        from wonderwords import RandomWord
    except ImportError as error:
        raise UsageError("RULER's words come from wonderwords: pip install 'headinfer[eval]'") from error
    words = RandomWord()

    def of_kind(kind: str) -> list[str]:
        return sorted(set(words.filter(include_parts_of_speech=[kind])))

    return of_kind("noun"), of_kind("adjective"), of_kind("verb")


def _cycled(text: str, characters: int) -> str:
    return (text * (characters // len(text) + 1))[:characters]
