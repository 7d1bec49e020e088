"""What a client asks for, and what the service says about its documents and about itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from headinfer.jobs.sampling import Sampling

__all__ = ["Ask", "DocumentState", "DocumentStatus", "ServerState"]

DocumentStatus = Literal["waiting", "reading", "ready", "failed", "partial"]


@dataclass(frozen=True)
class Ask:
    """A request for an answer: a chat with `messages`, or a completion of `prompt`. Exactly one of both is given.

    Attributes:
        client: who asks. The service is fair between clients.
        messages: the messages of a chat, as chat templates take them: role, content (a text, or parts with "type":
            "text"), and for tools tool_calls, tool_call_id and name. The last one is answered.
        prompt: the text to continue, or its token ids. With a session, it follows the session's tokens.
        session: the name of the document or session that precedes the messages; None for none.
        sampling: how tokens are chosen, and where the answer ends.
        max_new_tokens: tokens of the answer, at most; None takes the service's setting.
        tools: the tools that the model may call, as chat templates take them.
        where: whether a `Where` event says where in the session's document the answer came from.
    """

    client: str
    messages: Sequence[Mapping[str, Any]] = ()
    prompt: str | Sequence[int] | None = None
    session: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int | None = None
    tools: Sequence[Mapping[str, Any]] = ()
    where: bool = False


@dataclass(frozen=True)
class DocumentState:
    """A document or session of the service.

    Attributes:
        name: its name: that of its session, and the id of its file.
        filename: the name of the file that was added; that of the session if the command line has read it.
        nbytes: the size of the file, or of the text that the session holds, if it is known; else 0.
        created_s: when it was added, in seconds since 1970.
        status: "waiting" to be read, "reading", "ready" for questions, "failed", or "partial": a session that
            `headinfer read` has not finished, and that only it can finish.
        tokens: tokens that have been read.
        of: tokens of the document; 0 as long as that is unknown.
        characters: characters of the document's text; 0 as long as that is unknown. The page needs it to draw the
            document along its length, so the HTTP layer has it in "headinfer" of the file object.
        eta_s: estimated seconds until it is ready; None if it is not being read, or if there is no estimate yet.
        disk_bytes: bytes on disk of the session.
        error: why it failed, in one sentence; empty if it has not.
        approximation: what is approximate about its KV, in one sentence; empty if it is exact.
    """

    name: str
    filename: str
    nbytes: int
    created_s: float
    status: DocumentStatus
    tokens: int
    of: int
    characters: int = 0
    eta_s: float | None = None
    disk_bytes: int = 0
    error: str = ""
    approximation: str = ""


@dataclass(frozen=True)
class ServerState:
    """The service at one moment. Counts and seconds are totals since it began.

    Attributes:
        model: the name of the model.
        context_limit: tokens that the model was made for; 0 if that is unknown.
        approximation: what is approximate about the KV, in one sentence; empty if it is exact.
        device_kv_bytes: bytes of KV on the compute devices.
        device_kv_budget_bytes: the most bytes of KV that they may hold; 0 if there is no budget.
        host_kv_bytes: bytes of KV in host memory.
        disk_kv_bytes: bytes of KV on the disk: those of sessions, and those that the disk tier holds.
        tokens_per_s: tokens that were read or generated in each of the last seconds of work; 0 if there was none.
        link_bytes_per_s: bytes over the link between host and device in the same time.
        cpu_bytes_per_s: bytes of KV in host memory that the CPU has attended to in the same time.
        waiting: requests that wait.
        running: requests that are being answered, and documents that are being read.
        prompt_tokens_total: tokens of all prompts, cached ones included.
        completion_tokens_total: tokens that were generated.
        cached_tokens_total: tokens of prompts that were not read again.
        link_bytes_total: bytes over the link.
        cpu_bytes_total: bytes of KV in host memory that the CPU has attended to.
        seconds_prefill_total: seconds of reading prompts and documents.
        seconds_decode_total: seconds of generating answers.
    """

    model: str
    context_limit: int
    approximation: str = ""
    device_kv_bytes: int = 0
    device_kv_budget_bytes: int = 0
    host_kv_bytes: int = 0
    disk_kv_bytes: int = 0
    tokens_per_s: float = 0.0
    link_bytes_per_s: float = 0.0
    cpu_bytes_per_s: float = 0.0
    waiting: int = 0
    running: int = 0
    prompt_tokens_total: int = 0
    completion_tokens_total: int = 0
    cached_tokens_total: int = 0
    link_bytes_total: int = 0
    cpu_bytes_total: int = 0
    seconds_prefill_total: float = 0.0
    seconds_decode_total: float = 0.0
