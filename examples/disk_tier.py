"""Generate with a KV cache that is larger than the host memory it may use: the rest is stored on a disk.

The defaults use the small model that ships with headinfer, and keep 4 MiB of its KV in host memory:

    python examples/disk_tier.py
    python examples/disk_tier.py --model MODEL --file library.txt --host-kv-mib 32768 --disk-tier /mnt/ssd
"""

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import headinfer

MODEL = Path(headinfer.__file__).parent / "embedded"
FILLER = "The ship sailed on under a grey sky, and for a long time no one on deck said a word. " * 100
DOCUMENT = f"{FILLER}The magic number for bazuko is 40817. {FILLER}"
QUESTION = "What is the magic number for bazuko?"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help="a hub name or a folder")
    parser.add_argument("--file", type=Path, help="the document, as UTF-8 text")
    parser.add_argument("--question", default=QUESTION)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--host-kv-mib", type=int, default=4, help="KV cache in host memory, in MiB")
    parser.add_argument("--disk-tier", default=tempfile.gettempdir(), help="a folder on a fast disk, for the rest")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").to(device)
    prompt = f"{args.file.read_text('utf-8') if args.file else DOCUMENT}\n{args.question}"
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not tokenizer.chat_template).to(device)

    budget = args.host_kv_mib * 2**20
    with headinfer.enable(model, host_kv_budget_bytes=budget, disk_tier=args.disk_tier) as enabled:
        output = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False)

    stats = enabled.last_cache.stats()
    print(tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True))
    print(f"KV in host memory: at most {stats.host_kv_peak_bytes} bytes; on the disk: {stats.disk_kv_bytes} bytes")


if __name__ == "__main__":
    main()
