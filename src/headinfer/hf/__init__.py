"""Everything that knows transformers: the cache, its layers, the attention function, enable() and models."""
