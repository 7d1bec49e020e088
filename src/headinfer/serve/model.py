"""The model of a service: loaded once, with headinfer enabled, and used by the worker thread alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch

from headinfer.attention import native
from headinfer.engine.machine import chosen_device
from headinfer.engine.options import Options
from headinfer.engine.run_plan import RunRequest, plan_run
from headinfer.errors import UsageError
from headinfer.hf.cache import HeadCache
from headinfer.hf.compat import has_response_template, response_parser
from headinfer.hf.enable import enable
from headinfer.hf.models import resolve
from headinfer.hf.rotary import RotaryLengths
from headinfer.jobs.generate import chosen_dtype
from headinfer.plan.model_shape import ModelShape
from headinfer.serve.messages import chat_ids, completion_ids
from headinfer.serve.requests import Ask
from headinfer.serve.settings import ServeSettings
from headinfer.sessions.fingerprint import fingerprint, of_stored_kv
from headinfer.sessions.manifest import Manifest
from headinfer.utils.approximation import short_form

__all__ = ["ServedModel"]

_PARSED_TOKENS = 1024  # of the end of a prompt, in which its template begins the answer


class ServedModel:
    """A model that is loaded and enabled.

    Args:
        settings: the settings of the service.
        on_forward: called with the cache after each forward pass.

    Attributes:
        source: where the model is from.
        tokenizer: its tokenizer.
        enabled: the model, enabled.
        model: the model.
        shape: its shape.
        lengths: the lengths of a context at which its rotary frequencies change.
        fingerprint: the model, and how its KV is stored, as sessions name them.
        whole_only: whether some of its layers cannot be cut to fewer tokens.

    Raises:
        UsageError: a setting is invalid, or there is no such model.
        UnsupportedError: the model is not served.
        CapacityError: the model does not fit this machine.
    """

    def __init__(self, settings: ServeSettings, on_forward: Callable[[HeadCache], None]) -> None:
        if settings.sampling.draft is not None:
            raise UsageError("a server has no draft model yet: leave --draft out")
        device = str(chosen_device(settings.device))
        self.source = resolve(settings.model)
        self.tokenizer = self.source.tokenizer()
        self.shape = ModelShape.from_config(self.source.config)
        self.lengths = RotaryLengths.from_config(self.source.config)
        dtype = chosen_dtype(settings.dtype, self.source, device)
        request = RunRequest(
            shape=self.shape,
            device=torch.device(device),
            dtype=dtype,
            context_tokens=settings.max_new_tokens,
            options=settings.options,
            chunk_tokens=settings.chunk_tokens,
            host_weight_bytes=self.source.weight_bytes(dtype) if device == "cpu" else 0,
        )
        plan_run(request)  # raises if the weights do not fit
        self._given = given_options(settings.options)
        layers = HeadCache(self.source.config, **self._given).layers  # raises if the model or an option is not served
        self.whole_only = any(type(layer).__name__ != "HeadLayer" for layer in layers)
        self.model = self.source.load(dtype=dtype, device=device, seed=settings.seed)
        if device == "cpu":
            native.unavailable_reason(self.model.dtype)  # compiles the decode kernel, if it was never done here
        self.fingerprint = of_stored_kv(fingerprint(self.model), settings.options.arithmetic())
        self._options = settings.options
        self._tokenizing = threading.Lock()  # some tokenizers serve one thread at a time
        self.enabled = enable(
            self.model,
            chunk_tokens=settings.chunk_tokens,
            on_forward=on_forward,
            guesses=settings.sampling.guesses,
            **self._given,
        )

    @property
    def session_options(self) -> dict[str, Any]:
        """The options of the settings that replace those of a session."""
        return dict(self._given)

    def refusal(self, manifest: Manifest) -> str:
        """Return how a session was read so that it does not go on here; empty if it does.

        Exact KV does not go on as approximate KV, nor the other way round.
        """
        kept = short_form(manifest.kv_dtype, manifest.sparse_heads)
        served = short_form(self._options.kv_dtype, self._options.sparse_heads)
        if kept != served:
            forms = [f"approximately ({form})" if form else "exactly" for form in (kept, served)]
            return f"was read {forms[0]}, and this server reads {forms[1]}"
        return "" if manifest.model == self.fingerprint else "was read with another model"

    def prompt_ids(self, request: Ask, about: Mapping[str, Any] | None) -> list[int]:
        """Return the token ids of a request, or those after its session. Any thread may call it.

        Args:
            request: the request.
            about: the facts of its session; None for none.

        Raises:
            UsageError: the request is invalid, or its tokens are not the model's.
            UnsupportedError: the model's chat template cannot write the messages.
        """
        with self._tokenizing:
            if request.prompt is not None:
                ids = completion_ids(self.tokenizer, request.prompt, about)
            else:
                ids = chat_ids(self.tokenizer, request.messages, request.tools, about)
        self.source.check_ids(ids)
        return ids

    def parser(self, prompt_ids: list[int], tools: Sequence[Any]) -> Any:
        """Return the parser of an answer with reasoning and tool calls. has_parser must be true."""
        return response_parser(self.tokenizer, self.model, prompt_ids[-_PARSED_TOKENS:], list(tools))

    @property
    def has_parser(self) -> bool:
        """Whether the model has a template for reasoning and tool calls in its answers."""
        return has_response_template(self.tokenizer, self.model)

    def ends_with(self, token: int) -> bool:
        """Return whether a token ends an answer."""
        ends = self.model.generation_config.eos_token_id
        return token in (ends if isinstance(ends, list) else [ends])

    def close(self) -> None:
        """Restore the model, and free its memory."""
        self.enabled.disable()
        del self.model, self.enabled


def given_options(options: Options) -> dict[str, Any]:
    """Return the fields of Options that differ from their defaults."""
    default = Options()
    names = [field.name for field in fields(options)]
    return {name: getattr(options, name) for name in names if getattr(options, name) != getattr(default, name)}
