"""The host's share of attention in decode: exact results, what crosses the link, and errors."""

import copy
import dataclasses
import warnings

import pytest
import torch
from engine_runs import attend_all, host_tokens_of, step
from families import tiny_model
from generation import generate, make_model, padded, prompt, remembered
from hypothesis import given, settings
from hypothesis import strategies as st
from test_device_kv import pageable
from test_streaming import BOUND, Bench, Shape, padding

import headinfer
from headinfer import HeadCache
from headinfer.engine import host_attention, past
from headinfer.engine.engine import Engine
from headinfer.engine.layer_pass import AttentionSpec
from headinfer.engine.options import Options
from headinfer.kv.exchange import HostExchange
from headinfer.kv.host_memory import HostTier
from headinfer.plan import cpu_share as share_of_plan
from headinfer.plan.cpu_share import host_tokens
from headinfer.plan.footprint import layer_exchange_bytes
from headinfer.plan.tiles import TilePlan
from headinfer.sessions.manifest import Manifest

CPU = torch.device("cpu")
UNIT = 64
PROPERTY = settings(deadline=None, derandomize=True, max_examples=60)
both_streams = pytest.mark.parametrize("transport", ["eager", "lazy"])
SHARES = [0.0, 0.07, 0.31, 0.5, 0.83, 1.0]
STREAMING = 900_000
OF_MODELS = {"device_kv_budget_bytes": 5 << 20, "tile_tokens": 90, "heads_per_group": 2}
SMALL = {"device_kv_budget_bytes": STREAMING, "heads_per_group": 1, "tile_tokens": 90}


@pytest.fixture(autouse=True, scope="module")
def _small_units():
    """Divide the past in smaller units, so that a short one has several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("headinfer.plan.cpu_share.CPU_UNIT_TOKENS", UNIT)
        yield


@pytest.fixture(scope="module")
def llama():
    return make_model("llama")


@pytest.fixture(scope="module")
def references():
    """Results of the model without headinfer, for remembered()."""
    return {}


@pytest.fixture
def calls(monkeypatch):
    """The query rows of each call of the CPU's kernel, and the tokens that it attends to."""
    found = []
    attend = host_attention._attend

    def note(layer, q, part):
        found.append((q.shape[1], sum(k.shape[1] for k, _ in part.pieces)))
        return attend(layer, q, part)

    monkeypatch.setattr(host_attention, "_attend", note)
    return found


class HostBench(Bench):
    """One layer of whose past the host attends to a share."""

    def __init__(self, shape, transport="lazy", *more, share=0.5, **options):
        super().__init__(shape, transport, *more, **options)
        self.plan = dataclasses.replace(self.plan, cpu_share=share)
        self.exchange = HostExchange(CPU, self.counter, self.streams, HostTier(self.counter).buffer)

    def attend(self, q, k, v, **options):
        shape = self.shape
        self.exchange.reserve(
            layer_exchange_bytes(q[..., 0].numel(), shape.key_dim, shape.value_dim, shape.dtype.itemsize)
        )
        return super().attend(q, k, v, exchange=self.exchange, counter=self.counter, **options)

    def assert_moved(self, tokens):
        """Attend once, and check how much crosses the link and how much the host attends to."""
        counter = self.counter
        before = dataclasses.replace(counter)
        q, k, v = self.chunk(tokens)
        self.attend(q, k, v)
        on_host, streamed = host_tokens_of(self.layer_kv, self.plan.cpu_share, share_of_plan.CPU_UNIT_TOKENS)
        results = q[..., 0].numel() * (self.shape.value_dim + 1) * 4 if on_host else 0
        token_bytes = self.shape.token_bytes
        assert counter.cpu_attended_bytes - before.cpu_attended_bytes == on_host * token_bytes
        assert counter.host_to_device_bytes - before.host_to_device_bytes == streamed * token_bytes + results
        assert counter.device_to_host_bytes - before.device_to_host_bytes == (q.nbytes if on_host else 0)


# -- against the oracle ----------------------------------------------------------------------------------------


@st.composite
def benches(draw):
    shape = Shape(
        rows=draw(st.integers(1, 3)),
        kv_heads=draw(st.integers(1, 3)),
        group=draw(st.sampled_from([1, 2, 8])),
        key_dim=draw(st.sampled_from([16, 32, 5])),
        value_dim=draw(st.sampled_from([16, 48, 7])),
        dtype=torch.float32,
    )
    return HostBench(
        shape,
        transport=draw(st.sampled_from(["eager", "lazy"])),
        heads_per_group=draw(st.integers(1, shape.kv_heads)),
        tile_tokens=draw(st.sampled_from([1000, 130, 37])),
        seed=draw(st.integers(0, 2**31 - 1)),
        resident_tokens=draw(st.sampled_from([0, 0, 128, 256])),
        share=draw(st.sampled_from(SHARES)),
    )


@PROPERTY
@given(
    bench=benches(),
    filled=st.lists(st.integers(100, 500), min_size=1, max_size=3),
    lengths=st.lists(st.sampled_from([1, 1, 2, 16, 17]), min_size=1, max_size=3),
    unit=st.sampled_from([UNIT, UNIT, 1, 100]),
    data=st.data(),
)
def test_any_share_of_any_past(bench, filled, lengths, unit, data):
    for tokens in filled:
        bench.fill(tokens)
    sinks = 2 * torch.randn(bench.shape.kv_heads * bench.shape.group, generator=bench.rng)
    options = data.draw(st.sampled_from([{}, {"softcap": 3.0}, {"sinks": sinks}, {"softcap": 2.0, "sinks": sinks}]))
    if data.draw(st.booleans()):
        options["visible"] = padding(bench.shape.rows, sum(filled) + sum(lengths), data.draw)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("headinfer.plan.cpu_share.CPU_UNIT_TOKENS", unit)
        bench.assert_moved(1)
        for tokens in lengths:
            bench.assert_step(tokens, **options)


@settings(PROPERTY, max_examples=25)
@given(
    bench=benches(),
    moves=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=3), min_size=1, max_size=2),
    tokens=st.sampled_from([1, 2, 16]),
    keep=st.integers(0, 500),
)
def test_beams_forks_and_crops(bench, moves, tokens, keep):
    bench.fill(500)
    for picks in moves:
        bench.select_rows([row % bench.shape.rows for row in picks])
        bench.assert_step(tokens)
        bench.fill(150)
        bench.assert_moved(tokens)
        bench.assert_step(1)
    fork = copy.copy(bench)
    fork.layer_kv = bench.layer_kv.fork()
    for each in (bench, fork):
        each.fill(140)
        each.assert_step(tokens)
    bench.layer_kv.crop(keep)
    bench.k = bench.k[:, :, :keep]
    bench.v = bench.v[:, :, :keep]
    for each in (bench, fork):
        each.assert_step(tokens)
    bench.fill(300)
    bench.assert_step(1)


@both_streams
@pytest.mark.parametrize("tokens", [1, 16])
def test_every_share_gives_the_result_of_none(transport, tokens):
    found = []
    for share in SHARES:
        bench = HostBench(Shape(rows=2, kv_heads=4, group=3, value_dim=24), transport, 2, 130, seed=9, share=share)
        bench.fill(900)
        q, k, v = bench.chunk(tokens)
        found.append(bench.attend(q, k, v))
        assert torch.equal(found[-1], bench.attend(q, k, v)), "same options, same bits"
        assert (bench.counter.cpu_attended_bytes > 0) == (share > 0.1)
        assert float((found[-1] - found[0]).norm()) < BOUND * float(found[0].norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """The host's result is float32, and only the output is rounded."""
    for share in (0.5, 1.0):
        bench = HostBench(Shape(rows=2, kv_heads=3, group=4, dtype=dtype), "lazy", 2, 190, share=share)
        bench.fill(700)
        for tokens in (1, 1):  # more rows may be computed with weights that are rounded as on GPUs
            bench.assert_step(tokens, bound=0.5 * torch.finfo(dtype).eps)
        for tokens in (4, 16):
            bench.assert_step(tokens, bound=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("backend", ["cpu-native", "cpu-flash", "eager"])
def test_any_backend_serves_the_host(backend):
    bench = HostBench(Shape(group=4, key_dim=64, value_dim=64), tile_tokens=400, share=0.7)
    bench.fill(1500)
    for tokens in (1, 16):
        bench.assert_step(tokens, backend=backend)
    assert backend in bench.used


# -- calls of the CPU's kernel ---------------------------------------------------------------------------------


@both_streams
def test_rows_that_share_segments_are_one_call(transport, calls):
    bench = HostBench(Shape(), transport, 1, 150, share=1.0)
    bench.fill(1000)
    shared = bench.layer_kv.host_tokens
    bench.select_rows([0, 0, 0])
    bench.assert_step(4)
    assert calls == [(3 * 2 * 4, shared)]
    bench.fill(600)  # the rows get different tokens
    own = bench.layer_kv.host_tokens - shared
    calls.clear()
    bench.assert_step(4)
    assert calls == [(3 * 2 * 4, shared), *[(2 * 4, own)] * 3]
    held = layer_exchange_bytes(3 * 4 * 4, 16, 16, 4)
    assert bench.counter.device_bytes["exchange"] == held, "queries and results of a row cross once"
    bench.select_rows([2, 0, 0, 1])
    calls.clear()
    bench.assert_step(1)
    assert calls == [(4 * 2, shared), (2, own), (2 * 2, own), (2, own)]


def test_a_planned_share_is_smaller_for_tokens_that_rows_share(calls):
    """The link brings them once for all rows, and the CPU's kernel takes longer for each row."""
    bench = HostBench(Shape(rows=1), share=0.5)
    bench.plan = dataclasses.replace(bench.plan, cpu_rows=2)
    bench.fill(1000)
    shared = bench.layer_kv.host_tokens
    bench.assert_step(1)
    assert calls == [(2, host_tokens(0.5, shared))]
    bench.select_rows([0, 0, 0])
    bench.fill(600)
    own = bench.layer_kv.host_tokens - shared
    calls.clear()
    bench.assert_step(1)
    assert calls == [(3 * 2, host_tokens(0.25, shared)), *[(2, host_tokens(0.5, own))] * 3]
    bench.plan = dataclasses.replace(bench.plan, cpu_rows=None)
    calls.clear()
    bench.assert_step(1)
    assert calls[0] == (3 * 2, host_tokens(0.5, shared)), "a share that the user gives is used as it is"


def test_many_query_rows_are_one_call(calls):
    bench = HostBench(Shape(rows=1, group=9), share=1.0)
    bench.fill(400)
    bench.assert_step(16)
    on_host = 256
    assert calls == [(9 * 16, on_host)]
    assert bench.counter.cpu_attended_bytes == on_host * bench.shape.token_bytes, "counted once"


# -- the engine ------------------------------------------------------------------------------------------------


LENGTHS = (300, 600, 1, 1, 16, 130, 17, 1, 2)


@both_streams
@pytest.mark.parametrize("share", [0.0, 0.31, 1.0])
@pytest.mark.parametrize("resident_tokens", [0, 256])
def test_the_engine_is_exact_within_its_budget(transport, share, resident_tokens):
    dims = (32, 16)
    budget = STREAMING + 2 * resident_tokens * 2 * sum(dims) * 4
    sizes = SMALL | {"device_kv_budget_bytes": budget, "streaming_budget_bytes": STREAMING}
    errors, engine, layer_kvs = attend_all(
        "cpu", torch.float32, LENGTHS, Options(transport=transport, **sizes, cpu_share=share), dims
    )
    assert max(errors) < 1e-5
    assert engine.counter.device_peak_bytes <= budget
    assert (engine.counter.device_bytes["exchange"] > 0) == (share > 0)
    token_bytes = 2 * 2 * sum(dims) * 4  # K and V of both layers in float32
    for tokens in (16, 1):
        step(engine, layer_kvs, tokens)
        on_host, streamed = host_tokens_of(layer_kvs[0], share, UNIT)
        _, moved = step(engine, layer_kvs, tokens)
        results = 2 * 8 * tokens * (dims[1] + 1) * 4 if share else 0
        assert engine.plan.cpu_share == share
        assert moved["cpu_attended_bytes"] == on_host * token_bytes
        assert moved["host_to_device_bytes"] == streamed * token_bytes + results
    _, moved = step(engine, layer_kvs, 17)
    assert engine.plan.cpu_share == moved["cpu_attended_bytes"] == 0, "more tokens are prefill"
    assert engine.counter.device_peak_bytes <= budget


def test_rows_that_share_a_part_stay_within_the_budget():
    """Queries cross once for a row of the batch, also if the host attends to several parts of its past."""
    budget = 4 * STREAMING
    options = Options(transport="lazy", **SMALL | {"device_kv_budget_bytes": budget}, cpu_share=1.0)
    _, engine, layer_kvs = attend_all("cpu", torch.float32, (300, 1), options, (16, 16), rows=4)
    held = []
    for rows in ([0, 0, 0, 0], [0, 0, 2, 3], [3, 1, 2, 2]):
        for layer_kv in layer_kvs:
            layer_kv.select_rows(rows)
        step(engine, layer_kvs, 200)
        step(engine, layer_kvs, 16)
        held.append(engine.counter.device_bytes["exchange"])
    assert held == [layer_exchange_bytes(4 * 8 * 16, 16, 16, 4)] * 3
    assert engine.counter.device_peak_bytes <= budget


@pytest.mark.parametrize("query_heads", [(64,), (4, 64)])
def test_many_query_heads_stay_within_the_budget(query_heads):
    """Ring and exchange are sized for the largest layer in prefill already, and again for more new tokens."""
    engine = Engine(Options(transport="lazy", **SMALL, cpu_share=0.5), len(query_heads))
    layer_kvs = []
    rings = []
    for tokens in (400, 300, 1, 300, 1, 16, 1):
        for layer, heads in enumerate(query_heads):
            q, k, v = (torch.randn(1, each, tokens, 16) for each in (heads, 2, 2))
            if len(layer_kvs) == layer:
                layer_kvs.append(engine.new_layer_kv(k, v))
            if layer == 0:
                engine.begin(layer_kvs[0], heads, tokens)
            engine.attend(q, k, v, layer_kvs[layer], AttentionSpec(0.25))
            layer_kvs[layer].append(k, v)
        (kv,) = engine.devices.values()
        rings.append((kv.ring, engine.counter.device_bytes["exchange"]))
    tokens_held = [0, 1, 1, 1, 1, 16, 16]
    assert [held for _, held in rings] == [layer_exchange_bytes(64 * tokens, 16, 16, 4) for tokens in tokens_held]
    assert len({ring for ring, _ in rings[1:5]}) == 1, "the first new token does not replace the ring"
    assert rings[-1][1] > layer_kvs[0].tail_bytes, "which is free most of the time"
    assert engine.counter.device_peak_bytes <= STREAMING


def test_same_options_give_the_same_bits():
    found = []
    for transport in ("eager", "eager", "lazy"):
        options = Options(transport=transport, **SMALL, cpu_share=0.6)
        _, engine, layer_kvs = attend_all("cpu", torch.bfloat16, (300, 500, 1), options, (16, 16), rows=2)
        found.append([out for tokens in (1, 16, 1) for out in step(engine, layer_kvs, tokens)[0]])
    assert all(map(torch.equal, found[0], found[1]))
    assert all(map(torch.equal, found[0], found[2])), "the streams differ only in when they copy"


@both_streams
@pytest.mark.parametrize(
    ("allowed", "planned"), [(0, {}), (2, {}), (2, {"cpu_share": 0.3, "cpu_rows": 4})], ids=["none", "some", "planned"]
)
def test_the_host_attends_to_all_memory_that_cannot_be_pinned(monkeypatch, transport, allowed, planned):
    pageable(monkeypatch, allowed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        errors, engine, layer_kvs = attend_all(
            "cpu", torch.float32, (900, 1, 300, 1), Options(transport=transport, **SMALL, **planned), (16, 16)
        )
    assert max(errors) < 1e-5
    for tokens in (1, 16):
        _, moved = step(engine, layer_kvs, tokens)
        assert engine.plan.cpu_share == 1
        on_host = sum(layer_kv.host_tokens for layer_kv in layer_kvs)
        assert moved["host_to_device_bytes"] == 2 * 8 * tokens * (16 + 1) * 4, "only the results"
        assert moved["cpu_attended_bytes"] == on_host * 2 * 2 * 16 * 4
    _, moved = step(engine, layer_kvs, 17)
    assert moved["cpu_attended_bytes"] == 0
    assert moved["host_to_device_bytes"] > 0


@both_streams
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_kv_on_disk_is_streamed_and_the_host_attends_to_the_rest(tmp_path, transport, share):
    tier = {"host_kv_budget_bytes": 750_000, "disk_tier": str(tmp_path)}
    options = Options(transport=transport, **SMALL, cpu_share=share, **tier)
    errors, engine, layer_kvs = attend_all("cpu", torch.float32, (*[400] * 4, 1, 16, 1), options, (16, 16))
    assert max(errors) < 1e-5
    assert engine.counter.disk_bytes > 0
    assert engine.counter.host_peak_bytes <= tier["host_kv_budget_bytes"]
    before = sum(layer_kv.host_tokens for layer_kv in layer_kvs)
    engine.disk.settle()
    _, moved = step(engine, layer_kvs)
    assert before == sum(layer_kv.host_tokens for layer_kv in layer_kvs)
    slices = [part for layer_kv in layer_kvs for table in layer_kv._tables for part in table]
    token_bytes = 2 * 2 * 16 * 4
    on_disk = sum(part.tokens for part in slices if part.segment.location is not None)
    in_memory = sum(part.tokens for part in slices) - on_disk
    assert moved["disk_to_host_bytes"] == on_disk * token_bytes
    assert 0 < moved["cpu_attended_bytes"] <= in_memory * token_bytes
    assert share < 1 or moved["cpu_attended_bytes"] == in_memory * token_bytes


def test_the_share_does_not_depend_on_the_speed_of_the_disk(tmp_path):
    """The host attends to the same tokens whether the move of a segment has ended or has only begun. If it begins and
    ends after the past was divided, the host attends to a copy."""
    tier = {"host_kv_budget_bytes": 750_000, "disk_tier": str(tmp_path)}
    _, engine, layer_kvs = attend_all("cpu", torch.float32, [400], Options(**SMALL, transport="lazy", **tier), (16, 16))
    plan = TilePlan(2, 90, "", cpu_share=1.0)
    engine.settle()
    divided = past.divide(layer_kvs[0], plan, None)
    wanted = [side.clone() for part in past.host_parts(divided) for piece in part.pieces for side in piece]
    segment = layer_kvs[0]._tables[0][0].segment
    engine.disk.seal_full([segment])
    while not segment.is_leaving:
        assert engine.disk._begin_move()
    for _ in range(2):
        (found,) = past.divide(layer_kvs[0], plan, None)
        assert not found.on_host
        assert [part.segment for part in found.streamed] == [segment]
        engine.disk.settle()
    assert segment.location is not None
    held = [side for part in past.host_parts(divided) for piece in part.pieces for side in piece]
    assert all(map(torch.equal, held, wanted))


# -- models ----------------------------------------------------------------------------------------------------


@both_streams
@pytest.mark.parametrize("kind", ["padded rows", "beams"])
def test_generate_gives_the_tokens_of_transformers(llama, references, transport, kind):
    inputs = padded(tokens=450) if kind == "padded rows" else prompt(tokens=450) | {"num_beams": 3}
    wanted = remembered(references, kind, lambda: generate(llama, inputs, max_new_tokens=6)[0])
    with headinfer.enable(llama, transport=transport, **OF_MODELS, cpu_share=0.5) as active:
        found = generate(llama, inputs, max_new_tokens=6)[0]
    assert torch.equal(found, wanted)
    stats = active.last_cache.stats()
    assert stats.cpu_share == 0.5
    assert stats.cpu_attended_bytes > 0
    assert stats.device_kv_peak_bytes <= 5 << 20


def test_an_error_on_the_host_leaves_the_cache_as_it_was(monkeypatch):
    model = tiny_model("llama")
    ids = prompt(tokens=400)["input_ids"] % 128
    attend = host_attention._attend
    calls = []

    def fail(*more):
        calls.append(1)
        if len(calls) == 3:
            raise OSError("of the third layer")
        return attend(*more)

    with torch.no_grad(), headinfer.enable(model, transport="lazy", **OF_MODELS, cpu_share=0.5) as active:
        cache = active.new_cache()
        oracle = active.new_cache()
        for each in (cache, oracle):
            for part in (ids[:, :-2], ids[:, -2:-1]):
                model(part, past_key_values=each)
        monkeypatch.setattr(host_attention, "_attend", fail)
        with pytest.raises(OSError, match="of the third layer"):
            model(ids[:, :1], past_key_values=cache)
        assert len(calls) == 3
        assert cache.get_seq_length() == 399
        for _ in range(2):
            found, wanted = (model(ids[:, -1:], past_key_values=each).logits for each in (cache, oracle))
            assert torch.equal(found, wanted)


def test_a_session_keeps_the_share_and_can_be_loaded_with_another(llama, tmp_path):
    ids, question = (prompt(tokens=tokens, seed=tokens)["input_ids"] for tokens in (600, 3))
    with headinfer.enable(llama), torch.no_grad():
        cache = HeadCache(llama.config, transport="lazy", **OF_MODELS, cpu_share=0.5)
        llama(ids, past_key_values=cache)
        cache.save(tmp_path / "s", ids)
        assert Manifest.read(tmp_path / "s").arithmetic["cpu_share"] == 0.5
        loaded = HeadCache.load(tmp_path / "s", llama)
        others = [HeadCache.load(tmp_path / "s", llama, cpu_share=share) for share in (0.0, 1.0)]
        for part in (question, question[:, :1]):
            wanted, found, *rest = (llama(part, past_key_values=one).logits for one in (cache, loaded, *others))
            assert torch.equal(found, wanted)
            for other in rest:
                torch.testing.assert_close(other, wanted, atol=2e-4, rtol=2e-4)
    shares = [one.stats().cpu_share for one in (loaded, *others)]
    assert shares == [0.5, 0.0, 1.0]
    assert [one.stats().cpu_attended_bytes > 0 for one in (loaded, *others)] == [True, False, True]


@pytest.mark.filterwarnings("ignore::headinfer.ContextLengthWarning")
def test_a_session_is_loaded_with_a_disk_tier(tmp_path):
    """Its segments are loaded when they are first attended to, and others move to the disk then."""
    model = tiny_model("llama")
    ids = prompt(tokens=1500)["input_ids"] % 128
    tier = {"host_kv_budget_bytes": 900_000, "disk_tier": str(tmp_path / "tier")}
    with headinfer.enable(model), torch.no_grad():
        cache = HeadCache(model.config, transport="lazy", **OF_MODELS)
        for part in ids.split(300, dim=1):
            model(part, past_key_values=cache, logits_to_keep=1)
        cache.save(tmp_path / "s", ids)
        loaded = [HeadCache.load(tmp_path / "s", model, **tier, cpu_share=share) for share in (0.5, 1.0)]
        for part in (ids[:, :1], ids[:, :16], ids[:, :1]):
            wanted, *found = (model(part, past_key_values=one).logits for one in (cache, *loaded))
            for one in found:
                torch.testing.assert_close(one, wanted, atol=2e-4, rtol=2e-4)
    for one in loaded:
        stats = one.stats()
        assert stats.disk_kv_bytes > 0
        assert stats.cpu_attended_bytes > 0
        assert stats.host_kv_peak_bytes <= tier["host_kv_budget_bytes"]


@pytest.mark.parametrize("threads", [None, 1, 3])
def test_the_host_computes_with_the_threads_of_the_options(threads, llama, monkeypatch):
    """The result has the same bits for any number."""
    attend = host_attention._attend
    counts: set[int] = set()

    def note(*of_part):
        counts.add(torch.get_num_threads())
        return attend(*of_part)

    monkeypatch.setattr(host_attention, "_attend", note)
    before = torch.get_num_threads()
    logits = {}
    for count in (None, threads):
        options = Options(transport="lazy", **OF_MODELS, cpu_share=0.5, cpu_threads=count)
        cache = HeadCache(llama.config, **dataclasses.asdict(options))
        with headinfer.enable(llama), torch.no_grad():
            counts.clear()
            for part in prompt(tokens=1201)["input_ids"].split(300, dim=1):
                logits[count] = llama(part, past_key_values=cache, logits_to_keep=1).logits
    assert counts == {threads or before}
    assert torch.get_num_threads() == before
    assert torch.equal(logits[None], logits[threads])
