"""Names of options: the current ones, and those of version 0.1.0."""

import dataclasses
import inspect
import json
import typing

import pytest
from families import tiny_model

import headinfer
from headinfer import HeadCache, Options
from headinfer.engine.options import OptionFields, current_names, known_fields
from headinfer.plan.tiles import TileRates

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
    """enable() and HeadCache() take what Options takes: the typed dictionary repeats its fields for type checkers."""
    fields = {field.name: field.type for field in dataclasses.fields(Options)}
    assert OptionFields.__annotations__.keys() == fields.keys()
    assert {name: kind.__forward_arg__ for name, kind in OptionFields.__annotations__.items()} == fields
    for called in (headinfer.enable, HeadCache.__init__):
        assert typing.get_type_hints(called)["options"] == typing.Unpack[OptionFields]
        assert inspect.signature(called).parameters["options"].kind == inspect.Parameter.VAR_KEYWORD
