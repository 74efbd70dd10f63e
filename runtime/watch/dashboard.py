"""Feeds the browser page of a live decoder from the decoder's process.

The server runs in a process of its own (`sjepa_deploy.runtime.watch.dashboard_server`), at a low priority. The decoder's process
only takes a snapshot a few times a second and writes the snapshot to a pipe from a thread. This thread keeps the priority that it
inherits: a thread of a lower priority could be held up while it has the interpreter's lock, and would hold up the decoder. The
number of clients and how slowly they read do not touch the decoder's interpreter lock, garbage or memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import logging
import math
import subprocess
import tempfile
import threading
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from sjepa_deploy.eeg.montage import scalp_map
from sjepa_deploy.eeg.quality import ChannelState
from sjepa_deploy.errors import DashboardError, MissingDependencyError
from sjepa_deploy.runtime.live.counters import Counters
from sjepa_deploy.runtime.side_process import Served, end_server, start_server
from sjepa_deploy.runtime.watch.monitor import SKIPS, TIME_EDGES, Measure, Monitor, Snapshot, StreamFacts, Times

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

TOKEN_VARIABLE = "SJEPA_DASHBOARD_TOKEN"
"""Environment variable of the token, which other users of the machine would read in the arguments of a command."""

INTERVAL = 0.25
"""Seconds from one state to the next: as fast as somebody can read a number."""

RESTART_AFTER = 5.0
"""Seconds until a server that died is started again."""

_COUNTED = {"samples": "samples received"} | {
    field.name: field.name.replace("_", " ")
    for field in dataclasses.fields(Counters)
    if field.name not in ("samples", "windows", "decisions", "misses", "miss_run", "longest_misses", *SKIPS)
}
"""Counters that the page and Prometheus show as they are: the field, and its name in words."""

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
        Token that a reader must know. Needed unless `host` is a loopback address.

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
        self, monitor: Monitor, *, host: str = "127.0.0.1", port: int = DASHBOARD.port, token: str | None = None
    ) -> None:
        for package in ("starlette", "uvicorn", "prometheus_client"):
            if importlib.util.find_spec(package) is None:
                raise MissingDependencyError(package, "dashboard")
        DASHBOARD.check_token(host, token)
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
        if self._feeder.ident is not None:
            self._feeder.join(timeout=5)
            if self._feeder.is_alive() and self._server is not None:  # the server does not read: end it, and the write with it
                self._server.kill()
                self._feeder.join()
        self._listener.close()

    def _feed(self) -> None:
        while not self._stop.is_set():
            with tempfile.TemporaryFile() as complaints:
                self._server = start_server(SERVER, [self._listener], complaints)
                pipe = self._server.stdin
                assert pipe is not None
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
        _write_line(pipe, {"token": self._token, "port": self.port, "facts": describe(self._monitor.facts)})
        after = -1
        while True:
            last = self._stop.is_set()
            snapshot = self._monitor.snapshot()
            _write_line(pipe, describe_state(snapshot, after))
            after = snapshot.n_noted
            if last:
                return
            self._stop.wait(INTERVAL)


def describe(facts: StreamFacts) -> dict[str, Any]:
    """Return the facts that the page needs once, as JSON types."""
    places = None if facts.positions is None else _plain(scalp_map(facts.positions), 4)
    described = dataclasses.asdict(facts) | {"places": places, "edges": TIME_EDGES}
    del described["positions"]
    return described | {"channel_states": [state.name.lower() for state in ChannelState]}


def describe_state(snapshot: Snapshot, after: int = 0) -> dict[str, Any]:
    """Return a snapshot as JSON types, with the decisions after the first `after` ones. Times are in seconds before now."""
    counters, decisions, quality, now = snapshot.counters, snapshot.decisions, snapshot.quality, snapshot.now
    new = slice(max(0, len(decisions) - (snapshot.n_noted - max(after, 0))), None)
    return {
        "state": snapshot.state,
        "uptime": now - snapshot.started,
        "silence": _number(now - snapshot.newest_sample),
        "windows": counters.decisions + snapshot.n_skipped,  # not the one that is being decoded
        "decisions": counters.decisions,
        "misses": counters.misses,
        "miss_run": counters.miss_run,
        "longest_miss_run": counters.longest_misses,
        "skips": snapshot.skips,
        "counters": {words: getattr(counters, name) for name, words in _COUNTED.items()},
        "age": _spread(snapshot, "age", snapshot.age),
        "latency": _spread(snapshot, "latency", snapshot.latency),
        "channels": {
            "state": quality.state.tolist(),
            "repaired": quality.repaired.astype(int).tolist(),
            "rms": _plain(quality.rms, 3),
        },
        "events": [[round(now - incident.time, 1), f"{incident.kind}: {incident.text}"] for incident in snapshot.incidents],
        "memory": snapshot.memory,
        "new": {
            "index": decisions.index[new].tolist(),
            "time": _plain(decisions.time[new], 4),
            "latency": _plain(decisions.latency[new], 6),
            "age": _plain(decisions.age[new], 6),
            "prediction": _plain(decisions.prediction[new], 5),
            "flags": decisions.flags[new],
        },
    }


def _spread(snapshot: Snapshot, of: Measure, times: Times) -> dict[str, Any]:
    percentiles = {f"p{q}": _number(snapshot.percentile(of, q)) for q in (50, 99)}
    return percentiles | {"max": _number(times.largest), "sum": times.total, "counts": times.counts.tolist()}


def _number(value: float) -> float | None:
    """Return `value`, or None for what JSON cannot say."""
    return value if math.isfinite(value) else None


def _plain(values: ArrayLike, digits: int) -> list[Any]:
    """Return rounded values as lists, with None for NaN and infinities."""
    array = np.asarray(values, np.float64)
    rounded: list[Any] = np.round(array, digits).tolist()
    if np.isfinite(array).all():
        return rounded
    return [_plain(row, digits) if isinstance(row, list) else _number(row) for row in rounded]


def _write_line(pipe: IO[bytes], message: dict[str, Any]) -> None:
    pipe.write(json.dumps(message, allow_nan=False, separators=(",", ":")).encode() + b"\n")
    pipe.flush()
