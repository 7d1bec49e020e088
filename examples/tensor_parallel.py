"""Share one model between several processes under torchrun. Each rank offloads the KV heads that it computes.

Ranks use one GPU each, or the CPU if the machine has no GPU. The default is the small model that ships with headinfer:

    torchrun --nproc-per-node 2 examples/tensor_parallel.py
    torchrun --nproc-per-node 2 examples/tensor_parallel.py --model MODEL --file book.txt --question "Who did it?"
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.distributed import DistributedConfig

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
    args = parser.parse_args()

    if torch.cuda.is_available():
        dist.init_process_group("cpu:gloo,cuda:nccl")
        torch.cuda.set_device(dist.get_node_local_rank())
    else:
        dist.init_process_group("gloo")
    parallel = DistributedConfig(tp_size=dist.get_world_size(), tp_plan="auto")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto", distributed_config=parallel)
    prompt = f"{args.file.read_text('utf-8') if args.file else DOCUMENT}\n{args.question}"
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not tokenizer.chat_template).to(model.device)

    with headinfer.enable(model) as enabled:
        output = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False)

    host_bytes = [0] * dist.get_world_size()
    dist.all_gather_object(host_bytes, enabled.last_cache.stats().host_kv_bytes)
    if dist.get_rank() == 0:
        print(tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True))
        print(f"KV on the host, by rank: {host_bytes} bytes")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
