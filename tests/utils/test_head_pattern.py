import json

import pytest

from headinfer.errors import UsageError
from headinfer.utils.head_pattern import HeadPattern, read_pattern

PATTERN = HeadPattern(((0.9, 0.1), (), (0.4, 0.5)), sink_tokens=4, recent_tokens=8, info={"model": "tiny"})


def test_heads_and_share() -> None:
    assert [PATTERN.full_heads(layer) for layer in range(3)] == [(0,), (), (1,)]
    assert [PATTERN.streaming_heads(layer) for layer in range(3)] == [(1,), (), (0,)]
    assert PATTERN.share == 0.5
    assert PATTERN.heads == 4


@pytest.mark.parametrize(("share", "streaming"), [(0.0, 0), (0.25, 1), (0.5, 2), (0.6, 2), (0.75, 3), (0.875, 4)])
@pytest.mark.parametrize("value", [None, 0.0, 0.3, 1.0])
def test_a_share_gives_the_exact_number_of_streaming_heads(share: float, streaming: int, value: float | None) -> None:
    pattern = PATTERN if value is None else HeadPattern(((value, value), (value, value)))
    if streaming == 4:
        with pytest.raises(UsageError, match="leaves none of the 4 heads full"):
            pattern.with_share(share)
        return
    chosen = pattern.with_share(share)
    assert chosen.share == streaming / 4
    if value is not None and streaming == 1:
        assert chosen.streaming_heads(0) == (0,), "a head of the lowest layer is streaming first"
    assert chosen.with_share(share) == chosen


def test_json_holds_the_whole_pattern(tmp_path) -> None:
    path = tmp_path / "heads.json"
    path.write_text(json.dumps(PATTERN.as_dict()))
    found = read_pattern(path)
    assert found == PATTERN
    assert found.info == {"model": "tiny"}
    assert read_pattern(path, share=0.25).share == 0.25


def test_the_digest_is_of_what_decides_results() -> None:
    assert PATTERN.digest == PATTERN.reduced().digest
    assert len(PATTERN.digest) == 12
    others = [
        HeadPattern(((0.9, 0.1), (), (0.6, 0.5)), sink_tokens=4, recent_tokens=8),
        HeadPattern(PATTERN.values, sink_tokens=5, recent_tokens=8),
        HeadPattern(PATTERN.values, sink_tokens=4, recent_tokens=9),
    ]
    assert len({PATTERN.digest, *(other.digest for other in others)}) == 4
    assert HeadPattern.from_dict(PATTERN.reduced().as_dict()) == PATTERN.reduced()


def test_tables_of_duoattention(tmp_path) -> None:
    table = tmp_path / "full_attention_heads.tsv"
    table.write_text("1.02\t0.0\n3.0e-01\t-0.1\n")
    with pytest.raises(UsageError, match="sink_size and recent_size"):
        read_pattern(table)
    (tmp_path / "config.json").write_text('{"sink_size": 64, "recent_size": 128}')
    pattern = read_pattern(table)
    assert pattern == HeadPattern(((1.0, 0.0), (0.3, 0.0)), sink_tokens=64, recent_tokens=128)
    assert read_pattern(tmp_path) == pattern
    (tmp_path / "config.json").write_text('{"sink_size": "many", "recent_size": 128}')
    with pytest.raises(UsageError, match="is wrong: sink_tokens is many"):
        read_pattern(table)


@pytest.mark.parametrize("text", ["", "1.0\t0.5\n1.0", "a\tb", "nan\t1", "[[1.0]]"])
def test_other_tables_are_refused(tmp_path, text: str) -> None:
    path = tmp_path / "heads.tsv"
    path.write_text(text)
    with pytest.raises(UsageError, match="is not a head pattern"):
        read_pattern(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "else"}, "is not a head pattern"),
        ({"version": 2}, "version 2 of the format"),
        ({"heads": [[1.0, True]]}, "needs a field heads"),
        ({"heads": [1.0]}, "needs a field heads"),
        ({"heads": []}, "without heads"),
        ({"heads": [[1.5]]}, "the value of a head of layer 0 is 1.5"),
        ({"threshold": 2}, "threshold is 2"),
        ({"sink_tokens": -1}, "sink_tokens is -1"),
        ({"recent_tokens": 0}, "recent_tokens is 0"),
    ],
)
def test_wrong_json_is_refused(tmp_path, change: dict, message: str) -> None:
    path = tmp_path / "heads.json"
    path.write_text(json.dumps({**PATTERN.as_dict(), **change}))
    with pytest.raises(UsageError, match=message):
        read_pattern(path)


def test_files_that_are_no_json_or_missing_are_refused(tmp_path) -> None:
    path = tmp_path / "heads.json"
    path.write_text('{"format": ')
    with pytest.raises(UsageError, match="not valid JSON"):
        read_pattern(path)
    with pytest.raises(UsageError, match="cannot read"):
        read_pattern(tmp_path / "missing.json")


@pytest.mark.parametrize(
    ("kv_heads", "message"),
    [
        ([2, 0], "has 3 layers, and the model has 2"),
        ([2, 0, 4], "2 KV heads in layer 2, and the model has 4"),
        ([2, 2, 2], "0 KV heads in layer 1, and the model has 2"),
    ],
)
def test_a_pattern_of_another_model_is_refused(kv_heads: list[int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        PATTERN.check(kv_heads)


def test_a_pattern_must_have_a_full_head() -> None:
    PATTERN.check([2, 0, 2])
    with pytest.raises(UsageError, match="no full head"):
        HeadPattern(((0.1, 0.1),)).check([2])
