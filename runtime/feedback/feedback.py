"""Hands the messages of a live decoder to clients on a socket, and their commands to the decoder, from the decoder's process.

The server runs in a process of its own (`runtime.feedback.server`). The decoder only puts what it tells into a bounded queue, and
takes commands between two chunks. Two threads write to the server's pipe and read from it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import math
import queue
import socket
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from sjepa_deploy.errors import FeedbackError, MissingDependencyError
from sjepa_deploy.runtime.live.commands import Command, Executed, Load, Reply, Status
from sjepa_deploy.runtime.live.decision import Decision
from sjepa_deploy.runtime.live.decoder import Decoder
from sjepa_deploy.runtime.live.messages import Messages, Told
from sjepa_deploy.runtime.live.sources import Chunk
from sjepa_deploy.runtime.side_process import Served, end_server, start_server
from sjepa_deploy.serialize import decode

HEARTBEAT_S = 1.0
"""Seconds without another message after which a heartbeat is sent."""

MOST_WAITING = 10_000
"""Messages that wait for the server. What is more is left out, and counted."""

RESTART_AFTER_S = 5.0
"""Seconds until a server that died is started again."""

PATIENT_S = 1.0
"""Seconds that a recording that is decoded as fast as possible waits for the server. A live stream never waits."""

SERVER = "sjepa_deploy.runtime.feedback.server"
FEEDBACK = Served(
    name="feedback socket",
    gives_away="obey",
    option="--feedback",
    token_from="--token-file",
    port=8770,
    error=FeedbackError,
)

_LOG = logging.getLogger(__name__)
_END = object()


class Feedback:
    """Serves what a decoder tells, and takes commands, from entering to leaving the context.

    Clients that send JSON lines connect to `port`. With a token, WebSocket clients connect to the next port. Dareplane's primary
    commands are taken on the port after that one, on 127.0.0.1 alone.

    Parameters
    ----------
    decoder : Decoder
        The decoder.
    host : str
        Address to listen on. Whoever reaches it commands the decoder, unless there is a token.
    port : int
        Port of JSON lines; 0 takes free ones.
    token : str or None
        Token that a client must send first. Needed unless `host` is a loopback address, and for WebSocket.
    origins : sequence of str
        Origins of web pages that may connect, beside those of this machine, as "https://lab.example" or "null" (a file).
    dareplane : bool
        Whether primary commands are taken.

    Attributes
    ----------
    ports : dict of str to int
        Port of "lines", "websocket" and "dareplane", as far as these are served.
    counts : dict of str to int
        Clients now; clients that were refused; lines that were no command; clients that were let go as they did not read; and
        messages that never reached the server.

    Raises
    ------
    FeedbackError
        If the token is missing or short, or the address cannot be listened on.
    MissingDependencyError
        If the extra "feedback" is not installed.

    Examples
    --------
    >>> with Feedback(decoder, port=8770):  # doctest: +SKIP
    ...     decoder.run()
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        host: str = "127.0.0.1",
        port: int = FEEDBACK.port,
        token: str | None = None,
        origins: Sequence[str] = (),
        dareplane: bool = False,
    ) -> None:
        if importlib.util.find_spec("websockets") is None:
            raise MissingDependencyError("websockets", "feedback")
        FEEDBACK.check_token(host, token)
        self._decoder, self._messages = decoder, Messages(decoder)
        self._token, self._origins = token, tuple(origins)
        hosts = (
            {"lines": host}
            | ({"websocket": host} if token is not None else {})
            | ({"dareplane": "127.0.0.1"} if dareplane else {})
        )
        offset = {"lines": 0, "websocket": 1, "dareplane": 2}
        self._listeners: dict[str, socket.socket] = {}
        with contextlib.ExitStack() as opened:
            for kind, address in hosts.items():
                self._listeners[kind] = opened.enter_context(FEEDBACK.listen(address, port and port + offset[kind]))
            opened.pop_all()
        self.ports = {kind: int(listener.getsockname()[1]) for kind, listener in self._listeners.items()}
        self.counts = {"clients": 0, "refused": 0, "malformed": 0, "let go": 0, "left out": 0}
        self._queue: queue.Queue[Told | dict[str, Any] | object] = queue.Queue(MOST_WAITING)
        self._heard = self._decided = math.nan
        self._patient = not decoder.source.live
        self._server: subprocess.Popen[bytes] | None = None
        self._n_servers = 0
        self._stop = threading.Event()
        self._writer = threading.Thread(target=self._serve, name="feedback out", daemon=True)
        decoder.on_decision(self._take_decision)
        decoder.on_undecided(self._put)
        decoder.on_incident(self._put)
        decoder.on_command(self._take_executed)
        decoder.on_chunk(self._take_chunk)

    @property
    def server_pid(self) -> int | None:
        """Return the number of the server's process, while there is one."""
        return None if self._server is None else self._server.pid

    def __enter__(self) -> Feedback:
        self._writer.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Send the last messages, end the server and free the ports."""
        self._stop.set()
        with contextlib.suppress(queue.Full):
            self._queue.put(_END, timeout=1)
        if self._writer.ident is not None:
            self._writer.join(timeout=5)
            if self._writer.is_alive() and self._server is not None:  # the server does not read: end it, and the write with it
                self._server.kill()
                self._writer.join()
        for listener in self._listeners.values():
            listener.close()

    # ------------------------------------------------------------------ called in the decoder's thread

    def _put(self, what: Told | dict[str, Any]) -> None:
        if self._stop.is_set():
            return
        try:
            self._queue.put(what, block=self._patient, timeout=PATIENT_S)
        except queue.Full:
            self.counts["left out"] += 1

    def _take_decision(self, decision: Decision) -> None:
        self._decided = decision.decided
        self._put(decision)

    def _take_executed(self, executed: Executed) -> None:
        if isinstance(executed.command, Load) and executed.reply.accepted:
            self._put({"head": json.dumps(self._messages.head())})
        if not isinstance(executed.command, Status):
            self._put(executed)

    def _take_chunk(self, chunk: Chunk) -> None:
        self._heard = chunk.received

    # ------------------------------------------------------------------ the thread that writes

    def _serve(self) -> None:
        while not self._stop.is_set():
            with tempfile.TemporaryFile() as complaints:
                self._n_servers += 1
                self._server = server = start_server(SERVER, list(self._listeners.values()), complaints, answers=True)
                assert server.stdin is not None
                reader = threading.Thread(target=self._read, args=(server, self._n_servers), name="feedback in", daemon=True)
                reader.start()
                with contextlib.suppress(BrokenPipeError):  # it died: said below
                    try:
                        self._write(server.stdin)
                    finally:
                        server.stdin.close()
                status = end_server(server)
                reader.join()
                if not self._stop.is_set():
                    complaints.seek(0)
                    last = complaints.read().decode(errors="replace").strip().splitlines()[-1:]
                    what = "The server of the feedback socket ended with status %d %s; it starts again in %g s."
                    _LOG.warning(what, status, last, RESTART_AFTER_S)
                    self._decoder.note("feedback", "The server of the feedback socket died, and is started again.")
                    self._stop.wait(RESTART_AFTER_S)

    def _write(self, pipe: IO[bytes]) -> None:
        start = {"token": self._token, "origins": self._origins, "listeners": list(self._listeners)}
        _write_line(pipe, start | {"head": json.dumps(self._messages.head())})
        while True:
            try:
                what = self._queue.get(timeout=HEARTBEAT_S)
            except queue.Empty:
                what = self._heartbeat()
            if what is _END:
                return
            if isinstance(what, dict) and ("head" in what or "to" in what):
                if what.get("server", self._n_servers) == self._n_servers:
                    _write_line(pipe, what)
            else:
                message = what if isinstance(what, dict) else self._messages.of(what)  # type: ignore[arg-type]
                _write_line(pipe, {"message": json.dumps(message, allow_nan=False)})

    def _heartbeat(self) -> dict[str, Any]:
        now = self._decoder.source.clock()
        return {
            "type": "heartbeat",
            "run": self._decoder.run_id,
            "time": now,
            "paused": self._decoder.paused,
            "since_sample": _number(now - self._heard),
            "since_decision": _number(now - self._decided),
        }

    # ------------------------------------------------------------------ the thread that reads

    def _read(self, server: subprocess.Popen[bytes], number: int) -> None:
        assert server.stdout is not None
        with server.stdout as pipe:
            for text in pipe:
                line = json.loads(text)
                if "counts" in line:
                    if line["counts"]["let go"] > self.counts["let go"]:
                        self._decoder.note("feedback", "A client that did not read its messages was let go.")
                    self.counts.update(line["counts"])
                    continue
                future = self._decoder.commands.submit(decode(Command, line["command"]))
                future.add_done_callback(partial(self._reply, line["client"], number))

    def _reply(self, client: int, server: int, future: Future[Reply]) -> None:
        reply = future.result()
        message = {
            "type": "reply",
            "run": self._decoder.run_id,
            "accepted": reply.accepted,
            "text": reply.text,
            "data": reply.data,
        }
        self._put({"to": client, "reply": message, "server": server})


def read_token(file: Path) -> str:
    """Read a token from a file: its first line.

    Raises
    ------
    FeedbackError
        If the file cannot be read.
    """
    try:
        text = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeError) as e:
        raise FeedbackError(f"The token file {file} cannot be read ({e}).", "Write a line of text into it.") from e
    return text.splitlines()[0] if text else ""


def _number(value: float) -> float | None:
    return round(value, 6) if math.isfinite(value) else None


def _write_line(pipe: IO[bytes], line: dict[str, Any]) -> None:
    pipe.write(json.dumps(line).encode() + b"\n")
    pipe.flush()
