"""A device that runs out of memory during a forward pass: the pass goes on, with the same answer.

The device is a CPU twin with resident KV. Errors are raised at chosen operations of torch.
"""

import warnings
import weakref

import pytest
import torch
from families import tiny_model
from generation import generate, make_model, prompt
from torch.utils._python_dispatch import TorchDispatchMode

import headinfer
from headinfer.errors import CapacityError
from headinfer.hf.cache import HeadCache
from headinfer.kv.layer_kv import LayerKV

TOKEN_BYTES = 2 * 4 * 16 * 4  # one layer of make_model(): K and V of 4 heads of width 16 in float32
LAYERS = 4
STREAMING = 5 << 20
both_streams = pytest.mark.parametrize("transport", ["eager", "lazy"])
pytestmark = pytest.mark.filterwarnings("ignore:a device ran out of memory in a forward pass")


@pytest.fixture(scope="module")
def llama():
    return make_model("llama")


def options(transport="eager", resident_tokens=512):
    return {
        "transport": transport,
        "device_kv_budget_bytes": STREAMING + LAYERS * resident_tokens * TOKEN_BYTES,
        "streaming_budget_bytes": STREAMING,
        "heads_per_group": 2,
        "tile_tokens": 90,
    }


class Fails:
    """A hook that raises an error, an OutOfMemoryError if none is given, at the calls with these numbers, from 1."""

    def __init__(self, *numbers, error=None):
        self.numbers = numbers
        self.error = error or torch.OutOfMemoryError("CUDA out of memory, on purpose")
        self.calls = 0

    def __call__(self, *_):
        self.calls += 1
        if self.calls in self.numbers:
            raise self.error


class FailingAllocations(TorchDispatchMode):
    """Calls a hook before each operation of torch that returns new memory."""

    def __init__(self, hook):
        super().__init__()
        self.hook = hook

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(result.alias_info is None for result in func._schema.returns):
            self.hook()
        return func(*args, **(kwargs or {}))


def same(found, wanted):
    return (found - wanted).abs().max() < 1e-4 * wanted.std()


@both_streams
@pytest.mark.parametrize("phase", ["first chunk", "later chunk", "decode"])
def test_memory_may_run_out_in_any_operation_of_a_pass(llama, transport, phase):
    ids = prompt(tokens=400)["input_ids"]
    past, new = {"first chunk": (0, 280), "later chunk": (280, 120), "decode": (399, 1)}[phase]
    retries = 0
    with torch.no_grad():
        wanted = llama(ids[:, : past + new]).logits[:, -1:]
        with headinfer.enable(llama, **options(transport)):

            def run(*numbers):
                cache = HeadCache(llama.config, expected_tokens=400, **options(transport))
                if past:
                    llama(ids[:, :past], past_key_values=cache, logits_to_keep=1)
                fails = Fails(*numbers)
                chunk = ids[:, past : past + new]
                with FailingAllocations(fails):
                    found = llama(chunk, past_key_values=cache, logits_to_keep=1).logits
                return found, fails.calls, cache.stats(), cache

            operations = run()[1]
            for number in range(1, operations + 1, operations // 6):
                found, _, stats, cache = run(number, number + operations // 3)
                assert same(found, wanted), number
                assert {layer.get_seq_length() for layer in cache.layers} == {past + new}
                assert stats.device_kv_peak_bytes <= options()["device_kv_budget_bytes"]
                retries += stats.oom_retries
    assert retries >= 7


@both_streams
@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("place", ["attention", "mlp", "append"])
def test_memory_may_run_out_in_any_layer_of_generate(llama, transport, layer, place, monkeypatch):
    inputs = prompt(tokens=300)
    wanted = generate(llama, inputs, max_new_tokens=4)
    fails = Fails(2, 3, 6)  # twice in the second of three chunks, and in decode
    layer_kvs = []
    append = LayerKV.append

    def failing_append(self, k, v):
        append(self, k, v)
        layer_kvs.extend([self] if self not in layer_kvs else [])
        if place == "append" and layer_kvs.index(self) == layer:
            fails()

    monkeypatch.setattr(LayerKV, "append", failing_append)
    module = llama.model.layers[layer]
    hooks = {"attention": module.self_attn.o_proj, "mlp": module.mlp}
    hook = hooks[place].register_forward_pre_hook(fails) if place in hooks else None
    with headinfer.enable(llama, chunk_tokens=128, **options(transport)) as active:
        found = generate(llama, inputs, max_new_tokens=4)
    if hook is not None:
        hook.remove()
    assert torch.equal(found[0], wanted[0])
    assert same(found[1], wanted[1])
    assert active.last_cache.stats().oom_retries == 3


@pytest.mark.parametrize(
    ("text", "is_memory"),
    [
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", True),
        ("CUDA error: out of memory", True),
        ("Triton Error [CUDA]: out of memory", True),
        ("CUDA error: an illegal memory access was encountered", False),
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes", False),
    ],
)
def test_libraries_that_allocate_without_torch_run_out_of_memory_too(llama, text, is_memory):
    ids = prompt(tokens=300)["input_ids"]
    fails = Fails(2, error=RuntimeError(text))
    hook = llama.model.layers[2].mlp.register_forward_pre_hook(fails)
    cache = HeadCache(llama.config, expected_tokens=400, **options())
    with torch.no_grad(), headinfer.enable(llama, chunk_tokens=128, **options()):
        if is_memory:
            llama(ids, past_key_values=cache, logits_to_keep=1)
        else:
            with pytest.raises(RuntimeError, match=text.split(":")[0]):
                llama(ids, past_key_values=cache, logits_to_keep=1)
    hook.remove()
    assert cache.get_seq_length() == (300 if is_memory else 0)
    assert cache.stats().oom_retries == int(is_memory)


@both_streams
def test_resident_kv_is_given_back_in_halves_and_then_chunks_are_halved(llama, transport):
    ids = prompt(tokens=1000)["input_ids"]
    limits = options(transport)
    lengths = []
    with torch.no_grad(), headinfer.enable(llama, chunk_tokens=400, **limits):
        wanted = llama(ids, past_key_values=HeadCache(llama.config, **limits), logits_to_keep=1).logits
        cache = HeadCache(llama.config, **limits)
        llama(ids[:, :600], past_key_values=cache, logits_to_keep=1)
        before = cache.stats()
        hooks = [
            llama.model.layers[3].mlp.register_forward_hook(Fails(1, 2, 3, 4, 5)),
            llama.model.embed_tokens.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1])),
        ]
        with pytest.warns(UserWarning, match="a device ran out of memory in a forward pass") as said:
            found = llama(ids[:, 600:], past_key_values=cache, logits_to_keep=1).logits
        for hook in hooks:
            hook.remove()
        stats = cache.stats()
    assert len(said) == 1
    assert str(said[0].message) == (
        "a device ran out of memory in a forward pass, which was computed again: 1 MiB of resident KV were dropped "
        "from the device and chunks have at most 64 tokens from here on"
    )
    assert same(found, wanted)
    assert before.device_resident_bytes == stats.oom_given_back_bytes
    assert stats.device_resident_bytes == 0
    assert stats.oom_retries == 5
    assert stats.oom_chunk_tokens == 64
    assert lengths == [400, 400, 400, 400, 192, 64, 64, 64, 64, 64, 64, 16]


def test_later_chunks_have_the_shorter_length_and_on_forward_sees_each_chunk_once(llama):
    ids = prompt(tokens=700)["input_ids"]
    lengths = []
    with torch.no_grad():
        wanted = llama(ids).logits[:, -5:]
        hook = llama.model.layers[1].mlp.register_forward_hook(Fails(2))
        seen = {"chunk_tokens": 256, "on_forward": lambda cache: lengths.append(cache.get_seq_length())}
        with headinfer.enable(llama, transport="in_place", **seen) as active:
            cache = active.new_cache()
            found = llama(ids, past_key_values=cache, logits_to_keep=5).logits
        hook.remove()
    assert same(found, wanted)
    assert lengths == [256, 384, 512, 640, 700]
    assert cache.stats().oom_chunk_tokens == 128


@pytest.mark.parametrize("family", ["gemma3_text", "falcon_h1", "qwen3_next", "lfm2"])
def test_windows_and_linear_states_are_restored_before_each_attempt(family):
    model = tiny_model(family)
    ids = torch.randint(0, model.config.vocab_size, (1, 300), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), headinfer.enable(model, chunk_tokens=160):
        caches = [HeadCache(model.config, **options()) for _ in range(2)]
        wanted = model(ids, past_key_values=caches[0], logits_to_keep=1).logits
        hook = model.lm_head.register_forward_pre_hook(Fails(1, 2, 4))
        found = model(ids, past_key_values=caches[1], logits_to_keep=1).logits
        hook.remove()
    assert caches[1].stats().oom_retries == 3
    assert same(found, wanted)


def test_a_failed_attempt_keeps_no_tensor_of_the_pass(llama):
    kept = []
    alive = []

    def note(module, args):
        alive.append(sum(one() is not None for one in kept))
        kept.append(weakref.ref(args[0]))

    ids = prompt(tokens=300)["input_ids"]
    hooks = [
        llama.model.layers[0].mlp.register_forward_pre_hook(note),
        llama.model.layers[2].mlp.register_forward_hook(Fails(1)),
    ]
    with torch.no_grad(), headinfer.enable(llama, **options()):
        llama(ids, past_key_values=HeadCache(llama.config, **options()), logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    assert alive == [0, 0]


@pytest.mark.parametrize(
    ("tokens", "arguments", "sentence"),
    [
        (1, {}, r"forward pass of 1 tokens, and no resident KV is left to drop: .* are free, .* hold the ring .*: use"),
        (200, {"logits_to_keep": 1}, r"forward pass of 64 tokens, and no resident KV is left .*: use fewer rows or a"),
        (200, {}, r"pass of 200 tokens, .* are free, which hold a pass of about 199 tokens; logits_to_keep=1 lets a"),
    ],
)
def test_if_nothing_is_left_to_give_back_one_sentence_says_what_fits(llama, tokens, arguments, sentence):
    ids = prompt(tokens=500)["input_ids"]
    with torch.no_grad(), headinfer.enable(llama, chunk_tokens=256, **options()):
        cache = HeadCache(llama.config, **options())
        llama(ids[:, :300], past_key_values=cache, logits_to_keep=1)
        hook = llama.model.layers[2].mlp.register_forward_hook(Fails(*range(1, 100)))
        with pytest.raises(CapacityError, match=sentence) as caught:
            llama(ids[:, 300 : 300 + tokens], past_key_values=cache, **arguments)
        hook.remove()
        assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
        assert {layer.get_seq_length() for layer in cache.layers} == {300}
        assert cache.stats().device_resident_bytes == 0
        found = llama(ids[:, 300:], past_key_values=cache).logits
        wanted = llama(ids, past_key_values=HeadCache(llama.config, **options())).logits[:, 300:]
    assert same(found, wanted)


def test_a_rank_does_not_compute_a_pass_again(llama, monkeypatch):
    monkeypatch.setattr(type(llama), "tp_size", 2, raising=False)
    ids = prompt(tokens=200)["input_ids"]
    with torch.no_grad(), headinfer.enable(llama, **options()):
        cache = HeadCache(llama.config, **options())
        fails = Fails(1)
        hook = llama.model.layers[2].mlp.register_forward_hook(fails)
        with pytest.raises(CapacityError, match="a rank cannot compute it again, since the other ranks do not: use"):
            llama(ids, past_key_values=cache, logits_to_keep=1)
        hook.remove()
    assert fails.calls == 1
    assert cache.get_seq_length() == 0


def test_memory_that_suffices_is_never_mentioned(llama):
    with torch.no_grad(), headinfer.enable(llama, **options()) as active, warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(llama, prompt(tokens=300), max_new_tokens=2)
    stats = active.last_cache.stats()
    assert (stats.oom_retries, stats.oom_given_back_bytes, stats.oom_chunk_tokens) == (0, 0, 0)
