"""Feeds the browser page of a live decoder from the decoder's process.

The server runs in a process of its own (`sjepa_deploy.runtime.watch.dashboard_server`), at a low priority. The decoder's process
only takes a snapshot a few times a second and writes the snapshot to a pipe from a thread. This thread keeps the priority that it
inherits: a thread of a lower priority could be held up while it has the interpreter's lock, and would hold up the decoder. The
number of clients and how slowly they read do not touch the decoder's interpreter lock, garbage or memory.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import queue
import subprocess
import tempfile
import threading
import time
from types import TracebackType
from typing import IO, Any

from sjepa_deploy.errors import DashboardError, MissingDependencyError, SjepaError
from sjepa_deploy.runtime.live.commands import BadChannels, Command, Commands, Mark, Pause, Reply, Start
from sjepa_deploy.runtime.live.recorder import Recorder
from sjepa_deploy.runtime.side_process import Served, end_server, start_server
from sjepa_deploy.runtime.watch.described import describe, describe_recording, describe_state, describe_traces
from sjepa_deploy.runtime.watch.monitor import Monitor
from sjepa_deploy.serialize import decode

TOKEN_VARIABLE = "SJEPA_DASHBOARD_TOKEN"
"""Environment variable of the token, which other users of the machine would read in the arguments of a command."""

INTERVAL = 0.25
"""Seconds from one state to the next: as fast as somebody can read a number."""

RESTART_AFTER = 5.0
"""Seconds until a server that died is started again."""

CONTROLS = (Mark, Pause, Start, BadChannels)
"""Commands that the page may give."""

LONGEST_COMMAND = 65536
"""Bytes of a command."""

SERVER = "sjepa_deploy.runtime.watch.dashboard_server"

_LOG = logging.getLogger(__name__)
DASHBOARD = Served(
    name="dashboard",
    gives_away="show the stream to",
    option="--dashboard-address",
    token_from=f"environment variable {TOKEN_VARIABLE}",
    port=8765,
    error=DashboardError,
)


class Dashboard:
    """Serves a monitor to browsers and to Prometheus, from entering to leaving the context.

    Parameters
    ----------
    monitor : Monitor
        Monitor to show.
    host : str
        Address to listen on. Whoever reaches it may read, unless there is a token.
    port : int
        Port to listen on; 0 takes a free one.
    token : str or None
        Token that a reader must know. Needed unless `host` is a loopback address, and always with `commands`.
    commands : Commands or None
        Commands of the decoder, for the buttons of the page: mark, pause, start, bad channels. None: the page changes nothing.

    Attributes
    ----------
    recorder : Recorder or None
        Recorder whose file, size and disk the page shows.

    Raises
    ------
    DashboardError
        If the token is missing or short, or the address cannot be listened on.
    MissingDependencyError
        If the extra "dashboard" is not installed.

    Examples
    --------
    >>> with Dashboard(monitor) as dashboard:  # doctest: +SKIP
    ...     print(dashboard.url)
    """

    def __init__(
        self,
        monitor: Monitor,
        *,
        host: str = "127.0.0.1",
        port: int = DASHBOARD.port,
        token: str | None = None,
        commands: Commands | None = None,
    ) -> None:
        for package in ("starlette", "uvicorn", "prometheus_client"):
            if importlib.util.find_spec(package) is None:
                raise MissingDependencyError(package, "dashboard")
        DASHBOARD.check_token(host, token)
        if token is None and commands is not None:
            raise DashboardError(
                "Every page that is open in a browser of this machine could give the decoder commands.",
                f"Set a token (environment variable {TOKEN_VARIABLE}), or leave --control out.",
            )
        self.recorder: Recorder | None = None
        self._commands = commands
        self._answers: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._monitor = monitor
        self._host = host
        self._token = token
        self._listener = DASHBOARD.listen(host, port)
        self._stop = threading.Event()
        self._feeder = threading.Thread(target=self._feed, name="dashboard", daemon=True)
        self._server: subprocess.Popen[bytes] | None = None

    @property
    def port(self) -> int:
        """Return the port that the server listens on."""
        return int(self._listener.getsockname()[1])

    @property
    def url(self) -> str:
        """Return the address of the page, without the token."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self.port}/"

    @property
    def server_pid(self) -> int | None:
        """Return the number of the server's process, while there is one."""
        return self._server.pid if self._server is not None else None

    def __enter__(self) -> Dashboard:
        self._feeder.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Send the last state, end the server and free the port."""
        self._stop.set()
        self._answers.put(None)
        if self._feeder.ident is not None:
            self._feeder.join(timeout=5)
            if self._feeder.is_alive() and self._server is not None:  # the server does not read: end it, and the write with it
                self._server.kill()
                self._feeder.join()
        self._listener.close()

    def _feed(self) -> None:
        while not self._stop.is_set():
            with tempfile.TemporaryFile() as complaints:
                self._server = start_server(SERVER, [self._listener], complaints, answers=self._commands is not None)
                pipe = self._server.stdin
                assert pipe is not None
                if self._server.stdout is not None:
                    threading.Thread(target=self._obey, args=(self._server.stdout,), name="commands", daemon=True).start()
                with contextlib.suppress(BrokenPipeError):  # it died: said below
                    try:
                        self._write_states(pipe)
                    finally:
                        pipe.close()
                status = end_server(self._server)
                if not self._stop.is_set():
                    complaints.seek(0)
                    last = complaints.read().decode(errors="replace").strip().splitlines()[-1:]
                    what = "The dashboard's server ended with status %d %s; it starts again in %g s."
                    _LOG.warning(what, status, last, RESTART_AFTER)
                    self._stop.wait(RESTART_AFTER)

    def _write_states(self, pipe: IO[bytes]) -> None:
        control = self._commands is not None
        facts = describe(self._monitor.facts) | {"control": control}
        _write_line(pipe, {"token": self._token, "port": self.port, "control": control, "facts": facts})
        after = -1
        while True:
            last = self._stop.is_set()
            snapshot = self._monitor.snapshot()
            state = describe_state(snapshot, after) | {"wall": time.time()}
            if self.recorder is not None:
                state["recording"] = describe_recording(self.recorder)
            _write_line(pipe, state | {"traces": describe_traces(self._monitor.traces)})
            after = snapshot.n_noted
            if last:
                return
            self._write_answers(pipe, INTERVAL)

    def _write_answers(self, pipe: IO[bytes], seconds: float) -> None:
        """Write the answers to commands for some time, or until the dashboard closes."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            try:
                answer = self._answers.get(timeout=left)
            except queue.Empty:
                return
            if answer is None:
                return
            _write_line(pipe, answer)

    def _obey(self, pipe: IO[bytes]) -> None:
        """Give the decoder the commands that the server writes, a line each, until the server ends."""
        with pipe:
            while line := pipe.readline(LONGEST_COMMAND):
                asked = json.loads(line)
                self._submit(asked["number"], asked["command"])

    def _submit(self, number: int, described: Any) -> None:
        assert self._commands is not None

        def answer(reply: Reply) -> None:
            self._answers.put({"answer": number, "accepted": reply.accepted, "text": reply.text})

        try:
            command: Command = decode(Command, described)
        except (SjepaError, ValueError) as e:
            answer(Reply(accepted=False, text=str(e)))
            return
        if isinstance(command, CONTROLS):
            self._commands.submit(command).add_done_callback(lambda done: answer(done.result()))
        else:
            answer(Reply(accepted=False, text="The page does not give this command."))


def _write_line(pipe: IO[bytes], message: dict[str, Any]) -> None:
    pipe.write(json.dumps(message, allow_nan=False, separators=(",", ":")).encode() + b"\n")
    pipe.flush()
