"""A real server in a thread of this process, at a free port of the loopback address."""

import atexit
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx2
from own_process import HANG_S

from headinfer.serve.access import Access
from headinfer.serve.app import build_app
from headinfer.serve.web import web_server

BROWSER = httpx2.Client(verify=False, timeout=HANG_S, limits=httpx2.Limits(max_connections=200))
"""A client of HTTP. Making one takes long, since certificates are loaded unless verify=False."""
atexit.register(BROWSER.close)


@contextmanager
def live_server(service, access: Access | None = None) -> Iterator[str]:
    """Serve a service; yield the address of the server."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = web_server(build_app(service, access or Access()), service.close)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
