"""Needles: each is inserted once, at its depth, and the question does not contain the answer."""

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headinfer.evals.needles import SYLLABLES, Needle, build_haystack, random_needles, random_words

PROPERTY = settings(deadline=None, derandomize=True, max_examples=100)
SENTENCES = [f"Sentence number {n} says {'very ' * (n % 5)}little." for n in range(200)]
TEXT = " ".join(SENTENCES)


@PROPERTY
@given(st.integers(0, 10**6), st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_each_needle_is_inserted_once_within_a_sentence_of_its_depth(seed, depths):
    needles = random_needles(len(depths), random.Random(seed), held_out=True)
    found = build_haystack(TEXT, needles, depths)
    longest = max(map(len, SENTENCES)) + 1
    for needle, depth in zip(needles, depths, strict=True):
        assert found.count(needle.sentence) == 1
        assert found.count(needle.word) == found.count(needle.number) == 1
        position = found.index(needle.sentence)
        before = sum(len(other.sentence) for other in needles if found.index(other.sentence) < position)
        assert abs(position - before - depth * len(TEXT)) <= longest
        assert position == 0 or found[position - 1] == "."
    rest = found
    for needle in needles:
        rest = rest.replace(needle.sentence, "")
    assert rest == TEXT


@PROPERTY
@given(st.integers(0, 10**6), st.booleans())
def test_needles_depend_only_on_the_seed_and_differ_from_each_other(seed, held_out):
    first, again = (random_needles(20, random.Random(seed), held_out=held_out) for _ in range(2))
    assert first == again
    assert len({needle.word for needle in first}) == len({needle.number for needle in first}) == 20
    for needle in first:
        assert re.fullmatch(r"\d{5}", needle.number)
        assert len(needle.word) == 6
        assert {needle.word[i : i + 2] for i in (0, 2, 4)} <= set(SYLLABLES)
        assert not re.search(r"\d", needle.question)
        assert needle.answer.endswith(f" {needle.number}.")


def test_held_out_words_are_never_trained_on():
    rng = random.Random(1)
    assert not set(random_words(2000, rng, held_out=True)) & set(random_words(20_000, rng, held_out=False))


def test_sentences_of_a_needle():
    needle = Needle("bakelo", "01234")
    assert needle.sentence == " The magic number for bakelo is 01234."
    assert needle.question == "\nWhat is the magic number for bakelo?"
    quoted = build_haystack('He said: "No." She left! Then rain came.', [needle], [0.4])
    assert quoted == 'He said: "No." The magic number for bakelo is 01234. She left! Then rain came.'


def test_invalid_depths_and_words_of_the_text_are_rejected():
    needle = Needle("bakelo", "12345")
    with pytest.raises(ValueError, match="not between 0 and 1"):
        build_haystack(TEXT, [needle], [1.1])
    with pytest.raises(ValueError, match="already contains the word bakelo"):
        build_haystack("A bakelo.", [needle], [0.5])


def test_words_can_be_filtered():
    rng = random.Random(0)
    text = " ".join(random_words(3000, random.Random(0), held_out=True))
    words = random_words(3000, rng, held_out=True, accepts=lambda word: word not in text)
    assert not set(words) & set(text.split())
    assert all(word not in text for word in words)
