"""Tiny models whose rotary frequencies depend on the length of the context."""

import torch
import transformers
from packaging.version import Version
from transformers import AutoConfig, AutoModelForCausalLM

ORIGINAL = 256
VOCAB = 97
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "factor": 16.0,
    "original_max_position_embeddings": ORIGINAL,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}
DEFAULT = {"rope_type": "default", "rope_theta": 10_000.0}
MODELS = {
    "phi3": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": ORIGINAL}),
    "phimoe": (
        "phimoe",
        {
            "rope_parameters": LONGROPE | {"short_mscale": 1.2, "long_mscale": 1.4},
            "original_max_position_embeddings": ORIGINAL,
            "num_local_experts": 2,
        },
    ),
    "llama, longrope": ("llama", {"rope_parameters": LONGROPE}),
    "llama, dynamic": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": ORIGINAL}),
    "gemma3": (
        "gemma3_text",
        {
            "rope_parameters": {"full_attention": LONGROPE, "sliding_attention": DEFAULT},
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "sliding_window": 32,
            "head_dim": 8,
        },
    ),
}  # fmt: skip
if Version(transformers.__version__) < Version("5.21"):
    del MODELS["gemma3"]  # this version fails by itself if layers of one kind use longrope


def tiny(name, seed=0, **more):
    """Return a model whose weights are so large that other frequencies give other tokens."""
    family, changes = MODELS[name]
    fields = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096, "bos_token_id": None,
        "eos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(fields | changes | more))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.copy_(torch.randn_like(parameter) * (2.0 / parameter.shape[-1] ** 0.5))
    return model
