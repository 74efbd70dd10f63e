"""Runs servers beside a decoder, each in a process of its own at a low priority, and guards the addresses on which they listen.

The number of clients and how slowly these read do not touch the decoder's interpreter lock, garbage or memory.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

from sjepa_deploy.errors import SjepaError

MIN_TOKEN_LENGTH = 16
"""Characters that a token must have: `python -c "import secrets; print(secrets.token_urlsafe())"` makes one of 43."""

SEND_BUFFER = 65536
"""Bytes that the system buffers for a client: the more, the older is what a slow one reads."""

DEAD_CLIENT_MS = 20_000
"""Milliseconds after which the system gives up a client that takes nothing."""

_START = """import importlib, os, sys
os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))  # the decoder may be a real-time process
os.nice(10)
sys.path[:] = sys.argv.pop().split("\\n")
importlib.import_module(sys.argv.pop(1)).main()
"""


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True, kw_only=True)
class Served:
    """Says in words what is served, and checks where and to whom.

    Attributes
    ----------
    name : str
        What it is called, as "dashboard".
    gives_away : str
        What everybody who reaches the address could do, as "show the stream to".
    option : str
        Option of the address.
    token_from : str
        How the token is given.
    port : int
        Port where none is named.
    error : type
        What is raised.
    """

    name: str
    gives_away: str
    option: str
    token_from: str
    port: int
    error: type[SjepaError]

    def parse(self, text: str) -> tuple[str, int]:
        """Return host and port of "HOST:PORT", "HOST", ":PORT", "PORT" or nothing. IPv6 as in "[::1]:8765"."""
        host, colon, port = text.rpartition(":")
        if not colon or text.endswith("]"):
            host, port = ("", text) if text.isdecimal() else (text, "")
        if (port and not port.isdecimal()) or int(port or 0) > 65535 or (":" in host and not host.startswith("[")):
            raise self.error(
                f"{text!r} is not an address.", f"Give HOST:PORT, such as 127.0.0.1:{self.port} or [::1]:{self.port}."
            )
        return host.strip("[]") or "127.0.0.1", int(port) if port else self.port

    def check_token(self, host: str, token: str | None) -> None:
        """Refuse an address that others reach without a token, and a token that is guessed too easily."""
        if token is None and not is_loopback(host):
            raise self.error(
                f"The {self.name} would {self.gives_away} everyone who reaches {host}.",
                f"Set a token ({self.token_from}), or listen on 127.0.0.1.",
            )
        if token is not None and (len(token) < MIN_TOKEN_LENGTH or not token.isascii() or not token.isprintable()):
            raise self.error(
                f"The token of the {self.name} is shorter than {MIN_TOKEN_LENGTH} characters, or not plain ASCII.",
                'Make one with: python -c "import secrets; print(secrets.token_urlsafe())".',
            )

    def listen(self, host: str, port: int) -> socket.socket:
        """Return a socket that listens. Port 0 takes a free one."""
        try:
            family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
            listener = socket.socket(family, kind, proto)
        except (OSError, UnicodeError) as e:
            raise self.error(f"{host!r} is no address of this machine ({e}).", "Use 127.0.0.1, or an address of it.") from e
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
            if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
                listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, DEAD_CLIENT_MS)
            listener.bind(address)
            listener.listen(64)
        except OSError as e:
            listener.close()
            raise self.error(
                f"The {self.name} cannot listen on {host} port {port} ({os.strerror(e.errno or 0)}).",
                f"Choose another {self.option} HOST:PORT; port 0 takes a free one.",
            ) from e
        return listener


def start_server(
    module: str, listeners: Sequence[socket.socket], complaints: IO[bytes], *, answers: bool = False
) -> subprocess.Popen[bytes]:
    """Start `module.main()` in a process of its own, with the numbers of the listening sockets as its arguments.

    Parameters
    ----------
    module : str
        The module.
    listeners : sequence of socket
        Sockets that the process inherits.
    complaints : file
        Takes its standard error.
    answers : bool
        Whether its standard output is a pipe too. Its standard input always is one.
    """
    numbers = [listener.fileno() for listener in listeners]
    return subprocess.Popen(
        [sys.executable, "-c", _START, module, *map(str, numbers), "\n".join(sys.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE if answers else subprocess.DEVNULL,
        stderr=complaints,
        pass_fds=numbers,
        start_new_session=True,  # Ctrl-C is for the decoder, which then ends the server
    )


def end_server(server: subprocess.Popen[bytes]) -> int:
    """Return the exit status of a server, which ends when its standard input does."""
    try:
        return server.wait(timeout=5)
    except subprocess.TimeoutExpired:
        server.kill()
        return server.wait()
