"""The attention function for layers that pass their whole K and V, against the float64 oracle."""

import pytest
import torch

from headinfer.attention.reference import attend_reference, causal_mask
from headinfer.hf.attention import headinfer_attention

SHAPES = {"square": (40, 40), "lower right": (7, 53), "decode": (1, 30)}


def operands(queries, keys):
    torch.manual_seed(1)
    module = torch.nn.Module()
    module.num_key_value_groups = 3
    module.is_causal = True
    q = torch.randn(2, 6, queries, 16)
    k = torch.randn(2, 2, keys, 16)
    v = torch.randn(2, 2, keys, 16)
    return module, q, k, v


def padding(keys):
    mask = torch.ones(2, keys, dtype=torch.bool)
    mask[0, :5] = False
    mask[1, 11:14] = False
    return mask


MASKS = {
    "none": lambda queries, keys: None,
    "padding": lambda queries, keys: padding(keys),
    "padding in four dims": lambda queries, keys: padding(keys)[:, None, None, :],
    "window": lambda queries, keys: (
        causal_mask(queries, keys) & torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries - 7)
    ).expand(2, 1, -1, -1),
    "empty rows": lambda queries, keys: (
        causal_mask(queries, keys)[None, None].repeat(2, 1, 1, 1).index_fill_(2, torch.tensor([0]), False)
    ),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_dense_attention_agrees_with_the_oracle(mask, shape, softcap, with_sinks):
    queries, keys = SHAPES[shape]
    module, q, k, v = operands(queries, keys)
    given = MASKS[mask](queries, keys)
    seen = given if mask in ("window", "empty rows") else causal_mask(queries, keys)[None, None]
    if given is not None and "padding" in mask:
        seen = seen & given.view(2, 1, 1, keys)
    state = attend_reference(q, k, v, scale=0.4, mask=seen, softcap=softcap)
    sinks = torch.linspace(-1, 2, 6) if with_sinks else None
    expected = state.out if sinks is None else state.with_sinks(sinks[:, None])
    found, weights = headinfer_attention(module, q, k, v, given, scaling=0.4, softcap=softcap, s_aux=sinks)
    assert weights is None
    assert found.shape == (2, queries, 6, 16)
    torch.testing.assert_close(found.transpose(1, 2).double(), expected, rtol=1e-4, atol=2e-6)


def test_an_additive_mask_is_added():
    module, q, k, v = operands(5, 9)
    bias = torch.zeros(1, 1, 5, 9).masked_fill(~causal_mask(5, 9), -torch.inf)
    expected = attend_reference(q, k, v, scale=0.4, mask=causal_mask(5, 9), softcap=3.0).out
    found, _ = headinfer_attention(module, q, k, v, bias, scaling=0.4, softcap=3.0)
    torch.testing.assert_close(found.transpose(1, 2).double(), expected, rtol=1e-4, atol=2e-6)
