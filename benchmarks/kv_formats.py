"""Measures the error of attention on quantised keys and values of a real model, against float64, by format.

    python benchmarks/small_model.py FOLDER
    python benchmarks/kv_formats.py FOLDER [--tokens 8192] [--out result.json]
    python benchmarks/kv_formats.py --published

A model reads a text. The keys (before and after rotation), values and last queries of each layer are taken from it.
Each format quantises and dequantises keys and values, and float64 attention computes the outputs. The error of an
output is its distance from the exact one, divided by the length of the exact one. Bits are those of an element of K
and V in the mean, with scales and offsets (float16).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

from headinfer.hf.models import resolve

_DOCS = Path(__file__).parents[1] / "docs"
_RESULTS = Path(__file__).parent / "results"
_QUERIES = 64
_SCALE_BITS = 16

Quantise = Callable[[torch.Tensor], torch.Tensor]


def blocks(x: torch.Tensor, tokens: int, channels: int) -> torch.Tensor:
    """Return x [H, T, D] as blocks [H, T / tokens, D / channels, tokens * channels]."""
    heads, length, dim = x.shape
    parts = x.view(heads, length // tokens, tokens, dim // channels, channels)
    return parts.transpose(2, 3).flatten(3)


def unblocks(parts: torch.Tensor, tokens: int, channels: int) -> torch.Tensor:
    """Return the inverse of blocks()."""
    heads, groups, columns, _ = parts.shape
    x: torch.Tensor = parts.unflatten(3, (tokens, channels)).transpose(2, 3)
    return x.reshape(heads, groups * tokens, columns * channels)


def symmetric(bits: int, tokens: int, channels: int) -> Quantise:
    """Return a function that rounds to multiples of a scale for each block: -m to m with m = 2^(bits-1) - 1."""
    most = 2 ** (bits - 1) - 1

    def quantise(x: torch.Tensor) -> torch.Tensor:
        parts = blocks(x, tokens, channels)
        scale = (parts.abs().amax(-1, keepdim=True) / most).half().to(x.dtype)
        scale = scale.clamp_min(2.0**-24)
        return unblocks((parts / scale).round().clamp(-most, most) * scale, tokens, channels)

    return quantise


def q4_0(tokens: int, channels: int) -> Quantise:
    """Return llama.cpp's Q4_0: integers -8 to 7, and a scale that maps the element of largest magnitude to -8."""

    def quantise(x: torch.Tensor) -> torch.Tensor:
        parts = blocks(x, tokens, channels)
        largest = parts.gather(-1, parts.abs().argmax(-1, keepdim=True))
        scale = (largest / -8).half().to(x.dtype)
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        return unblocks((parts / scale).round().clamp(-8, 7) * scale, tokens, channels)

    return quantise


def asymmetric(bits: int, tokens: int, channels: int) -> Quantise:
    """Return a function that rounds to a scale and an offset for each block: integers 0 to 2^bits - 1, as in KIVI."""
    most = 2**bits - 1

    def quantise(x: torch.Tensor) -> torch.Tensor:
        parts = blocks(x, tokens, channels)
        low = parts.amin(-1, keepdim=True).half().to(x.dtype)
        scale = ((parts.amax(-1, keepdim=True) - low) / most).half().to(x.dtype).clamp_min(2.0**-24)
        return unblocks(((parts - low) / scale).round().clamp(0, most) * scale + low, tokens, channels)

    return quantise


def _exact(x: torch.Tensor) -> torch.Tensor:
    return x


def _bits(bits: int, tokens: int, channels: int, numbers: int) -> float:
    return bits + numbers * _SCALE_BITS / (tokens * channels)


def formats(dim: int) -> dict[str, tuple[str, Quantise, Quantise, float]]:
    """Return the formats: where K is quantised ("rotated" or "plain"), how K and V are, and bits of an element."""
    found: dict[str, tuple[str, Quantise, Quantise, float]] = {}

    def add(name: str, where: str, k: tuple[str, int, int, int], v: tuple[str, int, int, int]) -> None:
        makers: Mapping[str, Callable[..., Quantise]] = {"sym": symmetric, "asym": asymmetric}
        functions = []
        total = 0.0
        for kind, bits, tokens, channels in (k, v):
            functions.append(makers[kind](bits, tokens, channels))
            total += _bits(bits, tokens, channels, 1 if kind == "sym" else 2) / 2
        found[name] = (where, functions[0], functions[1], total)

    few = min(dim, 32)
    found["Q8_0 (llama.cpp)"] = ("rotated", symmetric(8, 1, few), symmetric(8, 1, few), _bits(8, 1, few, 1))
    found["Q4_0 (llama.cpp)"] = ("rotated", q4_0(1, few), q4_0(1, few), _bits(4, 1, few, 1))
    for where in ("plain", "rotated"):
        add(f"KIVI 4 bits, K {where}", where, ("asym", 4, 32, 1), ("asym", 4, 1, few))
    for bits in (8, 4):
        for kind in ("sym", "asym"):
            add(f"{bits} bits {kind}, K and V per token", "rotated", (kind, bits, 1, dim), (kind, bits, 1, dim))
            for tokens in (32, 64, 128):
                for where in ("plain", "rotated"):
                    name = f"{bits} bits {kind}, K {where} per channel of {tokens} tokens, V per token"
                    add(name, where, (kind, bits, tokens, 1), (kind, bits, 1, dim))
            if bits == 4:
                name = f"{bits} bits {kind}, K rotated per channel of 64 tokens, V per token of 32 channels"
                add(name, "rotated", (kind, bits, 64, 1), (kind, bits, 1, few))
    return found


class Recorder:
    """An attention function for transformers that keeps queries, keys and values of each layer."""

    def __init__(self) -> None:
        self.layers: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]] = []

    def __call__(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        scaling: float,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """Compute causal attention, and keep what it is computed from."""
        self.layers.append((query[0, :, -_QUERIES:].double(), key[0].double(), value[0].double(), scaling))
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2), None


def rotation(model: Any, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin [T, D] of the model's rotary embedding, float64."""
    positions = torch.arange(tokens)[None]
    rotary = model.get_decoder().rotary_emb
    cos, sin = rotary(torch.zeros(1, dtype=torch.float32), positions)
    return cos[0].double(), sin[0].double()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate x [H, T, D]. With -sin it is rotated back."""
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    rotated: torch.Tensor = x * cos + turned * sin
    return rotated


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Return attention [H, N, D] of the last N positions' queries, without a mask among them."""
    groups = q.shape[0] // k.shape[0]
    scores = q.unflatten(0, (-1, groups)) @ k[:, None].transpose(-1, -2) * scale
    out: torch.Tensor = scores.softmax(-1) @ v[:, None]
    return out.flatten(0, 1)


def published() -> str:
    """Return the table of docs/approximations.md: the formats of --kv-dtype beside others, on two models."""
    names = {
        "int8": "8 bits asym, K rotated per channel of 64 tokens, V per token",
        "Q8_0 of llama.cpp": "Q8_0 (llama.cpp)",
        "int4": "4 bits asym, K rotated per channel of 64 tokens, V per token",
        "KIVI, 4 bits": "KIVI 4 bits, K rotated",
        "Q4_0 of llama.cpp": "Q4_0 (llama.cpp)",
    }
    models = ("smollm2", "embedded")
    lines = ["| format | SmolLM2-135M: bits, error | embedded: bits, error |", "|---|---|---|"]
    for shown, name in names.items():
        cells = []
        for model in models:
            text = (_RESULTS / f"kv-formats-{model}.json").read_text(encoding="utf-8")
            line = next(one for one in json.loads(text)["results"] if one["format"] == name)
            cells.append(f"{line['bits']:.2f}, {line['mean']:.2%}")
        lines.append(f"| {shown} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure all formats and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a local folder, a hub name or `embedded`")
    parser.add_argument("--published", action="store_true", help="print the table of docs/approximations.md")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of the text, a multiple of 128")
    parser.add_argument("--out", type=Path, default=None, help="a JSON file for the results")
    given = parser.parse_args()
    if given.published:
        print(published())
        return
    if given.model is None:
        parser.error("name a model")
    recorder = Recorder()
    AttentionInterface.register("recorder", recorder)
    if Path(given.model).is_dir():
        tokenizer = AutoTokenizer.from_pretrained(given.model)
        model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
    else:
        source = resolve(given.model)
        tokenizer = source.tokenizer()
        model = source.load(dtype=torch.float32, device="cpu", seed=0)
    model.set_attn_implementation("recorder")
    text = "\n\n".join(path.read_text(encoding="utf-8") for path in sorted(_DOCS.glob("*.md")))
    ids = tokenizer(text, return_tensors="pt").input_ids[:, : given.tokens]
    if ids.shape[1] < given.tokens:
        raise SystemExit(f"the text has {ids.shape[1]:,} tokens: choose --tokens below")
    with torch.inference_mode():
        model(ids, use_cache=False, logits_to_keep=1)
        cos, sin = rotation(model, given.tokens)
        lines = [
            measure(recorder, cos, sin, name, *how) for name, how in formats(recorder.layers[0][1].shape[2]).items()
        ]
    print("| format | bits | error, mean of layers | error, worst layer |")
    print("|---|---|---|---|")
    for line in lines:
        print(f"| {line['format']} | {line['bits']:.2f} | {line['mean']:.5f} | {line['worst']:.5f} |")
    if given.out is not None:
        facts = {
            "command": f"python benchmarks/kv_formats.py MODEL --tokens {given.tokens}",
            "torch": torch.__version__,
            "results": lines,
        }
        given.out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def measure(
    recorder: Recorder,
    cos: torch.Tensor,
    sin: torch.Tensor,
    name: str,
    where: str,
    quantise_k: Quantise,
    quantise_v: Quantise,
    bits: float,
) -> dict[str, Any]:
    """Return the errors of one format."""
    errors = []
    for q, k, v, scale in recorder.layers:
        new_k = rotate(quantise_k(rotate(k, cos, -sin)), cos, sin) if where == "plain" else quantise_k(k)
        exact = attend(q, k, v, scale)
        found = attend(q, new_k, quantise_v(v), scale)
        errors.append(float((found - exact).norm() / exact.norm()))
    return {"format": name, "bits": bits, "mean": sum(errors) / len(errors), "worst": max(errors), "layers": errors}


if __name__ == "__main__":
    main()
