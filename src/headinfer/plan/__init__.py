"""The memory and cost model: what fits, what it costs, and the shape of tiles. It needs neither torch nor transformers."""
