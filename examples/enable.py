"""Generate text with a KV cache that is stored in host memory and streamed through a small budget of device memory.

The default is the small model that ships with headinfer, which finds magic numbers and nothing else. MODEL is a hub
name or a folder of one that is made for long contexts, such as Qwen/Qwen2.5-7B-Instruct-1M:

    python examples/enable.py
    python examples/enable.py --model MODEL --file book.txt --question "Who did it?"
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import headinfer

MODEL = Path(headinfer.__file__).parent / "embedded"
FILLER = "The ship sailed on under a grey sky, and for a long time no one on deck said a word. " * 60
DOCUMENT = f"{FILLER}The magic number for bazuko is 40817. {FILLER}"
QUESTION = "What is the magic number for bazuko?"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help="a hub name or a folder")
    parser.add_argument("--file", type=Path, help="the document, as UTF-8 text")
    parser.add_argument("--question", default=QUESTION)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--device-kv-mib", type=int, default=256, help="KV cache on the device, in MiB")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").to(device)

    prompt = f"{args.file.read_text('utf-8') if args.file else DOCUMENT}\n{args.question}"
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not tokenizer.chat_template).to(device)

    with headinfer.enable(model, device_kv_budget_bytes=args.device_kv_mib * 2**20) as enabled:
        output = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False)

    prompt_tokens = inputs.input_ids.shape[1]
    stats = enabled.last_cache.stats()
    print(tokenizer.decode(output[0, prompt_tokens:], skip_special_tokens=True))
    print(
        f"{prompt_tokens} tokens read; KV on the host: {stats.host_kv_bytes} bytes, "
        f"on the device: at most {stats.device_kv_peak_bytes} bytes"
    )


if __name__ == "__main__":
    main()
