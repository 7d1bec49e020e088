"""The model families that are served, and those that are refused with the reason.

Each served family was compared with transformers' own results. docs/models.md is generated from these lists.
"""

from __future__ import annotations

from headinfer.errors import UnsupportedError

__all__ = ["REFUSED", "SUPPORTED_FAMILIES", "check_family"]

# The model_type of the text model in transformers. tests/hf/test_families.py compares each with transformers.
SUPPORTED_FAMILIES = (
    "afmoe", "apertus", "arcee", "aria_text", "biogpt", "bitnet", "cohere", "cohere2", "cohere2_moe", "cwm", "dots1",
    "ernie4_5", "ernie4_5_moe", "exaone4", "exaone_moe", "falcon_h1", "flex_olmo", "gemma", "gemma2", "gemma3_text",
    "gemma3n_text", "gemma4_text", "gemma4_unified_text", "glm", "glm4", "glm4_moe", "gpt2", "gpt_bigcode", "gpt_neox",
    "gpt_oss", "granite", "granite_swa", "granitemoe", "granitemoe_swa", "granitemoehybrid",
    "granitemoeshared", "helium", "hunyuan_v1_dense", "hunyuan_v1_moe", "hy_v3", "hyperclovax", "internlm3", "jais2",
    "laguna", "lfm2", "lfm2_moe", "lfm3", "llama", "llama4_text", "mellum", "mimo_v2_flash", "minimax_m2", "ministral",
    "ministral3", "mistral", "mixtral", "nanochat", "nemotron", "nemotron_h", "olmo", "olmo2", "olmo3", "olmo_hybrid",
    "olmoe", "opt", "persimmon", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_5_moe_text",
    "qwen3_5_text", "qwen3_moe", "qwen3_next", "seed_oss", "smollm3", "solar_open", "stablelm", "starcoder2",
    "vaultgemma",
)  # fmt: skip

# Multimodal models that are served with text only. hf/inputs.py refuses images.
_COMPOSITES = ("gemma3", "gemma4", "llama4", "qwen3_5", "qwen3_5_moe")

_COMPRESSED = "it caches compressed latents and expands them to all heads after the cache"
_CHUNKS = "transformers itself gives other results for it if the prompt is read in chunks"
_CHANGES = "it changes K or V between the cache and the attention"
REFUSED = {
    "bamba": _CHUNKS,
    "deepseek_v2": _COMPRESSED,
    "deepseek_v3": _COMPRESSED,
    "diffllama": _CHANGES,
    "doge": "it uses an attention mask of its own in full-attention layers",
    "jamba": _CHUNKS,
    "jetmoe": _CHANGES,
    "minimax": "it requires a cache class of its own",
}


def check_family(family: str, text: str) -> None:
    """Check that the family of a model is served exactly.

    Args:
        family: transformers' model_type of the model.
        text: the model_type of its text model, which is the same unless the model is multimodal.

    Raises:
        UnsupportedError: it is not. The message says why.
    """
    if text in SUPPORTED_FAMILIES and family in (text, *_COMPOSITES):
        return
    reason = REFUSED.get(text)
    if reason is not None:
        raise UnsupportedError(
            f"the model family {family} cannot be served exactly, since {reason}: use transformers alone"
        )
    raise UnsupportedError(
        f"the model family {family} is not verified yet: docs/models.md and `headinfer info` list the "
        f"{len(SUPPORTED_FAMILIES)} that are"
    )
