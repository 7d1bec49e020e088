"""Makes the text and the tokenizer of the embedded model."""

from __future__ import annotations

import importlib
import random
import re
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from headinfer.evals.needles import SYLLABLES, random_needles

VOCAB_SIZE = 1024
CHAPTERS = 135
TRAIN_CHAPTERS = 70
_SYLLABLE_COPIES = 10_000  # enough for BPE to merge every syllable before any other pair of letters


def read_texts(novel: Path) -> tuple[str, str]:
    """Read the text for training and the held-out text.

    Args:
        novel: the folder with chapter_1.txt to chapter_135.txt of Moby-Dick.

    Returns:
        The text for training, which is the first 70 chapters and Python's language reference (`pydoc_data`), and the
        held-out text, which is the other chapters and ships with the package.
    """
    chapters = []
    for number in range(1, CHAPTERS + 1):
        text = (novel / f"chapter_{number}.txt").read_text(encoding="utf-8")
        joined = re.sub(r"(?<!\n)\n(?!\n)", " ", text.replace("\r", ""))  # joins lines within a paragraph
        chapters.append(re.sub(r"\s*\n\s*\n\s*", "\n\n", joined).strip())
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    reference = "\n\n".join(topics[name] for name in sorted(topics))
    return "\n\n".join([*chapters[:TRAIN_CHAPTERS], reference]), "\n\n".join(chapters[TRAIN_CHAPTERS:])


def make_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer.

    Each digit is a token of its own, and the first merges are the syllables of the made-up words.

    Args:
        text: the text for training. A third of it is used.

    Returns:
        The tokenizer, with VOCAB_SIZE tokens.
    """
    needles = random_needles(300, random.Random(0), held_out=False)
    lines = [needle.sentence + needle.question + needle.answer for needle in needles]
    syllables = [*SYLLABLES, *(f" {syllable}" for syllable in SYLLABLES)] * _SYLLABLE_COPIES
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    sample = text[: len(text) // 6] + text[-len(text) // 6 :]
    tokenizer.train_from_iterator([*sample.split("\n\n"), *lines, *syllables], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|eos|>", pad_token="<|pad|>", clean_up_tokenization_spaces=False
    )
