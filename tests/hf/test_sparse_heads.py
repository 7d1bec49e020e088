"""sparse_heads against float64 attention with explicit masks (tests/support/sparse_oracle.py), and what is refused.

The first layer of the pattern has no full head, the second has two that are no neighbours, the third one, the last all.
"""

import pytest
import torch
from families import tiny_model
from generation import generate, make_model, padded, prompt
from quantised_cache import forward
from sparse_oracle import sparse_oracle
from transformers import DynamicCache

import headinfer
from headinfer import Options
from headinfer.engine.device_kv import HeadCounts
from headinfer.engine.engine import Engine
from headinfer.errors import StateError, UnsupportedError, UsageError
from headinfer.hf.sparse_layers import SparseHeadLayer
from headinfer.kv.head_window import SLACK_TOKENS
from headinfer.plan.layer_shape import WINDOW_SLACK_TOKENS
from headinfer.utils.head_pattern import HeadPattern

PATTERN = HeadPattern(((0, 0, 0, 0), (0.9, 0.1, 0.2, 0.8), (0, 1, 0, 0), (1, 1, 1, 1)), sink_tokens=8, recent_tokens=40)
TOKENS = 620
CHUNKED = 608  # the other tokens are read one by one
CHUNK = 192
ERROR = 1e-5  # of logits up to 0.7
RING = {"device_kv_budget_bytes": 6 * 2**20, "streaming_budget_bytes": 6 * 2**20}
RESIDENT = {"device_kv_budget_bytes": 6 * 2**20, "streaming_budget_bytes": 5 * 2**20}


@pytest.fixture(scope="module")
def llama():
    return make_model("llama")


@pytest.fixture(scope="module")
def ids():
    return prompt(rows=2, tokens=TOKENS)["input_ids"]


@pytest.fixture(scope="module")
def oracle(llama, ids):
    """The logits of all tokens."""
    return alone(llama, ids)


def alone(model, ids, pattern=PATTERN):
    with sparse_oracle(model, pattern):
        return forward(model, DynamicCache(config=model.config), ids, ids.shape[1])


def error(found, wanted):
    return float((found - wanted).abs().max())


def enabled_with(model, pattern=PATTERN, **options):
    return headinfer.enable(model, chunk_tokens=CHUNK, sparse_heads=pattern, **options)


@pytest.mark.parametrize(
    ("chunk", "options"),
    [
        (TOKENS, {}),
        (CHUNK, {}),
        (33, {}),
        (CHUNK, {"transport": "eager", **RING}),
        (TOKENS, {"transport": "lazy", **RING}),
        (CHUNK, {"transport": "lazy", "cpu_share": 1.0, **RING}),
        (CHUNK, {"transport": "lazy", "heads_per_group": 3, "tile_tokens": 100, **RESIDENT}),
    ],
    ids=["whole", "chunks", "short chunks", "eager", "lazy", "cpu share", "resident and fixed tiles"],
)
def test_logits_are_those_of_the_mask_for_all_chunks_and_transports(llama, ids, oracle, chunk, options):
    with enabled_with(llama, **options) as enabled:
        cache = enabled.new_cache()
        chunks = forward(llama, cache, ids[:, :CHUNKED], chunk)
        single = forward(llama, cache, ids[:, CHUNKED:], 1)
        stats = cache.stats()
    assert error(torch.cat([chunks, single], dim=1), oracle) < ERROR
    assert stats.tokens == cache.get_seq_length() == TOKENS
    head_bytes = 2 * 32 * 4  # of a token: rows, K and V, float32
    assert SLACK_TOKENS == WINDOW_SLACK_TOKENS
    assert 0 < stats.device_window_bytes <= (4 + 2 + 3) * (8 + 40 + SLACK_TOKENS) * head_bytes
    assert 0 < stats.host_kv_bytes <= (2 + 1 + 4) * 1024 * head_bytes
    assert bool(stats.cpu_attended_bytes) == ("cpu_share" in options)
    assert bool(stats.device_resident_bytes) == ("heads_per_group" in options)
    assert stats.device_kv_bytes >= stats.device_window_bytes + stats.device_tail_bytes
    cache.reset()
    assert cache.stats().device_window_bytes == 0


def test_exact_attention_differs(llama, ids, oracle):
    assert error(forward(llama, DynamicCache(config=llama.config), ids, TOKENS), oracle) > 0.1


@pytest.mark.parametrize("more", [{"rows": 3}, {"rows": 2, "num_beams": 3}], ids=["greedy", "beams"])
def test_padded_rows_and_beams_give_the_tokens_of_the_mask(llama, more):
    inputs = padded(rows=more["rows"], tokens=320)
    more = {"max_new_tokens": 4, "num_beams": more.get("num_beams", 1)}
    with sparse_oracle(llama, PATTERN):
        wanted, logits = generate(llama, inputs, **more)
    for options in ({}, {"transport": "lazy", "device_kv_budget_bytes": 2**24, "streaming_budget_bytes": 2**24}):
        with enabled_with(llama, **options):
            found, here = generate(llama, inputs, **more)
        assert torch.equal(found, wanted)
        assert error(here, logits) < ERROR


@pytest.mark.parametrize("more", [{"prompt_lookup_num_tokens": 8}, {"assistant_model": "itself"}])
def test_rejected_guesses_are_removed(llama, more):
    inputs = prompt(tokens=400)
    inputs["input_ids"][:, 250:] = inputs["input_ids"][:, 50:200]
    if "assistant_model" in more:
        more = {"assistant_model": make_model("llama", num_hidden_layers=1)}
    with enabled_with(llama, guesses="off"):
        plain = llama.generate(**inputs, max_new_tokens=24, do_sample=False, pad_token_id=0)
        found = llama.generate(**inputs, max_new_tokens=24, do_sample=False, pad_token_id=0, **more)
    assert torch.equal(found, plain)


def test_questions_of_different_lengths_are_answered_together(llama):
    document = prompt(tokens=500)["input_ids"]
    questions = [prompt(tokens=count, seed=count)["input_ids"][0] for count in (5, 43, 60)]
    with enabled_with(llama) as enabled:
        cache = enabled.new_cache()
        forward(llama, cache, document, CHUNK)
        together = enabled.ask(cache, questions, document_ids=document, max_new_tokens=5, pad_token_id=0)
        single = [
            enabled.ask(cache, [one], document_ids=document, max_new_tokens=5, pad_token_id=0)[0] for one in questions
        ]
        assert together == single
        assert cache.get_seq_length() == 500
    with sparse_oracle(llama, PATTERN):
        whole = torch.cat([document[0], questions[1]])[None]
        mask = torch.ones_like(whole)
        wanted = llama.generate(whole, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert wanted[0, whole.shape[1] :].tolist() == together[1]


@pytest.mark.parametrize("failing", range(4))
def test_an_error_in_any_layer_leaves_the_cache_as_it_was(llama, ids, oracle, failing, monkeypatch):
    with enabled_with(llama) as enabled:
        cache = enabled.new_cache()
        forward(llama, cache, ids[:, :CHUNK], CHUNK)
        layer = cache.layers[failing]
        attend = layer.attend

        def fail(*args):
            attend(*args)
            raise KeyboardInterrupt

        for start in (CHUNK, 2 * CHUNK):
            layer.attend = fail
            with pytest.raises(KeyboardInterrupt):
                forward(llama, cache, ids[:, start : start + CHUNK], CHUNK)
            layer.__dict__.pop("attend", None)
            assert {layer.get_seq_length() for layer in cache.layers} == {start}
            found = forward(llama, cache, ids[:, start : start + CHUNK], CHUNK)
            assert error(found, oracle[:, start : start + CHUNK]) < ERROR


def test_forks_crops_and_selected_rows(llama, ids, oracle):
    with enabled_with(llama) as enabled:
        cache = enabled.new_cache()
        forward(llama, cache, ids[:, :CHUNKED], CHUNK)
        fork = cache.fork()
        checkpoint = cache.checkpoint()
        forward(llama, cache, ids.flip(0)[:, CHUNKED:], 1)
        cache.crop(CHUNKED + 3)
        cache.crop(-3)
        assert error(forward(llama, cache, ids[:, CHUNKED:], 1), oracle[:, CHUNKED:]) < ERROR
        cache.rollback(checkpoint)
        cache.crop(-100)
        rest = ids[:, CHUNKED - 100 :]
        assert error(forward(llama, cache, rest, CHUNK), oracle[:, CHUNKED - 100 :]) < ERROR
        with pytest.raises(StateError, match=r"its streaming heads keep only their first 8 .* keep a fork"):
            cache.crop(200)
        assert {layer.get_seq_length() for layer in cache.layers} == {TOKENS}
        fork.reorder_cache(torch.tensor([1, 1, 0]))
        rows = ids[[1, 1, 0], CHUNKED:]
        assert error(forward(llama, fork, rows, 1), oracle[[1, 1, 0], CHUNKED:]) < ERROR
        short = enabled.new_cache()
        forward(llama, short, ids[:, :100], 100)
        short.crop(1)  # all tokens are in the window
        assert error(forward(llama, short, ids[:, 1:300], CHUNK), oracle[:, 1:300]) < ERROR


@pytest.mark.filterwarnings("ignore::headinfer.errors.ApproximationWarning")
def test_saved_caches_go_on_as_they_were(llama, ids, oracle, tmp_path):
    with enabled_with(llama) as enabled:
        cache = enabled.new_cache()
        forward(llama, cache, ids[:, :CHUNKED], CHUNK)
        cache.save(tmp_path / "s", ids)
        loaded = headinfer.HeadCache.load(tmp_path / "s", llama, sparse_heads=PATTERN)
        found = forward(llama, loaded, ids[:, CHUNKED:], 1)
        assert torch.equal(found, forward(llama, cache, ids[:, CHUNKED:], 1))
        assert error(found, oracle[:, CHUNKED:]) < ERROR
        assert loaded.stats().device_window_bytes == cache.stats().device_window_bytes


def test_with_quantised_kv_only_full_heads_are_quantised(llama, ids, oracle):
    with enabled_with(llama, kv_dtype="int8", transport="lazy", **RING) as enabled:
        found = forward(llama, enabled.new_cache(), ids, CHUNK)
    assert 0 < error(found, oracle) < 0.01


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_soft_caps_and_sinks(family):
    model = make_model(family, layer_types=["full_attention"] * 4, sliding_window=64)
    if family == "gemma2":
        assert model.config.attn_logit_softcapping
    ids = prompt(tokens=300)["input_ids"]
    wanted = alone(model, ids)
    with enabled_with(model) as enabled:
        cache = enabled.new_cache()
        found = torch.cat([forward(model, cache, ids[:, :280], 77), forward(model, cache, ids[:, 280:], 1)], dim=1)
    assert error(found, wanted) < 1e-4


def test_layers_with_other_attention_have_no_heads_in_the_pattern():
    model = make_model("gemma3_text")
    pattern = HeadPattern(((), (1, 0, 0, 0), (), (0, 0, 0, 0)), sink_tokens=8, recent_tokens=40)
    ids = prompt(tokens=300)["input_ids"]
    found = []
    for chunk in (300, 77):
        with enabled_with(model, pattern) as enabled:
            cache = enabled.new_cache()
            found.append(forward(model, cache, ids, chunk))
    assert error(*found) < ERROR
    assert [type(layer) is SparseHeadLayer for layer in cache.layers] == [False, True, False, True]


def test_where_counts_the_full_heads(llama):
    document = prompt(tokens=500)["input_ids"]
    with enabled_with(llama) as enabled:
        cache = enabled.new_cache()
        forward(llama, cache, document, CHUNK)
        found = enabled.where(cache, [1, 2, 3], [4, 5])
    assert float(found.shares.sum()) == pytest.approx(1.0)


def test_half_types(llama, ids, oracle):
    model = make_model("llama").bfloat16()
    with enabled_with(model, transport="lazy", **RING) as enabled:
        found = forward(model, enabled.new_cache(), ids[:, :400], CHUNK)
    assert error(found.float(), oracle[:, :400]) < 0.1


def test_what_is_refused(llama):
    with pytest.raises(UsageError, match="has 2 layers, and the model has 4"):
        headinfer.enable(llama, sparse_heads=HeadPattern(((1, 0, 0, 0),) * 2))
    with pytest.raises(UsageError, match="no full head"):
        headinfer.HeadCache(llama.config, sparse_heads=HeadPattern(((0, 0, 0, 0),) * 4))
    for family, reason in (
        ("falcon_h1", "full and linear attention together"),
        ("gemma3n_text", "share the K and V of others"),
    ):
        with pytest.raises(UnsupportedError, match=f"not served for {family}, because .*{reason}"):
            headinfer.enable(tiny_model(family), sparse_heads=PATTERN)
    assert llama.config._attn_implementation != "headinfer"


def test_the_layers_of_several_devices_are_counted_by_device():
    counts = [HeadCounts(0, 4), HeadCounts(2, 2), HeadCounts(1, 3), HeadCounts(4, 0)]
    engine = Engine(Options(sparse_heads=PATTERN), 3, counts)
    first, second = (torch.device("cuda", index) for index in range(2))
    engine.place([first, first, second, second])
    assert engine.layers_on == {first: 1, second: 2}
