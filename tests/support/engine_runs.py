"""Runs forward passes of an engine without a model, and compares them with float64."""

import torch

from headinfer.attention.reference import attend_reference, causal_mask
from headinfer.engine.engine import Engine
from headinfer.engine.streaming import AttentionSpec


def attend_all(device, dtype, lengths, options, dims=(128, 128), rows=1, layers=2):
    """Run forward passes with `lengths` tokens.

    Returns the relative error of each output against float64, the engine, and its LayerKVs.
    """
    rng = torch.Generator().manual_seed(0)
    engine = Engine(options, layers)
    layer_kvs = []
    appended = []
    errors = []
    for tokens in lengths:
        for layer in range(layers):
            shapes = ((8, dims[0]), (2, dims[0]), (2, dims[1]))
            q, k, v = (torch.randn(rows, heads, tokens, dim, generator=rng).to(dtype) for heads, dim in shapes)
            here = [x.to(device) for x in (q, k, v)]
            if len(layer_kvs) == layer:
                layer_kvs.append(engine.new_layer_kv(*here[1:]))
                appended.append((k, v))
            else:
                appended[layer] = tuple(torch.cat(both, dim=2) for both in zip(appended[layer], (k, v), strict=True))
            if layer == 0:
                engine.begin(layer_kvs[0], 8, tokens)
            out = engine.attend(*here, layer_kvs[layer], AttentionSpec(0.1))
            layer_kvs[layer].append(*here[1:])
            mask = causal_mask(tokens, appended[layer][0].shape[2])
            wanted = attend_reference(q, *appended[layer], scale=0.1, mask=mask).out.transpose(1, 2)
            errors.append(float((out.cpu().double() - wanted).norm() / wanted.norm()))
    return errors, engine, layer_kvs
