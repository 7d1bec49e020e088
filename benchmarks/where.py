"""Measures where answers come from: how often the passage with a needle is first, and what telling it costs.

    python benchmarks/where.py [embedded] [--lengths 4K,16K,64K] [--documents 2] [--shares] [--out result.json]

Each document hides needles (evals/niah.py) at evenly spread depths. The passages of each answer are compared with the
place of its needle: the one whose number was written, which small models do not always choose rightly. --shares also
measures other shares from which a head looks far (FAR_SHARE in headinfer/hf/where.py); 0 counts all heads.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import headinfer
from headinfer.embedded import embedded_text
from headinfer.engine.recorder import Mass
from headinfer.evals.niah import niah_document
from headinfer.evals.reader import Reader
from headinfer.evals.tasks import Document
from headinfer.hf import where as rule
from headinfer.hf.models import resolve
from headinfer.jobs.prompts import pad_id
from headinfer.jobs.where import DocumentText, Passage, passages
from headinfer.utils.units import parse_tokens

_NEEDLES = 8
_SHARES = (0.0, 0.3, 0.5, 0.7, 0.9)  # 0 counts all heads


def main() -> None:
    """Measure all lengths and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="embedded", help="embedded, a local folder or a hub name")
    parser.add_argument("--lengths", default="4K,16K,64K", help="tokens of the documents")
    parser.add_argument("--documents", type=int, default=2, help="documents of each length")
    parser.add_argument("--lead", action="store_true", help="give the beginning of the answer, for small models")
    parser.add_argument("--shares", action="store_true", help="measure other shares too")
    parser.add_argument("--dtype", default="float32", help="float32 or bfloat16")
    parser.add_argument("--threads", type=int, default=None, help="threads of torch")
    parser.add_argument("--out", type=Path, default=None, help="a JSON file for the results")
    given = parser.parse_args()
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    source = resolve(given.model)
    model = source.load(dtype=getattr(torch, given.dtype), device="cpu", seed=0)
    reader = Reader(model, source.tokenizer())
    lines = []
    for length in map(parse_tokens, given.lengths.split(",")):
        found = [line for sample in range(given.documents) for line in measure(reader, length, sample, given)]
        lines.append(_summary(length, found))
        print(json.dumps(lines[-1]), flush=True)
    print("\n| tokens | needles | right answers | needle first | seconds, relative to decoding the answer |")
    print("|---|---|---|---|---|")
    for line in lines:
        print(
            f"| {line['tokens']:,} | {line['needles']} | {line['right']} | {line['first']} "
            f"| {line['relative_seconds']:.2f} |"
        )
    if given.out is not None:
        facts = {
            "command": f"python benchmarks/where.py {'embedded' if given.model == 'embedded' else 'MODEL'} --lengths "
            f"{given.lengths} --documents {given.documents}{' --lead' * given.lead}{' --shares' * given.shares} "
            f"--dtype {given.dtype} --threads {torch.get_num_threads()}",
            "torch": torch.__version__,
            "results": lines,
        }
        given.out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


@torch.inference_mode()
def measure(reader: Reader, length: int, sample: int, given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Read a document, and yield what is found for each of its needles."""
    model = reader.model
    depths = [number / (_NEEDLES - 1) for number in range(_NEEDLES)]
    document = niah_document(length, depths, sample, embedded_text(), reader.count, seed=7, gives_lead=given.lead)
    head, tails = reader.encode(document)
    text = DocumentText(reader.tokenizer, head)
    begin = text.text.index(document.text)  # what the chat template writes precedes it
    with headinfer.enable(model, guesses="off") as enabled:
        cache = enabled.new_cache(length)
        model(torch.tensor([head]), past_key_values=cache, logits_to_keep=1)
        for tail, question in zip(tails, document.questions, strict=True):
            prompt = head + tail
            started = time.perf_counter()
            written = model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                past_key_values=cache.fork(),
                max_new_tokens=question.new_tokens,
                do_sample=False,
                pad_token_id=pad_id(reader.tokenizer),
            )
            answered = time.perf_counter()
            answer = written[0, len(prompt) :].tolist()
            named = passages(enabled, cache, prompt, answer, text)
            told = time.perf_counter()
            text_of_answer = reader.tokenizer.decode(answer)
            numbers = [other.references[0] for other in document.questions]
            written_number = next((one for one in numbers if one in text_of_answer), question.references[0])
            needle = _needle(document, written_number, begin)
            ranks = {}
            if given.shares:
                with _recorded() as masses:
                    passages(enabled, cache, prompt, answer, text)
                ranks = {share: _rank(text.passages(_shares(masses, share), most=100), needle) for share in _SHARES}
            yield {
                "depth": question.facts["depth"],
                "is_right": bool(question.score(text_of_answer, question.references)),
                "rank": _rank(named, needle),
                "share": named[0].share if named else 0.0,
                "ranks": ranks,
                "answer_tokens": len(answer),
                "answer_s": answered - started,
                "where_s": told - answered,
            }


@contextmanager
def _recorded() -> Iterator[list[torch.Tensor]]:
    """Collect the masses [heads, tokens, stretches] of the document that are recorded within the block."""
    masses: list[torch.Tensor] = []
    take = rule._FarHeads.take

    def collect(heads: rule._FarHeads, found: Mass) -> None:
        masses.append(found.mass[..., 1:-1].clone())
        take(heads, found)

    with mock.patch.object(rule._FarHeads, "take", collect):
        yield masses


def _shares(masses: list[torch.Tensor], share: float) -> list[float]:
    """Return the mass of each stretch if heads look far from a share on."""
    sums = [mass.masked_fill((mass.amax(dim=-1) <= share)[..., None], 0).sum(dim=(0, 1)) for mass in masses]
    found: list[float] = torch.stack(sums).sum(dim=0).tolist()
    return found


def _needle(document: Document, number: str, begin: int) -> tuple[int, int]:
    """Return the first character of a needle's sentence in the text of the tokens, and the one after its last."""
    stop = document.text.index(f" is {number}.") + len(f" is {number}.")
    return begin + document.text.rindex("The magic number", 0, stop), begin + stop


def _rank(named: list[Passage], needle: tuple[int, int]) -> int:
    """Return the place of the first passage with a part of a needle, from 1; 0 if there is none."""
    start, stop = needle
    return next((at for at, one in enumerate(named, 1) if one.start < stop and start < one.stop), 0)


def _summary(length: int, found: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "tokens": length,
        "needles": len(found),
        "right": sum(one["is_right"] for one in found),
        "first": sum(one["rank"] == 1 for one in found),
        "not_first": {f"{one['depth']:.2f}": one["rank"] for one in found if one["rank"] != 1},
        "first_by_share": {str(share): sum(one["ranks"][share] == 1 for one in found) for share in found[0]["ranks"]},
        "median_share": statistics.median(one["share"] for one in found),
        "answer_tokens": statistics.median(one["answer_tokens"] for one in found),
        "answer_s": statistics.median(one["answer_s"] for one in found),
        "where_s": statistics.median(one["where_s"] for one in found),
        "relative_seconds": statistics.median(one["where_s"] / one["answer_s"] for one in found),
    }


if __name__ == "__main__":
    main()
