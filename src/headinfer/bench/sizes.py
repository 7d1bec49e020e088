"""How large the suites run: the model, contexts, chunks and rounds.

CPU and GPU suites share the model and its type. Their other sizes differ in kind: two CPU cores measure single passes
at a few contexts, and a GPU measures as many contexts as the time allows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from headinfer.plan.tiles import DEFAULT_BUDGET_BYTES

__all__ = ["BASELINES", "QUICK_CPU", "QUICK_GPU", "CpuSizes", "GpuSizes", "PlanCase", "Sizes"]

K = 2**10
M = 2**20
BASELINES = (
    "paper",
    "resident",
    "offloaded",
    "dynamic",
    "layer-wise",
    "free",
    "int8",
    "int4",
)  # the most telling first


@dataclass(frozen=True)
class Sizes:
    """What all suites have.

    Attributes:
        model: the model, as `headinfer generate` names it.
        dtype: the type of its weights and of its KV.
    """

    model: str
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class PlanCase:
    """A run that `headinfer bench --check-plan` predicts and measures.

    Attributes:
        what: the case, for people.
        dtype: the type of weights and KV.
        tokens: tokens of the prompt, or of the past of one decoded token.
        chunk_tokens: tokens of a prefill chunk; 0: one token is decoded after the past.
        layers: layers of the model, which has the shape of Llama-3-8B.
    """

    what: str
    dtype: torch.dtype
    tokens: int
    chunk_tokens: int = 0
    layers: int = 2


@dataclass(frozen=True)
class CpuSizes(Sizes):
    """Sizes of the CPU's suites. The defaults are those of the documented results.

    Attributes:
        model: the attention of Llama-3-8B, with a small MLP and vocabulary, so that attention is what is measured.
        host_model: the model of the suite `host`: many layers with little to compute.
        short_tokens: a short context.
        long_tokens: a long context.
        chunk_tokens: tokens of a prefill chunk.
        chunk_offset: tokens before that chunk.
        ring_tokens: two contexts whose KV is streamed through a ring.
        long_steps: rounds of a decoded token at the long context.
        short_steps: rounds of a decoded token at the short context.
        chunks: rounds of a prefill chunk.
        checkpoint_tokens: tokens between two checkpoints of a session.
        disk_rounds: rounds of the suites that write to a disk.
        attention_tokens: keys of the suite `attention`: 8 heads of width 128.
        attention_rounds: its rounds.
        batch_model: the second model of the suite `batch`: one query head for each KV head.
        batch_tokens: tokens of its document.
        batch_new_tokens: tokens of its answers.
        batch_rounds: its rounds.
        plan_cases: what --check-plan measures.
        about_s: for each suite, about how many seconds it takes on two cores of an AMD EPYC.
    """

    model: str = "random:llama-3-8b?layers=2&intermediate=256&vocab=256&context=1048576"
    host_model: str = "random:llama-3-8b?layers=32&hidden=64&intermediate=64&heads=4&kv_heads=2&context=1048576"
    short_tokens: int = 1024
    long_tokens: int = 131_072
    chunk_tokens: int = 2048
    chunk_offset: int = 30_720
    ring_tokens: tuple[int, int] = (8192, 262_144)
    long_steps: int = 7
    short_steps: int = 200
    chunks: int = 3
    checkpoint_tokens: int = 16_384
    disk_rounds: int = 5
    attention_tokens: int = 65_536
    attention_rounds: int = 9
    batch_model: str = "random:llama-3-8b?layers=2&hidden=1024&intermediate=256&vocab=256&heads=8&context=1048576"
    batch_tokens: int = 65_536
    batch_new_tokens: int = 32
    batch_rounds: int = 5
    plan_cases: tuple[PlanCase, ...] = (
        PlanCase("decode after 32,768 tokens, bfloat16", torch.bfloat16, 32_768),
        PlanCase("decode after 1,024 tokens, bfloat16", torch.bfloat16, 1024),
        PlanCase("decode after 16,384 tokens, float32", torch.float32, 16_384),
        PlanCase("prefill of 8,192 tokens, chunks of 2,048, bfloat16", torch.bfloat16, 8192, 2048),
        PlanCase("prefill of 4,096 tokens, chunks of 1,024, float32", torch.float32, 4096, 1024),
    )
    about_s: Mapping[str, float] = field(
        default_factory=lambda: {
            "decode": 45.0,
            "prefill": 135.0,
            "memory": 30.0,
            "device-kv": 30.0,
            "host": 10.0,
            "attention": 90.0,
            "batch": 240.0,
            "kv-dtype": 120.0,
            "session": 300.0,
            "disk-tier": 150.0,
        }
    )


@dataclass(frozen=True)
class GpuSizes(Sizes):
    """Sizes of the GPU's suites. Contexts and offsets are in the order of their importance, since time may run out.

    Attributes:
        model: the shape of Llama-3-8B; its context covers the longest one that is measured.
        decode_tokens: the contexts after which a token is decoded.
        chunk_offsets: the contexts after which a prefill chunk is read.
        whole_tokens: the lengths of prompts that are read as a whole.
        baselines: the baselines (baselines.py) that are measured, in this order.
        real_model: the model of the suite `real`.
        real_tokens: the lengths of its prompts; empty: the longest one that host memory holds.
        real_new_tokens: the tokens that it decodes after each prompt.
        chunk_tokens: tokens of a prefill chunk; None: chosen for the rates that this run measures.
        cpu_tokens: the shortest context at which a decoded token with a share of the host's CPU is measured.
        cpu_share: this share; None: chosen for the rates that this run measures.
        floor_bytes: the device KV budget of headinfer's own measurements, in bytes.
        real_kv_bytes: the most KV that is kept for all layers; beyond it all layers read the KV of one. None: what host
            memory allows.
        copy_bytes: the sizes of copies over the link, in bytes.
        matrix: rows and columns of the matrices whose product is timed.
        rounds: the most rounds of a comparison.
        rounds_s: about the seconds that the rounds of a comparison may take.
        longest_pass_s: a baseline whose pass would take longer is not measured.
    """

    model: str = "random:llama-3-8b?vocab=128256&context=4194304"
    decode_tokens: tuple[int, ...] = (64 * K, 1024 * K, K, 4096 * K, 256 * K, 16 * K, 4 * K)
    chunk_offsets: tuple[int, ...] = (64 * K, 1024 * K)
    whole_tokens: tuple[int, ...] = (10 * K, 40 * K, 100 * K, 200 * K)
    baselines: tuple[str, ...] = BASELINES
    real_model: str = "random:qwen2-7b?vocab=152064&context=4194304"
    real_tokens: tuple[int, ...] = ()
    real_new_tokens: int = 16
    chunk_tokens: int | None = None
    cpu_tokens: int = 64 * K
    cpu_share: float | None = None
    floor_bytes: int = DEFAULT_BUDGET_BYTES
    real_kv_bytes: int | None = None
    copy_bytes: tuple[int, ...] = (256 * M, 1024 * M)
    matrix: int = 8192
    rounds: int = 7
    rounds_s: float = 4.0
    longest_pass_s: float = 40.0


QUICK_CPU = CpuSizes(
    host_model="random:llama-3-8b?layers=4&hidden=64&intermediate=64&heads=4&kv_heads=2",
    short_tokens=256,
    long_tokens=4096,
    chunk_tokens=64,
    chunk_offset=1024,
    ring_tokens=(1024, 4096),
    long_steps=2,
    short_steps=2,
    chunks=1,
    checkpoint_tokens=1024,
    disk_rounds=1,
    about_s={
        "decode": 6.0,
        "prefill": 3.0,
        "memory": 10.0,
        "device-kv": 3.0,
        "host": 2.0,
        "attention": 2.0,
        "batch": 10.0,
        "kv-dtype": 6.0,
        "session": 60.0,
        "disk-tier": 10.0,
    },
    attention_tokens=1024,
    attention_rounds=1,
    batch_tokens=1024,
    batch_new_tokens=4,
    batch_rounds=1,
    plan_cases=(
        PlanCase("decode after 1,024 tokens, bfloat16", torch.bfloat16, 1024, layers=1),
        PlanCase("prefill of 256 tokens, chunks of 128, bfloat16", torch.bfloat16, 256, 128, layers=1),
    ),
)

QUICK_GPU = GpuSizes(
    model="random:llama-3-8b?layers=2&context=4194304",
    decode_tokens=(16 * K, K),
    chunk_offsets=(16 * K,),
    whole_tokens=(10 * K,),
    real_model="random:qwen2-7b?layers=2&context=4194304",
    real_tokens=(10 * K,),
    copy_bytes=(64 * M,),
    matrix=4096,
    rounds=2,
)
