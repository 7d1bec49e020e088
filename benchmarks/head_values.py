"""Shows what is still found if the KV heads with the lowest values of a head pattern see near tokens only.

    headinfer heads MODEL --calibrate -o heads.json
    python benchmarks/head_values.py MODEL heads.json [--tokens 4096] [--shares 0.25,0.5,0.75] [--out result.json]

Other needles than those of the calibration are hidden in the text that headinfer ships, and their answers are given
(teacher forcing). For each share of streaming heads, chosen by the values of the pattern and at random, the script
computes the negative log-likelihood of the numbers' tokens and the share of them that is predicted. Attention is that
of transformers with masks, in chunks and in float32, and not headinfer's.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from headinfer.embedded import embedded_text
from headinfer.evals.calibrate import CalibrationJob, Calibrator, Text
from headinfer.hf.attention import headinfer_attention, headinfer_mask
from headinfer.hf.models import resolve
from headinfer.info import machine
from headinfer.utils.head_pattern import HeadPattern, read_pattern

_NAME = "head-values"
_CHUNK_TOKENS = 1024


class Masked:
    """An attention function of transformers in which the streaming heads of `pattern` do not see far tokens."""

    pattern: HeadPattern | None = None

    def __call__(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **options: Any
    ) -> tuple[torch.Tensor, None]:
        """Compute attention; the shapes are those of headinfer_attention()."""
        pattern = self.pattern
        streaming = pattern.streaming_heads(module.layer_idx) if pattern is not None else ()
        if pattern is None or not streaming:
            return headinfer_attention(module, query, key, value, mask, **options)
        tokens = key.shape[2]
        keys = torch.arange(tokens)
        own = keys[tokens - query.shape[2] :, None]
        seen = (keys <= own).repeat(key.shape[1], 1, 1)
        near = (keys < pattern.sink_tokens) | (own - keys < pattern.recent_tokens)
        seen[list(streaming)] &= near
        group = query.shape[1] // key.shape[1]
        out = scaled_dot_product_attention(
            query,
            key.repeat_interleave(group, 1),
            value.repeat_interleave(group, 1),
            attn_mask=seen.repeat_interleave(group, 0),
            scale=options.get("scaling"),
        )
        return out.transpose(1, 2).contiguous(), None


@torch.inference_mode()
def score(model: Any, calibrator: Calibrator) -> dict[str, float]:
    """Return the mean negative log-likelihood of the numbers' tokens, and the share that is predicted."""
    nll = []
    right = []
    for context in calibrator.contexts:
        cache = DynamicCache(config=model.config)
        for chunk in torch.tensor([context.ids]).split(_CHUNK_TOKENS, dim=1):
            model(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)
        for asked in context.questions:
            ids = torch.tensor([asked.ids])
            logits = model(ids, past_key_values=copy.deepcopy(cache), use_cache=True).logits[0, asked.first - 1 : -1]
            wanted = ids[0, asked.first :]
            nll.append(-logits.log_softmax(-1).gather(1, wanted[:, None]))
            right.append(logits.argmax(-1) == wanted)
    return {
        "nll": round(float(torch.cat(nll).mean()), 4),
        "predicted": round(float(torch.cat(right).float().mean()), 4),
    }


def shuffled(pattern: HeadPattern, seed: int) -> HeadPattern:
    """Return a pattern with random values."""
    rng = random.Random(seed)
    return replace(pattern, values=tuple(tuple(rng.random() for _ in values) for values in pattern.values))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("pattern", type=Path)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--needles", type=int, default=8)
    parser.add_argument("--shares", default="0.25,0.5,0.75", help="shares of streaming heads")
    parser.add_argument("--seed", type=int, default=1, help="another one than that of the calibration")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    source = resolve(given.model)
    pattern = read_pattern(given.pattern)
    texts = [Text("the text that headinfer ships", embedded_text())]
    job = CalibrationJob(
        source,
        given.model,
        torch.float32,
        "cpu",
        texts,
        [given.tokens],
        given.needles,
        pattern.sink_tokens,
        pattern.recent_tokens,
        given.seed,
    )
    calibrator = Calibrator(job)
    masked = Masked()
    AttentionInterface.register(_NAME, masked)
    AttentionMaskInterface.register(_NAME, headinfer_mask)
    model = source.load(dtype=torch.float32, device="cpu", seed=0)
    model.set_attn_implementation(_NAME)
    lines: list[dict[str, Any]] = [{"heads": "all full", "share": 0.0, **score(model, calibrator)}]
    print(lines[-1], flush=True)
    for name, values in (("by value", pattern), ("at random", shuffled(pattern, given.seed))):
        for share in map(float, given.shares.split(",")):
            masked.pattern = values.with_share(share)
            lines.append({"heads": name, "share": share, **score(model, calibrator)})
            print(lines[-1], flush=True)
    if given.out is not None:
        about = {key: pattern.info.get(key) for key in ("family", "dtype", "contexts", "needles", "seed", "predicted")}
        facts = {
            "command": f"python benchmarks/head_values.py MODEL FILE --tokens {given.tokens} --needles {given.needles} "
            f"--shares {given.shares}",
            "machine": machine(),
            "python": sys.version.split()[0],
            "calibration": {**about, "sink_tokens": pattern.sink_tokens, "recent_tokens": pattern.recent_tokens},
            "values": [list(values) for values in pattern.values],
            "results": lines,
        }
        given.out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
