"""Measures guesses: tokens a pass, and the speed of answers with and without them, in turns.

    python benchmarks/small_model.py FOLDER
    python benchmarks/guesses.py FOLDER [--threads 2] [--out result.json]

The text is docs/guide.md. Greedy answers quote it, extract from it, sum it up, and ignore it. The last line samples at
a temperature at which nothing repeats: there guesses must not cost more than 5 %.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import headinfer
from headinfer.plan.guesses import Guesses

_TEXT = Path(__file__).parents[1] / "docs" / "guide.md"
_TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "quote": ("Quote the first paragraph of the text word by word.", {"do_sample": False}),
    "copy": ("Copy the text above word by word.", {"do_sample": False}),
    "extract": ("List all commands that the text names, as they are written.", {"do_sample": False}),
    "sum up": ("Sum up the text in three sentences.", {"do_sample": False}),
    "ignore": ("Write a poem about the sea.", {"do_sample": False}),
    "nothing repeats": ("Write a poem.", {"do_sample": True, "temperature": 20.0, "top_k": 0, "sampling_seed": 1}),
}
_ROUNDS = 3


def main() -> None:
    """Measure all tasks and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a local folder or a hub name")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of the text")
    parser.add_argument("--new-tokens", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--dtype", default="float32", help="float32 or bfloat16")
    parser.add_argument("--threads", type=int, default=None, help="threads of torch")
    parser.add_argument("--out", type=Path, default=None, help="a JSON file for the results")
    given = parser.parse_args()
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=getattr(torch, given.dtype)).eval()
    text = tokenizer.decode(tokenizer(_TEXT.read_text(encoding="utf-8")).input_ids[: given.tokens])
    lines = [measure(model, tokenizer, text, task, given.new_tokens) for task in _TASKS]
    print("| task | tokens a pass | guesses that were right | times as fast as without guesses |")
    print("|---|---|---|---|")
    for line in lines:
        print(
            f"| {line['task']} | {line['tokens_per_pass']:.2f} | {line['accepted']} of {line['guessed']} "
            f"| {line['speedup']:.2f} |"
        )
    if given.out is not None:
        facts = {
            "command": f"python benchmarks/guesses.py MODEL --tokens {given.tokens} --new-tokens {given.new_tokens} "
            f"--dtype {given.dtype} --threads {torch.get_num_threads()}",
            "torch": torch.__version__,
            "results": lines,
        }
        given.out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def measure(model: Any, tokenizer: Any, text: str, task: str, new_tokens: int) -> dict[str, Any]:
    """Answer one task with and without guesses in turns, each time after the same text in the cache."""
    prompt, options = _TASKS[task]
    message = [{"role": "user", "content": f"{text}\n\n{prompt}"}]
    inputs = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = inputs["input_ids"]
    cache = None
    seconds: dict[Guesses, list[float]] = {"off": [], "auto": []}
    answers = {}
    counts = None
    for _ in range(_ROUNDS):
        for guesses in seconds:
            with headinfer.enable(model, guesses=guesses) as enabled, torch.no_grad():
                if cache is None:
                    cache = enabled.new_cache(ids.shape[1] + new_tokens)
                    model(ids[:, :-1], past_key_values=cache, logits_to_keep=1)
                started = time.perf_counter()
                answers[guesses] = model.generate(
                    ids,
                    past_key_values=cache.fork(),
                    min_new_tokens=new_tokens,
                    max_new_tokens=new_tokens,
                    **options,
                )
                seconds[guesses].append(time.perf_counter() - started)
                counts = enabled.guess_counts
    assert counts is not None
    medians = {guesses: statistics.median(found) for guesses, found in seconds.items()}
    return {
        "task": task,
        "prompt_tokens": ids.shape[1],
        "new_tokens": new_tokens,
        "passes": counts.passes,
        "guessed": counts.guessed,
        "accepted": counts.accepted,
        "tokens_per_pass": counts.tokens_per_pass,
        "seconds": medians,
        "speedup": medians["off"] / medians["auto"],
        "same_tokens": torch.equal(answers["off"], answers["auto"]),
    }


if __name__ == "__main__":
    main()
