"""Options: their names and types, and the types that public functions take."""

import dataclasses
import inspect
import json
import typing
from pathlib import Path

import numpy as np
import pytest
import torch
from families import tiny_model

import headinfer
from headinfer import HeadCache, Options
from headinfer.engine.options import OptionFields, current_names, known_fields, merged
from headinfer.errors import UsageError
from headinfer.plan.tiles import TileRates
from headinfer.utils.head_pattern import HeadPattern

OLD = {
    "device_kv_budget": (2**28, "device_kv_budget_bytes", 2**28),
    "streaming_budget": (2**27, "streaming_budget_bytes", 2**27),
    "staging": ("late", "transport", "lazy"),
}


@pytest.mark.parametrize("name", OLD)
def test_an_old_name_works_and_warns(name):
    given, current, value = OLD[name]
    with pytest.warns(DeprecationWarning, match=f"{name} is deprecated: use {current}") as warned:
        options = Options(**{name: given})
    assert options == Options(**{current: value})
    assert warned[0].filename == __file__


def test_the_old_name_of_a_host_budget_works_and_warns(tmp_path):
    with pytest.warns(DeprecationWarning, match="host_kv_budget is deprecated"):
        options = Options(host_kv_budget=2**30, disk_tier=str(tmp_path))
    assert options.host_kv_budget_bytes == 2**30


@pytest.mark.parametrize(("old", "new"), [("none", "in_place"), ("early", "eager"), ("late", "lazy"), ("auto", "auto")])
def test_old_transports_have_new_names(old, new):
    with pytest.warns(DeprecationWarning, match="staging is deprecated"):
        assert Options(staging=old).transport == new
    assert current_names({"staging": old, "chunk_tokens": 5}) == {"transport": new, "chunk_tokens": 5}


def test_options_in_a_session_of_version_0_1_0_are_read():
    kept = {
        "device_kv_budget": 2**28, "streaming_budget": 2**27, "heads_per_group": None, "tile_tokens": None,
        "backend": None, "staging": "early", "expected_tokens": 0, "rates": None, "chunk_tokens": 512, "unknown": 1,
    }  # fmt: skip
    options = Options(**known_fields(kept))
    assert options == Options(device_kv_budget_bytes=2**28, streaming_budget_bytes=2**27, transport="eager")


def test_options_survive_json():
    options = Options(device_kv_budget_bytes=2**28, rates=TileRates(link_bytes_per_s=1e9))
    assert Options(**known_fields(json.loads(json.dumps(options.arithmetic())))) == options


@pytest.mark.parametrize("call", [headinfer.enable, lambda model, **options: HeadCache(model.config, **options)])
def test_the_warning_points_at_the_user_s_line(call):
    model = tiny_model("llama")
    with pytest.warns(DeprecationWarning, match="device_kv_budget is deprecated") as warned:
        call(model, device_kv_budget=2**28)
    assert [one.filename for one in warned] == [__file__]


def test_keywords_are_the_fields_of_options():
    """enable() and HeadCache() take what Options takes: the typed dictionary repeats its fields for type checkers.

    Bytes and tokens may be texts there, which Options converts to numbers, and folders and files may be paths.
    """
    fields = {field.name: field.type for field in dataclasses.fields(Options)}
    as_text = {name for name in fields if name.endswith(("_bytes", "_tokens"))}
    given = {name: kind.replace("int", "int | str") if name in as_text else kind for name, kind in fields.items()}
    given["disk_tier"] = "str | PathLike[str] | None"
    given["sparse_heads"] = "HeadPattern | str | PathLike[str] | None"
    assert {name: kind.__forward_arg__ for name, kind in OptionFields.__annotations__.items()} == given
    for called in (headinfer.enable, HeadCache.__init__):
        assert typing.get_type_hints(called)["options"] == typing.Unpack[OptionFields]
        assert inspect.signature(called).parameters["options"].kind == inspect.Parameter.VAR_KEYWORD


UNDERSTOOD = [
    ({"device_kv_budget_bytes": "256MiB"}, {"device_kv_budget_bytes": 2**28}),
    ({"device_kv_budget_bytes": 256.0}, {"device_kv_budget_bytes": 256}),
    ({"streaming_budget_bytes": "1GiB"}, {"streaming_budget_bytes": 2**30}),
    ({"tile_tokens": "4K", "expected_tokens": "1M"}, {"tile_tokens": 4096, "expected_tokens": 2**20}),
    ({"heads_per_group": np.int32(2)}, {"heads_per_group": 2}),
    ({"host_kv_budget_bytes": "1GB", "disk_tier": Path("a")}, {"host_kv_budget_bytes": 10**9, "disk_tier": "a"}),
    ({"rates": {"launch_s": 1e-5}}, {"rates": TileRates(launch_s=1e-5)}),
]


@pytest.mark.parametrize(("given", "fields"), UNDERSTOOD)
def test_values_of_other_types_are_understood(given, fields):
    options = Options(**given)
    for name, value in fields.items():
        assert getattr(options, name) == value
        assert type(getattr(options, name)) is type(value)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Options)])
@pytest.mark.parametrize("value", [True, 1.5, -1, [], b"x", 2**70, "\0", pytest.param(object(), id="object")], ids=repr)
def test_a_value_of_another_type_is_refused_with_its_name(name, value):
    other = {"host_kv_budget_bytes": {"disk_tier": "x"}, "disk_tier": {"host_kv_budget_bytes": 1}}.get(name, {})
    with pytest.raises(UsageError, match=name):
        Options(**{name: value, **other})


@pytest.mark.parametrize("rates", [{"launch_s": 0}, {"launch_s": "x"}, {"speed": 1}, {}, [1], TileRates(launch_s=None)])
def test_rates_out_of_range_are_refused(rates):
    with pytest.raises(UsageError, match="rates"):
        Options(rates=rates)


def test_the_streaming_budget_is_a_part_of_the_device_budget():
    with pytest.raises(UsageError, match="streaming_budget_bytes is 2,048: it is a part of device_kv_budget_bytes"):
        Options(device_kv_budget_bytes=1024, streaming_budget_bytes=2048)
    kept = {"device_kv_budget_bytes": 4096, "streaming_budget_bytes": 2048, "tile_tokens": 7}
    for changed in ({"device_kv_budget_bytes": "1KiB"}, {"device_kv_budget": 1024}):
        assert merged(kept, changed) == {**changed, "streaming_budget_bytes": 1024, "tile_tokens": 7}
    assert merged(kept, {"tile_tokens": 8}) == {**kept, "tile_tokens": 8}


@pytest.mark.parametrize("call", [headinfer.enable, lambda model, **options: HeadCache(model.config, **options)])
def test_an_unknown_option_is_refused_with_the_name_of_the_function(call):
    with pytest.raises(UsageError, match=r"^(enable|HeadCache)\(\) has no option 'budget': its options are device_kv"):
        call(tiny_model("llama"), budget=1)


def test_none_is_refused_if_a_field_has_another_default():
    for name in ("expected_tokens", "transport"):
        with pytest.raises(UsageError, match=f"{name} is None"):
            Options(**{name: None})


def test_public_functions_take_the_same_values():
    model = tiny_model("llama")
    with headinfer.enable(model, chunk_tokens="1K", device_kv_budget_bytes="64MiB") as enabled:
        assert enabled.chunk_tokens == 1024
        cache = enabled.new_cache(np.int64(100), rows=1.0)
        assert cache.engine.options.expected_tokens == 100
    assert HeadCache(model.config, device_kv_budget_bytes="1MiB").engine.options.device_kv_budget_bytes == 2**20


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda model, cache: headinfer.enable(model, chunk_tokens=True), "chunk_tokens"),
        (lambda model, cache: headinfer.enable(model, chunk_tokens="many"), "chunk_tokens"),
        (lambda model, cache: headinfer.enable(model, on_forward="print"), "on_forward"),
        (lambda model, cache: headinfer.enable(model, device_kv_budget_bytes="much"), "device_kv_budget_bytes"),
        (lambda model, cache: cache.crop("x"), "tokens_to_remove"),
        (lambda model, cache: cache.crop(None), "tokens_to_remove"),
        (lambda model, cache: cache.reorder_cache("x"), "beam_idx"),
        (lambda model, cache: cache.reorder_cache([[0]]), "beam_idx"),
        (lambda model, cache: cache.reorder_cache([1]), "beam_idx"),
        (lambda model, cache: cache.reorder_cache([-1]), "beam_idx"),
        (lambda model, cache: cache.batch_select_indices([7]), "indices"),
        (lambda model, cache: cache.batch_select_indices([True, False]), "indices"),
        (lambda model, cache: Options(device_kv_budget=1, device_kv_budget_bytes=2), "device_kv_budget"),
        (lambda model, cache: Options(staging="none", transport="eager"), "staging"),
        (lambda model, cache: cache.batch_repeat_interleave(0), "repeats"),
        (lambda model, cache: cache.batch_select_indices(None), "indices"),
        (lambda model, cache: cache.save(None), "folder"),
        (lambda model, cache: cache.save("x", token_ids="text"), "token_ids"),
        (lambda model, cache: cache.save("x", token_ids=[[1], [2, 3]]), "token_ids"),
        (lambda model, cache: cache.save("x", about=[1]), "about"),
        (lambda model, cache: cache.save("x", about={"a": model}), "about"),
        (lambda model, cache: HeadCache.load(None, model), "folder"),
        (lambda model, cache: HeadCache.load("x", "model"), "model"),
        (lambda model, cache: HeadCache(model), "config"),
        (lambda model, cache: HeadCache(None), "config"),
    ],
)
def test_public_functions_refuse_other_types_with_the_argument_s_name(call, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny_model("llama")
    with headinfer.enable(model), torch.inference_mode():
        cache = model(input_ids=torch.arange(9)[None], past_key_values=HeadCache(model.config)).past_key_values
    with pytest.raises(UsageError, match=rf"^{name}\b"):
        call(model, cache)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ids", [list(range(9)), [list(range(9))], np.arange(9)], ids=["flat list", "list", "array"])
def test_token_ids_may_be_lists_and_of_one_row(ids, tmp_path):
    model = tiny_model("llama")
    with headinfer.enable(model), torch.inference_mode():
        cache = model(input_ids=torch.arange(9)[None], past_key_values=HeadCache(model.config)).past_key_values
    cache.save(tmp_path / "s", ids)
    assert HeadCache.load(tmp_path / "s", model).token_ids.tolist() == [list(range(9))]


def test_rows_may_be_chosen_by_lists():
    model = tiny_model("llama")
    with headinfer.enable(model), torch.inference_mode():
        cache = model(input_ids=torch.arange(18).view(2, 9), past_key_values=HeadCache(model.config)).past_key_values
    cache.reorder_cache([1, 0])
    cache.batch_select_indices([True, False])
    assert cache.head_layers[0].rows == 1
    cache.batch_repeat_interleave(np.int64(3))
    assert cache.head_layers[0].rows == 3


def test_an_old_name_replaces_an_option_of_a_session(tmp_path):
    model = tiny_model("llama")
    with headinfer.enable(model), torch.inference_mode():
        empty = HeadCache(model.config, device_kv_budget_bytes="64MiB")
        cache = model(input_ids=torch.arange(9)[None], past_key_values=empty).past_key_values
    cache.save(tmp_path / "s")
    with pytest.warns(DeprecationWarning, match="device_kv_budget is deprecated"):
        loaded = HeadCache.load(tmp_path / "s", model, device_kv_budget=2**27)
    assert loaded.engine.options.device_kv_budget_bytes == 2**27
    assert HeadCache.load(tmp_path / "s", model).engine.options.device_kv_budget_bytes == 2**26


def test_head_patterns_are_read_and_kept_in_sessions(tmp_path):
    pattern = HeadPattern(((0.9, 0.2), (0.1, 0.6)), sink_tokens=4, recent_tokens=8, info={"model": "tiny"})
    path = tmp_path / "heads.json"
    path.write_text(json.dumps(pattern.as_dict()))
    options = Options(sparse_heads=path)
    assert options.sparse_heads == pattern
    assert options.is_approximate
    kept = json.loads(json.dumps(options.arithmetic()))
    assert Options(**kept).sparse_heads == pattern.reduced()
    assert "sparse_heads" not in Options(kv_dtype="int8").arithmetic()
    assert "kv_dtype" not in kept
    assert merged(kept, {"sparse_heads": path}) == {**kept, "sparse_heads": path}
    for held, given in ((kept, None), ({}, pattern), (kept, HeadPattern(((1.0, 1.0), (0.0, 1.0))))):
        with pytest.raises(UsageError, match="leave sparse_heads out, or read the document again"):
            merged(held, {"sparse_heads": given})
    with pytest.raises(UsageError, match="sparse_heads is 3"):
        Options(sparse_heads=3)
    with pytest.raises(UsageError, match="cannot read"):
        Options(sparse_heads=tmp_path / "none.json")
