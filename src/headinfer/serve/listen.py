"""The address that the server listens on, and its keys: what is checked before the model is loaded."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from headinfer.errors import UsageError
from headinfer.utils.files import read_bytes

__all__ = ["KEY_VARIABLE", "address_of", "check_extra", "listen", "read_keys"]

KEY_VARIABLE = "HEADINFER_API_KEY"
_LIBRARIES = ("fastapi", "openai", "prometheus_client", "python_multipart", "uvicorn")
_SHORTEST_KEY = 16


def check_extra() -> None:
    """Check that the libraries of the server are installed.

    Raises:
        UsageError: one is not.
    """
    missing = [name for name in _LIBRARIES if find_spec(name) is None]
    if missing:
        raise UsageError(f"the server needs {', '.join(missing)}: install it with pip install 'headinfer[serve]'")


def read_keys(path: Path | None, environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Return the keys that clients may use.

    Args:
        path: a file with a key in each line, or None.
        environment: the environment, in which HEADINFER_API_KEY may be a key.

    Raises:
        UsageError: both are given, the file cannot be read, or a key is too short or has other characters than
            visible ones of ASCII.
    """
    in_environment = environment.get(KEY_VARIABLE)
    if path is None:
        return () if in_environment is None else _checked([in_environment.strip()], KEY_VARIABLE)
    if in_environment is not None:
        raise UsageError(f"--api-key-file and {KEY_VARIABLE} are both given: give one of them")
    lines = read_bytes(path).decode("utf-8", "replace").splitlines()
    return _checked([line.strip() for line in lines if line.strip()], str(path))


def _checked(keys: list[str], origin: str) -> tuple[str, ...]:
    if not keys:
        raise UsageError(f"{origin} has no key: write one, such as the output of `openssl rand -hex 32`")
    if not all(len(key) >= _SHORTEST_KEY and key.isascii() and key.isprintable() and " " not in key for key in keys):
        raise UsageError(
            f"a key of {origin} is not usable: it must have at least {_SHORTEST_KEY} visible ASCII characters, such as "
            "the output of `openssl rand -hex 32`"
        )
    return tuple(keys)


def listen(host: str, port: int, *, has_key: bool) -> socket.socket:
    """Return a socket that listens, so that no other program takes the port while the model is loaded.

    Args:
        host: an address of this machine, or a name of it.
        port: the port; 0 for any free one.
        has_key: whether clients need a key. Without one, only this machine may reach the server.

    Raises:
        UsageError: other machines would reach the server without a key, or the address or the port cannot be used.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        raise UsageError(f"--host is {host}: there is no such address or name, use 127.0.0.1") from error
    family, _, _, _, address = found[0]
    if not has_key and not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
        raise UsageError(
            f"--host is {host}, which other machines can reach: give --api-key-file or set {KEY_VARIABLE}, or use "
            "127.0.0.1"
        )
    try:
        return socket.create_server((str(address[0]), port), family=family)
    except OSError as error:
        raise UsageError(_reason(host, port, error)) from error


def _reason(host: str, port: int, error: OSError) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            return f"--port is {port}, and another program uses it: choose another port, or end that program"
        case errno.EACCES:
            return f"--port is {port}, and the system allows it to administrators only: choose one above 1023"
        case errno.EADDRNOTAVAIL:
            return f"--host is {host}, which is no address of this machine: use 127.0.0.1, or 0.0.0.0 for all addresses"
        case _:
            return f"cannot listen at {host}, port {port} ({error.strerror}): choose another --host or --port"


def address_of(listener: socket.socket, host: str) -> str:
    """Return the URL of a server, for people."""
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{listener.getsockname()[1]}"
