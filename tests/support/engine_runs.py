"""Runs forward passes of an engine without a model, and compares them with float64."""

import functools

import torch

from headinfer.attention.reference import attend_reference, causal_mask
from headinfer.engine.engine import Engine
from headinfer.engine.layer_pass import AttentionSpec


@functools.lru_cache(maxsize=3)  # the dtypes of one test
def passes(dtype, lengths, dims, rows, layers):
    """Make the layer, q, k and v of each pass, and in float64 its attention to all tokens so far."""
    rng = torch.Generator().manual_seed(0)
    appended = [[] for _ in range(layers)]
    found = []
    for tokens in lengths:
        for layer in range(layers):
            shapes = ((8, dims[0]), (2, dims[0]), (2, dims[1]))
            q, k, v = (torch.randn(rows, heads, tokens, dim, generator=rng).to(dtype) for heads, dim in shapes)
            appended[layer].append((k, v))
            past = [torch.cat(side, dim=2) for side in zip(*appended[layer], strict=True)]
            mask = causal_mask(tokens, past[0].shape[2])
            wanted = attend_reference(q, *past, scale=0.1, mask=mask).out.transpose(1, 2)
            found.append((layer, q, k, v, wanted))
    return found


def attend_all(device, dtype, lengths, options, dims=(128, 128), rows=1, layers=2):
    """Run forward passes with `lengths` tokens.

    Returns the relative error of each output against float64, the engine, and its LayerKVs.
    """
    engine = Engine(options, layers)
    layer_kvs = []
    errors = []
    for layer, *inputs, wanted in passes(dtype, tuple(lengths), dims, rows, layers):
        q, k, v = (x.to(device) for x in inputs)
        if len(layer_kvs) == layer:
            layer_kvs.append(engine.new_layer_kv(k, v))
        if layer == 0:
            engine.begin(layer_kvs[0], 8, q.shape[2])
        out = engine.attend(q, k, v, layer_kvs[layer], AttentionSpec(0.1))
        layer_kvs[layer].append(k, v)
        errors.append(float((out.cpu().double() - wanted).norm() / wanted.norm()))
    return errors, engine, layer_kvs
