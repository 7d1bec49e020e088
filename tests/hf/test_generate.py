"""Further modes of generate(): the tokens are those of transformers, or the mode is an error."""

import copy

import pytest
import torch
from families import VOCAB, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    LlamaConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    TextGenerationPipeline,
    TextStreamer,
)

import headinfer
from headinfer.hf.chunks import chunks_of
from headinfer.hf.models import byte_tokenizer
from headinfer.kv.layer_kv import Segment, SegmentSlice

CHUNK_TOKENS = 64


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def draft():
    return tiny_model(
        "llama", num_hidden_layers=1
    )  # the first layer of the larger model, so that some guesses are right


def text(rows=1, tokens=300, seed=1):
    return torch.randint(1, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def options(ids, **changes):
    plain = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    return {**plain, **changes}


def chunk_sizes(model):
    """Install a hook that records the tokens of each forward pass of the decoder in its attribute `sizes`."""
    sizes = []

    def note(module, args, kwargs):
        given = kwargs.get("input_ids")
        sizes.append((kwargs["inputs_embeds"] if given is None else given).shape[1])

    handle = model.model.register_forward_pre_hook(note, with_kwargs=True)
    handle.sizes = sizes
    return handle


def assert_same(model, generate, longest=CHUNK_TOKENS):
    """Assert that `generate` gives the same tokens with headinfer, which reads the prompt in chunks."""
    torch.manual_seed(2)
    wanted = generate()
    handle = chunk_sizes(model)
    with headinfer.enable(model, chunk_tokens=CHUNK_TOKENS) as enabled:
        torch.manual_seed(2)
        found = generate()
    handle.remove()
    assert torch.equal(wanted, found)
    assert max(handle.sizes) <= longest
    assert enabled.last_cache.stats().host_kv_bytes > 0
    return enabled.last_cache


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("guesser", ["prompt lookup", "draft model", "early exit"])
def test_assisted_decoding_reads_long_prompts_in_chunks(llama, draft, guesser, sample):
    ids = text()
    ids[:, 200:] = ids[:, 100:200]  # a repetition for prompt lookup
    help_ = {"prompt lookup": {"prompt_lookup_num_tokens": 5}, "draft model": {"assistant_model": draft},
             "early exit": {"assistant_early_exit": 2}}[guesser]  # fmt: skip
    cache = assert_same(llama, lambda: llama.generate(ids, **options(ids, do_sample=sample, **help_)))
    assert cache.get_seq_length() < 320, "rejected tokens were cropped"


@pytest.mark.parametrize("guesser", ["prompt lookup", "draft model"])
def test_assisted_decoding_with_a_cache_that_is_not_empty(llama, draft, guesser):
    """transformers' own loop would append the whole prompt to the cache again."""
    ids = text()
    help_ = {"prompt_lookup_num_tokens": 5} if guesser == "prompt lookup" else {"assistant_model": draft}
    with headinfer.enable(llama) as enabled:
        cache = enabled.new_cache()
        llama.generate(ids, past_key_values=cache, **options(ids, max_new_tokens=2))
        longer = torch.cat([ids, text(tokens=20, seed=2)], dim=1)
        wanted = llama.generate(longer, **options(longer))
        found = llama.generate(longer, past_key_values=cache, **options(longer, **help_))
    assert torch.equal(found, wanted)
    assert cache.get_seq_length() == wanted.shape[1] - 1


@pytest.mark.parametrize("family", ["gemma3_text", "lfm2"])
def test_assisted_decoding_with_windows_and_convolutions(family):
    model = tiny_model(family)
    ids = text()
    ids[:, 200:] = ids[:, 100:200]
    assert_same(model, lambda: model.generate(ids, **options(ids, prompt_lookup_num_tokens=5)))


@pytest.mark.parametrize("guessed", [False, True])
def test_inputs_embeds(llama, guessed):
    ids = text(rows=2) if not guessed else text()
    embeds = llama.get_input_embeddings()(ids).detach()
    assert_same(llama, lambda: llama.generate(inputs_embeds=embeds, **options(ids)))


def test_attention_masks_with_holes(llama):
    ids = text(rows=3)
    mask = torch.ones_like(ids)
    mask[0, :50] = mask[0, 120:140] = mask[1, 10] = mask[1, 200:290] = mask[2, :299] = 0
    assert_same(llama, lambda: llama.generate(ids, **options(ids, attention_mask=mask)))


class Ban(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores.index_fill(1, input_ids[0, -3:], -torch.inf)


class StopAfter(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 307, device=input_ids.device)


def test_processors_criteria_streamers_and_dicts(llama):
    ids = text()
    streamed = []

    class Note(TextStreamer):
        def on_finalized_text(self, text, stream_end=False):
            streamed.append(text)

    def generate():
        found = llama.generate(
            ids,
            **options(ids),
            logits_processor=LogitsProcessorList([Ban()]),
            stopping_criteria=StoppingCriteriaList([StopAfter(), MaxTimeCriteria(600)]),
            streamer=Note(byte_tokenizer(), skip_prompt=True),
            return_dict_in_generate=True,
            output_scores=True,
            output_logits=True,
        )
        assert found.sequences.shape[1] == 307
        return torch.cat([found.sequences.flatten().float(), *(step.flatten() for step in found.scores)])

    wanted = generate()
    expected_text = "".join(streamed)
    streamed.clear()
    with headinfer.enable(llama, chunk_tokens=CHUNK_TOKENS):
        found = generate()
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    assert "".join(streamed) == expected_text


@pytest.mark.parametrize(
    "mode", [{"penalty_alpha": 0.6, "top_k": 4}, {"dola_layers": "low"}, {"num_beams": 4, "num_beam_groups": 2}]
)
def test_modes_outside_of_transformers_are_errors(llama, mode):
    ids = text()
    with headinfer.enable(llama), pytest.raises((ValueError, OSError), match="trust_remote_code"):
        llama.generate(ids, **options(ids, **mode))


def test_several_prompts_in_sequence(llama):
    with headinfer.enable(llama, chunk_tokens=CHUNK_TOKENS):
        found = [llama.generate(text(seed=seed), **options(text())) for seed in range(3)]
    for seed, tokens in enumerate(found):
        assert torch.equal(tokens, llama.generate(text(seed=seed), **options(text())))


def test_pipeline():
    model = tiny_model("llama", vocab_size=259)
    tokenizer = byte_tokenizer()
    prompts = ["A long story begins here. " * 20, "Short."]

    def answer():
        pipe = TextGenerationPipeline(model=model, tokenizer=tokenizer)
        return pipe(prompts, batch_size=2, max_new_tokens=10, do_sample=False)

    tokenizer.padding_side = "left"
    wanted = answer()
    with headinfer.enable(model, chunk_tokens=CHUNK_TOKENS) as enabled:
        assert answer() == wanted
    assert enabled.last_cache.stats().host_kv_bytes > 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", ["mlp", "layer"])
def test_compiled_layers(llama, what):
    ids = text(tokens=150)
    plain = list(llama.model.layers)
    wanted = llama.generate(ids, **options(ids, max_new_tokens=4))
    torch.compiler.reset()
    try:
        for index, layer in enumerate(plain):
            if what == "mlp":
                layer.mlp.compile(backend="aot_eager")
            else:
                llama.model.layers[index] = torch.compile(layer, backend="aot_eager")
        with headinfer.enable(llama, chunk_tokens=CHUNK_TOKENS) as enabled:
            found = llama.generate(ids, **options(ids, max_new_tokens=4))
    finally:
        for index, layer in enumerate(plain):
            llama.model.layers[index] = layer
            layer.mlp._compiled_call_impl = None
        torch.compiler.reset()
    assert torch.equal(found, wanted)
    assert enabled.last_cache.stats().layers_offloaded == 4


def test_training_is_possible_after_enable():
    model = tiny_model("llama")
    ids = text(rows=2, tokens=40)
    model.train()
    wanted = model(ids, labels=ids).loss
    with headinfer.enable(model):
        assert model.training
        model.eval()
        model.generate(ids, **options(ids, max_new_tokens=2))
        model.train()
    loss = model(ids, labels=ids).loss
    assert torch.equal(loss, wanted)
    loss.backward()
    assert all(weight.grad is not None for weight in model.parameters())


# -- long forward passes ---------------------------------------------------------------------------------------


def test_a_long_forward_pass_is_split_into_chunks(llama):
    ids = text(rows=2, tokens=333)
    with torch.no_grad():
        wanted = llama(ids, logits_to_keep=5).logits
        for chunk_tokens in (1, 7, 64, 328, 332, 333, 1000):
            handle = chunk_sizes(llama)
            with headinfer.enable(llama, chunk_tokens=chunk_tokens) as enabled:
                cache = enabled.new_cache()
                found = llama(ids, None, None, cache, logits_to_keep=5).logits
            handle.remove()
            assert max(handle.sizes) <= max(chunk_tokens, 5)
            assert sum(handle.sizes) == cache.get_seq_length() == 333
            assert (found - wanted).abs().max() < 5e-5 * wanted.std()


@pytest.mark.parametrize(
    "inputs",
    [
        {"input_ids": torch.ones(1, 9), "logits_to_keep": 0},
        {"input_ids": torch.ones(1, 9)},
        {"input_ids": torch.ones(1, 9), "logits_to_keep": torch.tensor([3])},
        {"input_ids": torch.ones(1, 9), "logits_to_keep": 1, "output_hidden_states": True},
        {"input_ids": torch.ones(1, 9), "logits_to_keep": 1, "attention_mask": torch.ones(1, 1, 9, 9)},
        {"input_ids": torch.ones(1, 4), "logits_to_keep": 1},
    ],
)
def test_other_forward_passes_are_not_split(inputs):
    assert [part is inputs for part in chunks_of(inputs, LlamaConfig(), lambda _: 4)] == [True]


def test_an_error_in_a_later_chunk_restores_the_length_before_the_pass(llama):
    ids = text(tokens=300)
    calls = []
    with torch.no_grad(), headinfer.enable(llama, chunk_tokens=50) as enabled:
        cache = enabled.new_cache()
        llama(ids[:, :100], past_key_values=cache, logits_to_keep=1)

        def fail(*_):
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt

        handle = llama.model.layers[2].register_forward_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            llama(ids[:, 100:], past_key_values=cache, logits_to_keep=1)
        handle.remove()
        assert [layer.layer_kv.tokens for layer in cache.head_layers] == [100] * 4
        found = llama(ids[:, 100:], past_key_values=cache, logits_to_keep=1).logits
    wanted = llama(ids, logits_to_keep=1).logits
    assert (found - wanted).abs().max() < 5e-5 * wanted.std()


# -- memory at a million tokens --------------------------------------------------------------------------------

MILLION = 2**20


class LargestTensor(TorchDispatchMode):
    """Records the largest new tensor of any operation. Views do not count."""

    def __init__(self):
        super().__init__()
        self.nbytes = 0
        self.by = ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            for tensor in result if isinstance(result, tuple | list) else (result,):
                if isinstance(tensor, torch.Tensor) and tensor.numel() * tensor.element_size() > self.nbytes:
                    self.nbytes = tensor.numel() * tensor.element_size()
                    self.by = str(func)
        return result


@torch.no_grad()
def fill_with_one_segment(cache, tokens):
    """Give a cache `tokens` tokens on the host, all of which are in the same memory."""
    for layer in cache.layers:
        layer_kv = getattr(layer, "layer_kv", None)
        if layer_kv is None:
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length = tokens + layer.cumulative_length
            continue
        segment = Segment(layer_kv.tier, layer_kv.heads, 2**14, layer_kv.key_dim, layer_kv.value_dim, layer_kv.dtype)
        segment.k.copy_(torch.randn_like(segment.k))
        segment.v.copy_(torch.randn_like(segment.v))
        segment.sealed = True
        copies = [copy.copy(segment) for _ in range(tokens // 2**14)]  # objects with the same memory
        layer_kv._tables = [[SegmentSlice(one, 0, 2**14) for one in copies] for _ in range(layer_kv.rows)]
        layer_kv.host_tokens = tokens
        layer_kv._whole_prefixes = None


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("transport", ["in_place", "eager"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "gemma4_text", "gpt_oss", "qwen3_next"])
@pytest.mark.filterwarnings("ignore::headinfer.ContextLengthWarning")  # the contexts are as long as the test needs
def test_no_tensor_is_as_large_as_the_cache_or_its_mask(family, transport, padded):
    model = tiny_model(family, num_hidden_layers=2, layer_types=LAYERS.get(family), num_kv_shared_layers=0)
    chunk = 40
    limits = {"device_kv_budget_bytes": 8 << 20} if transport == "eager" else {}
    with torch.no_grad(), headinfer.enable(model, transport=transport, **limits) as enabled:
        cache = enabled.new_cache()
        model(text(tokens=200), past_key_values=cache)
        fill_with_one_segment(cache, MILLION)
        total = cache.get_seq_length()
        assert total >= MILLION
        for tokens in (chunk, 1):
            mask = torch.ones(1, total + tokens, dtype=torch.long)
            mask[:, :1000] = 0
            total += tokens
            with LargestTensor() as largest:
                model(text(tokens=tokens), past_key_values=cache, attention_mask=mask if padded else None)
            assert cache.get_seq_length() == total
            # A flag, a number or a position for each token is allowed. K, V or scores for each token are not.
            assert largest.nbytes <= 8 * (MILLION + 1000), f"{largest.by} made {largest.nbytes} bytes"
    assert cache.stats().device_kv_peak_bytes <= 9 << 20


LAYERS = {
    "gemma2": ["sliding_attention", "full_attention"],
    "gemma3_text": ["sliding_attention", "full_attention"],
    "gemma4_text": ["sliding_attention", "full_attention"],
    "gpt_oss": ["sliding_attention", "full_attention"],
    "qwen3_next": ["linear_attention", "full_attention"],
}


COPIED = {"beams": {"num_beams": 4}, "returned": {"do_sample": True, "num_return_sequences": 4}}


@pytest.mark.parametrize("mode", COPIED)
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_next", "falcon_h1", "qwen3_moe"])
def test_beams_and_returned_sequences_share_the_prompt(family, mode):
    model = tiny_model(family)
    ids = text(rows=2, tokens=400)
    mask = torch.ones_like(ids)
    mask[1, :30] = 0
    more = options(ids, max_new_tokens=6, **COPIED[mode]) | {"attention_mask": mask}
    torch.manual_seed(3)
    expected = model.generate(ids, **more)
    read = []
    with headinfer.enable(
        model, chunk_tokens=CHUNK_TOKENS, on_forward=lambda c: read.append(c.head_layers[0].rows)
    ) as on:
        torch.manual_seed(3)
        assert torch.equal(model.generate(ids, **more), expected)
    layer_kv = on.last_cache.head_layers[0].layer_kv
    assert read[: 400 // CHUNK_TOKENS] == [2] * (400 // CHUNK_TOKENS), "the prompt is read once for each row"
    assert (layer_kv.rows, read[-1]) == (8, 8)
    shared = {id(part.segment) for table in layer_kv._tables for part in table}
    assert len(shared) == 2 * len(layer_kv._tables[0]), "all rows of a prompt use the same segments"


def test_copies_of_a_row_are_separated_when_rows_are_accessed(llama):
    """Greedy rows never differ, so the cache stores them once. An operation on rows separates them."""
    ids = text(tokens=300)
    with headinfer.enable(llama, chunk_tokens=CHUNK_TOKENS) as enabled:
        llama.generate(ids, **options(ids, max_new_tokens=4, do_sample=True, top_k=1, num_return_sequences=3))
        cache = enabled.last_cache
        assert (cache.copies, cache.head_layers[0].rows) == (3, 1)
        cache.batch_select_indices(torch.tensor([0, 2]))
        assert (cache.copies, cache.head_layers[0].rows) == (1, 2)
        with torch.no_grad():
            logits = llama(torch.full((2, 1), 5), past_key_values=cache).logits
        assert torch.equal(logits[0], logits[1])
        hidden = llama.generate(
            ids,
            **options(ids, max_new_tokens=4, num_beams=3, output_hidden_states=True, return_dict_in_generate=True),
        ).hidden_states
        assert hidden[0][0].shape[0] == 3, "other outputs have all rows"
