"""Forward passes of an engine without a model, against float64."""

import torch

from headinfer.attention.reference import attend_reference, causal_mask
from headinfer.engine.engine import Engine


def attend_all(device, dtype, lengths, options, dims=(128, 128), rows=1, layers=2):
    """Forward passes of an engine's layers; the relative error of each output against float64, and the engine."""
    rng, engine, layer_kvs, told, errors = torch.Generator().manual_seed(0), Engine(options, layers), [], [], []
    for tokens in lengths:
        for layer in range(layers):
            shapes = ((8, dims[0]), (2, dims[0]), (2, dims[1]))
            q, k, v = (torch.randn(rows, heads, tokens, dim, generator=rng).to(dtype) for heads, dim in shapes)
            here = [x.to(device) for x in (q, k, v)]
            if len(layer_kvs) == layer:
                layer_kvs.append(engine.new_layer_kv(*here[1:]))
                told.append((k, v))
            else:
                told[layer] = tuple(torch.cat(both, dim=2) for both in zip(told[layer], (k, v), strict=True))
            if layer == 0:
                engine.begin(layer_kvs[0], 8, tokens)
            out = engine.attend(*here, layer_kvs[layer], scale=0.1, softcap=None, sinks=None, token_ranges=None)
            layer_kvs[layer].append(*here[1:])
            mask = causal_mask(tokens, told[layer][0].shape[2])
            wanted = attend_reference(q, *told[layer], scale=0.1, mask=mask).out.transpose(1, 2)
            errors.append(float((out.cpu().double() - wanted).norm() / wanted.norm()))
    return errors, engine, layer_kvs
