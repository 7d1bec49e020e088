"""Tensor parallelism over several processes: each rank offloads the KV heads that it computes.

transformers shards the weights (`DistributedConfig`) and sums the partial results. The attention of a rank has only its
own KV heads, so the rank's HeadCache holds and moves only their KV. This module checks that a model can be sharded,
loads a shard, connects the ranks, and ends all of them if one fails.
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

from headinfer.errors import HeadinferError, StateError, UnsupportedError, UsageError
from headinfer.hf.compat import DistributedConfig, PreTrainedConfig, PreTrainedModel, tensor_parallel_plan
from headinfer.hf.defaults import decode_one_text, leave_out_outputs
from headinfer.hf.models import first_line, load_whole
from headinfer.hf.ranks import Ranks
from headinfer.plan.model_shape import ModelShape

__all__ = [
    "check_shards",
    "gather_from_ranks",
    "load_random_shard",
    "load_shard",
    "process_group",
    "rank_device",
    "run_on_all_ranks",
]

_TIMEOUT = timedelta(hours=2)  # ranks may load at different speeds; torchrun notices a rank that ends at once
_Result = TypeVar("_Result")
# Families for which transformers' own sharded model gives wrong logits.
_NOT_SHARDED = ("gemma3n_text",)
_KEY_PROJECTIONS = ("k_proj", "qkv_proj", "query_key_value")


def rank_device(ranks: Ranks, device: str) -> str:
    """Return the device of this rank: the GPU with the number of its local rank, or the CPU if there is no GPU.

    Args:
        ranks: this rank.
        device: the device that the user asked for. "auto", or the kind of device that the rank gets anyway.

    Raises:
        UsageError: the user asked for another device, or there are fewer GPUs than ranks on this host.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device not in ("auto", "cuda" if gpus else "cpu"):
        raise UsageError(
            f"--device {device} cannot be used under torchrun, where each rank has a device of its own: leave it out"
        )
    if gpus and ranks.local_rank >= gpus:
        raise UsageError(
            f"there are {ranks.local_world} ranks and {gpus} CUDA devices on this host: start one rank per device"
        )
    return f"cuda:{ranks.local_rank}" if gpus else "cpu"


def check_shards(config: PreTrainedConfig, shape: ModelShape, ranks: Ranks) -> None:
    """Check that a model can be sharded over the ranks, before it is loaded.

    Args:
        config: the config of the model.
        shape: the shape of the whole model.
        ranks: this rank.

    Raises:
        UnsupportedError: transformers cannot shard the model exactly, or its KV heads do not split over the ranks.
    """
    plan = tensor_parallel_plan(config)
    family = config.get_text_config(decoder=True).model_type
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
def process_group(ranks: Ranks) -> Iterator[None]:
    """Connect all ranks, and disconnect them at the end. Do nothing if there is only one process.

    Raises:
        UsageError: the ranks cannot connect to each other.
        StateError: another rank has ended.
    """
    if ranks.world == 1:
        yield
        return
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(ranks.local_rank % torch.cuda.device_count())
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"the {ranks.world} ranks cannot connect to each other: {first_line(error)}") from error
    try:
        yield
    except HeadinferError:
        raise
    except RuntimeError as error:
        if _is_lost_connection(error):
            raise StateError("another rank has ended, so this one ends too: see the message of that rank") from error
        raise
    dist.destroy_process_group()


def run_on_all_ranks(ranks: Ranks, work: Callable[[], _Result]) -> _Result:
    """Do the same work on all ranks. If it fails on one of them, all ranks end, with one message.

    Args:
        ranks: this rank.
        work: the work. It must not communicate with other ranks.

    Raises:
        HeadinferError: on the first rank only: the error of the first rank that failed. The message names that rank,
            unless all ranks failed in the same way.
        SystemExit: on all other ranks, with status 2.
    """
    if ranks.world == 1:
        return work()
    result: _Result | None = None
    error: HeadinferError | None = None
    try:
        result = work()
    except HeadinferError as caught:
        error = caught
    outcomes = gather_from_ranks(ranks, None if error is None else (type(error), str(error)))
    failed = [(rank, outcome) for rank, outcome in enumerate(outcomes) if outcome is not None]
    if not failed:
        assert result is not None
        return result
    dist.destroy_process_group()
    if not ranks.is_first:
        raise SystemExit(2)
    first_failed, (kind, message) = failed[0]
    different = {outcome for _, outcome in failed}
    if len(failed) < ranks.world or len(different) > 1:
        message = f"rank {first_failed} of {ranks.world}: {message}"
    raise kind(message)


def gather_from_ranks(ranks: Ranks, value: _Result) -> list[_Result]:
    """Give every rank the values of all ranks, in the order of the ranks."""
    if ranks.world == 1:
        return [value]
    values: list[Any] = [None] * ranks.world
    dist.all_gather_object(values, value)
    return values


def load_shard(name: str, ranks: Ranks, *, dtype: torch.dtype) -> PreTrainedModel:
    """Load this rank's shard of a model onto the rank's device.

    Args:
        name: the folder or the hub name of the model.
        ranks: this rank.
        dtype: the dtype of the weights.

    Raises:
        UsageError: the model cannot be loaded.
    """
    distributed = DistributedConfig(tp_size=ranks.world, tp_plan="auto")
    model = load_whole(name, dtype=dtype, distributed_config=distributed)
    leave_out_outputs(model)
    decode_one_text(model)
    return model


def load_random_shard(
    make: Callable[[str], PreTrainedModel], ranks: Ranks, *, device: str, dtype: torch.dtype
) -> PreTrainedModel:
    """Load this rank's shard of a model that exists nowhere on disk.

    The first rank of each host writes the whole model to a temporary folder, and all ranks of the host load from it.
    On a single host its device draws the weights, as if it were alone, and host memory takes them one after the other,
    since the whole model may be larger than the memory of the device. Several hosts draw them on their CPUs: the
    numbers that a GPU draws also depend on how many multiprocessors it has, and all hosts must draw the same ones.

    Args:
        make: creates the whole model on the CPU; it gets the device that draws the weights.
        ranks: this rank.
        device: the device of this rank.
        dtype: the dtype of the weights.
    """
    with tempfile.TemporaryDirectory(prefix="headinfer-") as own_folder:
        folders = gather_from_ranks(ranks, (own_folder, ranks.local_rank))
        first_on_host = next(rank for rank in range(ranks.rank, -1, -1) if folders[rank][1] == 0)
        folder = folders[first_on_host][0]
        if ranks.local_rank == 0:
            model = make(device if ranks.local_world == ranks.world else "cpu")
            # model.save_pretrained() would write on rank 0 only, and so on one host only.
            model.config.save_pretrained(folder)
            save_model(model, f"{folder}/model.safetensors", metadata={"format": "pt"})
            del model
        dist.barrier()
        model = load_shard(folder, ranks, dtype=dtype)
        dist.barrier()  # the folder is removed only when all ranks have loaded
    return model


def _is_lost_connection(error: RuntimeError) -> bool:
    """Return whether an error of torch.distributed says that another rank has ended."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(
        words in text for words in ("connection closed by peer", "connection reset by peer", "broken pipe")
    )
