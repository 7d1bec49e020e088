"""Train the embedded model: `python training/train.py --novel FOLDER --out FOLDER`; see README.md beside this file.

Three runs; each begins with new optimizers and saves its model, so `--first-run 2` goes on after an interruption.
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

MADE = "training.json"  # in the folder of each run: what made it
SEED = 0
BATCH_TOKENS = 3072
WARM_UP_STEPS = 50
DIGITS = 5
KNOWN, TEXT = 0.1, 0.02  # weights of the loss, where a digit of an answer has 1 to 4: see Run.digit_weights
WINDOW_TOKENS = 32
MOST_NEEDLES = 24


@dataclass(frozen=True)
class Stage:
    """Steps with samples of so many tokens, and far keys with weights from 1 to most_weight (see attention.FarKeys)."""

    steps: int
    tokens: int
    far_keys: int = 0
    most_weight: float = 1.0


@dataclass(frozen=True)
class Run:
    """Stages at first_rate for a share of the steps, then falling in a line to last_rate.

    digit_weights, lead_weight: weights of the loss on the digits of an answer, and on each token before them.
    alike_share: share of the samples whose needles are alike, in words and in numbers.
    """

    stages: tuple[Stage, ...]
    digit_weights: tuple[float, ...]
    lead_weight: float
    alike_share: float
    first_rate: float
    last_rate: float
    constant_share: float

    @property
    def steps(self) -> int:
        """Steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        left = min(1.0, (1 - step / self.steps) / (1 - self.constant_share))
        return (self.last_rate + (self.first_rate - self.last_rate) * left) * min(1.0, (step + 1) / WARM_UP_STEPS)


RUNS = (
    # The lookup: only the first digit needs the word.
    Run(
        (Stage(1400, 160), Stage(1000, 256)),
        digit_weights=(4.0, 1.0, 1.0, 1.0, 1.0),
        lead_weight=0.1,
        alike_share=0.0,
        first_rate=3e-3,
        last_rate=2.3e-3,
        constant_share=0.733,
    ),
    # Among many that are alike: a digit after the first is looked up by the word as well as by the digits before it.
    Run(
        (Stage(600, 512), Stage(300, 1024), Stage(900, 512, far_keys=512, most_weight=2048.0)),
        digit_weights=(4.0, 4.0, 4.0, 4.0, 4.0),
        lead_weight=0.1,
        alike_share=0.5,
        first_rate=2e-3,
        last_rate=5e-5,
        constant_share=0.2,
    ),
    # And the word that was asked for, said again without a mistake.
    Run(
        (Stage(800, 512, far_keys=512, most_weight=2048.0),),
        digit_weights=(4.0, 4.0, 4.0, 4.0, 4.0),
        lead_weight=4.0,
        alike_share=0.5,
        first_rate=8e-4,
        last_rate=2e-5,
        constant_share=0.2,
    ),
)


@dataclass(frozen=True)
class Batch:
    """ids [B, T], and weights [B, T] of the loss on predicting each of them."""

    ids: torch.Tensor
    weights: torch.Tensor


class Samples:
    """Samples of a given length: text with needles, then their questions and answers in another order."""

    def __init__(self, text_ids: list[int], tokenizer: Any, run: Run, seed: int) -> None:
        self._text, self._tokenizer, self._run, self._rng = text_ids, tokenizer, run, random.Random(seed)

    def batch(self, tokens: int) -> Batch:
        """As many samples of `tokens` tokens as make BATCH_TOKENS."""
        samples = [self._sample(tokens) for _ in range(max(BATCH_TOKENS // tokens, 1))]
        ids, weights = zip(*samples, strict=True)
        return Batch(torch.tensor(ids), torch.tensor(weights))

    def _sample(self, tokens: int) -> tuple[list[int], list[float]]:
        rng = self._rng
        most = min(tokens // 44, MOST_NEEDLES)
        count = rng.randint(2, most)
        alike = rng.random() < self._run.alike_share
        needles = alike_needles(count, rng) if alike else random_needles(count, rng, held_out=False)
        hidden = [self._ids(needle.sentence) for needle in needles]
        asked: list[int] = []
        asked_weights: list[float] = []
        room = tokens - sum(map(len, hidden))
        # Any needle again at any time: were each asked for once, "one not asked for yet" would be right too often, and
        # that is all that the model would learn.
        for needle in rng.choices(needles, k=max(round(len(needles) * 1.3), 5)):
            is_question = rng.random() < 0.4  # else only the needle's sentence once more, which takes fewer tokens
            question = self._ids(needle.question) if is_question else []
            answer = self._ids(needle.answer)
            weights = [self._run.lead_weight * is_question] * (len(answer) - 7) + [
                KNOWN,
                *self._run.digit_weights,
                KNOWN,
            ]
            if is_question:
                answer, weights = [*answer, self._tokenizer.eos_token_id], [*weights, KNOWN]
            if len(question) + len(answer) > room:
                break
            room -= len(question) + len(answer)
            asked += question + answer
            asked_weights += [0.0] * len(question) + weights
        cuts = sorted(rng.randrange(room + 1) for _ in hidden)
        start = rng.randrange(len(self._text) - room)
        ids: list[int] = []
        before = 0
        for cut, needle_ids in zip(cuts, hidden, strict=True):
            ids += self._text[start + before : start + cut] + needle_ids
            before = cut
        ids += self._text[start + before : start + room]
        return ids + asked, [TEXT] * len(ids) + asked_weights

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text).input_ids
        return ids


def alike_needles(count: int, rng: random.Random) -> list[Needle]:
    """Needles whose words have few different syllables, and whose numbers have few different digits."""
    syllables, digits = rng.sample(SYLLABLES, 6), rng.sample("0123456789", 3)
    words: dict[str, str] = {}
    while len(words) < count:
        word = "".join(rng.choices(syllables, k=3))
        number = "".join(rng.choices(digits, k=DIGITS))
        if not is_held_out(word) and number not in words.values():
            words[word] = number
    return [Needle(word, number) for word, number in words.items()]


def make_model() -> SmolLM3ForCausalLM:
    """2.6M parameters. Two layers with rotary positions gather a needle's words within a window, so that no distance
    is new to them; two layers without positions find it at any distance."""
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
    """The weighted loss, and the share of the tokens of answers that are right, where they weigh."""
    logits = model(batch.ids[:, :-1], use_cache=False).logits.float()
    wanted, weights = batch.ids[:, 1:], batch.weights[:, 1:]
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none")
    right = (logits.argmax(dim=-1) == wanted)[weights >= 1.0].float().mean()
    return (losses * weights.flatten()).sum() / weights.sum(), right


def train(novel: Path, out: Path, first_run: int) -> None:
    """All runs from first_run on (from 1); each saves to out/runN what the next one begins with."""
    for number in range(first_run, len(RUNS) + 1):
        check_run_folder(out / f"run{number}")
    text, _ = read_texts(novel)
    tokenizer = make_tokenizer(text)
    text_ids = tokenizer(text).input_ids
    for number in range(first_run, len(RUNS) + 1):
        model = make_model() if number == 1 else SmolLM3ForCausalLM.from_pretrained(out / f"run{number - 1}")
        model.set_attn_implementation(attention.NAME)
        torch.manual_seed(SEED + number)
        train_run(
            model, RUNS[number - 1], Samples(text_ids, tokenizer, RUNS[number - 1], SEED + number), out / f"run{number}"
        )
        tokenizer.save_pretrained(out / f"run{number}")


def check_run_folder(folder: Path) -> None:
    """Exit if a run would overwrite files that no earlier run wrote."""
    if folder.exists() and any(folder.iterdir()) and not {"seed", "run"} <= read_json_object(folder / MADE).keys():
        sys.exit(f"{folder} holds files but no {MADE} of this program: choose another --out")


def train_run(model: Any, run: Run, samples: Samples, out: Path) -> None:
    """One run; the model and what made it go to `out`, the model every 200 steps as well."""
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = (
        torch.optim.Muon(hidden, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0),
    )
    made = {"seed": SEED, "batch_tokens": BATCH_TOKENS, "run": asdict(run)}
    out.mkdir(parents=True, exist_ok=True)
    (out / MADE).write_text(json.dumps(made, indent=1), encoding="utf-8")
    rng, start, step, log = random.Random(SEED), time.perf_counter(), 0, []
    for stage in run.stages:
        attention.FarKeys.count = stage.far_keys
        for _ in range(stage.steps):
            attention.FarKeys.weight = stage.most_weight ** rng.random()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss, right = loss_of(model, samples.batch(stage.tokens))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = run.rate(step)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            log.append((float(loss.detach()), float(right)))
            step += 1
            if step % 20 == 0:
                loss_mean, right_mean = (sum(column) / 20 for column in zip(*log[-20:], strict=True))
                print(
                    f"{time.perf_counter() - start:6.0f} s  step {step:5} of {run.steps}  {stage.tokens:5} tokens  "
                    f"loss {loss_mean:.4f}  right {right_mean:.4f}",
                    flush=True,
                )
            if step % 200 == 0:
                model.save_pretrained(out)
    model.save_pretrained(out)
    made["seconds"] = time.perf_counter() - start
    (out / MADE).write_text(json.dumps(made, indent=1), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--novel", type=Path, required=True, help="the folder of Moby-Dick's chapter_N.txt")
    parser.add_argument("--out", type=Path, required=True, help="where the models of the runs go")
    parser.add_argument("--first-run", type=int, default=1, help="go on with this run, from what the one before saved")
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    train(chosen.novel, chosen.out, chosen.first_run)
