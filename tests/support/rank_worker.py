"""What test_parallel.py runs on every rank: in forks of itself, or with torchrun as a program.

rank_worker.py dying COMMAND ...   run a command, and end the last rank after a chunk
"""

import itertools
import os
import sys

import torch
from safetensors.torch import load_file, save_file

import headinfer
from headinfer.cli import main as cli
from headinfer.engine import run_plan
from headinfer.hf import parallel
from headinfer.hf.ranks import Ranks
from headinfer.jobs import generate as generation

CHUNK_TOKENS = 40
STEPS = 5
SMALL_TILES = {"device_kv_budget_bytes": 4 << 20, "heads_per_group": 1, "tile_tokens": 30, "transport": "eager"}


@torch.no_grad()
def read(model, ids, cache):
    """Compute the logits of all tokens, in chunks and for the last tokens one by one."""
    tokens = ids.shape[1]
    edges = [*range(0, tokens - STEPS, CHUNK_TOKENS), *range(tokens - STEPS, tokens + 1)]
    pairs = itertools.pairwise(edges)
    return torch.cat([model(ids[:, a:b], past_key_values=cache, use_cache=True).logits for a, b in pairs], dim=1)


def families(folder):
    """Run each model in a folder sharded, and write the first rank's logits to its folder."""
    ranks = Ranks.from_environment()
    with parallel.process_group(ranks):
        for path in sorted(folder.iterdir()):
            ids = load_file(path / "ids.safetensors")["ids"]
            model = parallel.load_shard(str(path), ranks, dtype=torch.float32).eval()
            with headinfer.enable(model):
                cache = headinfer.HeadCache(model.config, **SMALL_TILES)
                logits = read(model, ids, cache)
            heads = torch.tensor([layer.layer_kv.heads for layer in cache.head_layers])
            if ranks.is_first:
                save_file({"logits": logits, "heads": heads}, path / "found.safetensors")


def command_line(fault, arguments):
    """Run a command. The last rank has no free host memory ("poor"), ends after a chunk ("dying"), or is well ("")."""
    sys.argv = ["headinfer", *arguments]
    ranks = Ranks.from_environment()
    if ranks.rank == ranks.world - 1:
        if fault == "poor":
            run_plan.available_host_bytes = lambda: 0
        elif fault == "dying":
            run = generation.run
            generation.run = lambda prepared, on_text: run(prepared, on_text=on_text, on_forward=lambda _: os._exit(9))
    cli.main()


if __name__ == "__main__":
    torch.set_num_threads(1)
    command_line(sys.argv[1], sys.argv[2:])
