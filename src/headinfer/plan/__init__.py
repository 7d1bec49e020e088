"""The memory and cost model: what fits, what it costs, and the shape of tiles. Needs neither torch nor transformers."""
