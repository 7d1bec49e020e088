"""Put a trained model into the package: `python training/package.py --novel FOLDER --model FOLDER`.

The weights are converted to bfloat16. The text that ships is the half of the novel that was not used for training.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import shutil
from pathlib import Path

import torch
from corpus import read_texts
from transformers import AutoModelForCausalLM

import headinfer.embedded

MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
TEXT = "text.txt.xz"


def package(novel: Path, trained: Path, sharpness: float) -> None:
    """Write the files of headinfer.embedded and their checksums.

    Args:
        novel: the folder with the chapters of Moby-Dick; see `read_texts()`.
        trained: the folder of the trained model and its tokenizer.
        sharpness: a factor on the queries of the layers without positions.
    """
    folder = Path(headinfer.embedded.__file__).parent
    model = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32)
    with torch.no_grad():
        for layer, has_positions in zip(model.model.layers, model.config.no_rope_layers, strict=True):
            if not has_positions:
                layer.self_attn.q_proj.weight.mul_(sharpness)
    model.to(torch.bfloat16).save_pretrained(folder)
    for name in MODEL_FILES:
        if name.startswith("tokenizer"):
            shutil.copyfile(trained / name, folder / name)
    _, held_out = read_texts(novel)
    (folder / TEXT).write_bytes(lzma.compress(held_out.encode("utf-8"), preset=9 | lzma.PRESET_EXTREME))
    sums = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in (*MODEL_FILES, TEXT)}
    (folder / "SHA256.json").write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--novel", type=Path, required=True, help="folder with chapter_N.txt of Moby-Dick")
    parser.add_argument("--model", type=Path, required=True, help="folder of a model that train.py wrote")
    parser.add_argument("--sharpness", type=float, default=1.0, help="factor on the queries of the last two layers")
    chosen = parser.parse_args()
    package(chosen.novel, chosen.model, chosen.sharpness)
