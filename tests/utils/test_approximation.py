"""The sentences that say what is approximate."""

from headinfer.utils.approximation import approximation, short_form
from headinfer.utils.head_pattern import HeadPattern

PATTERN = HeadPattern(((0.9, 0.1), (), (0.2, 0.3)), sink_tokens=4, recent_tokens=1024)


def test_exact_kv_has_no_notice():
    assert approximation("auto") == short_form("auto") == ""


def test_each_approximation_is_named():
    assert approximation("int8").startswith("KV is stored in int8, which is approximate: answers are not exactly")
    heads = "3 of 4 KV heads see only the first 4 and the newest 1,024 tokens"
    assert approximation("auto", PATTERN).startswith(f"{heads}, which is approximate:")
    assert approximation("int4", PATTERN).startswith(f"KV is stored in int4, and {heads}, which is approximate:")
    assert short_form("int4", PATTERN) == f"int4, 3 of 4 heads sparse, pattern {PATTERN.digest}"
