"""MODEL arguments, the byte tokenizer, model shapes, and the check of host memory."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from headinfer.errors import CapacityError
from headinfer.hf.models import RANDOM_CONFIGS, byte_tokenizer, resolve
from headinfer.plan.memory import available_host_bytes, check_host_memory
from headinfer.plan.model_shape import ModelShape


@pytest.mark.parametrize("text", ["plain", "Grüße, 世界 🌍\n\ttabs  and   spaces\r\n", "\x00\x7f", "<|eos|", ""])
def test_the_byte_tokenizer_round_trips_any_text(text):
    tokenizer = byte_tokenizer()
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) == 259


@pytest.mark.parametrize("name", RANDOM_CONFIGS)
def test_every_built_in_config_resolves_to_its_shape(name):
    source = resolve(f"random:{name}?layers=6")
    shape = ModelShape.from_config(source.config)
    assert len(shape.layers) == 6
    assert shape.offloaded_layers
    assert shape.vocab_size == 259


def test_llama_3_8b_has_128_kib_of_kv_a_token():
    shape = ModelShape.from_config(resolve("random:llama-3-8b").config)
    assert shape.kv_bytes_per_token(2) == 128 * 1024
    assert len(shape.offloaded_layers) == 32


def test_kv_bytes_count_full_attention_layers_only():
    config = AutoConfig.for_model(
        "gemma3_text", num_hidden_layers=6, layer_types=["sliding_attention", "full_attention"] * 3, head_dim=32,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    shape = ModelShape.from_config(config)
    assert shape.offloaded_layers == (1, 3, 5)
    assert shape.kv_bytes_per_token(4) == 3 * 2 * 64 * 4


def test_prefill_flops_equal_a_count_by_hand():
    shape = ModelShape.from_config(
        resolve("random:tiny-llama?layers=1&hidden=64&intermediate=96&heads=4&kv_heads=2").config
    )
    weights = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96
    assert shape.prefill_flops(10) == 2 * weights * 10 + 4 * 32 * 10 * 10


def test_random_models_are_seeded_and_overridable():
    source = resolve("random:tiny-llama?layers=1&hidden=64&heads=4&kv_heads=2&vocab=300")
    assert source.config.vocab_size == 300
    first, again, other = (source.load(dtype=torch.float32, device="cpu", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert source.weight_bytes(torch.bfloat16) == sum(p.numel() * 2 for p in first.parameters())


def test_a_saved_model_and_its_tokenizer_load_from_a_folder(tmp_path):
    source = resolve("random:tiny-llama?layers=1&hidden=64&heads=4&kv_heads=2")
    model = source.load(dtype=torch.float32, device="cpu", seed=3)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    stored = resolve(str(tmp_path))
    assert not stored.is_random
    assert stored.tokenizer()("héllo").input_ids == byte_tokenizer()("héllo").input_ids
    loaded = stored.load(dtype=torch.float32, device="cpu", seed=0)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert isinstance(loaded, type(AutoModelForCausalLM.from_config(source.config)))


def test_a_job_that_exceeds_host_memory_is_refused_with_what_would_fit():
    check_host_memory(1000, 1024, 0, available=1000 * 1024)
    with pytest.raises(CapacityError, match=r"at most 500 tokens fit"):
        check_host_memory(1000, 1024, 512 * 1024, available=1012 * 1024)
    with pytest.raises(CapacityError, match="a machine with more"):
        check_host_memory(10, 1024, 2048, available=1024)


def test_available_memory_is_within_the_cgroup_limit(tmp_path):
    free = available_host_bytes(tmp_path)
    assert free > 0
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("2000\n")
    assert available_host_bytes(tmp_path) == 3000
    (tmp_path / "memory.max").write_text("max\n")
    assert available_host_bytes(tmp_path) > 3000
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("4000")
    (tmp_path / "memory" / "memory.usage_in_bytes").write_text("4500")
    assert available_host_bytes(tmp_path) == 0


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("limited", ["", "slice", "slice/job", "slice/job/step"])
def test_a_limit_on_any_cgroup_above_the_process_counts(tmp_path, version, limited):
    root = tmp_path / "cgroup"
    top = root if version == 2 else root / "memory"
    limit_name, used_name = ("memory.max", "memory.current")
    if version == 1:
        limit_name, used_name = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    (top / "slice/job/step").mkdir(parents=True)
    for folder in ("slice", "slice/job", "slice/job/step"):
        (top / folder / limit_name).write_text("max" if version == 2 else str(2**63 - 4096))
        (top / folder / used_name).write_text("100")
    (top / limited / limit_name).write_text("9000\n")
    (top / limited / used_name).write_text("2000\n")
    own = tmp_path / "own"
    other = "5:cpu,cpuacct:/elsewhere\n1:name=systemd:/slice\n"
    own.write_text(other + ("0::/slice/job/step\n" if version == 2 else "4:hugetlb,memory:/slice/job/step\n0::/x\n"))
    assert available_host_bytes(root, own) == 7000
    own.write_text("0::/../../other\n")
    assert (available_host_bytes(root, own) == 7000) == (limited == "")
    assert (available_host_bytes(root, tmp_path / "missing") == 7000) == (limited == "")
