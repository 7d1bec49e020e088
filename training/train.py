"""Train the embedded model: `python training/train.py --novel FOLDER --out FOLDER`; see README.md beside this file.

The training consists of three runs. Each run begins with new optimizers and saves its model, so that `--first-run 2`
continues after an interruption.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import attention
import torch
from corpus import VOCAB_SIZE, make_tokenizer, read_texts
from transformers import SmolLM3Config, SmolLM3ForCausalLM

from headinfer.evals.needles import SYLLABLES, Needle, is_held_out, random_needles
from headinfer.utils.files import read_json_object

RECORD = "training.json"  # the settings of a run, in the run's folder
SEED = 0
BATCH_TOKENS = 3072
WARM_UP_STEPS = 50
DIGITS = 5

# Weights of the loss. A digit of an answer has a weight of 1 to 4; see Run.digit_weights.
KNOWN_WEIGHT = 0.1  # tokens around the digits, which are the same in every answer
TEXT_WEIGHT = 0.02

WINDOW_TOKENS = 32
MAX_NEEDLES = 24


@dataclass(frozen=True)
class Stage:
    """A part of a run.

    Attributes:
        steps: the number of steps.
        tokens: the tokens of each sample.
        extra_keys: the number of extra keys; see `attention.ExtraKeys`.
        max_weight: the largest weight of an extra key. The logarithm of the weight is drawn evenly, from 0 to that of
            `max_weight`.
    """

    steps: int
    tokens: int
    extra_keys: int = 0
    max_weight: float = 1.0


@dataclass(frozen=True)
class Run:
    """A run of the training, with one schedule of the learning rate for all stages.

    Attributes:
        stages: the stages, in their order.
        digit_weights: the weights of the loss on the five digits of an answer.
        lead_weight: the weight of the loss on each token of an answer before the digits.
        similar_share: the share of samples in which words and numbers of the needles are similar to each other.
        first_rate: the learning rate after the warm-up.
        last_rate: the learning rate at the end.
        constant_share: the share of the steps with the first rate. After them the rate falls linearly to the last one.
    """

    stages: tuple[Stage, ...]
    digit_weights: tuple[float, ...]
    lead_weight: float
    similar_share: float
    first_rate: float
    last_rate: float
    constant_share: float

    @property
    def steps(self) -> int:
        """The number of steps in all stages."""
        return sum(stage.steps for stage in self.stages)

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        decay = min(1.0, (1 - step / self.steps) / (1 - self.constant_share))
        warm_up = min(1.0, (step + 1) / WARM_UP_STEPS)
        return (self.last_rate + (self.first_rate - self.last_rate) * decay) * warm_up


RUNS = (
    # Run 1: the lookup. Later digits can be found by the digits before them, the first one only by the word.
    Run(
        (Stage(1400, 160), Stage(1000, 256)),
        digit_weights=(4.0, 1.0, 1.0, 1.0, 1.0),
        lead_weight=0.1,
        similar_share=0.0,
        first_rate=3e-3,
        last_rate=2.3e-3,
        constant_share=0.733,
    ),
    # Run 2: similar needles. Several numbers begin with the same digits, so later digits require the word as well.
    Run(
        (Stage(600, 512), Stage(300, 1024), Stage(900, 512, extra_keys=512, max_weight=2048.0)),
        digit_weights=(4.0, 4.0, 4.0, 4.0, 4.0),
        lead_weight=0.1,
        similar_share=0.5,
        first_rate=2e-3,
        last_rate=5e-5,
        constant_share=0.2,
    ),
    # Run 3: the lead of an answer, which repeats the word of the question.
    Run(
        (Stage(800, 512, extra_keys=512, max_weight=2048.0),),
        digit_weights=(4.0, 4.0, 4.0, 4.0, 4.0),
        lead_weight=4.0,
        similar_share=0.5,
        first_rate=8e-4,
        last_rate=2e-5,
        constant_share=0.2,
    ),
)


@dataclass(frozen=True)
class Batch:
    """A batch of samples.

    Attributes:
        ids: token ids [B, T].
        weights: the weights of the loss on predicting each token, [B, T].
    """

    ids: torch.Tensor
    weights: torch.Tensor


class Samples:
    """Generates samples: text with needles, followed by questions and answers in a random order.

    Args:
        text_ids: the tokens of the text for training.
        tokenizer: the tokenizer.
        run: the run, for its weights and its share of similar needles.
        seed: the seed of the random numbers.
    """

    def __init__(self, text_ids: list[int], tokenizer: Any, run: Run, seed: int) -> None:
        self._text = text_ids
        self._tokenizer = tokenizer
        self._run = run
        self._rng = random.Random(seed)

    def batch(self, tokens: int) -> Batch:
        """Make a batch of samples of `tokens` tokens each, with at most BATCH_TOKENS tokens but at least one sample."""
        samples = [self._sample(tokens) for _ in range(max(BATCH_TOKENS // tokens, 1))]
        ids, weights = zip(*samples, strict=True)
        return Batch(torch.tensor(ids), torch.tensor(weights))

    def _sample(self, tokens: int) -> tuple[list[int], list[float]]:
        rng = self._rng
        count = rng.randint(2, min(tokens // 44, MAX_NEEDLES))
        is_similar = rng.random() < self._run.similar_share
        needles = similar_needles(count, rng) if is_similar else random_needles(count, rng, held_out=False)
        hidden = [self._ids(needle.sentence) for needle in needles]
        asked: list[int] = []
        asked_weights: list[float] = []
        text_tokens = tokens - sum(map(len, hidden))
        # Needles are drawn with replacement. If each was asked for once, the model would only learn to name a needle
        # that was not asked for yet, which is right too often.
        for needle in rng.choices(needles, k=max(round(len(needles) * 1.3), 5)):
            is_question = rng.random() < 0.4  # otherwise only the sentence is repeated, which takes fewer tokens
            question = self._ids(needle.question) if is_question else []
            answer = self._ids(needle.answer)
            # The last 7 tokens of an answer are the space before the number, five digits and the full stop.
            weights = [self._run.lead_weight * is_question] * (len(answer) - 7)
            weights += [KNOWN_WEIGHT, *self._run.digit_weights, KNOWN_WEIGHT]
            if is_question:
                answer = [*answer, self._tokenizer.eos_token_id]
                weights = [*weights, KNOWN_WEIGHT]
            if len(question) + len(answer) > text_tokens:
                break
            text_tokens -= len(question) + len(answer)
            asked += question + answer
            asked_weights += [0.0] * len(question) + weights
        cuts = sorted(rng.randrange(text_tokens + 1) for _ in hidden)
        start = rng.randrange(len(self._text) - text_tokens)
        ids: list[int] = []
        before = 0
        for cut, needle_ids in zip(cuts, hidden, strict=True):
            ids += self._text[start + before : start + cut] + needle_ids
            before = cut
        ids += self._text[start + before : start + text_tokens]
        return ids + asked, [TEXT_WEIGHT] * len(ids) + asked_weights

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text).input_ids
        return ids


def similar_needles(count: int, rng: random.Random) -> list[Needle]:
    """Make needles whose words consist of only 6 syllables and whose numbers consist of only 3 digits."""
    syllables = rng.sample(SYLLABLES, 6)
    digits = rng.sample("0123456789", 3)
    words: dict[str, str] = {}
    while len(words) < count:
        word = "".join(rng.choices(syllables, k=3))
        number = "".join(rng.choices(digits, k=DIGITS))
        if not is_held_out(word) and number not in words.values():
            words[word] = number
    return [Needle(word, number) for word, number in words.items()]


def make_model() -> SmolLM3ForCausalLM:
    """Make the untrained model, with 2.6M parameters.

    Two layers with rotary positions and a small window gather the words of a needle. Two layers without positions find
    it. Neither depends on the length of the context.
    """
    config = SmolLM3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=8,
        no_rope_layers=[1, 1, 0, 0],
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "full_attention"],
        use_sliding_window=True,
        sliding_window=WINDOW_TOKENS,
        max_position_embeddings=2**21,
        rope_theta=100.0,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=VOCAB_SIZE - 2,
        pad_token_id=VOCAB_SIZE - 1,
    )
    torch.manual_seed(SEED)
    return SmolLM3ForCausalLM(config)


def loss_of(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the loss of a batch.

    Args:
        model: the model.
        batch: the batch.

    Returns:
        The weighted loss, and the accuracy on all tokens with a weight of at least 1.
    """
    logits = model(batch.ids[:, :-1], use_cache=False).logits.float()
    expected = batch.ids[:, 1:]
    weights = batch.weights[:, 1:]
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), expected.flatten(), reduction="none")
    accuracy = (logits.argmax(dim=-1) == expected)[weights >= 1.0].float().mean()
    return (losses * weights.flatten()).sum() / weights.sum(), accuracy


def train(novel: Path, out: Path, first_run: int) -> None:
    """Train the model.

    Args:
        novel: the folder with the chapters of Moby-Dick; see `read_texts()`.
        out: the folder for the models. Run N writes to out/runN, and run N + 1 begins with that model.
        first_run: the number of the first run, from 1.
    """
    for number in range(first_run, len(RUNS) + 1):
        check_run_folder(out / f"run{number}")
    text, _ = read_texts(novel)
    tokenizer = make_tokenizer(text)
    text_ids = tokenizer(text).input_ids
    for number in range(first_run, len(RUNS) + 1):
        model = make_model() if number == 1 else SmolLM3ForCausalLM.from_pretrained(out / f"run{number - 1}")
        model.set_attn_implementation(attention.NAME)
        torch.manual_seed(SEED + number)
        run = RUNS[number - 1]
        train_run(model, run, Samples(text_ids, tokenizer, run, SEED + number), out / f"run{number}")
        tokenizer.save_pretrained(out / f"run{number}")


def check_run_folder(folder: Path) -> None:
    """Exit if a run would overwrite files that were not written by an earlier run."""
    if folder.exists() and any(folder.iterdir()) and not {"seed", "run"} <= read_json_object(folder / RECORD).keys():
        sys.exit(f"{folder} contains files but no {RECORD} of this program: choose another --out")


def train_run(model: Any, run: Run, samples: Samples, out: Path) -> None:
    """Train one run.

    Args:
        model: the model. It is changed.
        run: the run.
        samples: the samples.
        out: the folder for the model and the record of the run. The model is also saved every 200 steps.
    """
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = (
        torch.optim.Muon(hidden, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0),
    )
    record = {"seed": SEED, "batch_tokens": BATCH_TOKENS, "run": asdict(run)}
    out.mkdir(parents=True, exist_ok=True)
    (out / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
    rng = random.Random(SEED)
    start = time.perf_counter()
    step = 0
    log = []
    for stage in run.stages:
        attention.ExtraKeys.count = stage.extra_keys
        for _ in range(stage.steps):
            attention.ExtraKeys.weight = stage.max_weight ** rng.random()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss, accuracy = loss_of(model, samples.batch(stage.tokens))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = run.rate(step)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            log.append((float(loss.detach()), float(accuracy)))
            step += 1
            if step % 20 == 0:
                mean_loss, mean_accuracy = (sum(column) / 20 for column in zip(*log[-20:], strict=True))
                print(
                    f"{time.perf_counter() - start:6.0f} s  step {step:5} of {run.steps}  {stage.tokens:5} tokens  "
                    f"loss {mean_loss:.4f}  right {mean_accuracy:.4f}",
                    flush=True,
                )
            if step % 200 == 0:
                model.save_pretrained(out)
    model.save_pretrained(out)
    record["seconds"] = time.perf_counter() - start
    (out / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--novel", type=Path, required=True, help="folder with chapter_N.txt of Moby-Dick")
    parser.add_argument("--out", type=Path, required=True, help="folder for the models of the runs")
    parser.add_argument(
        "--first-run", type=int, default=1, help="begin with this run, from the model of the run before it"
    )
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    train(chosen.novel, chosen.out, chosen.first_run)
