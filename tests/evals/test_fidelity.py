"""`headinfer eval fidelity`: its figures against torch and transformers, its files, and what it refuses."""

import dataclasses
import json
import math

import pytest
import torch
from quantised_cache import forward, quantised_cache

from headinfer.errors import CapacityError, UnsupportedError, UsageError
from headinfer.evals import fidelity_job
from headinfer.evals.fidelity import Differences, check_disk, compare, differences
from headinfer.evals.fidelity_job import FidelityJob, prepare
from headinfer.hf.models import ModelSource, resolve
from headinfer.utils.head_pattern import HeadPattern

TINY = "random:tiny-llama?layers=2&hidden=64&intermediate=64&heads=4&kv_heads=2"
CHUNK = 128
WINDOW = 100


@pytest.fixture(scope="module")
def model():
    return resolve(TINY).load(dtype=torch.float32, device="cpu", seed=0)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 256, (1, 600), generator=torch.Generator().manual_seed(1))


def compared(model, ids, **approximate):
    exact = {"chunk_tokens": CHUNK}
    (found,) = compare(model, ids, window=WINDOW, exact=exact, others=[exact | approximate])
    return found


@pytest.fixture(scope="module")
def in_int4(model, ids):
    return compared(model, ids, kv_dtype="int4")


# -- figures -----------------------------------------------------------------------------------------------------------


def test_differences_are_those_of_torch():
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(40, 50, generator=generator) * 3
    other = exact + torch.randn(40, 50, generator=generator)
    next_ids = torch.randint(0, 50, (40,), generator=generator)
    found = differences(exact, other, next_ids)
    p = exact.double().log_softmax(-1)
    q = other.double().log_softmax(-1)
    torch.testing.assert_close(found.kl, torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1))
    torch.testing.assert_close(found.exact_nll, torch.nn.functional.cross_entropy(p, next_ids, reduction="none"))
    torch.testing.assert_close(found.nll, torch.nn.functional.cross_entropy(q, next_ids, reduction="none"))
    assert found.agrees.tolist() == [a == b for a, b in zip(exact.argmax(-1), other.argmax(-1), strict=True)]
    summary = found.summary()
    ordered = found.kl.sort().values
    assert summary["kl_mean"] == pytest.approx(float(ordered.mean()))
    assert summary["kl_median"] == pytest.approx(float((ordered[19] + ordered[20]) / 2))
    assert ordered[38] < summary["kl_p99"] < summary["kl_max"] == ordered[39]
    assert summary["perplexity"] == pytest.approx(math.exp(float(found.nll.mean())))

    impossible = torch.cat([exact, torch.full((40, 1), -torch.inf)], dim=1)
    alike = torch.cat([other, torch.full((40, 1), -torch.inf)], dim=1)
    torch.testing.assert_close(differences(impossible, alike, next_ids).kl, found.kl)


def test_exact_kv_compared_with_itself_differs_in_no_bit(model, ids):
    exact = {"chunk_tokens": CHUNK}
    found, rounded = compare(model, ids, window=WINDOW, exact=exact, others=[exact, {"chunk_tokens": CHUNK // 2}])
    assert 0 < float(rounded.kl.mean()) < 1e-12, "other chunks round otherwise"
    assert found.kl.shape == (WINDOW,)
    assert (found.kl == 0).all()
    assert found.agrees.all()
    assert torch.equal(found.exact_nll, found.nll)


def test_perplexity_is_that_of_transformers(model, ids, in_int4):
    labels = ids.clone()
    labels[:, :-WINDOW] = -100
    with torch.inference_mode():
        loss = model(input_ids=ids, labels=labels).loss
    assert float(in_int4.exact_nll.mean()) == pytest.approx(float(loss), rel=1e-6)


def test_the_divergence_is_that_of_quantised_kv_in_transformers(model, ids, monkeypatch):
    """The oracle has all logits at once. Blocks of 64 tokens are too long for the kernel that rounds queries too."""
    monkeypatch.setattr("headinfer.evals.fidelity.BLOCK_TOKENS", 64)
    found = compared(model, ids, kv_dtype="int4")
    cache = quantised_cache(model.config, 4)
    first = ids.shape[1] - 1 - WINDOW
    forward(model, cache, ids[:, :first], CHUNK)
    logits = forward(model, cache, ids[:, first:-1], 64)[0]
    with torch.inference_mode():
        exact = model(input_ids=ids).logits[0, first:-1]
    p = exact.double().log_softmax(-1)
    wanted = torch.nn.functional.kl_div(logits.double().log_softmax(-1), p, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(found.kl, wanted, rtol=0.02, atol=1e-11)


def test_fewer_bits_diverge_more_and_the_same_each_time(model, ids, in_int4):
    in_int8 = compared(model, ids, kv_dtype="int8")
    assert 0 < float(in_int8.kl.mean()) < float(in_int4.kl.mean()) / 10
    again = compared(model, ids, kv_dtype="int4", transport="eager")
    assert torch.equal(again.kl, in_int4.kl)


def test_sparse_heads_diverge_unless_they_see_everything(model, ids):
    half = HeadPattern(((0.0, 1.0),) * 2, sink_tokens=4, recent_tokens=64)
    near = compared(model, ids, sparse_heads=half)
    assert float(near.kl.mean()) > 1e-9
    everything = compared(model, ids, sparse_heads=dataclasses.replace(half, recent_tokens=600))
    assert 0 <= float(everything.kl.max()) < 1e-11


def test_logits_that_are_not_finite_are_refused():
    nan = torch.full((2,), torch.nan, dtype=torch.float64)
    with pytest.raises(UnsupportedError, match="not finite"):
        Differences(nan, torch.ones(2, dtype=torch.bool), nan, nan).summary()


# -- what is checked before the model is loaded ------------------------------------------------------------------------


def job(tmp_path, characters=3000, **options):
    text = "It was a bright cold day in April. " * 200
    given = {"approximate": {"kv_dtype": "int8"}} | options
    return FidelityJob(TINY, [text[:characters]], tmp_path, device="cpu", **given)


def test_lengths_are_powers_of_two_that_fit(tmp_path, monkeypatch):
    assert prepare(job(tmp_path)).lengths == (1024, 2048)
    assert prepare(job(tmp_path, 900)).lengths == (900,)
    short = dataclasses.replace(job(tmp_path), model=f"{TINY}&context=1024")
    assert prepare(short).lengths == (1024,)
    plan_run = fidelity_job.plan_run

    def refusing(request):
        if request.context_tokens > 1024:
            raise CapacityError("too long")
        return plan_run(request)

    monkeypatch.setattr(fidelity_job, "plan_run", refusing)
    assert prepare(job(tmp_path)).lengths == (1024,)
    with pytest.raises(CapacityError):
        prepare(job(tmp_path, lengths=(900, 2000)))


def test_a_length_is_longer_than_what_stays_exact(tmp_path):
    assert prepare(job(tmp_path, lengths=(770,))).lengths == (770,)
    with pytest.raises(UsageError, match="770 are the fewest of which 512 can be compared"):
        prepare(job(tmp_path, lengths=(769,)))
    pattern = HeadPattern(((0.0, 1.0),) * 2, sink_tokens=64, recent_tokens=300)
    assert prepare(job(tmp_path, lengths=(878,), approximate={"sparse_heads": pattern})).lengths == (878,)
    with pytest.raises(UsageError, match="878 are the fewest"):
        prepare(job(tmp_path / "sparse", lengths=(877,), approximate={"sparse_heads": pattern}))
    with pytest.raises(UsageError, match="has 3 layers, and the model has 2"):
        prepare(job(tmp_path, approximate={"sparse_heads": HeadPattern(((0.0, 1.0),) * 3)}))


def test_no_token_stays_resident_on_a_gpu(tmp_path):
    for given, wanted in ((None, 2**28), (2**30, 2**30)):
        options = fidelity_job._exact_options(job(tmp_path, device_kv_budget_bytes=given), "cuda:0")
        assert options["device_kv_budget_bytes"] == options["streaming_budget_bytes"] == wanted


def test_a_disk_without_space_is_refused(monkeypatch):
    monkeypatch.setattr("headinfer.evals.fidelity.free_disk_bytes", lambda folder: 10**6)
    check_disk(512, 256)
    with pytest.raises(CapacityError, match="choose a smaller --window"):
        check_disk(512, 128_000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "exact KV has nothing to be compared with: give --kv-dtype int8"),
        (("--kv-dtype", "auto"), "exact KV has nothing to be compared with"),
        (("--kv-dtype", "int3"), "--kv-dtype is int3"),
        (("--kv-dtype", "int8", "--file", "/nowhere"), "cannot read /nowhere"),
        (("--kv-dtype", "int8", "--lengths", "4K"), "more than the 2,000 tokens of the text"),
        (("--kv-dtype", "int8", "--lengths", "500,1K"), "a length of 500 tokens is too short: 770 are the fewest"),
        (("--kv-dtype", "int8", "--lengths", "4X"), "is not a number of tokens"),
        (("--kv-dtype", "int8", "--window", "5K"), "the text has 2,000 tokens, and 5,378 are the fewest"),
        (("--kv-dtype", "int8", "--needles", "200"), "1024 tokens cannot hold 200 needles"),
    ],
)
def test_mistakes_are_reported_in_one_sentence(run_command, tmp_path, monkeypatch, options, message):
    monkeypatch.setattr(ModelSource, "load", lambda *_, **__: pytest.fail("weights were loaded first"))
    text = tmp_path / "text.txt"
    text.write_text("word " * 400)
    file = () if "--file" in options else ("--file", text)
    code, _, err = run_command("eval", "fidelity", TINY, *file, *options, "--out", tmp_path / "out")
    assert code == 2
    assert message in " ".join(err.split())
    assert err.startswith("headinfer: error: ")
    assert not (tmp_path / "out").exists()


def test_a_model_whose_head_dims_cannot_be_quantised_is_refused(run_command, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("word " * 400)
    model = TINY.replace("hidden=64", "hidden=48")
    code, _, err = run_command("eval", "fidelity", model, "--file", text, "--kv-dtype", "int8", "--out", tmp_path)
    assert code == 2
    assert "whose head dims are 12 for K" in err


# -- the command -------------------------------------------------------------------------------------------------------


def test_end_to_end(run_command, tmp_path):
    pytest.importorskip("matplotlib")
    text = tmp_path / "text.txt"
    text.write_text("It was a bright cold day in April. " * 40)
    out = tmp_path / "out"
    command = ("eval", "fidelity", TINY, "--file", text, "--kv-dtype", "int4", "--window", "32", "--needles", "1")
    code, shown, err = run_command(*command, "--lengths", "600", "--chunk-tokens", "256", "--out", out)
    assert code == 0, err
    assert "int4: the last 32 tokens" in shown
    kept = json.loads((out / "results.json").read_text())
    assert kept["command"].startswith("headinfer eval fidelity")
    assert kept["about"]["approximation"] == "int4"
    assert kept["versions"]["torch"] == torch.__version__
    (first,) = kept["lengths"]
    assert (first["length"], first["chunk_tokens"]) == (600, 256)
    assert 0 < first["kl_mean"] < first["kl_p99"] <= first["kl_max"]
    assert {first["needles"], first["exact_needles_found"], first["needles_found"]} <= {0, 1}
    assert (out / "fidelity.png").read_bytes().startswith(b"\x89PNG")
    assert first["rounding"]["kl_mean"] < first["kl_mean"]
    assert "\n| tokens | 600 |\n" in (out / "results.md").read_text()

    more = (*command, "--chunk-tokens", "256", "--out", out, "--json", "--lengths")
    code, shown, _ = run_command(*more, "500,600")
    lengths = json.loads(shown)["lengths"]
    assert [one["length"] for one in lengths] == [500, 600]
    assert lengths[1] == first
    code, _, err = run_command(*command, "--lengths", "600", "--out", out)
    assert code == 2
    assert "holds another evaluation: its chunk_tokens is 256, not 'planned'" in err
