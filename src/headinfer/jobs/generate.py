"""One generation job, from options to a summary: check everything, then load, read, write."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from headinfer.attention import native
from headinfer.engine.options import Options
from headinfer.engine.run_plan import fixed_fields, plan_run, planned
from headinfer.errors import UsageError
from headinfer.hf.cache import HeadCache, Stats
from headinfer.hf.compat import PreTrainedModel
from headinfer.hf.enable import enable
from headinfer.hf.models import ModelSource, resolve
from headinfer.hf.parallel import all_of, check_shards, load_random_shard, load_shard, rank_device
from headinfer.hf.ranks import Ranks
from headinfer.plan.memory import available_host_bytes, check_host_memory
from headinfer.plan.model_shape import ModelShape
from headinfer.plan.planner import Plan

__all__ = [
    "DTYPES",
    "Job",
    "Prepared",
    "Streamer",
    "Summary",
    "checked_device",
    "chosen_dtype",
    "prepare",
    "read_text",
    "run",
]

_WINDOW_TOKENS = 8
_LONGEST_CHARACTER_BYTES = 4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Job:
    """What a person asks for; what is None is planned. Sampling options are generate()'s own."""

    model: str
    document: str = ""
    prompt: str = ""
    max_new_tokens: int = 64
    chunk_tokens: int | None = None
    dtype: str = "auto"
    device: str = "auto"
    seed: int = 0
    raw: bool = False
    sampling: dict[str, Any] = field(default_factory=dict)
    options: Options = field(default_factory=Options)


@dataclass(frozen=True)
class Prepared:
    """A job that has passed all checks; only its tokenizer and config are loaded."""

    job: Job
    source: ModelSource
    tokenizer: Any
    input_ids: torch.Tensor
    dtype: torch.dtype
    device: str
    warnings: list[str]
    plan: Plan
    ranks: Ranks = field(default_factory=Ranks)

    @property
    def shape(self) -> ModelShape:
        """The model's shape."""
        return ModelShape.from_config(self.source.config)


@dataclass
class Summary:
    """What a job did. Seconds are wall time; interrupted jobs say what was done so far.

    plan: predictions, and why. options: those of `enable()` that repeat the run's arithmetic. stats: of this process;
    rank_stats: of all ranks, where several processes shared the model and none was interrupted.
    """

    model: str
    text: str = ""
    tokens_in: int = 0
    tokens_read: int = 0
    tokens_out: int = 0
    token_ids: list[int] = field(default_factory=list)
    first_token_s: float | None = None
    total_s: float = 0.0
    interrupted: bool = False
    ranks: int = 1
    plan: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    stats: Stats | None = None
    rank_stats: list[Stats] = field(default_factory=list)

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Tokens per second after the first."""
        if self.first_token_s is None or self.tokens_out < 2:
            return None
        return (self.tokens_out - 1) / (self.total_s - self.first_token_s)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**dataclasses.asdict(self), "decode_tokens_per_s": self.decode_tokens_per_s}


def read_text(path: Path) -> str:
    """The text of a UTF-8 file; UsageError where there is none."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror or str(error)
        raise UsageError(f"cannot read {path}: {reason}") from error


def checked_device(name: str) -> str:
    """The device that a --device option names; auto is CUDA where there is any. Raises UsageError."""
    device = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"device {device}: this torch sees no CUDA device; use --device cpu")
    if device.split(":")[0] not in ("cpu", "cuda"):
        raise UsageError(f"device {device}: choose cpu, cuda or cuda:N")
    return device


def chosen_dtype(name: str, source: ModelSource, device: str) -> torch.dtype:
    """The dtype that a --dtype option names. auto: the checkpoint's; random models run in float32 on the CPU and in
    bfloat16 elsewhere. Raises UsageError.
    """
    if name not in ("auto", *DTYPES):
        raise UsageError(f"dtype {name}: choose auto, {', '.join(DTYPES)}")
    if name != "auto":
        return DTYPES[name]
    own = getattr(source.config, "dtype", None)
    if source.is_random or own not in DTYPES.values():
        return torch.float32 if device == "cpu" else torch.bfloat16
    assert isinstance(own, torch.dtype)
    return own


def prepare(job: Job, ranks: Ranks | None = None) -> Prepared:
    """Check a job against the model, this machine and itself, without loading weights.

    ranks: this process's place among those that share the model; each is checked for its share of the heads.
    Raises UsageError, UnsupportedError or CapacityError with what is wrong and what would work.
    """
    for name in ("max_new_tokens", "chunk_tokens"):
        if getattr(job, name) is not None and getattr(job, name) < 1:
            raise UsageError(f"{name.replace('_', '-')} is {getattr(job, name)}: it must be a positive number")
    if not (job.prompt.strip() or job.document.strip()):
        raise UsageError("the prompt is empty: give a question with --prompt, a document with --file, or both")
    ranks = ranks or Ranks()
    device = rank_device(ranks, job.device) if ranks.world > 1 else checked_device(job.device)
    source = resolve(job.model)
    dtype = chosen_dtype(job.dtype, source, device)
    tokenizer = source.tokenizer()
    input_ids = _encode(job, tokenizer)
    shape = ModelShape.from_config(source.config)
    weight_bytes = source.weight_bytes(dtype) if device == "cpu" else 0
    if ranks.world > 1:
        check_shards(source.config, shape, ranks)
        shape, weight_bytes = shape.shard(ranks.world), weight_bytes // ranks.world
    total = input_ids.shape[1] + job.max_new_tokens
    check_host_memory(
        total,
        shape.kv_bytes_per_token(dtype.itemsize),
        weight_bytes,
        available=available_host_bytes() // ranks.local_world,
        kv_budget=job.options.host_kv_budget_bytes,
    )
    plan = plan_run(
        shape,
        torch.device(device),
        dtype,
        total,
        ranks_on_host=ranks.local_world,
        fixed=fixed_fields(job.options, job.chunk_tokens),
    )
    cache = HeadCache(source.config, **vars(planned(job.options, plan)))
    cache.engine.check_budget(shape, dtype.itemsize, plan.chunk_tokens, total)
    warnings = []
    if shape.max_context_tokens and total > shape.max_context_tokens:
        warnings.append(
            f"{total:,} tokens exceed the {shape.max_context_tokens:,} that this model was made for: "
            "expect poor answers"
        )
    return Prepared(job, source, tokenizer, input_ids, dtype, device, warnings, plan, ranks)


def run(
    prepared: Prepared,
    *,
    on_text: Callable[[str], None],
    on_forward: Callable[[HeadCache], None] | None = None,
) -> Summary:
    """Load the model and generate. Text goes to on_text as it comes; on_forward is called after each chunk and token.

    Ctrl-C ends the generation and returns the summary so far, with `interrupted` set.
    """
    job = prepared.job
    summary = Summary(job.model, tokens_in=prepared.input_ids.shape[1], warnings=prepared.warnings)
    summary.ranks = prepared.ranks.world
    summary.plan = prepared.plan.as_dict()
    model = _load(prepared)
    torch.manual_seed(job.seed)
    chunk_tokens = prepared.plan.chunk_tokens
    options = planned(job.options, prepared.plan)
    options = dataclasses.replace(options, expected_tokens=prepared.input_ids.shape[1] + job.max_new_tokens)
    cache = HeadCache(model.config, **vars(options))
    summary.options = dataclasses.asdict(options) | {"chunk_tokens": chunk_tokens}
    if prepared.device == "cpu":
        native.unavailable_reason()  # compiles the decode kernel where that was never done here, which is no part of the timing
    start = time.perf_counter()
    streamer = Streamer(prepared.tokenizer, on_text, summary, start)
    input_ids = prepared.input_ids.to(prepared.device)
    try:
        with enable(model, chunk_tokens=chunk_tokens, on_forward=on_forward):
            model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                past_key_values=cache,
                prefill_chunk_size=chunk_tokens,
                max_new_tokens=job.max_new_tokens,
                streamer=streamer,
                **({"do_sample": False} | job.sampling),
            )
    except KeyboardInterrupt:
        summary.interrupted = True
        streamer.end()
    summary.total_s = time.perf_counter() - start
    summary.stats = cache.stats()
    summary.tokens_read = min(summary.stats.tokens, summary.tokens_in)
    if prepared.ranks.world > 1 and not summary.interrupted:
        summary.rank_stats = all_of(prepared.ranks, summary.stats)
    return summary


def _load(prepared: Prepared) -> PreTrainedModel:
    """The model, or this rank's shard of it."""
    source, ranks, dtype = prepared.source, prepared.ranks, prepared.dtype
    if ranks.world == 1:
        return source.load(dtype=dtype, device=prepared.device, seed=prepared.job.seed)
    if source.is_random:

        def make() -> PreTrainedModel:
            return source.load(dtype=dtype, device="cpu", seed=prepared.job.seed)

        return load_random_shard(make, ranks, dtype=dtype)
    return load_shard(source.name, ranks, dtype=dtype)


class Streamer(BaseStreamer):  # type: ignore[misc]
    """Passes text on as soon as its characters are whole, and notes tokens and times.

    transformers' TextStreamer decodes everything since the last newline again at each token; this decodes a window
    of a few tokens, since a tokenizer needs only its neighbours to place a token's spaces and bytes.
    """

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None], summary: Summary, start: float) -> None:
        self._tokenizer, self._on_text, self._summary, self._start = tokenizer, on_text, summary, start
        self._seen_prompt = False
        self._shown: list[int] = []
        self._held: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, then one token at a time."""
        if not self._seen_prompt:
            self._seen_prompt = True
            return
        summary, new_ids = self._summary, value.flatten().tolist()
        if summary.first_token_s is None:
            summary.first_token_s = time.perf_counter() - self._start
        summary.tokens_out += len(new_ids)
        summary.token_ids.extend(new_ids)
        self._held.extend(new_ids)
        self._show(at_end=False)

    def end(self) -> None:
        """Show what is left."""
        self._show(at_end=True)

    def _show(self, *, at_end: bool) -> None:
        before, after = self._decode(self._shown), self._decode(self._shown + self._held)
        text = after[len(before) :]
        if text.endswith("\ufffd") and len(self._held) < _LONGEST_CHARACTER_BYTES and not at_end:
            return  # the first bytes of a character
        self._shown, self._held = (self._shown + self._held)[-_WINDOW_TOKENS:], []
        if text:
            self._summary.text += text
            self._on_text(text)

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text


def _encode(job: Job, tokenizer: Any) -> torch.Tensor:
    """Token ids [1, T]: the document first, the question last, in the model's chat template where it has one."""
    text = "\n\n".join(part for part in (job.document, job.prompt) if part)
    if not job.raw and getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
        )
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    else:
        ids = tokenizer(text, return_tensors="pt").input_ids
    if ids.shape[1] == 0:
        raise UsageError("the prompt has no tokens")
    assert isinstance(ids, torch.Tensor)
    return ids
