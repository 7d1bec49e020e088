"""Tiny models with sharp attention, their prompts, and the results of generate()."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB = 300


def make_model(family, **changes):
    fields = {
        "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "head_dim": 16,
        "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 65_536, "sliding_window": None,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    if family == "llama":
        fields.pop("sliding_window")
    if family == "gemma3_text":
        fields |= {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"] * 2}
    torch.manual_seed(11)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**fields, **changes})).eval()
    with (
        torch.no_grad()
    ):  # untrained models attend to all tokens equally and repeat one token; larger weights change both
        for name, weight in model.named_parameters():
            if any(part in name for part in ("q_proj.weight", "k_proj.weight")):
                weight.mul_(8)
            if any(part in name for part in ("v_proj.weight", "o_proj.weight")):
                weight.mul_(5)
    return model


def prompt(rows=1, tokens=500, seed=1):
    ids = torch.randint(0, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def padded(rows=3, tokens=500):
    inputs = prompt(rows, tokens)
    for row, start in enumerate((0, 37, 290)[:rows]):
        inputs["attention_mask"][row, :start] = 0
    return inputs


def remembered(results, name, compute):
    """A result that several tests compare with, computed once. `results` is a dict that these tests share."""
    if name not in results:
        results[name] = compute()
    return results[name]


def generate(model, inputs, **options):
    torch.manual_seed(3)
    found = model.generate(
        **inputs,
        **{"max_new_tokens": 24, "do_sample": False, "no_repeat_ngram_size": 2, "pad_token_id": 0, **options},
        return_dict_in_generate=True,
        output_logits=True,
    )
    return found.sequences, torch.stack(found.logits)
