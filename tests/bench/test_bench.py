"""The CPU's benchmarks run, measure what they say, and leave nothing behind. Their speed is not tested."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from headinfer.attention import native
from headinfer.attention.native_build import targets_here
from headinfer.bench.job import CpuJob
from headinfer.bench.results import is_result_json, is_result_markdown, result_json, result_markdown
from headinfer.bench.run import CPU_SUITES, run_suites
from headinfer.bench.sizes import QUICK_CPU
from headinfer.bench.timing import Call, Rounds, in_turns
from headinfer.errors import UsageError

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
DEFAULT_SUITES = [name for name, suite in CPU_SUITES.items() if suite.by_default]
DISK_SUITES = set(CPU_SUITES).difference(DEFAULT_SUITES, ["attention", "batch", "kv-dtype"])


def measured(names, job):
    return [measurement for found in run_suites(names, job) for measurement in found]


@pytest.fixture(scope="module")
def stages():
    return []


@pytest.fixture(scope="module")
def job(stages):
    return CpuJob(QUICK_CPU, stages.append)


@pytest.fixture(scope="module")
def measurements(job, stages):
    found = measured([], job)
    assert stages[0].startswith("suites: decode, ")
    assert [stage.split()[1].strip(",") for stage in stages if stage.startswith("measuring ")] == DEFAULT_SUITES
    assert all(" about " in stage for stage in stages)
    return found


def test_every_suite_measures(measurements):
    assert {measurement.suite for measurement in measurements} == set(DEFAULT_SUITES)
    assert all(measurement.value > 0 for measurement in measurements)


@pytest.mark.skipif(bool(native.unavailable_reason(torch.bfloat16)), reason="no native kernel")
def test_the_decode_kernel_is_measured_for_every_target(job):
    found = measured(["attention"], job)
    targets = [target.name for target in targets_here(torch.bfloat16)]
    one_thread = [line for line in found if line.point.endswith("1 thread")]
    assert [line.who for line in one_thread] == ["plain read", *targets] * 4
    assert all(line.value > 0 for line in found)
    assert all("x sdpa's" in line.note for line in found if line.who in targets)
    errors = [line.details["error_against_float64"] / line.details["error_of_sdpa"] for line in found if line.details]
    assert max(errors) <= 1.5


def test_eight_questions_are_measured_against_one():
    small = "random:llama-3-8b?layers=1&hidden=64&intermediate=64&vocab=256&heads=8"
    sizes = dataclasses.replace(QUICK_CPU, model=small + "&kv_heads=2", batch_model=small + "&kv_heads=8")
    found = measured(["batch"], CpuJob(sizes, lambda line: None))
    assert len(found) == 8
    assert all(line.value > 0 and line.goal == "<= 1.3 x" for line in found)
    assert {line.point.partition(", ")[2] for line in found} == {
        f"{heads} query heads per KV head, {where}" for heads in (1, 4) for where in ("in place", "through the ring")
    }


def test_fewer_bits_are_measured_against_exact_kv():
    sizes = dataclasses.replace(
        QUICK_CPU, model="random:llama-3-8b?layers=1&hidden=1024&intermediate=64&vocab=256&heads=8&kv_heads=2"
    )
    found = measured(["kv-dtype"], CpuJob(sizes, lambda line: None))
    assert [line.goal for line in found] == [">= 1.7 x"] * 3 + [">= 2.8 x"] * 3
    assert all(line.value > 0 for line in found if "the past" not in line.who)  # at quick sizes it takes no time
    link = [line.value for line in found if "over the link" in line.who]
    assert 1.85 < link[0] < 1.95
    assert 3.5 < link[1] < 3.7
    details = found[0].details
    assert details["int4_host_bytes"] < 0.3 * details["auto_host_bytes"]


def test_goals_are_answered(measurements):
    assert all((measurement.reached is None) == (not measurement.goal) for measurement in measurements)


def test_device_bytes_are_equal_at_both_lengths_and_add_up(measurements):
    short, long = (measurement for measurement in measurements if measurement.suite == "device-kv")
    assert short.value == long.value
    assert short.reached
    assert long.reached
    for measurement in (short, long):
        parts = measurement.details
        assert measurement.value == parts["ring_bytes"] + parts["tail_bytes"] + parts["staging_bytes"] <= 256 * 2**20
    assert long.details["host_kv_bytes"] > short.details["host_kv_bytes"]
    assert long.details["link_bytes_of_the_pass"] <= long.details["host_kv_bytes"]


def test_the_hosts_time_is_measured_with_all_kv_resident(measurements):
    resident, in_place, dynamic, ratio = (one for one in measurements if one.suite == "host")
    assert resident.details["streamed_bytes"] == 0
    assert {one.unit for one in (resident, in_place, dynamic)} == {"us/layer"}
    assert resident.ratio == 1
    assert ratio.who == "headinfer, all KV resident / DynamicCache"
    for one in (resident, in_place, dynamic):
        assert sum(one.details["operations"].values()) > 0
        assert one.rounds == QUICK_CPU.short_steps


def test_results_name_command_machine_and_model(job, measurements):
    result = json.loads(result_json(job, measurements, ["bench", "decode"]))
    assert result["command"] == "headinfer bench decode"
    assert result["machine"]
    assert result["model"].startswith("random:llama-3-8b")
    assert len(result["lines"]) == len(measurements)
    text = result_markdown(job, measurements, ["bench", "decode"])
    assert text.startswith("# CPU benchmark: ")
    points = {(measurement.suite, measurement.point) for measurement in measurements}
    assert text.count("\n| ") == len(measurements) + len(points)  # with a header for each point
    assert text.count("\n### ") == len(points)
    assert "| way | measured | rounds | goal |" in text.partition("## decode")[2]


@pytest.mark.parametrize("name", ["cpu", "cpu-amx", "disk", "check-plan-cpu", "h200-first", "h200-24gb"])
def test_earlier_results_are_recognised(name):
    """Those of CPUs were written with other keys than today's."""
    assert is_result_json(RESULTS / f"{name}.json")
    markdown = RESULTS / f"{name}.md"
    assert not markdown.exists() or is_result_markdown(markdown)
    assert not is_result_json(RESULTS / "embedded.json")


def test_an_unknown_suite_is_refused(job):
    with pytest.raises(UsageError, match="no suite"):
        run_suites(["speed"], job)


def test_the_disk_suites_measure_and_leave_nothing(tmp_path):
    found = measured(list(DISK_SUITES), CpuJob(QUICK_CPU, print, folder=tmp_path))
    assert {measurement.suite for measurement in found} == DISK_SUITES
    assert all(measurement.value > 0 for measurement in found if "KV read" not in measurement.who)
    readings = [measurement for measurement in found if "KV read" in measurement.who]
    assert len(readings) == 2
    assert all(reading.value > 0 if reading.value is not None else reading.note for reading in readings)
    asked = [measurement.details for measurement in found if "total_s" in measurement.details]
    assert len(asked) == 2
    for parts in asked:
        names = ("process_start_s", "checks_s", "model_load_s", "kv_read_s", "compute_s")
        assert all(parts[name] > 0 for name in names)
        assert parts["total_s"] == pytest.approx(sum(parts[name] for name in names))
    (memory,) = (measurement.details for measurement in found if "budget_bytes" in measurement.details)
    assert 0 < memory["held_bytes"] <= memory["budget_bytes"]
    assert not list(tmp_path.iterdir())
    with pytest.raises(UsageError, match="there is no folder"):
        CpuJob(QUICK_CPU, print, folder=tmp_path / "none")


def test_alternatives_run_in_turns_and_only_their_run_is_timed():
    events = []

    def call(name):
        return Call(run=lambda: events.append(name), after=lambda: events.append(f"after {name}"))

    def timer(run):
        run()
        return 1.0 if events[-1] == "a" else 2.0

    rounds = in_turns({"a": call("a"), "b": call("b")}, 2, timer)
    assert events == ["a", "after a", "b", "after b"] * 3  # the first time to warm up
    assert rounds.seconds == {"a": [1.0, 1.0], "b": [2.0, 2.0]}
    assert rounds.ratio("b", "a") == 2.0


@pytest.mark.parametrize(("rounds", "warm_up", "runs_before"), [(3, True, 1), (3, False, 1), (1, False, None)])
def test_turns_say_how_long_they_will_take(rounds, warm_up, runs_before):
    runs = []
    said = []
    turns = {"a": Call(run=lambda: runs.append("a")), "b": Call(run=lambda: runs.append("b"))}
    in_turns(turns, rounds, warm_up=warm_up, expect=lambda about_s: said.append((len(runs), about_s)))
    if runs_before is None:
        assert not said
    else:
        ((done, about_s),) = said
        assert done == 2 * runs_before
        assert about_s > 0


def test_alternatives_are_compared_round_by_round():
    """The load doubles in the last round, which changes the medians but not the ratio."""
    rounds = Rounds({"a": [1.0, 2.0, 4.0], "b": [3.0, 6.0, 12.0]})
    assert rounds.ratio("b", "a") == 3.0
    assert rounds.medians() == {"a_s": 2.0, "b_s": 6.0}
