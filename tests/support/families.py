"""A tiny random model of each family, with every kind of layer that the family has."""

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, DynamicCache

from headinfer.errors import UnsupportedError
from headinfer.hf.parallel import check_shards
from headinfer.hf.ranks import Ranks
from headinfer.plan.families import REFUSED as WHY
from headinfer.plan.model_shape import ModelShape

VOCAB = 128
COMMON = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 4096, "bos_token_id": None,
    "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "shared_intermediate_size": 32,
}  # fmt: skip
WINDOWS = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"] * 2}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"] * 2, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "partial_rotary_factor": 0.5,
}  # fmt: skip
MAMBA = {
    "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 2,
    "mamba_chunk_size": 16, "mamba_expand": 1,
}  # fmt: skip

ROUTED = {**EXPERTS, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1}
OWN_HEADS = {
    "num_key_value_heads": None,
    "head_dim": None,
}  # as many KV heads as query heads, or one; not set by the config
SHARED_KV = {
    "sliding_window": 24, "num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention"] * 3,
    "num_kv_shared_layers": 2, "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8,
}  # fmt: skip

# The fields of each family's config in addition to COMMON. They cover all kinds of layers of the family.
CHANGES = {
    "afmoe": {**WINDOWS, **EXPERTS},
    "apertus": {},
    "arcee": {},
    "aria_text": EXPERTS,
    "biogpt": OWN_HEADS,
    "bitnet": {"head_dim": 8},
    "cohere": {},
    "cohere2": WINDOWS,
    "cohere2_moe": {**WINDOWS, **EXPERTS},
    "cwm": {**WINDOWS, "bos_token_id": 1, "eos_token_id": 2},
    "dots1": ROUTED,
    "ernie4_5": {},
    "ernie4_5_moe": {**EXPERTS, "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1},
    "exaone4": WINDOWS,
    "exaone_moe": {**WINDOWS, **ROUTED},
    "falcon_h1": MAMBA,
    "flex_olmo": EXPERTS,
    "gemma": {},
    "gemma2": {**WINDOWS, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 16},
    "gemma3_text": WINDOWS,
    "gemma3n_text": {**SHARED_KV, "laurel_rank": 8, "altup_num_inputs": 2,
                     "activation_sparsity_pattern": [0.5, 0.0] * 3},
    "gemma4_text": {**SHARED_KV, "global_head_dim": 32},
    "gemma4_unified_text": {**SHARED_KV, "global_head_dim": 32},
    "glm": {},
    "glm4": {},
    "glm4_moe": ROUTED,
    "gpt2": OWN_HEADS,
    "gpt_bigcode": OWN_HEADS,
    "gpt_neox": OWN_HEADS,
    "gpt_oss": {**WINDOWS, **EXPERTS},
    "granite": {"attention_multiplier": 0.3, "residual_multiplier": 0.5},
    "granite_swa": WINDOWS,
    "granitemoe": EXPERTS,
    "granitemoe_swa": {**WINDOWS, **EXPERTS},
    "granitemoehybrid": {**EXPERTS, **MAMBA, "layer_types": ["mamba", "attention"] * 2},
    "granitemoeshared": EXPERTS,
    "helium": {"num_attention_heads": 4},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": {**EXPERTS, "moe_topk": 2},
    "hy_v3": EXPERTS,
    "hyperclovax": {},
    "internlm3": {},
    "jais2": {},
    "laguna": EXPERTS,
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {**EXPERTS, "layer_types": ["conv", "full_attention"] * 2},
    "lfm3": {},
    "llama": {},
    "llama4_text": {**EXPERTS, "attention_chunk_size": 24, "layer_types": ["chunked_attention", "full_attention"] * 2,
                    "no_rope_layers": [1, 0, 1, 0], "intermediate_size_mlp": 96},
    "mellum": EXPERTS,
    "mimo_v2_flash": {**WINDOWS, **EXPERTS, "v_head_dim": 8, "mlp_layer_types": ["dense", "sparse"] * 2},
    "minimax_m2": {**EXPERTS, "rotary_dim": 8},
    "ministral": WINDOWS,
    "ministral3": {"sliding_window": None},
    "mistral": {"sliding_window": None},
    "mixtral": EXPERTS,
    "nanochat": {},
    "nemotron": {},
    "nemotron_h": {**EXPERTS, "layers_block_type": ["mamba", "attention", "moe", "attention"], "mamba_num_heads": 4,
                   "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 2, "chunk_size": 16},
    "olmo": {},
    "olmo2": {},
    "olmo3": WINDOWS,
    "olmo_hybrid": LINEAR,
    "olmoe": {**EXPERTS, "head_dim": 8},
    "opt": {**OWN_HEADS, "ffn_dim": 96, "word_embed_proj_dim": 64},
    "persimmon": OWN_HEADS,
    "phi": {},
    "phi3": {},
    "phimoe": EXPERTS,
    "qwen2": {},
    "qwen2_moe": EXPERTS,
    "qwen3": {},
    "qwen3_5_moe_text": {**LINEAR, **EXPERTS},
    "qwen3_5_text": LINEAR,
    "qwen3_moe": EXPERTS,
    "qwen3_next": {**LINEAR, **EXPERTS},
    "seed_oss": {},
    "smollm3": {"no_rope_layers": [1, 1, 0, 0]},
    "solar_open": ROUTED,
    "stablelm": {"head_dim": 8},
    "starcoder2": {},
    "vaultgemma": WINDOWS,
}  # fmt: skip


REFUSED = {
    "bamba": {**MAMBA, "attn_layer_indices": [1, 3]},
    "bloom": {},
    "deepseek_v2": {"kv_lora_rank": 32, "head_dim": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16},
    "deepseek_v3": {"kv_lora_rank": 32, "head_dim": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16},
    "diffllama": {},
    "doge": {},
    "falcon": {"head_dim": None},
    "gpt_neo": {"num_layers": 4, "num_heads": 8, "attention_types": [[["global", "local"], 2]]},
    "gptj": {"rotary_dim": 8},
    "jamba": {**EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 16, "mamba_dt_rank": 4},
    "jetmoe": EXPERTS,
    "minimax": EXPERTS,
    "mpt": {},
    "xglm": {"d_model": 64, "num_layers": 4, "attention_heads": 8, "ffn_dim": 96},
}  # fmt: skip
OTHERS = {
    "DynamicSlidingWindowLayer": "windows", "LinearAttentionLayer": "linear attention or convolution",
    "DummyLayer": "no cache of their own",
}  # fmt: skip


# Families of which transformers itself accepts no rotary embeddings of a kind, or not with the tiny config.
# tests/hf/test_rotary.py has Phi-3 with longrope.
NO_ROPE = {
    "dynamic": ("gemma4_text", "gemma4_unified_text", "gpt_neox", "lfm3", "olmo_hybrid", "phi3", "phimoe", "stablelm"),
    "longrope": ("gemma4_text", "gemma4_unified_text", "laguna", "lfm3", "mellum", "olmo_hybrid", "phi3"),
}  # fmt: skip


def present():
    """The supported families that the installed transformers has."""
    return [family for family in sorted(CHANGES) if family in CONFIG_MAPPING]


def tiny_config(family, **changes):
    chosen = {**COMMON, **(CHANGES.get(family) or REFUSED.get(family, {})), **changes}
    return AutoConfig.for_model(family, **{name: value for name, value in chosen.items() if value is not None
                                           or name.endswith("_id") or name == "sliding_window"})  # fmt: skip


def tiny_model(family, seed=0, **changes):
    """Make a model in float32. Its weights are so large that the logits depend on the whole text."""
    torch.manual_seed(seed)
    config = tiny_config(family, **changes)
    if getattr(config, "attn_logit_softcapping", None):
        config._attn_implementation = "eager"  # transformers' sdpa ignores the soft cap
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim >= 2 and not any(part in name for part in ("conv", "A_log", "norm", "router", "gate.")):
                weight.mul_(3.0)
    return model


def beyond_original_length(family, original_tokens):
    """Return the changes of a family's config for each kind of rotary embeddings that extends a context.

    Families without a kind are left out: their config or their code does not accept it in transformers.
    """
    scaled = {"llama4_text": {"floor_scale": original_tokens // 4}}.get(family, {})
    default = {"max_position_embeddings": original_tokens, **scaled}
    model = tiny_model(family, max_position_embeddings=original_tokens)
    rope = getattr(model.config, "rope_parameters", None) or {}
    rotary = next((module for module in model.modules() if hasattr(module, "rope_type")), None)
    if family == "ministral3":  # its queries are scaled by the position
        default["rope_parameters"] = {**rope, "original_max_position_embeddings": original_tokens // 4}
    found = {"default": default}
    if rotary is None:
        return found

    def dynamic(kind, layer_type):
        return {**kind, "rope_type": "dynamic", "factor": 4.0}

    def longrope(kind, layer_type):
        count = getattr(rotary, f"{layer_type}_inv_freq" if layer_type else "inv_freq").numel()
        factors = {"short_factor": [1.0] * count, "long_factor": [4.0] * count}
        own = {"short_mscale": 1.1, "long_mscale": 1.3} if family == "phimoe" else {}
        kind = {**kind, "rope_type": "longrope", "factor": 16.0, "original_max_position_embeddings": original_tokens}
        return {**kind, **own, **factors}

    for name, change in (("dynamic", dynamic), ("longrope", longrope)):
        if family not in NO_ROPE[name]:
            kinds = (
                change(rope, None) if "rope_type" in rope else {key: change(kind, key) for key, kind in rope.items()}
            )
            found[name] = default | {"rope_parameters": kinds}
    return found


def full_layers(config):
    """Count the layers of a config that keep K and V of all tokens, without headinfer's code."""
    names = [type(layer).__name__ for layer in DynamicCache(config=config).layers]
    return sum(name in ("DynamicLayer", "LinearAttentionAndFullAttentionLayer") for name in names)


def splits(family):
    """Whether the tiny config of a family works with two ranks."""
    config = tiny_config(family)
    try:
        check_shards(config, ModelShape.from_config(config), Ranks(0, 2, 0, 2))
    except UnsupportedError:
        return False
    return True


def models_table():
    """Generate docs/models.md."""
    lines = [
        "# Model families",
        "",
        "Generated by `python tests/support/families.py > docs/models.md`; a test keeps it true. Each family was",
        "compared with transformers' own results, read in chunks and whole, on a tiny random config that has every",
        "kind of layer of the family; `offloaded` and `left to transformers` count its layers. Layers whose state",
        "does not grow with the context (windows, linear attention, convolutions) and layers without a cache of",
        "their own stay with transformers. Gemma 3 and 4, Llama 4 and Qwen 3.5 with images load too, and are",
        "served for text. `ranks`: whether transformers' tensor parallel plan splits its KV heads over several",
        "processes (test_parallel.py).",
        "",
        "| family (model_type of the text model) | offloaded | left to transformers | ranks | verified by |",
        "|---|---|---|---|---|",
    ]
    for family in sorted(CHANGES):
        kinds = [type(layer).__name__ for layer in DynamicCache(config=tiny_config(family)).layers]
        full = full_layers(tiny_config(family))
        left = sorted({OTHERS[kind] for kind in kinds if kind in OTHERS})
        others = f"{len(kinds) - full}: {', '.join(left)}" if left else "0"
        hybrid = " (with a linear state each)" if "LinearAttentionAndFullAttentionLayer" in kinds else ""
        ranks = "yes" if splits(family) else "no"
        lines.append(
            f"| {family} | {full}{hybrid} | {others} | {ranks} | test_families.py, all tests with [{family}] |"
        )
    lines += ["", "## Refused", "", "| family | why |", "|---|---|"]
    for family in sorted(REFUSED):
        lines.append(f"| {family} | {WHY.get(family, 'it does not use the attention interface')} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(models_table(), end="")
