"""Attention of streaming heads against a float64 attention with an explicit mask."""

import pytest
import torch

from headinfer.attention import sink_window
from headinfer.attention.reference import attend_reference
from headinfer.attention.sink_window import attend_sink_window, sink_window_output

SINK = 5
RECENT = 11


def seen(q_positions, k_positions):
    i = q_positions[:, None, :, None]
    j = k_positions[:, None, None, :]
    return (j >= 0) & (j <= i) & ((j < SINK) | (i - j < RECENT))


def positions(case, tokens):
    """Positions of two rows: without padding, with padding before and within, with hidden queries at the end."""
    at = torch.arange(tokens).expand(2, tokens).clone()
    if case == "padding":
        visible = torch.ones(2, tokens, dtype=torch.bool)
        visible[0, :9] = False
        visible[1, 20:45] = False
        at = torch.where(visible, visible.cumsum(1) - 1, -1)
    if case == "hidden queries":
        at[1, -3:] = -1
    return at


@pytest.mark.parametrize("case", ["plain", "padding", "hidden queries"])
@pytest.mark.parametrize("new_tokens", [1, 7, 64])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("block", [16, 256])
def test_it_is_attention_with_an_explicit_mask(case, new_tokens, softcap, block, monkeypatch):
    monkeypatch.setattr(sink_window, "_BLOCK_QUERIES", block)
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(2, 6, new_tokens, 8, generator=generator)
    k = torch.randn(2, 3, 64, 8, generator=generator)
    v = torch.randn(2, 3, 64, 4, generator=generator)
    k_at = positions(case, 64)
    q_at = k_at[:, -new_tokens:]
    tokens = {"sink_tokens": SINK, "recent_tokens": RECENT, "scale": 0.7}
    wanted = attend_reference(q, k, v, scale=0.7, mask=seen(q_at, k_at), softcap=softcap)
    found = attend_sink_window(q, k, v, q_at, k_at, softcap=softcap, **tokens)
    torch.testing.assert_close(found.out.double(), wanted.out, atol=2e-6, rtol=0)
    torch.testing.assert_close(found.lse.double(), wanted.lse, atol=2e-6, rtol=1e-6)
    if softcap is None:
        torch.testing.assert_close(
            sink_window_output(q, k, v, q_at, k_at, **tokens).double(), wanted.out, atol=2e-6, rtol=0
        )
        half = sink_window_output(q.bfloat16(), k.bfloat16(), v.bfloat16(), q_at, k_at, **tokens)
        assert half.dtype == torch.bfloat16
        assert float((half.double() - wanted.out).abs().max()) < 0.05


def test_blocks_read_only_keys_that_they_may_see(monkeypatch):
    """Each key has a bound number of readers, however many keys there are, so a long chunk costs its length."""
    read = []
    taken = sink_window._taken
    monkeypatch.setattr(sink_window, "_taken", lambda x, slices: read.append(taken(x, slices)) or read[-1])
    x = torch.zeros(1, 1, 4096, 4)
    at = torch.arange(4096)[None]
    attend_sink_window(x, x, x, at, at, sink_tokens=SINK, recent_tokens=RECENT, scale=1.0)
    assert max(part.shape[2] for part in read) == SINK + RECENT - 1 + 256
