"""Several processes, one model: transformers' tensor parallel plan splits the heads, each rank offloads its own.

There is no engine of our own here. transformers shards the weights (`DistributedConfig`) and sums the partial
results; a rank's attention sees its KV heads only, so its HeadCache holds, and its link moves, a share of the KV.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors.torch import save_model
from transformers import AutoModelForCausalLM

from headinfer.errors import HeadinferError, StateError, UnsupportedError, UsageError
from headinfer.hf.compat import DistributedConfig, PreTrainedConfig, PreTrainedModel, tensor_parallel_plan
from headinfer.hf.ranks import Ranks
from headinfer.plan.model_shape import ModelShape

__all__ = [
    "_NOT_SHARDED",
    "all_of",
    "check_shards",
    "group",
    "load_random_shard",
    "load_shard",
    "rank_device",
    "together",
]

_TIMEOUT = timedelta(hours=2)  # ranks load at different speeds; a rank that ends is noticed by torchrun at once
_Result = TypeVar("_Result")
# Families whose logits transformers' own sharded model gets wrong (test_parallel.py shows it).
_NOT_SHARDED = ("gemma3n_text",)
_KEY_PROJECTIONS = ("k_proj", "qkv_proj", "query_key_value")


def rank_device(ranks: Ranks, device: str) -> str:
    """The device of this rank: the GPU of its local rank, or the CPU. Raises UsageError where it has none."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device not in ("auto", "cuda" if gpus else "cpu"):
        raise UsageError(f"--device {device}: under torchrun each rank takes the device of its own, so leave it out")
    if gpus and ranks.local_rank >= gpus:
        raise UsageError(f"{ranks.local_world} ranks and {gpus} CUDA devices on this host: start one rank per device")
    return f"cuda:{ranks.local_rank}" if gpus else "cpu"


def check_shards(config: PreTrainedConfig, shape: ModelShape, ranks: Ranks) -> None:
    """Raise UnsupportedError, before anything is loaded, where the model does not split over the ranks."""
    plan, family = tensor_parallel_plan(config), config.get_text_config(decoder=True).model_type
    if family in _NOT_SHARDED:
        raise UnsupportedError(
            f"transformers itself gives other results for {family} over several ranks: run it in one process"
        )
    if not any(name.endswith(_KEY_PROJECTIONS) and style == "colwise" for name, style in plan.items()):
        raise UnsupportedError(
            f"transformers has no tensor parallel plan that splits the KV heads of {family}: run it in one process"
        )
    for index, layer in enumerate(shape.layers):
        if layer.kind != "linear_attention" and layer.kv_heads % ranks.world:
            splits = [count for count in range(ranks.world - 1, 0, -1) if layer.kv_heads % count == 0]
            raise UnsupportedError(
                f"layer {index} has {layer.kv_heads} KV heads, which do not split over {ranks.world} ranks: a KV head "
                f"is never cut, so use {splits[0]} or another divisor of {layer.kv_heads}"
            )


@contextmanager
def group(ranks: Ranks) -> Iterator[None]:
    """The process group of all ranks, left in order at the end; nothing for one process."""
    if ranks.world == 1:
        yield
        return
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(ranks.local_rank % torch.cuda.device_count())
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"the {ranks.world} ranks do not reach each other: {_first_line(error)}") from error
    try:
        yield
    except HeadinferError:
        raise
    except RuntimeError as error:
        if _is_lost_connection(error):
            raise StateError("another rank has ended, so this one ends too: see what that one says") from error
        raise
    dist.destroy_process_group()


def together(ranks: Ranks, work: Callable[[], _Result]) -> _Result:
    """Do the same work, without collectives, on all ranks; where it fails on any, it fails on all, and one says so.

    The first rank raises the error, with the ranks that it concerns unless that is all of them; the others exit with
    2 and say nothing.
    """
    if ranks.world == 1:
        return work()
    result, error = None, None
    try:
        result = work()
    except HeadinferError as caught:
        error = caught
    outcomes = all_of(ranks, None if error is None else (type(error), str(error)))
    failed = [(rank, outcome) for rank, outcome in enumerate(outcomes) if outcome is not None]
    if not failed:
        assert result is not None
        return result
    dist.destroy_process_group()
    if not ranks.is_first:
        raise SystemExit(2)
    (_, (kind, message)), same = failed[0], {outcome for _, outcome in failed}
    if len(failed) < ranks.world or len(same) > 1:
        message = f"rank {failed[0][0]} of {ranks.world}: {message}"
    raise kind(message)


def all_of(ranks: Ranks, value: _Result) -> list[_Result]:
    """The value of every rank, in their order, on every rank."""
    if ranks.world == 1:
        return [value]
    values: list[Any] = [None] * ranks.world
    dist.all_gather_object(values, value)
    return values


def load_shard(name: str, ranks: Ranks, *, dtype: torch.dtype) -> PreTrainedModel:
    """This rank's shard of a stored model, on the rank's device."""
    distributed = DistributedConfig(tp_size=ranks.world, tp_plan="auto")
    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, distributed_config=distributed)


def load_random_shard(make: Callable[[], PreTrainedModel], ranks: Ranks, *, dtype: torch.dtype) -> PreTrainedModel:
    """This rank's shard of a model that `make` builds; one rank of each host writes it to a temporary folder.

    Not by save_pretrained(), which writes on the first rank only, whatever the host.
    """
    with tempfile.TemporaryDirectory(prefix="headinfer-") as own:
        folders = all_of(ranks, (own, ranks.local_rank))
        folder = next(folders[rank][0] for rank in range(ranks.rank, -1, -1) if folders[rank][1] == 0)
        if ranks.local_rank == 0:
            model = make()
            model.config.save_pretrained(folder)
            save_model(model, f"{folder}/model.safetensors", metadata={"format": "pt"})
            del model
        dist.barrier()
        model = load_shard(folder, ranks, dtype=dtype)
        dist.barrier()  # the others have read it
    return model


def _is_lost_connection(error: RuntimeError) -> bool:
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(
        words in text for words in ("connection closed by peer", "connection reset by peer", "broken pipe")
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
