"""Parsing and formatting of sizes, token counts and times."""

import pytest

from headinfer.errors import UsageError
from headinfer.utils.units import format_bytes, format_seconds, format_tokens, parse_bytes, parse_tokens


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("1M", 2**20), ("128k", 2**17), ("1.5M", 3 * 2**19), ("4096", 4096), (" 2 K ", 2048), ("13830K", 13830 * 1024)],
)
def test_parse_tokens(text, tokens):
    assert parse_tokens(text) == tokens
    assert parse_tokens(format_tokens(tokens)) == tokens


@pytest.mark.parametrize("text", ["", "K", "1KK", "1KB", "-1", "nan", "inf", "1e300", "12XB", "1T"])
def test_text_that_is_not_a_number_of_tokens_is_refused(text):
    with pytest.raises(UsageError):
        parse_tokens(text)


@pytest.mark.parametrize(
    ("text", "size"), [("1TB", 10**12), ("2TiB", 2**41), ("128GB", 128 * 10**9), ("1.5 kib", 1536)]
)
def test_parse_bytes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0123, "12.3 ms"), (6.41, "6.41 s"), (2040, "34 min"), (27114, "7.53 h")]
)
def test_format_seconds(seconds, text):
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("nbytes", "text"), [(512, "512 B"), (1536, "1.5 KiB"), (256 * 2**20, "256 MiB"), (128 * 2**30, "128 GiB")]
)
def test_format_bytes(nbytes, text):
    assert format_bytes(nbytes) == text
