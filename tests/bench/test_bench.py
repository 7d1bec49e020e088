"""The benchmarks run and measure what they say; their speed is no test's business."""

import json

import pytest

from headinfer.bench.cpu_suites import SUITES
from headinfer.bench.disk_suites import DISK_SUITES
from headinfer.bench.run import markdown_table, result_json, run_suites
from headinfer.errors import UsageError


@pytest.fixture(scope="module")
def measures():
    stages = []
    found = run_suites([], quick=True, on_stage=stages.append)
    assert len(stages) == len(SUITES)
    return found


def test_every_suite_measures(measures):
    assert {measure.suite for measure in measures} == set(SUITES)
    assert all(measure.value > 0 for measure in measures)


def test_device_bytes_are_equal_at_both_lengths_and_add_up(measures):
    short, long = (measure for measure in measures if measure.suite == "device-kv")
    assert short.value == long.value
    for measure in (short, long):
        parts = measure.details
        assert measure.value == parts["ring_bytes"] + parts["tail_bytes"] + parts["staging_bytes"] <= 256 * 2**20
    assert long.details["host_kv_bytes"] > short.details["host_kv_bytes"]
    assert long.details["link_bytes_of_the_pass"] <= long.details["host_kv_bytes"]


def test_results_name_command_machine_and_model(measures):
    result = json.loads(result_json(measures, ["bench", "decode"]))
    assert result["command"] == "headinfer bench decode"
    assert result["machine"]
    assert result["model"].startswith("random:llama-3-8b")
    assert len(result["measures"]) == len(measures)
    assert markdown_table(measures).count("\n| ") == len(measures)


def test_an_unknown_suite_is_refused():
    with pytest.raises(UsageError, match="no suite"):
        run_suites(["speed"], quick=True, on_stage=print)


def test_the_disk_suites_measure_and_leave_nothing(tmp_path):
    found = run_suites(list(DISK_SUITES), quick=True, on_stage=print, folder=tmp_path)
    assert {measure.suite for measure in found} == set(DISK_SUITES)
    assert all(measure.value > 0 for measure in found)
    asked = [measure.details for measure in found if "total_s" in measure.details]
    assert len(asked) == 2
    for parts in asked:
        names = ("process_start_s", "checks_s", "model_load_s", "kv_read_s", "compute_s")
        assert all(parts[name] > 0 for name in names)
        assert parts["total_s"] == pytest.approx(sum(parts[name] for name in names))
    (memory,) = (measure.details for measure in found if "budget_bytes" in measure.details)
    assert 0 < memory["held_bytes"] <= memory["budget_bytes"]
    assert not list(tmp_path.iterdir())
    with pytest.raises(UsageError, match="there is no folder"):
        run_suites(["disk-tier"], quick=True, on_stage=print, folder=tmp_path / "none")
