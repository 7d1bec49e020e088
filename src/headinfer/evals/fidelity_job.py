"""The work of `headinfer eval fidelity`: check everything, then load the model, then compare at each length."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from headinfer.engine.machine import chosen_device
from headinfer.engine.options import Options
from headinfer.engine.run_plan import RunRequest, plan_run
from headinfer.errors import CapacityError, ContextLengthWarning, UsageError
from headinfer.evals.fidelity import check_disk, compare
from headinfer.evals.fidelity_results import FidelityResults
from headinfer.evals.niah import niah_document
from headinfer.evals.reader import Reader
from headinfer.evals.tasks import Document
from headinfer.hf.cache import HeadCache
from headinfer.hf.compat import PreTrainedModel
from headinfer.hf.enable import context_warning
from headinfer.hf.models import ModelSource, resolve
from headinfer.jobs.documents import sha256_of_text
from headinfer.jobs.generate import chosen_dtype
from headinfer.jobs.prompts import chat_texts, document_ids
from headinfer.kv.device_buffer import TAIL_TOKENS
from headinfer.plan.cpu_share import unused_share_warnings
from headinfer.plan.model_shape import ModelShape
from headinfer.plan.tiles import DEFAULT_BUDGET_BYTES
from headinfer.utils.approximation import short_form

__all__ = ["FidelityJob", "Prepared", "prepare", "run"]

_SHORTEST = 1024  # of the lengths that are chosen if the user gives none


@dataclass(frozen=True)
class FidelityJob:
    """What `headinfer eval fidelity` is asked for.

    Attributes:
        model: as for `headinfer generate`.
        texts: the pieces of the text, which are tokenized on their own.
        out: the folder of results.
        approximate: the fields of Options that make KV approximate: kv_dtype, sparse_heads, or both.
        lengths: tokens of each context, ascending; None for powers of two up to what fits.
        window: the last tokens of each length, which are compared.
        needles: facts that are hidden in the text of each length and asked for; 0 for none.
        seed: the seed of the needles and of random weights.
        is_raw: whether the questions for needles leave out the model's chat template.
        dtype: a value of --dtype.
        device: a value of --device.
        chunk_tokens: tokens of a prefill chunk; None is planned.
        device_kv_budget_bytes: the device budget; None is the default of the engine.
        cpu_share: the share of the host's CPU in decode; None is planned.
        command: the command line, which is saved with the results.
    """

    model: str
    texts: Sequence[str]
    out: Path
    approximate: Mapping[str, Any] = field(default_factory=dict)
    lengths: tuple[int, ...] | None = None
    window: int = 512
    needles: int = 8
    seed: int = 0
    is_raw: bool = False
    dtype: str = "auto"
    device: str = "auto"
    chunk_tokens: int | None = None
    device_kv_budget_bytes: int | None = None
    cpu_share: float | None = None
    command: str = ""


@dataclass(frozen=True)
class Prepared:
    """A job that was checked against the model and this machine.

    Attributes:
        job: the job.
        source: the model, whose weights are not loaded yet.
        tokenizer: the tokenizer.
        shape: the shape of the model.
        dtype: the dtype of weights and exact KV.
        device: the device that computes.
        ids: the tokens of the text.
        lengths: tokens of each context, ascending.
        exact: the keyword arguments of enable() for exact KV.
        results: the results so far.
    """

    job: FidelityJob
    source: ModelSource
    tokenizer: Any
    shape: ModelShape
    dtype: torch.dtype
    device: str
    ids: list[int]
    lengths: tuple[int, ...]
    exact: Mapping[str, Any]
    results: FidelityResults

    @property
    def warnings(self) -> list[str]:
        """What the user should know before the run, a sentence each."""
        about_length = context_warning(self.lengths[-1], self.shape)
        return [
            *unused_share_warnings(self.job.cpu_share, is_in_place=self.device == "cpu"),
            *([about_length] if about_length is not None else []),
        ]

    @property
    def reading_tokens(self) -> list[int]:
        """The tokens of each reading that is still to be done, for a progress bar."""
        readings = 5 if self.job.needles else 3
        return [length for length in self.lengths if not self.results.has(length) for _ in range(readings)]


def prepare(job: FidelityJob) -> Prepared:
    """Check a job against the model and this machine. No weights are loaded.

    Raises:
        UsageError: an option is wrong, the text is too short, or the folder holds other results.
        CapacityError: a length does not fit this machine.
    """
    form = _checked_form(job)
    device = str(chosen_device(job.device))
    source = resolve(job.model)
    shape = ModelShape.from_config(source.config)
    HeadCache(source.config, **job.approximate)  # raises if the model or an option is not served
    dtype = chosen_dtype(job.dtype, source, device)
    tokenizer = source.tokenizer()
    chat_texts(tokenizer, is_raw=job.is_raw)  # raises if the chat template cannot be used
    ids = document_ids(tokenizer, job.texts, None)
    source.check_ids(ids)
    results = FidelityResults.open(job.out, _about(job, form, dtype))
    results.command = job.command
    exact = _exact_options(job, device)
    least = job.window + 2 + _exact_tokens(form)  # one token is not read
    if len(ids) < least:
        raise UsageError(
            f"the text has {len(ids):,} tokens, and {least:,} are the fewest of which {job.window:,} can be compared: "
            "give a longer text or a smaller --window"
        )
    prepared = Prepared(job, source, tokenizer, shape, dtype, device, ids, (), exact, results)
    lengths = _given_lengths(prepared, least) if job.lengths is not None else _fitting_lengths(prepared, least)
    check_disk(job.window, shape.vocab_size)
    if job.needles:
        _haystack(prepared, lengths[0])  # raises if the needles do not fit
    return replace(prepared, lengths=lengths)


def run(
    prepared: Prepared,
    *,
    on_tokens: Callable[[int], None] = lambda tokens: None,
    on_read: Callable[[], None] = lambda: None,
) -> FidelityResults:
    """Load the model, and compare at each length that has no results yet. The files are written after each one.

    Args:
        prepared: the job.
        on_tokens: called after each forward pass with the number of tokens in the cache.
        on_read: called after each reading of a text.

    Returns:
        The results of all lengths.
    """
    job = prepared.job
    results = prepared.results
    missing = [length for length in prepared.lengths if not results.has(length)]
    if not missing:
        results.save()
        return results
    model = prepared.source.load(dtype=prepared.dtype, device=prepared.device, seed=job.seed)
    ids = torch.tensor([prepared.ids], device=model.device)
    for length in missing:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ContextLengthWarning)  # Prepared.warnings says the same
            results.add(_record(prepared, model, ids[:, :length], on_tokens, on_read))
    return results


def _record(
    prepared: Prepared,
    model: PreTrainedModel,
    ids: torch.Tensor,
    on_tokens: Callable[[int], None],
    on_read: Callable[[], None],
) -> dict[str, Any]:
    """Return the figures of one length, for JSON."""
    job = prepared.job
    length = ids.shape[1]
    chunk_tokens = job.chunk_tokens or _planned_chunk(prepared, length, is_loaded=True)
    exact = {**prepared.exact, "chunk_tokens": chunk_tokens}
    approximate = {**exact, **job.approximate}
    # Exact KV that was read in other chunks differs by rounding alone.
    rounded = {**exact, "chunk_tokens": max(min(chunk_tokens, length - job.window) // 2, 1)}
    others = (approximate, rounded)
    found, rounding = compare(
        model, ids, window=job.window, exact=exact, others=others, on_tokens=on_tokens, on_read=on_read
    )
    record: dict[str, Any] = {"length": length, "window": job.window, "chunk_tokens": chunk_tokens, **found.summary()}
    record["rounding"] = rounding.summary()
    record["needles"] = job.needles
    if job.needles:
        document = _haystack(prepared, length)
        for name, used in (("exact_needles_found", exact), ("needles_found", approximate)):
            record[name] = _needles_found(prepared, model, document, used, on_tokens)
            on_read()
    return record


def _checked_form(job: FidelityJob) -> Options:
    """Return the options of approximate KV.

    Raises:
        UsageError: an option is wrong, or KV is exact.
    """
    form = Options(**job.approximate)
    if not form.is_approximate:
        raise UsageError(
            "exact KV has nothing to be compared with: give --kv-dtype int8, --kv-dtype int4, or --sparse-heads with a "
            "file of `headinfer heads`"
        )
    return form


def _about(job: FidelityJob, form: Options, dtype: torch.dtype) -> dict[str, Any]:
    """Return what must be equal for an evaluation to be continued."""
    about = {
        "evaluation": "fidelity",
        "model": job.model,
        "dtype": str(dtype).removeprefix("torch."),
        "kv_dtype": form.kv_dtype,
        "approximate": True,
        "approximation": short_form(form.kv_dtype, form.sparse_heads),
        "text_sha256": sha256_of_text("".join(job.texts)),
        "window": job.window,
        "needles": job.needles,
        "seed": job.seed,
        "raw": job.is_raw,
        "chunk_tokens": job.chunk_tokens or "planned",
    }
    if form.sparse_heads is not None:
        about["sparse_heads"] = form.sparse_heads.reduced().as_dict()
    return about


def _exact_options(job: FidelityJob, device: str) -> dict[str, Any]:
    """Return the options of exact KV. On a GPU no token stays resident, since resident KV is exact in any case."""
    budget = job.device_kv_budget_bytes
    options: dict[str, Any] = {"device_kv_budget_bytes": budget, "cpu_share": job.cpu_share}
    if device != "cpu":
        budget = budget or DEFAULT_BUDGET_BYTES
        options |= {"device_kv_budget_bytes": budget, "streaming_budget_bytes": budget}
    return options


def _exact_tokens(form: Options) -> int:
    """Return the most tokens of a context that approximate KV does not change."""
    pattern = form.sparse_heads
    seen = pattern.sink_tokens + pattern.recent_tokens if pattern is not None else 0
    return max(TAIL_TOKENS if form.kv_dtype != "auto" else 0, seen)


def _given_lengths(prepared: Prepared, least: int) -> tuple[int, ...]:
    """Check the lengths that the user gives, and that the longest one fits this machine."""
    lengths = prepared.job.lengths
    assert lengths is not None
    available = len(prepared.ids)
    if lengths[-1] > available:
        raise UsageError(
            f"a length of {lengths[-1]:,} tokens is more than the {available:,} tokens of the text: give a longer text "
            "or shorter --lengths"
        )
    if lengths[0] < least:
        raise UsageError(
            f"a length of {lengths[0]:,} tokens is too short: {least:,} are the fewest of which "
            f"{prepared.job.window:,} can be compared; give longer --lengths or a smaller --window"
        )
    most = prepared.shape.max_context_tokens
    if prepared.shape.has_position_table and lengths[-1] > most:
        raise UsageError(
            f"a length of {lengths[-1]:,} tokens exceeds the {most:,} positions that this {prepared.shape.family} has "
            "learned: give shorter --lengths"
        )
    _planned_chunk(prepared, lengths[-1])
    return lengths


def _fitting_lengths(prepared: Prepared, least: int) -> tuple[int, ...]:
    """Return the powers of two for which there is text and memory and for which the model was made, at least one."""
    most = min(len(prepared.ids), prepared.shape.max_context_tokens or len(prepared.ids))
    powers = [2**power for power in range(10, most.bit_length()) if least <= 2**power <= most]
    lengths: list[int] = []
    for length in powers or [max(most, least)]:
        try:
            _planned_chunk(prepared, length)
        except CapacityError:
            if not lengths:
                raise
            break
        lengths.append(length)
    return tuple(lengths)


def _planned_chunk(prepared: Prepared, length: int, *, is_loaded: bool = False) -> int:
    """Return the tokens of a chunk that are planned for a length with exact KV, and used for both.

    Raises:
        CapacityError: a context of this length does not fit this machine.
    """
    request = RunRequest(
        prepared.shape,
        torch.device(prepared.device),
        prepared.dtype,
        length,
        Options(**prepared.exact),
        chunk_tokens=prepared.job.chunk_tokens,
        is_loaded=is_loaded,
    )
    return plan_run(request).chunk_tokens


def _haystack(prepared: Prepared, length: int) -> Document:
    """Return the text of a length with needles, and the questions for them."""

    def count(text: str) -> int:
        return len(prepared.tokenizer(text, add_special_tokens=False).input_ids)

    needles = prepared.job.needles
    depths = [round(number / max(needles - 1, 1), 4) for number in range(needles)]
    return niah_document(length, depths, 0, "".join(prepared.job.texts), count, prepared.job.seed)


def _needles_found(
    prepared: Prepared,
    model: PreTrainedModel,
    document: Document,
    options: Mapping[str, Any],
    on_tokens: Callable[[int], None],
) -> int:
    """Return how many needles a model finds in a document."""
    reader = Reader(model, prepared.tokenizer, is_raw=prepared.job.is_raw, options=options, on_tokens=on_tokens)
    (reading,) = reader.read_together([document])
    pairs = zip(document.questions, reading.answers, strict=True)
    return sum(question.score(answer.text, question.references) == 1 for question, answer in pairs)
