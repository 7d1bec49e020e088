"""Progress of the commands, and the widths of their tables."""

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from headinfer.bench.measurement import Measurement
from headinfer.cli import bench, report
from headinfer.cli import main as cli
from headinfer.plan.models import find_shape


@pytest.fixture
def clock(monkeypatch):
    """The seconds of time.perf_counter() in report.py."""
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(report.time, "perf_counter", lambda: now.seconds)
    return now


def cache_of(tokens):
    return SimpleNamespace(head_layers=[SimpleNamespace(get_seq_length=lambda: tokens)])


@pytest.mark.parametrize("known_before", [0, 8000], ids=["of another session", "of this session"])
def test_progress_of_a_resumed_read_begins_at_what_is_there(clock, known_before):
    shape = find_shape("llama-3-8b")
    progress = report.GenerationProgress(shape, 10_000, 0, show_decode=False, read_before=known_before)
    (task,) = progress._progress.tasks
    clock.seconds += 60  # the model is loaded
    progress.on_resumed(8000)
    assert task.completed == pytest.approx(shape.prefill_flops(8000), rel=1e-6)
    assert task.fields["shown"] == "8,000/10,000 tokens"
    clock.seconds += 2
    progress.on_forward(cache_of(9000))
    assert task.fields["shown"] == "9,000/10,000 tokens, 500 tokens/s"
    assert task.completed == pytest.approx(shape.prefill_flops(9000), rel=1e-6)


def test_chunks_that_take_long_have_a_remaining_time(clock):
    progress = report.GenerationProgress(find_shape("llama-3-8b"), 12_000, 0, show_decode=False)
    progress._progress.get_time = lambda: clock.seconds
    (task,) = progress._progress.tasks
    task._get_time = progress._progress.get_time
    for tokens in (4000, 8000):
        clock.seconds += 100
        progress.on_forward(cache_of(tokens))
    assert 100 < task.time_remaining < 130


def test_read_tells_the_progress_where_it_resumes(tmp_path, monkeypatch, capsys):
    model = "random:tiny-llama?layers=1&hidden=64&intermediate=64&heads=4&kv_heads=2"
    book = tmp_path / "book.txt"
    resumed = []
    monkeypatch.setattr(report.GenerationProgress, "on_resumed", lambda _, tokens: resumed.append(tokens))
    for repeats, session in ((20, "a"), (40, "b"), (50, "b")):
        book.write_text("It was a bright cold day in April.\n" * repeats, encoding="utf-8")
        arguments = ["read", model, "--file", book, "--session", session, "--sessions", tmp_path / "root"]
        monkeypatch.setattr(sys, "argv", ["headinfer", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert not stopped.value.code, capsys.readouterr().err
    assert resumed == [20 * 35, 40 * 35]


RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.mark.parametrize("columns", [80, 100])
@pytest.mark.parametrize("path", sorted(RESULTS.glob("h200-*.json")), ids=lambda path: path.stem)
def test_tables_of_benchmarks_fit_the_terminal(path, columns, capsys, monkeypatch):
    known = {field.name for field in dataclasses.fields(Measurement)}
    lines = json.loads(path.read_text(encoding="utf-8")).get("lines", [])
    measurements = [Measurement(**{key: line[key] for key in known & line.keys()}) for line in lines]
    monkeypatch.setenv("COLUMNS", str(columns))
    bench._print_tables(measurements)
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines()), default=0) <= columns
    assert "\N{HORIZONTAL ELLIPSIS}" not in shown
