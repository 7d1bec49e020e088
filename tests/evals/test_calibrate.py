"""Calibration: what is measured against float64, values of heads whose needs are known, files, and mistakes."""

import json

import pytest
import torch
from families import tiny_model

from headinfer.attention.reference import attend_reference
from headinfer.errors import UnsupportedError
from headinfer.evals.calibrate import CalibrationJob, Calibrator, Text
from headinfer.hf import head_needs
from headinfer.hf.head_needs import HeadMeter, split_attention
from headinfer.hf.models import ModelSource
from headinfer.utils.head_pattern import read_pattern

SINK = 4
RECENT = 32
ESSAY = " ".join(f"Sentence {n} of the essay says {'rather ' * (n % 7)}little." for n in range(90))
MODEL = "random:tiny-llama?layers=2&hidden=64&intermediate=64&heads=4&kv_heads=2"
SHORT = ("--context", 600, "--needles", 2, "--sink-tokens", SINK, "--recent-tokens", RECENT)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_attention_with_and_without_far_keys_is_that_of_float64(softcap, has_sinks, monkeypatch):
    monkeypatch.setattr(head_needs, "_MOST_SCORES", 300)  # blocks of few keys
    torch.manual_seed(0)
    q = torch.randn(6, 5, 8)
    k = torch.randn(2, 90, 8)
    v = torch.randn(2, 90, 12)
    positions = torch.tensor([3, 35, 36, 60, 89])
    sinks = torch.randn(6) if has_sinks else None
    exact, near, mass = split_attention(
        q, k, v, positions, sink_tokens=SINK, recent_tokens=RECENT, scale=0.5, softcap=softcap, sinks=sinks
    )
    keys = torch.arange(90)
    seen = keys <= positions[:, None]
    is_near = seen & ((keys < SINK) | (positions[:, None] - keys < RECENT))
    states = [
        attend_reference(q[None], k[None], v[None], scale=0.5, mask=mask, softcap=softcap)
        for mask in (seen, is_near, seen & ~is_near)
    ]
    sink = sinks[None, :, None].double() if has_sinks else torch.tensor(-torch.inf, dtype=torch.float64)
    total = torch.logaddexp(states[0].lse, sink)
    for found, state in ((exact, states[0]), (near, states[1])):
        expected = state.out * torch.sigmoid(state.lse - sink)[..., None]
        torch.testing.assert_close(found.double(), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mass.double(), torch.exp(states[2].lse - total)[0], rtol=1e-5, atol=1e-6)
    assert mass[:, :2].eq(0).all(), "the first positions have no far keys"


# Soft caps and windows, shared K and V, sinks, linear attention beside full attention, and Conv1D projections.
@pytest.mark.parametrize("family", ["gemma2", "gemma3n_text", "gpt_oss", "falcon_h1", "gpt2"])
def test_the_model_reads_exactly_and_each_layer_is_measured(family, monkeypatch):
    monkeypatch.setattr(head_needs, "_MOST_CHUNK_TOKENS", 24)
    model = tiny_model(family)
    ids = torch.randint(3, 60, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    implementation = model.config._attn_implementation
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0]
    with HeadMeter(model, 2, 8) as meter:
        cache = meter.new_cache()
        first, _ = meter.read(cache, ids[:40], [5, 30])
        fork = meter.fork(cache)
        found, logits = meter.read(fork, ids[40:], range(41, 60), logits=20)
        again, _ = meter.read(cache, ids[40:], range(41, 60))
    torch.testing.assert_close(logits, expected[-20:], rtol=2e-3, atol=2e-3)
    shape = meter.shape
    assert sorted(first) == sorted(found) == list(shape.offloaded_layers)
    for layer, needs in found.items():
        assert needs.error.shape[0] == shape.layers[layer].kv_heads
        assert needs.error.shape[1] % 19 == 0, "layers that share K and V add queries"
        assert torch.equal(needs.error, again[layer].error), "the fork has changed nothing"
        assert (needs.mass <= needs.largest_mass + 1e-9).all()
        assert (needs.effect > 0).all()
        assert (first[layer].error[:, 0] == 0).all()
    assert model.config._attn_implementation == implementation, "the model is as before"


def known_model():
    """A layer whose KV head 0 attends to the query's own token only, and head 1 to all tokens alike."""
    model = tiny_model("llama", num_hidden_layers=1, attention_bias=True, vocab_size=300)
    attention = model.model.layers[0].self_attn
    dim = attention.head_dim
    queries = attention.num_key_value_groups * dim
    with torch.no_grad():
        for projection, width in ((attention.q_proj, queries), (attention.k_proj, dim)):
            projection.weight.zero_()
            projection.bias.zero_()
            projection.bias[:width] = 30.0
    return model


def calibrator(model, needles=2, **changes):
    source = ModelSource("tiny", model.config, is_random=True)
    fields = {"lengths": [600], "sink_tokens": SINK, "recent_tokens": RECENT, **changes}
    texts = [Text("essay", ESSAY)]
    return Calibrator(CalibrationJob(source, "tiny", torch.float32, "cpu", texts, needles=needles, **fields))


def test_heads_of_known_needs_get_the_values_at_both_ends():
    model = known_model()
    pattern = calibrator(model, share=0.5).measure(model)
    assert pattern.values == ((0.0, 1.0),)
    assert pattern.full_heads(0) == (1,)
    measured = pattern.info["measured"]["needles"]
    assert measured["mass"][0][0] == 0.0
    assert measured["error"][0][0] == 0.0
    assert measured["mass"][0][1] > 1 - 2 * (SINK + RECENT) / 600


def test_the_same_options_write_the_same_bytes_and_the_file_is_shown(run_command, tmp_path):
    first = tmp_path / "first.json"
    book = tmp_path / "book.txt"
    book.write_text(ESSAY)
    arguments = ("heads", MODEL, "--calibrate", *SHORT, "--file", book, "--seed", 3, "--device", "cpu")
    code, out, err = run_command(*arguments, "-o", first)
    assert code == 0, err
    assert "2 of 4 KV heads (50.0%)" in out
    assert "predicted" in err, "a random model finds nothing, which is said"
    content = first.read_bytes()
    assert run_command(*arguments, "-o", first, "--json")[0] == 0, "an earlier pattern is replaced"
    assert first.read_bytes() == content
    pattern = read_pattern(first)
    assert pattern.share == 0.5
    assert max(value for values in pattern.values for value in values) == 1.0
    assert [text["name"] for text in pattern.info["texts"]] == ["the text that headinfer ships", "book.txt"]
    assert (pattern.info["contexts"], pattern.info["needles"], pattern.info["seed"]) == ([600], 2, 3)
    code, out, _ = run_command("heads", first, "--sparse-share", 0.25, "--json")
    assert code == 0
    shown = json.loads(out)
    assert shown["share"] == 0.25
    share, nbytes = shown["kept"]["8192"]
    assert share == (3 * 8192 + SINK + RECENT) / (4 * 8192)
    assert nbytes == share * 4 * 8192 * 2 * 16 * 4
    table = tmp_path / "full_attention_heads.tsv"
    table.write_text("1 0\n0.25 0.75\n")
    (tmp_path / "config.json").write_text('{"sink_size": 64, "recent_size": 256}')
    code, out, _ = run_command("heads", table, "--threshold", 0.2)
    assert code == 0
    assert "1 of 4 KV heads" in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((MODEL, "--calibrate"), "name it with -o FILE"),
        ((MODEL,), "there is no file random:tiny-llama"),
        (("book.txt",), "is not a head pattern"),
        (("book.txt", "-o", "x.json"), "-o is for --calibrate"),
        (("book.txt", "--seed", 0), "--seed is for --calibrate"),
        (("good.json", "--sparse-share", 0.5, "--threshold", 0.5), "give one of them"),
        (("good.json", "--threshold", 1), "leaves no full head: the highest value is 0.9"),
        ((MODEL, "--calibrate", "-o", "book.txt"), "is not an earlier result"),
        ((MODEL, "--calibrate", "-o", "no.json", "--file", "missing.txt"), "missing.txt"),
        ((MODEL, "--calibrate", "-o", "no.json", "--file", "blank.txt"), "no text"),
        ((MODEL, "--calibrate", "-o", "no.json", "--context", "4Q"), "4Q"),
        ((MODEL, "--calibrate", "-o", "no.json", "--context", 639), "give a --context of at least 640"),
        ((MODEL, "--calibrate", "-o", "no.json", "--context", 700, "--needles", 50), "cannot hold 50 needles"),
        ((MODEL, "--calibrate", "-o", "no.json", *SHORT, "--sparse-share", 0.9), "leaves none of the 4 heads full"),
        ((MODEL, "--calibrate", "-o", "no.json", "--context", "512M"), "give a smaller --context"),
        (("random:gemma-3", "--calibrate", "-o", "no.json"), "no built-in config"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(map(str, value))[-40:],
)
def test_mistakes_are_refused_before_weights_are_loaded(arguments, sentence, run_command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ModelSource, "load", lambda *_, **__: pytest.fail("weights were loaded"))
    (tmp_path / "book.txt").write_text(ESSAY)
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "good.json").write_text('{"format": "headinfer-heads", "version": 1, "heads": [[0.1, 0.9]]}')
    code, out, err = run_command("heads", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("headinfer: error: ")
    assert err.count("\n") == 1
    assert sentence in err
    assert not (tmp_path / "no.json").exists()


def test_a_model_that_is_not_served_is_refused():
    model = tiny_model("llama")
    model.config.model_type = "deepseek_v3"
    with pytest.raises(UnsupportedError, match="cannot be served"):
        HeadMeter(model, SINK, RECENT)
