"""Fingerprints of models with adapters, and of models that accelerate splits or offloads."""

import copy

import pytest
import torch
import xxhash
from families import tiny_model

import headinfer
from headinfer import HeadCache, SessionError
from headinfer.sessions.fingerprint import fingerprint

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`"),  # peft uses an old name
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`"),  # several adapters are what is tested
]

IDS = torch.randint(0, 90, (1, 300), generator=torch.Generator().manual_seed(0))
NEXT = torch.randint(0, 90, (1, 8), generator=torch.Generator().manual_seed(1))


def lora(rank=4, alpha=16):
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=alpha, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


def with_adapters(*names, config=None):
    """A model with these adapters. The first one is active, and each name gives the same weights again."""
    model = tiny_model("llama")
    for name in names:
        torch.manual_seed(sum(name.encode()))
        model.add_adapter(config or lora(), name)
    if names:
        model.set_adapter(names[0])
    return model.eval()


def save(model, folder):
    with headinfer.enable(model), torch.inference_mode():
        cache = HeadCache(model.config)
        model(input_ids=IDS, past_key_values=cache, use_cache=True)
        cache.save(folder, IDS)


def logits_of(model, folder):
    with headinfer.enable(model), torch.inference_mode():
        cache = HeadCache.load(folder, model)
        return model(input_ids=NEXT, past_key_values=cache, use_cache=True).logits


def whole_logits(model):
    with torch.inference_mode():
        return model(input_ids=torch.cat([IDS, NEXT], dim=1)).logits[:, -NEXT.shape[1] :]


def disabled(model):
    model.disable_adapters()
    return model


def activated(model, name):
    model.set_adapter(name)
    return model


def scaled(model):
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.scaling["one"] *= 2
    return model


def merged(model):
    for module in model.modules():
        if hasattr(module, "merge"):
            module.merge()
    return model


def trained(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.mul_(1.5)
    return model


MODELS = {
    "none": lambda: with_adapters(),
    "one": lambda: with_adapters("one"),
    "two": lambda: with_adapters("two"),
    "one, with two loaded": lambda: with_adapters("one", "two"),
    "two, with one loaded": lambda: activated(with_adapters("one", "two"), "two"),
    "one and two": lambda: activated(with_adapters("one", "two"), ["one", "two"]),
    "one disabled": lambda: disabled(with_adapters("one")),
    "one with another scaling": lambda: scaled(with_adapters("one")),
    "one merged": lambda: merged(with_adapters("one")),
    "one after training": lambda: trained(with_adapters("one")),
    "one with another config": lambda: with_adapters("one", config=lora(alpha=32)),
    "one with another rank": lambda: with_adapters("one", config=lora(rank=8)),
}
SAME = [{"none", "one disabled"}, {"one", "one, with two loaded"}, {"two", "two, with one loaded"}]


@pytest.fixture(scope="module")
def models():
    pytest.importorskip("peft")
    return {name: make() for name, make in MODELS.items()}


@pytest.mark.parametrize("reader", MODELS)
def test_a_session_is_accepted_only_with_the_adapters_that_read_it(models, tmp_path, reader):
    save(models[reader], tmp_path / "book")
    for name, model in models.items():
        if name == reader or {name, reader} in SAME:
            torch.testing.assert_close(logits_of(model, tmp_path / "book"), whole_logits(model), atol=2e-3, rtol=1e-3)
        else:
            with pytest.raises(SessionError, match="was made with"):
                logits_of(model, tmp_path / "book")


@pytest.mark.parametrize(
    ("reader", "asked", "says"),
    [
        ("none", "one", "with no adapter active, and the model has the adapter one active"),
        ("one", "none", "with the adapter one active, and the model has no adapter active"),
        ("one and two", "one", "the adapter one and two active"),
        ("one", "one with another config", "lora_alpha is 16 there and 32 here"),
        ("one", "one merged", "merged is"),
        ("one", "one after training", "other weights"),
    ],
)
def test_the_message_names_what_differs(models, tmp_path, reader, asked, says):
    save(models[reader], tmp_path / "book")
    with pytest.raises(SessionError, match=says):
        logits_of(models[asked], tmp_path / "book")


def test_the_model_in_a_peft_model_has_the_same_fingerprint():
    peft = pytest.importorskip("peft")
    model = with_adapters("one")
    base = tiny_model("llama")
    torch.manual_seed(sum(b"one"))
    wrapped = peft.get_peft_model(base, lora(), adapter_name="one").eval()
    assert fingerprint(wrapped) == fingerprint(wrapped.get_base_model()) == fingerprint(model)


def test_whole_modules_of_an_adapter_count():
    peft = pytest.importorskip("peft")
    config = copy.copy(lora())
    config.modules_to_save = ["lm_head"]
    model = peft.get_peft_model(tiny_model("llama"), config).eval()
    before = fingerprint(model)
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight.mul_(1.1)
    assert fingerprint(model)["adapters"]["weights"] != before["adapters"]["weights"]
    assert fingerprint(model)["weights"] == before["weights"] == fingerprint(tiny_model("llama"))["weights"]


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_next"])
def test_models_without_adapters_have_the_fingerprint_of_earlier_versions(family):
    """As headinfer 0.1.0 computed it."""
    model = tiny_model(family)
    whole = xxhash.xxh3_128()
    for name, parameter in sorted(model.named_parameters()):
        whole.update(f"{name} {tuple(parameter.shape)} {parameter.dtype};".encode())
        flat = parameter.detach().reshape(-1)
        step = max(-(-flat.numel() // 4096), 1)
        whole.update(flat[::step].contiguous().view(torch.uint8).numpy().data)
    assert fingerprint(model)["weights"] == whole.hexdigest()
    assert list(fingerprint(model)) == ["config", "architecture", "dtype", "weights"]


def cpu_offload(folder, offload_folder):
    accelerate = pytest.importorskip("accelerate")
    model = load(folder)
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def disk_offload(folder, offload_folder):
    accelerate = pytest.importorskip("accelerate")
    model = load(folder)
    return accelerate.disk_offload(model, offload_folder, execution_device=torch.device("cpu"))


def split(folder, offload_folder):
    pytest.importorskip("accelerate")
    parts = ["embed_tokens", "norm", "rotary_emb", "layers.0", "layers.1", "layers.2", "layers.3"]
    where = {f"model.{part}": "cpu" if part in ("layers.0", "norm", "rotary_emb") else "disk" for part in parts}
    return load(folder, device_map={**where, "lm_head": "disk"}, offload_folder=offload_folder)


def load(folder, **options):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@pytest.mark.parametrize("offload", [cpu_offload, disk_offload, split])
def test_a_model_that_accelerate_offloads_loads_the_same_sessions(tmp_path, offload):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    plain = load(tmp_path / "model")
    offloaded = offload(tmp_path / "model", tmp_path / "offload")
    assert any(parameter.device.type == "meta" for parameter in offloaded.parameters())
    assert fingerprint(offloaded) == fingerprint(plain)
    save(plain, tmp_path / "book")
    save(offloaded, tmp_path / "again")
    expected = logits_of(plain, tmp_path / "book")
    assert torch.equal(logits_of(offloaded, tmp_path / "book"), expected)
    assert torch.equal(logits_of(plain, tmp_path / "again"), expected)
    with torch.no_grad():
        plain.model.layers[1].mlp.up_proj.weight.mul_(1.1)
    with pytest.raises(SessionError, match="other weights"):
        logits_of(plain, tmp_path / "again")
