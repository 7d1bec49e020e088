"""A model whose attention is float64 with the explicit mask of a head pattern: the oracle of sparse heads."""

import contextlib

import torch
from transformers import AttentionInterface, AttentionMaskInterface

_NAME = "sparse_oracle"
_PATTERNS = []


def _attention(module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, **kwargs):
    pattern = _PATTERNS[-1]
    groups = query.shape[1] // key.shape[1]
    keys = key.shape[2]
    visible = torch.ones(key.shape[0], keys, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    at = torch.where(visible, visible.cumsum(1) - 1, -1)
    i = at[:, keys - query.shape[2] :, None]
    j = at[:, None, :]
    full = (j >= 0) & (torch.arange(keys) <= torch.arange(keys - query.shape[2], keys)[:, None])
    streaming = full & ((j < pattern.sink_tokens) | (i - j < pattern.recent_tokens))
    masks = [full if head in pattern.full_heads(module.layer_idx) else streaming for head in range(key.shape[1])]
    mask = torch.stack(masks, dim=1).repeat_interleave(groups, dim=1)
    k, v = (tensor.double().repeat_interleave(groups, dim=1) for tensor in (key, value))
    scores = query.double() @ k.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~mask, -torch.inf)
    if s_aux is not None:
        scores = torch.cat([scores, s_aux.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
    weights = torch.softmax(scores, dim=-1).nan_to_num(0.0)[..., :keys]
    return (weights @ v).to(query.dtype).transpose(1, 2), None


def _mask(batch_size, q_length, kv_length, attention_mask=None, **kwargs):
    return attention_mask


@contextlib.contextmanager
def sparse_oracle(model, pattern):
    """Let the full-attention layers of a model attend with the mask of a pattern. All layers must be of this kind."""
    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, _mask)
    before = model.config._attn_implementation
    _PATTERNS.append(pattern)
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        _PATTERNS.pop()
