"""ModelShape from a config object and from config.json, compared with transformers' own models."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from headinfer.plan.model_shape import ModelShape

SMALL = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "vocab_size": 1024}
DENSE = {**SMALL, "num_key_value_heads": 2, "intermediate_size": 1536}
MLA = {"kv_lora_rank": 128, "q_lora_rank": 192, "qk_rope_head_dim": 32, "qk_nope_head_dim": 64, "v_head_dim": 64}
EXPERTS = {"num_experts": 8, "moe_intermediate_size": 256, "num_experts_per_tok": 2}
FAMILIES = {
    "llama": DENSE,
    "mistral": {**DENSE, "sliding_window": 256},
    "qwen2": {**DENSE, "use_sliding_window": True, "sliding_window": 128, "max_window_layers": 3},
    "qwen3": {**DENSE, "head_dim": 128, "tie_word_embeddings": True},
    "gemma2": {**DENSE, "head_dim": 96},
    "gemma3_text": {**DENSE, "head_dim": 96, "sliding_window": 128},
    "gemma3n_text": {**DENSE, "intermediate_size": 2048, "num_kv_shared_layers": 3, "vocab_size_per_layer_input": 1024},
    "gemma4_text": {**DENSE, "num_kv_shared_layers": 2, "vocab_size_per_layer_input": 1024, "head_dim": 64},
    "gpt_oss": {**DENSE, "num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 64},
    "mixtral": {**DENSE, "num_local_experts": 4, "sliding_window": None},
    "qwen3_moe": {**DENSE, **EXPERTS, "mlp_only_layers": [1], "head_dim": 64},
    "qwen3_next": {**DENSE, **EXPERTS, "head_dim": 64, "shared_expert_intermediate_size": 256},
    "llama4_text": {**DENSE, "num_local_experts": 4, "interleave_moe_layer_step": 2, "intermediate_size_mlp": 2048,
                    "head_dim": 64},
    "deepseek_v3": {**DENSE, **MLA, "n_routed_experts": 8, "moe_intermediate_size": 256, "num_experts_per_tok": 2,
                    "n_group": 2, "topk_group": 1, "first_k_dense_replace": 2, "num_key_value_heads": 8},
}  # fmt: skip


def model_of(family, config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_and_layer_types_are_those_of_transformers(family):
    config = AutoConfig.for_model(family, **FAMILIES[family])
    model = model_of(family, config)
    shape = ModelShape.from_config(config)
    counted = sum(p.numel() for p in model.parameters())
    assert shape.weights == pytest.approx(counted, rel=0.01)
    vectors = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    assert shape.weights <= counted
    assert shape.weights + vectors >= 0.995 * counted
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        assert [layer.kind for layer in shape.layers] == list(kinds)
    assert shape.active_weights <= shape.weights


@pytest.mark.parametrize("family", FAMILIES)
def test_config_json_gives_the_same_shape_as_the_config_object(family, tmp_path):
    config = AutoConfig.for_model(family, **FAMILIES[family])
    shape = ModelShape.from_config(config)
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert ModelShape.from_dict(stored) == shape
    # Old files have no layer_types, and the family's rule must give the same layers.
    stored.pop("layer_types", None)
    assert ModelShape.from_dict(stored) == shape
    assert ModelShape.from_dict({"model_type": "outer", "text_config": stored}) == shape


def test_fields_that_a_file_leaves_out_are_the_familys_defaults():
    """The published files of Gemma 3 leave out the defaults of its class."""
    given = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024}
    shape = ModelShape.from_dict({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", **given}})
    assert shape == ModelShape.from_config(AutoConfig.for_model("gemma3_text", **given))


CACHED = ["llama", "mistral", "gemma2", "gpt_oss", "deepseek_v3", "gemma4_text", "gemma3n_text"]


@pytest.mark.parametrize("family", CACHED)
def test_kv_bytes_are_those_of_dynamic_cache(family):
    """A tiny model reads three tokens; DynamicCache holds the predicted bytes."""
    fields = {**FAMILIES[family], "hidden_size": 128, "num_hidden_layers": 8, "vocab_size": 64}
    fields |= {"intermediate_size": 64, "vocab_size_per_layer_input": 64} if "gemma" in family else {}
    config = AutoConfig.for_model(family, **fields)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        cache = model(torch.tensor([[1, 2, 3]])).past_key_values
    sides = [x for layer in cache.layers for x in (layer.keys, layer.values) if x is not None]
    held = sum(x.numel() * x.element_size() for x in sides)
    shape = ModelShape.from_config(config)
    assert 3 * sum(layer.kv_bytes_per_token(4) for layer in shape.layers) == held


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": None}, "num_hidden_layers is None"),
        ({"hidden_size": "4096"}, "hidden_size is '4096'"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"layer_types": ["full_attention"]}, "layer_types names 1 layers"),
    ],
)
def test_a_config_that_is_incomplete_is_refused_with_the_reason(change, message):
    with pytest.raises(ValueError, match=message):
        ModelShape.from_dict({"model_type": "llama", **DENSE, **change})
