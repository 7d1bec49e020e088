"""Types of tensors that several packages exchange, and tensors that a caller gives."""

from __future__ import annotations

from typing import Any

import torch

from headinfer.errors import UsageError
from headinfer.utils.values import shown

__all__ = ["Piece", "integer_tensor"]

Piece = tuple[torch.Tensor, torch.Tensor]
"""K and V of the same tokens of the same KV heads: k [h, T, Dk] and v [h, T, Dv], of one dtype and on one device."""


def integer_tensor(value: Any, name: str, dims: tuple[int, ...], *, allows_mask: bool = False) -> torch.Tensor:
    """Return a tensor of integers that a caller gave as a tensor, a list or an array.

    Args:
        value: the given value.
        name: the name of the argument, for the message.
        dims: the numbers of dimensions that are allowed.
        allows_mask: whether a tensor of bool is allowed too.

    Raises:
        UsageError: it is something else, or has another number of dimensions.
    """
    wanted = f"a tensor or list of integers with {' or '.join(map(str, dims))} dimension{'s' if max(dims) > 1 else ''}"
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:  # ragged lists, None, numbers over 64 bits
        raise UsageError(f"{name} is {shown(value)}: it must be {wanted}") from error
    is_mask = tensor.dtype == torch.bool
    is_other = tensor.is_floating_point() or tensor.is_complex() or (is_mask and not allows_mask)
    if tensor.dim() not in dims or (is_other and tensor.numel()):
        kind = str(tensor.dtype).removeprefix("torch.")
        raise UsageError(f"{name} has shape {list(tensor.shape)} and dtype {kind}: it must be {wanted}")
    return tensor if is_mask else tensor.long()
