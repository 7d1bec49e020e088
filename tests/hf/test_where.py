"""Where an answer came from: masses against transformers' eager attention, on every path that KV takes."""

import itertools

import pytest
import torch
from families import VOCAB, tiny_model

import headinfer
from headinfer.errors import HeadinferError, UnsupportedError, UsageError
from headinfer.hf import where as where_module
from headinfer.hf.where import FAR_SHARE, SINK_TOKENS, even_edges

DOCUMENT_TOKENS = 600
SMALL = {"device_kv_budget_bytes": 2**23}


def ids(tokens, seed=1):
    return torch.randint(1, VOCAB, (tokens,), generator=torch.Generator().manual_seed(seed))


DOCUMENT = ids(DOCUMENT_TOKENS)
QUESTION = ids(9, seed=2)
ANSWER = ids(12, seed=3)
EDGES = [7, 20, 276, 532, 590]  # what precedes the document, an odd stretch, equal ones, and a rest


def read(enabled, document=DOCUMENT, expected_tokens=0):
    cache = enabled.new_cache(expected_tokens)
    enabled.model(document[None], past_key_values=cache, logits_to_keep=1)
    return cache


def recorded(monkeypatch):
    """The masses of all heads that the next where() records, by attention and query."""
    found = {}
    take = where_module._FarHeads.take

    def kept(heads, mass):
        for head in range(mass.mass.shape[0]):
            for query in range(mass.mass.shape[1]):
                found[mass.attention, mass.first_head + head, mass.first_query + query] = mass.mass[head, query].clone()
        take(heads, mass)

    monkeypatch.setattr(where_module._FarHeads, "take", kept)
    return found


@torch.inference_mode()
def eager_weights(model, tokens):
    """The weights [attention, heads, queries, keys] of transformers' eager attention in full-attention layers."""
    model.set_attn_implementation("eager")
    weights = model(tokens[None], output_attentions=True, use_cache=False).attentions
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * len(weights)
    if len(weights) == len(kinds):
        weights = [one for one, kind in zip(weights, kinds, strict=True) if "sliding" not in kind]
    return torch.stack([one[0] for one in weights])


def stretch_masses(weights, edges):
    """The sums of weights [..., keys] over stretches."""
    parts = [weights[..., start:stop].sum(dim=-1) for start, stop in itertools.pairwise(edges)]
    return torch.stack(parts, dim=-1)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llama", torch.float32), ("llama", torch.float64), ("gemma2", torch.float32), ("gpt_oss", torch.float32),
     ("gemma4_text", torch.float32), ("falcon_h1", torch.float32), ("qwen3_next", torch.float32)],
    ids=str,
)  # fmt: skip
def test_masses_are_those_of_eager_attention(family, dtype, monkeypatch):
    model = tiny_model(family)
    with headinfer.enable(model, chunk_tokens=256) as enabled, torch.inference_mode():
        cache = read(enabled)
        raw = recorded(monkeypatch)
        found = enabled.where(cache, QUESTION, ANSWER, edges=EDGES)
        assert cache.get_seq_length() == DOCUMENT_TOKENS
        assert cache.engine.recorder is None
    weights = eager_weights(model.to(dtype), torch.cat([DOCUMENT, QUESTION, ANSWER]))
    first = DOCUMENT_TOKENS + len(QUESTION) - 1
    queries = range(first, first + len(ANSWER))
    attentions, heads = weights.shape[:2]
    masses = torch.stack(
        [torch.stack([torch.stack([raw[a, h, q] for q in queries]) for h in range(heads)]) for a in range(attentions)]
    )
    assert len(raw) == masses[..., 0].numel()
    wanted = stretch_masses(weights[:, :, first:-1], [0, *EDGES, queries[-1] + 1])
    torch.testing.assert_close(masses, wanted.to(masses.dtype), atol=2e-5, rtol=1e-4)
    if family == "gpt_oss":
        assert masses.sum(dim=-1).max() < 1, "sinks have the rest"
    else:
        torch.testing.assert_close(masses.sum(dim=-1), torch.ones(masses.shape[:-1]), atol=2e-6, rtol=0)
    document = wanted[..., 1:-1]
    looks_far = document.amax(dim=-1) > FAR_SHARE
    torch.testing.assert_close(found.heads, looks_far.sum(dim=(0, 1)))
    expected = (document * looks_far[..., None]).sum(dim=(0, 1)).double()
    torch.testing.assert_close(found.mass, expected, atol=1e-4, rtol=1e-4)
    assert found.edges == EDGES
    assert float(found.shares.sum()) == pytest.approx(1 if found.heads.any() else 0)


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def in_place(llama):
    """What where() finds in place, with 2,600 tokens."""
    with headinfer.enable(llama, chunk_tokens=512) as enabled, torch.inference_mode():
        return enabled.where(read(enabled, ids(2600)), QUESTION, ANSWER)


@pytest.mark.parametrize(
    "options",
    [
        {"transport": "lazy", **SMALL},
        {"transport": "eager", "tile_tokens": 90, "heads_per_group": 1, **SMALL},
        {"transport": "lazy", "cpu_share": 0.5, **SMALL},
        {"transport": "eager", "device_kv_budget_bytes": 2**23 + 2**20, "streaming_budget_bytes": 2**23},
        {"transport": "lazy", "device_kv_budget_bytes": 2**26},
        {"transport": "lazy", "disk": True, **SMALL},
        {"transport": "in_place", "disk": True},
    ],
    ids=["lazy", "tiles", "share of the CPU", "some resident", "all resident", "disk", "disk in place"],
)
def test_each_path_of_kv(llama, in_place, tmp_path, options):
    is_on_disk = options.pop("disk", False) if "disk" in options else False
    if is_on_disk:
        options = {**options, "disk_tier": tmp_path, "host_kv_budget_bytes": 5 * 2**18}
    with headinfer.enable(llama, chunk_tokens=512, **options) as enabled, torch.inference_mode():
        cache = read(enabled, ids(2600))
        before = llama(QUESTION[None], past_key_values=cache.fork()).logits
        found = enabled.where(cache, QUESTION, ANSWER)
        after = llama(QUESTION[None], past_key_values=cache.fork()).logits
        if is_on_disk:
            assert cache.stats().disk_kv_bytes > 0
    torch.testing.assert_close(found.mass, in_place.mass, atol=1e-4, rtol=1e-4)
    assert torch.equal(found.heads, in_place.heads)
    assert torch.equal(before, after), "recording changes nothing"


@pytest.mark.parametrize("transport", ["in_place", "lazy"])
def test_quantised_kv(llama, in_place, transport):
    options = {"transport": transport, "kv_dtype": "int8", **SMALL}
    with headinfer.enable(llama, chunk_tokens=512, **options) as enabled, torch.inference_mode():
        found = enabled.where(read(enabled, ids(2600)), QUESTION, ANSWER)
    assert (found.shares - in_place.shares).abs().max() < 0.05, "K and V of 8 bits are not exact"


def test_a_long_question_and_a_long_answer_in_several_passes(llama, monkeypatch):
    question = ids(300, seed=4)
    answer = ids(70, seed=5)
    with headinfer.enable(llama, chunk_tokens=64) as enabled, torch.inference_mode():
        cache = read(enabled)
        found = enabled.where(cache, question, answer)
        monkeypatch.setattr(where_module, "_PASS_TOKENS", 7)
        again = enabled.where(cache, question, answer.tolist())
    assert found.mass.shape == (70, len(even_edges(0, DOCUMENT_TOKENS)) - 1)
    torch.testing.assert_close(found.mass, again.mass, atol=1e-4, rtol=1e-4)


def test_a_document_in_the_first_tokens_leaves_out_those_of_sinks(llama):
    with headinfer.enable(llama) as enabled, torch.inference_mode():
        cache = read(enabled)
        whole = enabled.where(cache, QUESTION, ANSWER, edges=[0, 300, 600])
        later = enabled.where(cache, QUESTION, ANSWER, edges=[SINK_TOKENS, 300, 600])
    assert torch.equal(whole.mass, later.mass)


def test_what_cannot_be_told_is_refused_in_one_sentence(llama):
    with headinfer.enable(llama) as enabled, torch.inference_mode():
        cache = read(enabled)
        for wrong, message in [
            ({"question": []}, "the question has no tokens"),
            ({"answer": []}, "the answer has no tokens"),
            ({"answer": "text"}, "answer is text"),
            ({"edges": [0]}, "must be at least two ascending positions from 0 to 609"),
            ({"edges": [0, 9, 9]}, "ascending"),
            ({"edges": [0, 700]}, "ascending positions from 0 to 609"),
            ({"cache": cache.fork_rows(torch.zeros(2, dtype=torch.long))}, "the cache holds 2 rows"),
        ]:
            with pytest.raises(UsageError, match=message):
                enabled.where(**{"cache": cache, "question": QUESTION, "answer": ANSWER, **wrong})
        assert cache.engine.recorder is None


def test_changing_rotary_frequencies_are_refused():
    rope = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}
    model = tiny_model("llama", max_position_embeddings=605, rope_parameters=rope)
    with headinfer.enable(model) as enabled, torch.inference_mode():
        cache = read(enabled)
        with pytest.raises(UnsupportedError, match="rotary frequencies change"):
            enabled.where(cache, QUESTION, ANSWER)


def test_an_error_leaves_the_cache_and_the_recorder_as_they_were(llama, monkeypatch):
    def fail(heads, mass):
        raise HeadinferError("stop")

    with headinfer.enable(llama) as enabled, torch.inference_mode():
        cache = read(enabled)
        monkeypatch.setattr(where_module._FarHeads, "take", fail)
        with pytest.raises(HeadinferError, match="stop"):
            enabled.where(cache, QUESTION, ANSWER)
        assert cache.engine.recorder is None
        assert cache.get_seq_length() == DOCUMENT_TOKENS
