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


def step(engine, layer_kvs, tokens=1, seed=1):
    """Run one more forward pass with random input.

    Returns the output of each layer, and the sums of what the counters of all devices have counted in the pass.
    """
    rng = torch.Generator().manual_seed(seed)
    before = _counted(engine)
    outputs = []
    for layer_kv in layer_kvs:
        shape = (layer_kv.rows, layer_kv.heads, tokens)
        q = torch.randn(shape[0], 8, tokens, layer_kv.key_dim, generator=rng)
        k = torch.randn(*shape, layer_kv.key_dim, generator=rng)
        v = torch.randn(*shape, layer_kv.value_dim, generator=rng)
        q, k, v = (x.to(layer_kv.device, layer_kv.dtype) for x in (q, k, v))
        if layer_kv is layer_kvs[0]:
            engine.begin(layer_kv, 8, tokens)
        outputs.append(engine.attend(q, k, v, layer_kv, AttentionSpec(0.1)))
        layer_kv.append(k, v)
    now = _counted(engine)
    return outputs, {name: now[name] - before[name] for name in now}


def _counted(engine):
    names = ("host_to_device_bytes", "device_to_host_bytes", "cpu_attended_bytes", "disk_to_host_bytes")
    return {name: sum(getattr(counter, name) for counter in engine.counters) for name in names}


def host_tokens_of(layer_kv, share, unit):
    """The tokens that the host should attend to with a share of the past, and those that should be streamed."""
    on_host = 0
    streamed = 0
    for shared in layer_kv.shared_prefixes():
        slices = [(max(part.start, part.segment.resident_tokens), part.stop) for part in shared.slices]
        total = sum(max(stop - start, 0) for start, stop in slices)
        own = total if share == 1 else int(share * total) // unit * unit
        on_host += own
        streamed += total - own
    return on_host, streamed
