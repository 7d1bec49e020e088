"""Read a document once and ask several questions about it together.

Each token of the answers reads the document's KV once for all questions, and no answer depends on another question.
The defaults use the small model that ships with headinfer:

    python examples/questions.py
    python examples/questions.py --model MODEL --file book.txt --question "Who did it?" --question "Why?"
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import headinfer

MODEL = Path(headinfer.__file__).parent / "embedded"
FACTS = {"bazuko": 40817, "tirelo": 93265, "mugapi": 57140}
FILLER = "The ship sailed on under a grey sky, and for a long time no one on deck said a word. " * 30
DOCUMENT = "".join(f"{FILLER}The magic number for {word} is {number}. " for word, number in FACTS.items()) + FILLER
QUESTIONS = [f"What is the magic number for {word}?" for word in FACTS]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help="a hub name or a folder")
    parser.add_argument("--file", type=Path, help="the document, as UTF-8 text")
    parser.add_argument("--question", action="append", help="can be given several times")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").to(device)
    document = args.file.read_text("utf-8") if args.file else DOCUMENT

    def encode(question: str) -> torch.Tensor:
        prompt = f"{document}\n{question}"
        if tokenizer.chat_template:
            messages = [{"role": "user", "content": prompt}]
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return tokenizer(prompt, return_tensors="pt", add_special_tokens=not tokenizer.chat_template).input_ids

    # All prompts begin with the document. A prompt's last token is left to generate().
    prompts = [encode(question) for question in args.question or QUESTIONS]
    shortest = min(prompt.shape[1] for prompt in prompts)
    is_shared = (torch.cat([prompt[:, : shortest - 1] for prompt in prompts]) == prompts[0][:, : shortest - 1]).all(0)
    shared_tokens = int(is_shared.cumprod(0).sum())

    with headinfer.enable(model) as enabled:
        document_ids = prompts[0][:, :shared_tokens].to(device)
        cache = enabled.new_cache()
        model(document_ids, past_key_values=cache, logits_to_keep=1)
        questions = [prompt[0, shared_tokens:] for prompt in prompts]
        answers = enabled.ask(cache, questions, document_ids=document_ids, max_new_tokens=args.max_new_tokens)
    for answer in answers:
        print(tokenizer.decode(answer, skip_special_tokens=True).strip())


if __name__ == "__main__":
    main()
