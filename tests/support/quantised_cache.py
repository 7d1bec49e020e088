"""transformers' own cache, with K and V stored as headinfer stores them with kv_dtype: the oracle of such runs.

What is older than the tail is decode(encode(K)), in whole blocks at the same positions. It keeps all K and V in the
model's dtype, and each attention is one call of transformers over all of them.
"""

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from headinfer.attention.quantised import Codec
from headinfer.kv.device_buffer import TAIL_TOKENS, TAIL_UNIT_TOKENS


class QuantisedLayer(DynamicLayer):
    """A layer whose keys and values before `stored_tokens` have been quantised."""

    bits = 8
    stored_tokens = 0

    def update(self, key_states, value_states, *args, **kwargs):
        result = super().update(key_states, value_states, *args, **kwargs)
        self.keys = self.keys.clone()  # the attention that follows sees the exact tail and chunk
        self.values = self.values.clone()
        self.store()
        return result

    def store(self):
        """Quantise what leaves the tail after the attention of this chunk."""
        newer = self.keys.shape[2] - self.stored_tokens
        if newer <= TAIL_TOKENS:
            return
        start = self.stored_tokens
        stop = start + (newer - TAIL_UNIT_TOKENS) // TAIL_UNIT_TOKENS * TAIL_UNIT_TOKENS
        codec = Codec(self.bits, self.keys.shape[3], self.values.shape[3], self.keys.dtype)
        for row in range(self.keys.shape[0]):
            k = self.keys[row, :, start:stop]
            v = self.values[row, :, start:stop]
            self.keys[row, :, start:stop], self.values[row, :, start:stop] = codec.decode(*codec.encode(k, v))
        self.stored_tokens = stop


def quantised_cache(config, bits):
    """Return an empty cache whose full-attention layers are QuantisedLayers."""
    cache = DynamicCache(config=config)
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[index] = QuantisedLayer()
            cache.layers[index].bits = bits
    return cache


def forward(model, cache, ids, chunk_tokens, **more):
    """Read ids [B, T] in chunks, and return the logits of all tokens."""
    with torch.inference_mode():
        parts = [
            model(input_ids=part, past_key_values=cache, use_cache=True, **more).logits
            for part in ids.split(chunk_tokens, dim=1)
        ]
    return torch.cat(parts, dim=1)
