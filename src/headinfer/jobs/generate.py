"""The job of `headinfer generate`: check everything, then load the model, read the prompt and write the answer."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch

from headinfer.attention import native
from headinfer.engine.machine import chosen_device
from headinfer.engine.options import Options
from headinfer.engine.run_plan import RunPlan, RunRequest, plan_run
from headinfer.errors import ContextLengthWarning, RereadWarning, UsageError
from headinfer.hf.cache import HeadCache, Stats
from headinfer.hf.compat import BaseStreamer, PreTrainedModel
from headinfer.hf.enable import Enabled, context_warning, enable
from headinfer.hf.guesses import GuessCounts
from headinfer.hf.models import ModelSource, resolve
from headinfer.hf.parallel import check_shards, gather_from_ranks, load_random_shard, load_shard, rank_device
from headinfer.hf.ranks import Ranks
from headinfer.hf.rotary import RotaryLengths, crossing_warning
from headinfer.jobs.answer_text import AnswerText
from headinfer.jobs.draft import check_draft, loaded_draft
from headinfer.jobs.prompts import prompts_ids
from headinfer.jobs.sampling import Sampling
from headinfer.jobs.where import Passage
from headinfer.plan.cpu_share import unused_share_warnings
from headinfer.plan.model_shape import ModelShape
from headinfer.plan.planner import Plan
from headinfer.utils.units import format_bytes
from headinfer.utils.values import choice

__all__ = [
    "DTYPES",
    "Job",
    "Prepared",
    "Streamer",
    "Summary",
    "already_warned",
    "chosen_dtype",
    "load",
    "prepare",
    "run",
]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Job:
    """The options of `headinfer generate`.

    Attributes:
        model: a local folder, a hub name, `embedded`, or random:NAME (hf/models.py).
        document: a text to read before the prompt, or the pieces of one (Document.texts in jobs/documents.py).
        prompt: the question.
        more_prompts: further questions about the document, which are answered together with it.
        max_new_tokens: tokens to write, at most.
        chunk_tokens: tokens of a prefill chunk; None is planned.
        dtype: auto, or one of DTYPES.
        device: auto, cpu, cuda or cuda:N.
        seed: the seed of random weights.
        raw: whether the model's chat template is left out.
        system: the system prompt; empty if there is none.
        sampling: how tokens are chosen.
        options: Options of the cache; what they leave open is planned.
    """

    model: str
    document: str | Sequence[str] = ""
    prompt: str = ""
    more_prompts: Sequence[str] = ()
    max_new_tokens: int = 64
    chunk_tokens: int | None = None
    dtype: str = "auto"
    device: str = "auto"
    seed: int = 0
    raw: bool = False
    system: str = ""
    sampling: Sampling = field(default_factory=Sampling)
    options: Options = field(default_factory=Options)


@dataclass(frozen=True)
class Prepared:
    """A job that has passed all checks. Only its tokenizer and config are loaded.

    Attributes:
        job: the job.
        source: the model.
        tokenizer: the model's tokenizer.
        input_ids: the prompt [1, T], int64; the longest one if there are several.
        dtype: the dtype of weights and KV.
        device: the device that computes.
        warnings: what the user should know before the run.
        run_plan: what the run will do.
        ranks: this process among those that share the model.
        prompts: the token ids of all prompts.
        draft: the draft model; None if none was asked for.
    """

    job: Job
    source: ModelSource
    tokenizer: Any
    input_ids: torch.Tensor
    dtype: torch.dtype
    device: str
    warnings: list[str]
    run_plan: RunPlan
    ranks: Ranks = field(default_factory=Ranks)
    prompts: Sequence[list[int]] = ()
    draft: ModelSource | None = None

    @property
    def shape(self) -> ModelShape:
        """The shape of the model."""
        return ModelShape.from_config(self.source.config)

    @property
    def plan(self) -> Plan:
        """The plan of the run, with its predictions."""
        return self.run_plan.plan


@dataclass
class Summary:
    """What a job did.

    Attributes:
        model: the model, as the user named it.
        text: the answer.
        tokens_in: tokens of the prompt.
        tokens_read: tokens of the prompt that were read. After Ctrl-C the cache no longer holds them.
        tokens_out: tokens that were written.
        token_ids: these tokens.
        stopped_by: the stop string that ended the answer; its tokens are in token_ids, and it is not in the text.
        first_token_s: seconds to the first of them, from the start of reading.
        total_s: seconds in all.
        interrupted: whether Ctrl-C ended the job. The other fields say what was done so far.
        ranks: number of processes that shared the model.
        plan: the predictions of the plan, and why it was chosen.
        options: Options of `enable()` that repeat the arithmetic of the run.
        warnings: what the user was told before the run.
        guess_counts: what the guesses did.
        guesses_off_reason: why guesses could not be used; empty if they could, or if they were not wanted.
        kernel_failure: why the CPU's attention kernel could not be used; empty if it could, or if a GPU computed.
        where: the passages of the document that the answer came from; None if that was not asked for.
        where_s: seconds that it took to find them, after total_s.
        where_off_reason: why they cannot be told; empty if they can.
        stats: bytes and choices of this process.
        rank_stats: those of all ranks, if several processes shared the model and none was interrupted.
    """

    model: str
    text: str = ""
    tokens_in: int = 0
    tokens_read: int = 0
    tokens_out: int = 0
    token_ids: list[int] = field(default_factory=list)
    stopped_by: str | None = None
    first_token_s: float | None = None
    total_s: float = 0.0
    interrupted: bool = False
    ranks: int = 1
    plan: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    guess_counts: GuessCounts = field(default_factory=GuessCounts)
    guesses_off_reason: str = ""
    kernel_failure: str = ""
    where: list[Passage] | None = None
    where_s: float = 0.0
    where_off_reason: str = ""
    stats: Stats | None = None
    rank_stats: list[Stats] = field(default_factory=list)

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Tokens per second after the first token; None with fewer than two tokens."""
        if self.first_token_s is None or self.tokens_out < 2:
            return None
        return (self.tokens_out - 1) / (self.total_s - self.first_token_s)

    @property
    def cpu_attended_bytes_per_s(self) -> float | None:
        """Bytes of KV that the host's CPU attended to per second of decode; None if there are none."""
        if self.stats is None or not self.stats.cpu_attended_bytes or self.first_token_s is None:
            return None
        decode_s = self.total_s - self.first_token_s
        return self.stats.cpu_attended_bytes / decode_s if decode_s > 0 else None

    @property
    def cpu_text(self) -> str:
        """What the host's CPU attended to in decode, for people; empty if nothing."""
        rate = self.cpu_attended_bytes_per_s
        if self.stats is None or rate is None:
            return ""
        share = f"{self.stats.cpu_share:.1%} of what would stream"
        return f"{format_bytes(self.stats.cpu_attended_bytes)}, {share}, {rate / 1e9:.3g} GB/s of decode"

    @property
    def guesses_text(self) -> str:
        """What the guesses did, for people; empty if none was wanted."""
        counts = self.guess_counts
        if not counts.passes:
            return f"off: {self.guesses_off_reason}" if self.guesses_off_reason else ""
        return f"{counts.accepted:,} of {counts.guessed:,} were right: {counts.tokens_per_pass:.2f} tokens a pass"

    def note_guesses(self, active: Enabled) -> None:
        """Note what the guesses of the last generate() of a model did."""
        self.guess_counts = active.guess_counts
        self.guesses_off_reason = active.guesses_off_reason

    def as_dict(self) -> dict[str, Any]:
        """Return all fields, for JSON."""
        rates = {
            "decode_tokens_per_s": self.decode_tokens_per_s,
            "cpu_attended_bytes_per_s": self.cpu_attended_bytes_per_s,
            "tokens_per_pass": self.guess_counts.tokens_per_pass,
        }
        if self.stats is not None and self.stats.approximation:
            return {**dataclasses.asdict(self), **rates, "approximate": True}
        return {**dataclasses.asdict(self), **rates}


def chosen_dtype(name: str, source: ModelSource, device: str) -> torch.dtype:
    """Return the dtype that a --dtype option names.

    auto is the checkpoint's dtype. Random models run in float32 on the CPU and in bfloat16 elsewhere.

    Raises:
        UsageError: the name is unknown.
    """
    choice(name, "dtype", ("auto", *DTYPES))
    if name != "auto":
        return DTYPES[name]
    own = getattr(source.config, "dtype", None)
    if source.is_random or own not in DTYPES.values():
        return torch.float32 if device == "cpu" else torch.bfloat16
    assert isinstance(own, torch.dtype)
    return own


def prepare(job: Job, ranks: Ranks | None = None) -> Prepared:
    """Check a job against the model and this machine, and plan it. No weights are loaded.

    Args:
        job: the job.
        ranks: this process among those that share the model. Its share of the heads is checked.

    Raises:
        UsageError: an argument is invalid.
        UnsupportedError: the model is not served.
        CapacityError: the job does not fit this machine.
    """
    for name in ("max_new_tokens", "chunk_tokens"):
        value = getattr(job, name)
        if value is not None and value < 1:
            raise UsageError(f"{name.replace('_', '-')} is {value}: it must be a positive number")
    job.sampling.check(is_together=bool(job.more_prompts))
    prompts = [job.prompt, *job.more_prompts]
    if len(prompts) > 1 and not all(prompt.strip() for prompt in prompts):
        raise UsageError("one of the prompts is empty: leave it out, or write a question")
    if not (job.prompt.strip() or any(part.strip() for part in job.document)):
        raise UsageError("the prompt is empty: give a question with --prompt, a document with --file, or both")
    ranks = ranks or Ranks()
    if ranks.world > 1 and job.more_prompts:
        raise UsageError("several processes share the model, and each answers one prompt: give --prompt once")
    device = rank_device(ranks, job.device) if ranks.world > 1 else str(chosen_device(job.device))
    source = resolve(job.model)
    dtype = chosen_dtype(job.dtype, source, device)
    tokenizer = source.tokenizer()
    ids = _encode(job, tokenizer)
    source.check_ids(chain.from_iterable(ids))
    input_ids = torch.tensor([max(ids, key=len)])
    shape = ModelShape.from_config(source.config)
    weight_bytes = source.weight_bytes(dtype) if device == "cpu" else 0
    draft = check_draft(job.sampling.draft, source, tokenizer)
    if draft is not None and ranks.world > 1:
        raise UsageError("--draft is for one process: leave it out, or do not share the model among processes")
    if ranks.world > 1:
        check_shards(source.config, shape, ranks)
        shape = shape.shard(ranks.world)
        weight_bytes //= ranks.world
    total_tokens = input_ids.shape[1] + job.max_new_tokens
    request = RunRequest(
        shape=shape,
        device=torch.device(device),
        dtype=dtype,
        context_tokens=total_tokens,
        options=job.options,
        chunk_tokens=job.chunk_tokens,
        ranks_on_host=ranks.local_world,
        host_weight_bytes=weight_bytes,
        other_model_bytes=draft.weight_bytes(dtype) if draft is not None else 0,
    )
    run_plan = plan_run(request)
    HeadCache(source.config, **vars(run_plan.options))  # raises if a layer of the model is not served
    told = _warnings(source, shape, input_ids.shape[1], job.max_new_tokens)
    is_in_place = device == "cpu" and job.options.transport in ("auto", "in_place")
    told += unused_share_warnings(job.options.cpu_share, is_in_place=is_in_place)
    if job.options.is_approximate:
        told.append(job.options.approximation)
    return Prepared(job, source, tokenizer, input_ids, dtype, device, told, run_plan, ranks, ids, draft)


def _warnings(source: ModelSource, shape: ModelShape, prompt_tokens: int, new_tokens: int) -> list[str]:
    """Return what the user should know about the length of the context before the run."""
    crossing = crossing_warning(
        RotaryLengths.from_config(source.config),
        held=0,
        past_tokens=0,
        prompt_tokens=prompt_tokens,
        longest_tokens=prompt_tokens + new_tokens - 1,  # the last one is not read
    )
    told = [context_warning(prompt_tokens + new_tokens, shape), crossing]
    return [line for line in told if line is not None]


def run(
    prepared: Prepared,
    *,
    on_text: Callable[[str], None],
    on_forward: Callable[[HeadCache], None] | None = None,
) -> Summary:
    """Load the model and generate.

    Ctrl-C ends the generation and returns the summary so far, with `interrupted` set.

    Args:
        prepared: the job.
        on_text: called with each part of the answer as it is written.
        on_forward: called with the cache after each chunk and each token.
    """
    job = prepared.job
    run_plan = prepared.run_plan
    tokens_in = prepared.input_ids.shape[1]
    summary = Summary(job.model, tokens_in=tokens_in, warnings=prepared.warnings)
    summary.ranks = prepared.ranks.world
    summary.plan = run_plan.plan.as_dict()
    model = load(prepared)
    torch.manual_seed(job.sampling.seed)
    options = dataclasses.replace(run_plan.options, expected_tokens=tokens_in + job.max_new_tokens)
    cache = HeadCache(model.config, **vars(options))
    cache.rotary_min_tokens = job.options.expected_tokens
    summary.options = options.as_dict() | {"chunk_tokens": run_plan.chunk_tokens}
    if prepared.device == "cpu":
        summary.kernel_failure = native.unavailable_reason(model.dtype)  # compiles it before the clock starts
    start = time.perf_counter()
    streamer = Streamer(prepared.tokenizer, on_text, summary, start, job.sampling.stop)
    sampling = job.sampling.arguments(prepared.tokenizer, prompt_tokens=tokens_in, max_new_tokens=job.max_new_tokens)
    input_ids = prepared.input_ids.to(prepared.device)

    def after_forward(cache: HeadCache) -> None:
        summary.tokens_read = min(cache.get_seq_length(), tokens_in)
        if on_forward is not None:
            on_forward(cache)

    try:
        with (
            already_warned(),
            enable(
                model,
                chunk_tokens=run_plan.chunk_tokens,
                on_forward=after_forward,
                guesses=job.sampling.guesses,
            ) as active,
            loaded_draft(prepared.draft, prepared.dtype, prepared.device) as draft,
        ):
            try:
                model.generate(
                    input_ids,
                    attention_mask=torch.ones_like(input_ids),
                    past_key_values=cache,
                    streamer=streamer,
                    tokenizer=prepared.tokenizer,  # for stop_strings in the model's generation config
                    assistant_model=draft,
                    **sampling,
                )
            finally:
                summary.note_guesses(active)
    except KeyboardInterrupt:
        summary.interrupted = True
        streamer.end()
    summary.total_s = time.perf_counter() - start
    summary.stats = cache.stats()
    if prepared.ranks.world > 1 and not summary.interrupted:
        summary.rank_stats = gather_from_ranks(prepared.ranks, summary.stats)
    return summary


@contextmanager
def already_warned() -> Iterator[None]:
    """Suppress enable()'s warnings about long contexts. The commands show them before anything is loaded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ContextLengthWarning)
        warnings.simplefilter("ignore", RereadWarning)
        yield


def load(prepared: Prepared) -> PreTrainedModel:
    """Return the model, or this rank's shard of it."""
    source = prepared.source
    ranks = prepared.ranks
    dtype = prepared.dtype
    if ranks.world == 1:
        return source.load(dtype=dtype, device=prepared.device, seed=prepared.job.seed)
    if source.is_random:

        def make(device: str) -> PreTrainedModel:
            return source.load(dtype=dtype, device="cpu", seed=prepared.job.seed, drawn_on=device)

        return load_random_shard(make, ranks, device=prepared.device, dtype=dtype)
    return load_shard(source.name, ranks, dtype=dtype)


class Streamer(BaseStreamer):  # type: ignore[misc]
    """Takes the tokens of generate(), passes their text on, and notes tokens and times in a Summary.

    Args:
        tokenizer: the model's tokenizer.
        on_text: called with each part of the text.
        summary: gets the tokens and times.
        start: the time, by time.perf_counter(), from which first_token_s counts.
        stop: texts that end the answer.

    Attributes:
        answer: the answer so far.
    """

    def __init__(
        self, tokenizer: Any, on_text: Callable[[str], None], summary: Summary, start: float, stop: Sequence[str] = ()
    ) -> None:
        self.answer = AnswerText(tokenizer, stop, on_text)
        self._summary = summary
        self._start = start
        self._seen_prompt = False

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, and then the new tokens of each pass."""
        if not self._seen_prompt:
            self._seen_prompt = True
            return
        if self._summary.first_token_s is None:
            self._summary.first_token_s = time.perf_counter() - self._start
        self.answer.put(value.flatten().tolist())
        self._note()

    def end(self) -> None:
        """Pass on the rest of the text."""
        self.answer.end()
        self._note()

    def _note(self) -> None:
        self._summary.tokens_out = len(self.answer.token_ids)
        self._summary.token_ids = self.answer.token_ids
        self._summary.text = self.answer.text
        self._summary.stopped_by = self.answer.stopped_by


def _encode(job: Job, tokenizer: Any) -> list[list[int]]:
    """Return the token ids of each prompt: the document first, then the question, in the model's chat template."""
    questions = [job.prompt, *job.more_prompts]
    ids = prompts_ids(tokenizer, job.document, questions, is_raw=job.raw, system=job.system)
    if not all(ids):
        raise UsageError("the prompt has no tokens: the model's tokenizer drops all of its characters")
    return ids
