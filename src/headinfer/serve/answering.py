"""Answers requests, step by step: finds what a cache or a session holds of the prompt, reads the rest, generates."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from headinfer.engine.run_plan import check_saved_kv
from headinfer.errors import CapacityError, HeadinferError, UsageError
from headinfer.hf.batch import BatchQuestion, answer_batch, plan_batches
from headinfer.hf.cache import HeadCache
from headinfer.hf.compat import last_logits_only
from headinfer.jobs.answering import can_remove, decode
from headinfer.jobs.prompts import pad_id
from headinfer.jobs.rotary import held_rotary_tokens
from headinfer.jobs.where import passages
from headinfer.serve.caches import Caches, Checkpoint, Kept
from headinfer.serve.errors import public
from headinfer.serve.events import Failed, FinishReason, Passage, Prefill, Where
from headinfer.serve.library import Library
from headinfer.serve.meter import Meter, Pace
from headinfer.serve.model import ServedModel
from headinfer.serve.parsing import AnswerStream, Cancelled, TurnOver
from headinfer.serve.settings import ServeSettings
from headinfer.serve.turns import Step
from headinfer.serve.work import AnswerTask, Begun
from headinfer.sessions.manifest import Manifest
from headinfer.sessions.prefix import find_prefix

__all__ = ["Answerer"]

_LEAST_STORED_TOKENS = 512  # shorter prompts are read faster than the sessions on disk are looked through

_CHECKPOINTS = 4  # of a cache; each may have the states of windows and of linear attention, on the device

_logger = logging.getLogger(__name__)


class Answerer:
    """Answers requests with one model. Only the worker thread uses it, in torch.inference_mode().

    Args:
        settings: the settings of the service.
        model: the model.
        caches: the caches that are kept.
        library: the sessions on disk.
        meter: counts the work.
        pace: estimates the time of reading.
    """

    def __init__(
        self, settings: ServeSettings, model: ServedModel, caches: Caches, library: Library, meter: Meter, pace: Pace
    ) -> None:
        self._settings = settings
        self._model = model
        self._caches = caches
        self._library = library
        self._meter = meter
        self._pace = pace
        self._first_token_at: float | None = None  # of the generate() that is running

    def step(
        self,
        task: AnswerTask,
        waiting: Sequence[AnswerTask],
        *,
        can_wait: bool,
        others_wait: Callable[[], bool] = lambda: False,
    ) -> Step:
        """Do the next step of a request: begin it, read a chunk of its prompt, or generate its answer or a part of it.

        Args:
            task: the request.
            waiting: the requests that have not begun. Those that ask the same session are answered together with this
                one, and have ended then.
            can_wait: whether other tasks are under way whose end frees memory.
            others_wait: returns whether other clients wait, so that the answer should pause.

        Raises:
            Exception: the request cannot be answered. fail() tells the client.
        """
        if task.begun is not None and task.begun.stream is not None:
            return self._answer(task, task.begun, others_wait)
        if task.is_cancelled:
            self._keep_prompt(task)
            task.end("cancelled")
            return "done"
        if task.begun is None:
            if not self._begin(task, can_wait=can_wait):
                return "later"
            self._tell_progress(task)
        begun = task.begun
        assert begun is not None
        missing = begun.ids.shape[0] - begun.cache.get_seq_length()
        if missing > begun.chunk_tokens:
            self._read_chunk(task, begun)
            return "goes on"
        others = [other for other in waiting if self._joins(other, task, begun)]
        if begun.base is not None and others:
            self._answer_together(begun.base, [task, *others])
            return "done"
        if self._model.whole_only:
            now = (begun.cache.get_seq_length(), begun.cache.checkpoint())
            begun.checkpoints = (*begun.checkpoints, now)[-_CHECKPOINTS:]
        begun.stream = self._stream(task, begun)
        return self._answer(task, begun, others_wait)

    def fail(self, task: AnswerTask, error: BaseException) -> None:
        """Tell a client that its request has failed, and keep what was read."""
        self._keep_prompt(task)
        task.tell(Failed(public(error, self._settings.root)))

    # -- the prompt ------------------------------------------------------------------------------------------

    def _begin(self, task: AnswerTask, *, can_wait: bool) -> bool:
        """Find the cache with the longest beginning of the prompt, or make one.

        Returns:
            Whether there is memory for the request now.

        Raises:
            CapacityError: there will be none.
        """
        name = task.request.session
        ids = torch.tensor(task.rest_ids, dtype=torch.long)
        session_tokens = 0
        if name is not None:
            session_ids = self._library.ids(name)
            session_tokens = session_ids.shape[0]
            ids = torch.cat([session_ids, ids])
        tokens = ids.shape[0]
        self.check_length(tokens, task.max_new_tokens)
        kept, common = self._caches.find(ids)
        if name is None and tokens - common > _LEAST_STORED_TOKENS:
            name = self._stored(ids, common)
        if name is not None and (common < session_tokens or not session_tokens):
            self._load(name)
            kept, common = self._caches.find(ids)
        if kept is not None and not self._keeps_frequencies(kept.cache, tokens):
            kept = None
            common = 0
        if not self._has_room(tokens - common + task.max_new_tokens, kept, can_wait=can_wait):
            return False
        origin = task.request.session
        base = None
        checkpoints: tuple[Checkpoint, ...] = ()
        if kept is not None:
            origin = origin or kept.session
            base = kept if kept.generation else None
            checkpoints = tuple(one for one in kept.checkpoints if one[0] <= common)
            cache = self._caches.use(kept, common)
        else:
            cache = self._model.enabled.new_cache(tokens + task.max_new_tokens)
            cache.rotary_min_tokens = self._rotary_tokens(tokens)  # not those of the answer's possible end
        chunk_tokens = self._model.enabled.planning.chunk_of(cache, tokens, 1)
        task.begun = Begun(ids, cache, common, chunk_tokens, origin, base, checkpoints)
        self._meter.note_prompt(tokens, common)
        return True

    def check_length(self, tokens: int, max_new_tokens: int) -> None:
        """Check the length of a prompt. Any thread may call it.

        Raises:
            UsageError: it is longer than the model's positions, or than the server allows.
        """
        most = self._settings.limits.prompt_tokens
        if most is not None and tokens > most:
            raise UsageError(f"the prompt has {tokens:,} tokens, and this server takes {most:,}: send a shorter one")
        self._model.shape.check_positions(tokens + max_new_tokens)

    def _load(self, name: str) -> HeadCache:
        """Load a session, and keep its cache.

        Raises:
            SessionError: there is none, or it cannot be used.
            CapacityError: its KV does not fit this machine.
        """
        model = self._model
        manifest = self._library.usable(name)
        is_mapped = model.model.device.type == "cpu"
        options = model.session_options
        self._make_room(lambda: check_saved_kv(manifest.tokens, manifest.nbytes, 0, options, is_mapped=is_mapped))
        cache = HeadCache.load(self._library.folder(name), model.model, **options)
        cache.chunk_tokens = manifest.arithmetic.get("chunk_tokens")
        ids = cache.token_ids
        saved = cache.saved
        assert ids is not None
        assert saved is not None
        self._caches.keep(Kept(cache, ids[0], name, saved.generation))
        return cache

    def _stored(self, ids: torch.Tensor, held: int) -> str | None:
        """Return the session on disk with the longest common beginning, if that is longer than what a cache holds."""
        model = self._model
        needed = model.lengths.normalized(ids.shape[0])

        def is_usable(manifest: Manifest, folder: Path) -> bool:
            self._library.usable(folder.name)  # raises SessionError if it is not read to its end
            return held_rotary_tokens(model.lengths, manifest, folder) == needed

        found = find_prefix(
            self._settings.root,
            model.fingerprint,
            ids[:-1],
            exclude="",
            whole_only=model.whole_only,
            is_usable=is_usable,
            is_linked=False,
        )
        return found.name if found is not None and found.tokens - held >= _LEAST_STORED_TOKENS else None

    def _has_room(self, tokens: int, spared: Kept | None, *, can_wait: bool) -> bool:
        """Free the memory of old caches until a context of so many new tokens fits.

        Raises:
            CapacityError: it does not fit, and there is nothing to wait for.
        """
        try:
            self._make_room(lambda: self._model.enabled.planning.checked(tokens, 1), spared)
        except CapacityError:
            if can_wait:
                return False
            raise
        return True

    def _make_room(self, check: Callable[[], object], spared: Kept | None = None) -> None:
        """Free the memory of old caches until a check, or a pass, does not fail for want of memory.

        Raises:
            CapacityError: it fails without them.
        """
        while True:
            try:
                check()
            except CapacityError:
                if not self._caches.drop_one(spared):
                    raise
            else:
                return

    def _keeps_frequencies(self, cache: HeadCache, tokens: int) -> bool:
        """Return whether the keys of a cache have the rotary frequencies of a prompt of so many tokens."""
        lengths = self._model.lengths
        held = lengths.held(cache.head_layers[0].rotary_tokens, cache.get_seq_length())
        return not lengths or held == lengths.normalized(self._rotary_tokens(tokens))

    def _rotary_tokens(self, tokens: int) -> int:
        """Return the length of a context whose rotary frequencies a prompt of so many tokens has."""
        return max(self._settings.options.expected_tokens, tokens)

    def _read_chunk(self, task: AnswerTask, begun: Begun) -> None:
        model = self._model.model
        start = begun.cache.get_seq_length()
        stop = start + begun.chunk_tokens
        ids = begun.ids[None, start:stop].to(model.device)
        before = time.perf_counter()
        self._make_room(
            lambda: model(input_ids=ids, past_key_values=begun.cache, use_cache=True, **last_logits_only(model))
        )
        seconds = time.perf_counter() - before
        self._meter.note_read(stop - start, seconds)
        self._pace.note(start, stop, seconds)
        self._tell_progress(task)

    def _tell_progress(self, task: AnswerTask) -> None:
        begun = task.begun
        assert begun is not None
        done = begun.cache.get_seq_length()
        tokens = begun.ids.shape[0]
        task.tell(Prefill(done, tokens, self._pace.eta_s(done, tokens)))

    def _keep_prompt(self, task: AnswerTask) -> None:
        """Keep what was read of the prompt of a request that ends early, but no cache with a part of an answer."""
        begun = task.begun
        if begun is None or begun.is_kept:
            return
        held = begun.cache.get_seq_length()
        if held <= begun.ids.shape[0] and (begun.base is None or held > begun.base.tokens):
            self._keep(begun, begun.ids[:held])

    def _keep(self, begun: Begun, ids: torch.Tensor) -> None:
        """Keep a cache that holds these tokens [T], unless the document that they begin with was removed meanwhile."""
        begun.is_kept = True
        if begun.origin is None or self._library.exists(begun.origin):
            self._caches.keep(Kept(begun.cache, ids, begun.origin, checkpoints=begun.checkpoints))

    # -- answers ---------------------------------------------------------------------------------------------

    def _joins(self, other: AnswerTask, task: AnswerTask, begun: Begun) -> bool:
        """Return whether a request that waits can be answered in one batch with one that has begun.

        Both go on from the session itself, and only a little follows it. A request that goes on from an earlier answer
        is not among them, since its cache saves more than a batch does.
        """
        base = begun.base
        if base is None or begun.cached != base.tokens or other is task or not task.is_asked_like(other):
            return False
        if other.is_cancelled or len(other.rest_ids) > begun.chunk_tokens:
            return False
        ids = torch.cat([base.ids, torch.tensor(other.rest_ids, dtype=torch.long)])
        try:
            self.check_length(ids.shape[0], other.max_new_tokens)
        except UsageError:
            return False  # it fails alone, and its client hears why
        return self._caches.find(ids)[1] == base.tokens

    def _stream(self, task: AnswerTask, begun: Begun) -> AnswerStream:
        parser = None
        if task.request.prompt is None and self._model.has_parser:
            parser = self._model.parser(begun.ids.tolist(), task.request.tools)
        stream = AnswerStream(self._model.tokenizer, task.request.sampling.stop, task.tell, parser)
        stream.on_tokens = self._note_tokens
        return stream

    def _note_tokens(self, tokens: int) -> None:
        if self._first_token_at is None:
            self._first_token_at = time.perf_counter()
        self._meter.note_generated(tokens)

    @contextmanager
    def _timed(self, missing: int) -> Iterator[None]:
        """Count the seconds of a generate() that reads the last `missing` tokens of its prompts."""
        self._first_token_at = None
        start = time.perf_counter()
        try:
            yield
        finally:
            stop = time.perf_counter()
            first = self._first_token_at if self._first_token_at is not None else stop
            self._meter.note_read(missing, first - start)
            self._meter.note_decode(stop - first)

    def _answer(self, task: AnswerTask, begun: Begun, others_wait: Callable[[], bool]) -> Step:
        """Generate the answer of one request until it ends or other clients have their turn, and keep the cache."""
        model = self._model
        stream = begun.stream
        assert stream is not None
        ids = _with_answer(begun, stream)
        answered = len(stream.answer.token_ids)
        if not task.is_cancelled:
            stream.begin_turn()
            ends = [Cancelled([task])]
            if not model.lengths:  # frequencies that depend on the length are chosen for each generate()
                ends.append(TurnOver(stream, others_wait, ids.shape[0]))
            with self._timed(ids.shape[0] - begun.cache.get_seq_length()):
                decode(
                    model.model,
                    model.tokenizer,
                    begun.cache,
                    ids[None],
                    task.request.sampling,
                    stream,
                    max_new_tokens=task.max_new_tokens - answered,
                    ends=ends,
                    answered_tokens=answered,
                )
            ids = _with_answer(begun, stream)
            if stream.is_paused and not task.is_cancelled and not self._is_whole(task, stream):
                return "goes on"
        stream.is_paused = False
        stream.end()
        self._keep_answer(begun, ids)
        if task.request.where and not task.is_cancelled:
            task.tell(self._where(task, begun, stream.answer.token_ids))
        self._end(task, stream)
        return "done"

    def _is_whole(self, task: AnswerTask, stream: AnswerStream) -> bool:
        """Return whether an answer has ended, for another reason than that its request was cancelled."""
        ids = stream.answer.token_ids
        return self._has_end(stream) or len(ids) >= task.max_new_tokens

    def _has_end(self, stream: AnswerStream) -> bool:
        """Return whether an answer has ended by itself, or by a stop string."""
        ids = stream.answer.token_ids
        return stream.answer.stopped_by is not None or bool(ids and self._model.ends_with(ids[-1]))

    def _keep_answer(self, begun: Begun, ids: torch.Tensor) -> None:
        """Keep a cache after an answer, without tokens that are not part of it, such as guesses after its end."""
        surplus = begun.cache.get_seq_length() - ids.shape[0]
        if surplus > 0 and not can_remove(begun.cache, surplus):
            return
        if surplus > 0:
            begun.cache.crop(-surplus)
        self._keep(begun, ids[: begun.cache.get_seq_length()])

    def _where(self, task: AnswerTask, begun: Begun, answer_ids: list[int]) -> Where:
        """Return the passages of the session's document that an answer came from.

        The answer is written already. So if they cannot be told, such as for a model whose answer cannot be computed
        again in one pass, or for want of memory, the reason takes their place.
        """
        name = task.request.session
        assert name is not None
        cache = begun.cache
        try:
            if begun.base is not None:
                cache = begun.base.cache
            elif not can_remove(cache, cache.get_seq_length() - begun.ids.shape[0] + 1):
                cache = self._load(name)
            document = self._library.document(name)
            found = passages(self._model.enabled, cache, begun.ids.tolist(), answer_ids, document)
        except HeadinferError as error:
            return Where((), str(public(error, self._settings.root)))
        return Where(tuple(Passage(**vars(passage)) for passage in found))

    def _answer_together(self, base: Kept, tasks: Sequence[AnswerTask]) -> None:
        """Answer requests on one session in batches, which read its KV once for all. Their caches are not kept."""
        try:
            self._answer_batches(base, tasks)
        except Exception as error:
            for task in tasks[1:]:
                self.fail(task, error)
            raise

    def _answer_batches(self, base: Kept, tasks: Sequence[AnswerTask]) -> None:
        model = self._model
        questions = []
        for task in tasks:
            if task.begun is None:
                ids = torch.cat([base.ids, torch.tensor(task.rest_ids, dtype=torch.long)])
                task.begun = Begun(ids, base.cache, base.tokens, 0, base.session, base)
                self._meter.note_prompt(ids.shape[0], base.tokens)
                self._tell_progress(task)
            stream = self._stream(task, task.begun)
            stream.on_end = functools.partial(self._end, task, stream)
            questions.append(BatchQuestion(task.rest_ids, task.max_new_tokens, streamer=stream))
        for batch in plan_batches(model.enabled, base.cache, questions):
            rows = [tasks[number] for number, _ in batch]
            lengths = [len(question.ids) for _, question in batch]
            arguments = tasks[0].request.sampling.arguments(
                model.tokenizer,
                prompt_tokens=base.tokens + max(lengths),
                max_new_tokens=max(task.max_new_tokens for task in rows),
                ends=[Cancelled(rows)],
            )
            with self._timed(sum(lengths)):
                answer_batch(
                    model.model,
                    base.cache,
                    base.ids[None],
                    [question for _, question in batch],
                    tokenizer=model.tokenizer,  # for stop_strings in the model's generation config
                    pad_token_id=pad_id(model.tokenizer),
                    **arguments,
                )

    def _end(self, task: AnswerTask, stream: AnswerStream) -> None:
        """Tell a client why its answer has ended."""
        answer = stream.answer
        ids = answer.token_ids
        is_whole = self._has_end(stream)
        reason: FinishReason = "stop"
        if stream.has_tool_calls:
            reason = "tool_calls"
        elif not is_whole and len(ids) >= task.max_new_tokens:
            reason = "length"
        elif not is_whole and task.is_cancelled:
            reason = "cancelled"
        task.end(reason, stream)


def _with_answer(begun: Begun, stream: AnswerStream) -> torch.Tensor:
    """Return the token ids [T] of a prompt and of its answer so far, int64."""
    return torch.cat([begun.ids, torch.tensor(stream.answer.token_ids, dtype=torch.long)])
