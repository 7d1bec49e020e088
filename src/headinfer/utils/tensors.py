"""Types of tensors that several packages exchange."""

from __future__ import annotations

import torch

__all__ = ["Piece"]

Piece = tuple[torch.Tensor, torch.Tensor]
"""K and V of the same tokens of the same KV heads: k [h, T, Dk] and v [h, T, Dv], of one dtype and on one device."""
