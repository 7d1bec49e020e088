"""Values that a user gives: understood, or one sentence that names them."""

import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from headinfer.errors import UsageError
from headinfer.utils.tensors import integer_tensor
from headinfer.utils.values import (
    byte_count,
    check_text,
    choice,
    json_object,
    optional,
    path_text,
    real_number,
    token_count,
    whole_number,
)

TEMPERATURE = partial(real_number, low=1e-3, high=100, allows_zero=True)


@pytest.mark.parametrize(
    ("convert", "value", "expected"),
    [
        (whole_number, 5, 5),
        (whole_number, "5", 5),
        (whole_number, 5.0, 5),
        (whole_number, np.int64(5), 5),
        (whole_number, np.float32(5), 5),
        (whole_number, torch.tensor(5), 5),
        (whole_number, 2**63 - 1, 2**63 - 1),
        (partial(whole_number, low=0), 0, 0),
        (token_count, "4K", 4096),
        (token_count, "300", 300),
        (token_count, 4096.0, 4096),
        (byte_count, "256MiB", 2**28),
        (byte_count, 0.25 * 2**30, 2**28),
        (byte_count, np.uint64(7), 7),
        (optional(byte_count), None, None),
        (TEMPERATURE, "0.7", 0.7),
        (TEMPERATURE, 0, 0.0),
        (TEMPERATURE, np.float32(0.5), 0.5),
        (path_text, Path("a/b"), "a/b"),
        (path_text, "a/b", "a/b"),
        (json_object, {"a": [1, None]}, {"a": [1, None]}),
        (check_text, "世界", "世界"),
    ],
)
def test_values_that_are_understood(convert, value, expected):
    found = convert(value, "limit")
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    "value", [True, np.bool_(True), torch.tensor(True), 1.5, math.nan, math.inf, "x", "", [3], b"4"]
)
@pytest.mark.parametrize("convert", [whole_number, token_count, byte_count])
def test_values_that_are_no_number(convert, value):
    with pytest.raises(UsageError, match=r"^limit"):
        convert(value, "limit")


@pytest.mark.parametrize(
    "value", [0, -1, "-1", 2**63, pytest.param(10**5000, id="long"), "9" * 30, "9" * 5000, 2.0**70]
)
@pytest.mark.parametrize("convert", [whole_number, token_count, byte_count])
def test_numbers_out_of_range(convert, value):
    with pytest.raises(UsageError, match=r"^limit") as raised:
        convert(value, "limit")
    assert len(str(raised.value)) < 150


@pytest.mark.parametrize("value", ["1e-300", 1e300, "nan", "inf", "-inf", -1, "x", True, None, [1], 10**400])
def test_real_numbers_out_of_range(value):
    with pytest.raises(UsageError, match=r"^limit is"):
        TEMPERATURE(value, "limit")


@pytest.mark.parametrize(
    ("convert", "value"),
    [
        (partial(choice, choices=("a", "b")), "c"),
        (partial(choice, choices=("a", "b")), ["a"]),
        (path_text, None),
        (path_text, ""),
        (path_text, 3),
        (path_text, b"a"),
        (path_text, "a\0b"),
        (json_object, [1]),
        (json_object, {"a": {1}}),
        (check_text, "\udcff"),
    ],
)
def test_other_values_that_are_refused(convert, value):
    with pytest.raises(UsageError, match=r"^limit"):
        convert(value, "limit")


@pytest.mark.parametrize(
    ("value", "dims"),
    [([[1, 2]], (1, 2)), ([1, 2], (1, 2)), (torch.tensor([1, 2], dtype=torch.int32), (1,)), (np.array([[3]]), (2,))],
)
def test_tensors_that_are_understood(value, dims):
    found = integer_tensor(value, "ids", dims)
    assert found.dtype == torch.long
    assert found.tolist() == torch.as_tensor(value).tolist()


@pytest.mark.parametrize(
    "value",
    [
        None,
        "ids",
        3,
        [[1], [2, 3]],
        [1.5],
        [True],
        torch.ones(1, 1, 1, dtype=torch.long),
        torch.ones(2),
        [2**70],
        {"a": 1},
    ],
)
def test_values_that_are_no_tensor_of_integers(value):
    with pytest.raises(UsageError, match=r"^ids"):
        integer_tensor(value, "ids", (1, 2))
