"""Read a document, save its KV cache to a folder, and ask about the document later without reading it again.

The defaults use the small model that ships with headinfer, and a temporary folder:

    python examples/sessions.py
    python examples/sessions.py --model MODEL --session book --file book.txt    # reads, saves and asks
    python examples/sessions.py --model MODEL --session book --question "Why?"  # only asks
"""

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import headinfer

MODEL = Path(headinfer.__file__).parent / "embedded"
FILLER = "The ship sailed on under a grey sky, and for a long time no one on deck said a word. " * 60
DOCUMENT = f"{FILLER}The magic number for bazuko is 40817. {FILLER}"
QUESTION = "What is the magic number for bazuko?"
MARK = "<document>"


def around_document(tokenizer: PreTrainedTokenizerBase, question: str) -> tuple[str, str]:
    """Return what the prompt has before the document, and after it."""
    prompt = f"{MARK}\n{question}"
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    before, _, after = prompt.partition(MARK)
    return before, after


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help="a hub name or a folder")
    parser.add_argument("--file", type=Path, help="the document, as UTF-8 text")
    parser.add_argument("--session", type=Path, help="the folder of the KV cache; default: a temporary folder")
    parser.add_argument("--question", default=QUESTION)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").to(device)
    before, after = around_document(tokenizer, args.question)

    with headinfer.enable(model), tempfile.TemporaryDirectory() as temporary:
        session = args.session or Path(temporary) / "session"
        if not session.exists():
            print(f"Reading the document and saving its KV cache to {session}")
            document = args.file.read_text("utf-8").strip() if args.file else DOCUMENT
            special = not tokenizer.chat_template
            ids = tokenizer(before + document, return_tensors="pt", add_special_tokens=special).input_ids
            cache = headinfer.HeadCache(model.config)
            model(ids.to(device), past_key_values=cache, logits_to_keep=1)
            cache.save(session, ids)

        cache = headinfer.HeadCache.load(session, model)
        question_ids = tokenizer(after, return_tensors="pt", add_special_tokens=False).input_ids
        ids = torch.cat([cache.token_ids, question_ids], dim=1).to(device)
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=args.max_new_tokens,
            do_sample=False,
        )
    print(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip())


if __name__ == "__main__":
    main()
