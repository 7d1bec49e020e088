"""Models whose weights are quantised, dequantised from GGUF, or offloaded: headinfer gives the same tokens."""

import pytest
import torch
from families import VOCAB, tiny_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LogitsProcessor, TorchAoConfig

import headinfer
from headinfer.hf import models
from headinfer.hf.models import resolve

CHUNK_TOKENS = 64
pytestmark = pytest.mark.filterwarnings("ignore")  # warnings of the libraries that quantise and move weights

HIDDEN = 128
LAYERS = 3
HEADS = 8
KV_HEADS = 2
HEAD_DIM = 16
MLP = 256
# If activations are rounded to bfloat16 or int8, a difference of 1e-6 may become one of 2^-8 or 2^-7, and the order of
# two tokens with nearly equal logits may change. transformers' eager and sdpa attention then differ by up to 0.05.
ROUNDED = 0.1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    tiny_model(
        "llama", hidden_size=HIDDEN, intermediate_size=MLP, num_hidden_layers=LAYERS, head_dim=HEAD_DIM
    ).save_pretrained(folder)
    return folder


class Forced(LogitsProcessor):
    """Makes generate() choose given tokens."""

    def __init__(self, sequences):
        self.sequences = sequences

    def __call__(self, input_ids, scores):
        token = self.sequences[:, input_ids.shape[1], None]
        return torch.full_like(scores, float("-inf")).scatter(1, token, 0)


def assert_same_tokens(model, rows=2, bound=5e-5):
    """Compare generation with and without headinfer, with the same chunks and the same tokens."""
    ids = torch.randint(1, VOCAB, (rows, 300), generator=torch.Generator().manual_seed(1))

    def generate(*processors):
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0,
            prefill_chunk_size=CHUNK_TOKENS, return_dict_in_generate=True, output_logits=True,
            logits_processor=list(processors),
        )  # fmt: skip
        return found.sequences, torch.stack(found.logits).float()

    tokens, logits = generate()
    with headinfer.enable(model, chunk_tokens=CHUNK_TOKENS) as enabled:
        _, found = generate(Forced(tokens))
    assert (logits - found).abs().max() < bound * logits.std()
    if bound < ROUNDED:
        assert torch.equal(logits.argmax(-1), found.argmax(-1))
    stats = enabled.last_cache.stats()
    assert stats.layers_offloaded == model.config.num_hidden_layers
    assert stats.host_kv_bytes > 0


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


def test_torchao(folder):
    quantization = pytest.importorskip("torchao.quantization")
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    assert_same_tokens(load(folder, quantization_config=config, device_map="cpu"))


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes(folder, bits):
    pytest.importorskip("bitsandbytes")
    chosen = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32} if bits == 4 else {"load_in_8bit": True}
    model = load(folder, quantization_config=BitsAndBytesConfig(**chosen), device_map="cpu")
    assert_same_tokens(model, bound=ROUNDED)


def test_gguf(tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_context_length(4096)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(VOCAB)
    rng = torch.Generator().manual_seed(5)

    def add(name, rows, columns):
        weight = (0.2 * torch.randn(rows, columns, generator=rng)).numpy()
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quants.quantize(weight, kind), raw_dtype=kind)

    add("token_embd.weight", VOCAB, HIDDEN)
    add("output.weight", VOCAB, HIDDEN)
    writer.add_tensor("output_norm.weight", torch.ones(HIDDEN).numpy())
    for layer in range(LAYERS):
        add(f"blk.{layer}.attn_q.weight", HEADS * HEAD_DIM, HIDDEN)
        add(f"blk.{layer}.attn_k.weight", KV_HEADS * HEAD_DIM, HIDDEN)
        add(f"blk.{layer}.attn_v.weight", KV_HEADS * HEAD_DIM, HIDDEN)
        add(f"blk.{layer}.attn_output.weight", HIDDEN, HEADS * HEAD_DIM)
        add(f"blk.{layer}.ffn_gate.weight", MLP, HIDDEN)
        add(f"blk.{layer}.ffn_up.weight", MLP, HIDDEN)
        add(f"blk.{layer}.ffn_down.weight", HIDDEN, MLP)
        writer.add_tensor(f"blk.{layer}.attn_norm.weight", torch.ones(HIDDEN).numpy())
        writer.add_tensor(f"blk.{layer}.ffn_norm.weight", torch.ones(HIDDEN).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = load(tmp_path, gguf_file="tiny.gguf")
    assert model.config.num_key_value_heads == KV_HEADS
    assert_same_tokens(model)


def test_a_device_map_with_layers_on_disk(folder, tmp_path):
    pytest.importorskip("accelerate")
    where = {f"model.layers.{layer}": "disk" if layer else "cpu" for layer in range(LAYERS)}
    rest = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), "cpu")
    model = load(folder, device_map={**where, **rest}, offload_folder=tmp_path)
    assert model.model.layers[1].mlp.up_proj.weight.device.type == "meta"
    assert_same_tokens(model)


def test_an_automatic_device_map_that_runs_out_of_memory(folder, tmp_path):
    pytest.importorskip("accelerate")
    model = load(folder, device_map="auto", max_memory={"cpu": 900_000}, offload_folder=tmp_path)
    assert "disk" in model.hf_device_map.values()
    assert_same_tokens(model)


def test_a_70b_shape_with_weights_on_the_host():
    accelerate = pytest.importorskip("accelerate")
    source = resolve("random:llama-3-70b?layers=1&intermediate=512&vocab=128")
    model = source.load(dtype=torch.bfloat16, device="cpu", seed=0)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.model.layers[0].self_attn.q_proj.weight.device.type == "meta"
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (64, 8)
    assert_same_tokens(model, rows=1, bound=ROUNDED)


def test_random_weights_of_a_cpu_are_those_of_transformers():
    source = resolve("random:qwen3-8b?layers=2&hidden=128&intermediate=32")
    found = source.load(dtype=torch.bfloat16, device="cpu", seed=5)
    torch.manual_seed(5)
    wanted = AutoModelForCausalLM.from_config(source.config, dtype=torch.bfloat16).state_dict()
    assert found.state_dict().keys() == wanted.keys()
    assert all(torch.equal(weight, wanted[name]) for name, weight in found.state_dict().items())


@pytest.mark.parametrize("has_accelerate", [True, False])
@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_weights_are_read_straight_onto_a_gpu_if_accelerate_is_installed(monkeypatch, device, has_accelerate):
    class Loaded(Exception):
        pass

    def load_whole(name, **options):
        raise Loaded(options)

    monkeypatch.setattr(models, "load_whole", load_whole)
    monkeypatch.setattr(models, "is_accelerate_available", lambda: has_accelerate)
    with pytest.raises(Loaded) as raised:
        resolve("embedded").load(dtype=torch.float32, device=device, seed=0)
    straight = {"device_map": device} if has_accelerate and device != "cpu" else {}
    assert raised.value.args == ({"dtype": torch.float32, **straight},)
