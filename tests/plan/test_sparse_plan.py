"""Plans with sparse heads: what is stored, moved and computed of streaming heads, and plans without them as before."""

import dataclasses
import json

import pytest

from headinfer.errors import CapacityError, UnsupportedError, UsageError
from headinfer.plan.compare import kv_forms, memory_by_method, sparse_forms
from headinfer.plan.fit import longest_context
from headinfer.plan.footprint import host_kv_tokens, streaming_footprint, tail_bytes
from headinfer.plan.hardware import HARDWARE
from headinfer.plan.layer_shape import LayerShape
from headinfer.plan.model_shape import ModelShape
from headinfer.plan.models import find_shape
from headinfer.plan.planner import make_plan
from headinfer.plan.request import Request
from headinfer.plan.roofline import Schedule, decode_seconds, prefill_seconds
from headinfer.utils.head_pattern import HeadPattern

K = 1024
M = 2**20
GIB = 2**30
LLAMA = find_shape("llama-3-8b")
RTX4090 = HARDWARE["rtx4090"]
HALF = LLAMA.even_pattern(0.5)
WINDOW = 64 + 256
KEPT = 2 * (WINDOW + 256)  # two windows, of which one is that before the pass


def request_of(tokens=M, pattern=HALF, **options):
    return Request(LLAMA, RTX4090, tokens, 600 * GIB, sparse_heads=pattern, **options)


def two_layers(first, second):
    """A model of two layers with 2 KV heads and the streaming heads of these values."""
    layer = LayerShape("full_attention", 4, 2, 64, 64)
    shape = ModelShape((layer, layer), 256, 512, 1000, 0)
    return shape.with_pattern(HeadPattern((first, second), sink_tokens=4, recent_tokens=60))


@pytest.mark.parametrize("share", [0, 0.3, 0.5])
@pytest.mark.parametrize("name", ["llama-3-8b", "qwen2-7b", "gemma-2-9b"])
def test_an_even_pattern_has_the_share_in_each_layer_and_exactly_over_all(name, share):
    shape = find_shape(name)
    pattern = shape.even_pattern(share)
    counts = [(len(pattern.streaming_heads(i)), heads) for i, heads in enumerate(shape.pattern_heads)]
    assert sum(count for count, _ in counts) == round(share * sum(shape.pattern_heads))
    assert all(abs(count - share * heads) <= 1 for count, heads in counts)
    assert pattern.info["assumed"]
    assert make_plan(Request(shape, RTX4090, 64 * K, 64 * GIB, sparse_heads=pattern)).request.shape.layers


def test_all_heads_cannot_be_sparse_and_a_pattern_is_for_one_model():
    with pytest.raises(UsageError, match="no full head"):
        LLAMA.even_pattern(1.0)
    with pytest.raises(UsageError, match=r"streaming heads is 1\.5"):
        LLAMA.even_pattern(1.5)
    with pytest.raises(UsageError, match="32 layers, and the model has 28"):
        find_shape("qwen2-7b").with_pattern(HALF)


def test_a_shape_without_its_pattern_is_the_model_again():
    sparse = LLAMA.with_pattern(HALF)
    assert LLAMA.with_pattern(None) is LLAMA
    assert sparse.with_pattern(None) == LLAMA
    assert sparse.with_pattern(HALF) == sparse
    assert request_of().with_sparse_heads(None) == request_of(pattern=None)
    assert not request_of(pattern=None).is_approximate


def test_a_pattern_without_streaming_heads_changes_no_figure():
    exact = make_plan(request_of(pattern=None))
    found = make_plan(request_of(pattern=LLAMA.even_pattern(0)))
    for field in ("footprint", "prefill", "decode", "prefill_cost", "decode_cost", "schedule", "resident_tokens"):
        assert getattr(found, field) == getattr(exact, field)


def test_streaming_heads_take_a_window_and_nothing_else():
    """Host bytes, tails and FLOPs are those of the full heads; each streaming head has a window on the device."""
    sparse = LLAMA.with_pattern(HALF)
    assert sparse.kv_bytes_per_token(2) == LLAMA.kv_bytes_per_token(2) // 2 == 32 * 4 * 256 * 2
    assert sparse.stored_bytes_per_token(2, 4) == LLAMA.stored_bytes_per_token(2, 4) // 2
    assert sum(tail_bytes(sparse, 2)) == sum(tail_bytes(LLAMA, 2)) // 2
    assert sparse.window_bytes(2) == 32 * 4 * 256 * 2 * KEPT
    assert sparse.local_kv_bytes(M, 2) == 0
    linear = LLAMA.prefill_flops(0)
    assert sparse.prefill_flops(M) - linear < LLAMA.prefill_flops(M)
    options = {"chunk_tokens": 4096, "streaming_bytes": GIB, "rows": 2}
    found = streaming_footprint(sparse, M, **options)
    exact = streaming_footprint(LLAMA, M, **options)
    assert found.window_bytes == 2 * sparse.window_bytes(2)
    assert found.host_kv_bytes == exact.host_kv_bytes // 2 == 2 * host_kv_tokens(M) * sparse.kv_bytes_per_token(2)
    assert found.device_kv_budget_bytes <= GIB
    assert GIB - found.device_kv_budget_bytes < 512  # the ring has the rest


def test_a_layer_may_have_no_full_head():
    shape = two_layers((0, 0), (0, 1))
    assert shape.offloaded_layers == (1,)
    assert [len(layer.attention_parts) for layer in shape.layers] == [1, 2]
    assert shape.kv_bytes_per_token(2) == 128 * 2
    assert shape.window_bytes(2) == 3 * 128 * 2 * 2 * (64 + 256)
    plan = make_plan(Request(shape, RTX4090, 300_000, 16 * GIB, device_kv_budget_bytes=4 * M, dtype="float16"))
    assert plan.resident_tokens[0] == 0
    assert plan.footprint.device_kv_budget_bytes <= plan.device_kv_budget_bytes <= 4 * M
    assert (plan.prefill.heads_per_group, plan.decode.heads_per_group) == (1, 1)


@pytest.mark.parametrize("change", [{"shares_kv": True}, {"kind": "hybrid"}, {"score_dims": 192}])
def test_families_whose_heads_cannot_be_sparse_are_refused(change):
    layer = LayerShape("full_attention", 4, 2, 64, 64)
    shape = ModelShape((layer, dataclasses.replace(layer, **change)), 256, 512, 1000, 0, "example")
    with pytest.raises(UnsupportedError, match="sparse_heads is not served for example, because"):
        shape.even_pattern(0.25)
    assert sparse_forms(make_plan(Request(shape, RTX4090, 64 * K, 16 * GIB))) == []


def test_seconds_are_those_of_the_full_heads_and_of_a_window():
    """A layer with 4 of 8 heads full is a layer of 4 heads and a layer of 4 heads with a window, with one MLP."""
    schedule = Schedule(4096, (0,) * 32, (4, 16_384), (4, 16_384), merges=True, writes_back=True)
    sparse = LLAMA.with_pattern(HALF)
    for seconds in (prefill_seconds, decode_seconds):
        found = seconds(sparse, RTX4090, M, schedule)
        exact = seconds(LLAMA, RTX4090, M, schedule)
        assert found.linear_s == exact.linear_s
        assert found.transfer_s == pytest.approx(exact.transfer_s / 2, rel=1e-3)
        assert found.attention_s == pytest.approx(exact.attention_s / 2, rel=2e-3)
        assert found.attention_s > exact.attention_s / 2  # the window
    by_hand_s = 4 * 32 * 2 * 128 * 4 * 256 * 320 / RTX4090.attained_flops_per_s("bfloat16")
    pairs_s = prefill_seconds(sparse, RTX4090, 4096, Schedule(4096)).attention_s
    full_s = prefill_seconds(LLAMA, RTX4090, 4096, Schedule(4096)).attention_s / 2
    seen = 4096 * 320 - 320 * 320 / 2
    assert pairs_s - full_s == pytest.approx(full_s * seen / (4096 * 4096 / 2))
    assert by_hand_s < pairs_s


@pytest.mark.parametrize("gpu", ["rtx4090", "h200", "laptop-cpu"])
@pytest.mark.parametrize("kv_dtype", ["auto", "int4"])
def test_sparse_heads_never_take_more_and_all_budgets_hold(gpu, kv_dtype):
    for tokens in (300, 64 * K, M):
        request = Request(LLAMA, HARDWARE[gpu], tokens, 600 * GIB, kv_dtype=kv_dtype)
        exact = make_plan(request)
        last = exact
        for share in (0.25, 0.5, 0.9):
            plan = make_plan(request.with_sparse_heads(LLAMA.even_pattern(share)))
            assert plan.total_s <= last.total_s * (1 + 1e-9) or tokens < M  # short contexts are bound by launches
            assert plan.footprint.host_kv_bytes <= last.footprint.host_kv_bytes
            assert plan.footprint.device_bytes <= request.room_bytes
            assert plan.footprint.device_kv_budget_bytes <= plan.device_kv_budget_bytes
            last = plan


def test_streaming_heads_are_queued_too():
    """At short contexts, where launches bound a token on a fast GPU, sparse heads are not faster."""
    machine = HARDWARE["h200"]
    exact = decode_seconds(LLAMA, machine, 1000, Schedule(1000))
    found = decode_seconds(LLAMA.with_pattern(HALF), machine, 1000, Schedule(1000))
    assert found.launch_s - exact.launch_s == pytest.approx(32 * 20 * machine.launch_s)
    assert found.total_s > exact.total_s


def test_the_baselines_have_no_sparse_heads():
    """What the paper's methods need is compared with headinfer's sparse heads, and does not have them."""
    exact = memory_by_method(make_plan(request_of(pattern=None, chunk_tokens=4096)))
    found = memory_by_method(make_plan(request_of(chunk_tokens=4096)))
    for method in exact:
        assert (found[method] == exact[method]) == (method != "headinfer")


def test_8m_tokens_fit_256_gb_only_with_4_bits_and_half_of_the_heads():
    """The answer of docs/approximations.md."""
    request = Request(LLAMA, RTX4090, 8 * M, 256 * 10**9, kv_dtype="int4", sparse_heads=HALF)
    forms = [*kv_forms(make_plan(request)), *sparse_forms(make_plan(request))]
    assert [form["fits"] for form in forms] == [False] * 5 + [True]
    assert [form["longest_tokens"] >= 8 * M for form in forms] == [False] * 5 + [True]
    assert [form["token_bytes"] for form in forms] == [131_072, 68_608, 35_840, 65_536, 34_304, 17_920]
    assert [form["approximate"] for form in forms] == [False] + [True] * 5
    with pytest.raises(CapacityError):
        make_plan(dataclasses.replace(request, kv_dtype="int8"))
    assert longest_context(request) == forms[-1]["longest_tokens"]


def test_the_command_names_sparse_heads_approximate(run_command, tmp_path):
    job = ("plan", "llama-3.1-8b", "--gpu", "rtx4090", "--ram", "64GB")
    code, out, err = run_command(*job, "--sparse-share", "0.5")
    assert code == 0, err
    words = " ".join(out.split())
    assert "Attention is approximate: 128 of 256 KV heads are sparse" in words
    assert "the first 64 and the newest 256 tokens only" in words
    assert "assumed, evenly over the layers" in words
    assert "int8, 50% sparse" in words
    path = tmp_path / "heads.json"
    heads = [[1.0, 0.75, 0.25, 0.0] * 2 for _ in range(32)]
    path.write_text(json.dumps(HeadPattern(heads, recent_tokens=512).as_dict()), encoding="utf-8")
    code, out, err = run_command(*job, "--sparse-heads", path, "--sparse-share", "0.25", "--json")
    assert code == 0, err
    found = json.loads(out)
    plan = found["plan"]
    assert plan["approximate"]
    assert plan["sparse_heads"]["streaming_share"] == 0.25
    assert plan["sparse_heads"]["recent_tokens"] == 512
    assert not plan["sparse_heads"]["assumed"]
    assert plan["footprint"]["window_bytes"] == 64 * 256 * 2 * 2 * (64 + 512 + 256)
    assert [form["token_bytes"] for form in found["with_sparse_heads"]] == [98_304, 51_456, 26_880]
    assert [form["token_bytes"] for form in found["kv_dtypes"]] == [131_072, 68_608, 35_840]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--sparse-share", "1.5"), "--sparse-share is 1.5"),
        (("--sparse-share", "1"), "no full head"),
        (("--sparse-heads", "nowhere.json"), "nowhere.json"),
        (("--sparse-heads", "{path}"), "the head pattern has 1 layers, and the model has 32"),
    ],
)
def test_a_mistake_gets_one_sentence(run_command, tmp_path, arguments, sentence):
    path = tmp_path / "heads.json"
    path.write_text(json.dumps(HeadPattern(((0, 1),)).as_dict()), encoding="utf-8")
    given = [str(path) if value == "{path}" else value for value in arguments]
    code, out, err = run_command("plan", "llama-3-8b", "--gpu", "rtx4090", "--ram", "64GB", *given)
    assert code == 2
    assert sentence in err
    assert err.count("\n") == 1
    assert not out
