"""The command `headinfer serve`."""

from __future__ import annotations

import dataclasses
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from headinfer.cli.console import say, warning
from headinfer.cli.options import (
    ChunkTokens,
    CpuShare,
    Device,
    DeviceKVBudget,
    DiskTier,
    Dtype,
    HostKVBudget,
    KVDtypeOption,
    MaxNewTokens,
    Model,
    SessionsFolder,
    SparseHeads,
    SparseShare,
    kv_options,
    number,
)
from headinfer.cli.sampling import takes_sampling
from headinfer.jobs.sampling import Sampling
from headinfer.sessions.folder import default_root

__all__ = ["serve"]

_PANEL = "Server"


@takes_sampling
def serve(
    model: Model,
    sessions: SessionsFolder = None,
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen on. An address that other machines can reach, such as 0.0.0.0, needs a key.",
            rich_help_panel=_PANEL,
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int,
        number("--port", "Port to listen on; 0 takes a free one.", low=0, high=65535, rich_help_panel=_PANEL),
    ] = 8000,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            help="A file with a key in each line. Clients must send one of them.",
            show_default="$HEADINFER_API_KEY, or none",
            rich_help_panel=_PANEL,
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            help="A further name of this server, such as that of a reverse proxy. Requests that name another one are "
            "refused. May be given more than once.",
            metavar="NAME",
            show_default=False,
            rich_help_panel=_PANEL,
        ),
    ] = None,
    queue: Annotated[
        int,
        number("--queue", "Requests and documents that wait, at most.", high=100_000, rich_help_panel=_PANEL),
    ] = 64,
    caches: Annotated[
        int,
        number(
            "--caches",
            "Conversations and documents whose KV stays in memory for the next request, at most.",
            high=1000,
            rich_help_panel=_PANEL,
        ),
    ] = 4,
    max_new_tokens: MaxNewTokens = 1024,
    chunk_tokens: ChunkTokens = None,
    device_kv_budget: DeviceKVBudget = None,
    host_kv_budget: HostKVBudget = None,
    disk_tier: DiskTier = None,
    cpu_share: CpuShare = None,
    kv_dtype: KVDtypeOption = None,
    sparse_heads: SparseHeads = None,
    sparse_share: SparseShare = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    *,
    sampling: Sampling,
) -> None:
    """Serve a model to OpenAI clients and as a page: documents are read once, and asked about from then on.

    Options of sampling, and --max-new-tokens, apply if a request does not set them. Sessions are those of
    `headinfer read`. Ctrl-C ends the server; documents that it has not read to their ends go on when it starts again.
    """
    from headinfer.engine.options import Options
    from headinfer.serve.listen import address_of, check_extra, listen, read_keys
    from headinfer.serve.settings import ServeSettings

    check_extra()
    settings = ServeSettings(
        model=model,
        root=sessions or default_root(),
        device=device,
        dtype=dtype,
        seed=sampling.seed,
        chunk_tokens=chunk_tokens,
        options=Options(
            **kv_options(device_kv_budget, host_kv_budget, disk_tier, cpu_share, kv_dtype, sparse_heads, sparse_share)
        ),
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        queue_limit=queue,
        caches_kept=caches,
    )
    dataclasses.replace(sampling, temperature=sampling.temperature or 1.0).check()  # a request may set a temperature
    if settings.approximation:
        warning(settings.approximation)
    keys = read_keys(api_key_file)
    with listen(host, port, has_key=bool(keys)) as listener:
        from headinfer.serve.access import Access
        from headinfer.serve.app import build_app
        from headinfer.serve.service import Service
        from headinfer.serve.web import web_server

        address = address_of(listener, host)
        access = Access(host=host, keys=keys, allowed_hosts=tuple(allow_host or ()))
        before = signal.signal(signal.SIGTERM, _end)
        try:
            say(f"loading {model} ...")
            with Service(settings) as service:
                server = web_server(build_app(service, access), service.close)
                say(f"{service.model} is served: the page is at {address}/ and the API at {address}/v1; Ctrl-C ends it")
                server.run([listener])
        finally:
            signal.signal(signal.SIGTERM, before)


def _end(number: int, frame: FrameType | None) -> None:
    """End the process after SIGTERM as after Ctrl-C: the service is closed."""
    sys.exit(128 + number)
