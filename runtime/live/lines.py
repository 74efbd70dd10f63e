"""Writes decisions and incidents as JSON lines."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import os
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path

from sjepa_deploy.errors import StreamError
from sjepa_deploy.runtime.live.decision import Decision
from sjepa_deploy.runtime.live.decoder import Decoder
from sjepa_deploy.runtime.live.markers import Event
from sjepa_deploy.runtime.live.places import Undecided
from sjepa_deploy.runtime.live.sources import Incident
from sjepa_deploy.serialize import encode

MOST_LINES = 10_000
"""Lines that wait for a reader that stalls; what is more is left out, and counted."""

LAST_LINES_S = 5.0
"""Seconds that a reader has at the end."""


class LineWriter:
    """Appends decisions, events without one and incidents to a file, one JSON object a line: a slow reader delays nothing.

    A thread of its own writes the lines, past Python's buffers: when a reader has stopped, the end of the process would wait for
    a buffer's lock.

    Parameters
    ----------
    path : Path
        File to append to; ``-`` is standard output.
    on_failure : callable
        Called with one sentence when lines are left out for the first time, or the file takes no more. It may be called in
        another thread.
    patient : bool
        Whether a slow reader is waited for, as for a recording that is decoded as fast as possible.

    Attributes
    ----------
    n_lost : int
        Lines that were left out.

    Raises
    ------
    StreamError
        If the file cannot be written, or is a FIFO that nobody reads.
    """

    def __init__(self, path: Path, on_failure: Callable[[str], object], *, patient: bool = False) -> None:
        self._path, self._on_failure, self._patient = path, on_failure, patient
        self._queue: queue.Queue[Decision | Incident | Undecided | None] = queue.Queue(MOST_LINES)
        self.n_lost = 0
        self._is_new = str(path) != "-" and not path.exists()
        self._wrote = False
        try:
            self._file = io.FileIO(os.dup(1) if str(path) == "-" else _open_to_append(path), "a")
        except OSError as e:
            if e.errno == errno.ENXIO and path.is_fifo():
                raise StreamError(f"Nobody reads the FIFO {path}.", "Start its reader first.") from e
            raise StreamError(f"{path} cannot be written ({e.strerror}).", "Choose another --out.") from e
        self._thread = threading.Thread(target=self._keep_writing, name="lines", daemon=True)
        self._thread.start()

    def put(self, what: Decision | Incident | Undecided) -> None:
        """Write a line soon, or count it if too many wait already."""
        try:
            self._queue.put(what, block=self._patient)
        except queue.Full:
            self.n_lost += 1
            if self.n_lost == 1:
                self._on_failure(f"{self._path} is not read fast enough: lines are left out.")

    def close(self) -> None:
        """Write what is left, unless nobody reads it. A file that the writer made and that has no line is removed."""
        ends = time.monotonic() + LAST_LINES_S
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=LAST_LINES_S)
            self._thread.join(max(0.0, ends - time.monotonic()))
        if self._thread.is_alive():
            self.n_lost += self._queue.qsize()
        else:
            self._file.close()
            if self._is_new and not self._wrote:
                self._path.unlink(missing_ok=True)

    def _keep_writing(self) -> None:
        try:
            while (what := self._queue.get()) is not None:
                line = memoryview(json.dumps(line_of(what)).encode() + b"\n")
                while line:
                    line = line[self._file.write(line) :]
                    self._wrote = True
        except OSError as e:  # the disk is full, or the reader of a pipe has gone
            self._on_failure(f"{self._path} takes no more lines: {e.strerror}.")
            self.n_lost += 1
            while self._queue.get() is not None:
                self.n_lost += 1


def _open_to_append(path: Path) -> int:
    """Open a file, or a FIFO that somebody reads: without O_NONBLOCK, a FIFO without a reader would be waited for."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    os.set_blocking(file, True)
    return file


def write_lines(decoder: Decoder, path: Path) -> LineWriter:
    """Write the decisions and incidents of `decoder` to `path` from now on. Close the writer after the run.

    Parameters
    ----------
    decoder : Decoder
        Its decisions wait for the reader only where its source does (`Source.live` is False).
    path : Path
        See `LineWriter`.
    """
    lines = LineWriter(path, lambda why: decoder.note("out", why), patient=not decoder.source.live)
    decoder.on_decision(lines.put)
    decoder.on_incident(lines.put)
    decoder.on_undecided(lines.put)
    return lines


def line_of(what: Decision | Incident | Undecided) -> dict[str, object]:
    """Return a decision, an event without one or an incident as an object for JSON.

    An incident has the key "event", with its kind. An event without a decision has the key "undecided", with the reason.
    """
    if isinstance(what, Incident):
        return {"event": what.kind, "time": what.time, "text": what.text, "sample": what.sample}
    if isinstance(what, Undecided):
        return {"undecided": what.reason, **_event_of(what.event)}
    line: dict[str, object] = {
        "index": what.index,
        "time": what.time,
        "due": what.due,
        "received": what.received,
        "decided": what.decided,
        "infer_s": round(what.infer_s, 6),
        "age": round(what.age, 6),
        "prediction": what.prediction.ravel().tolist(),
        "flags": what.flags,
        "bad_channels": what.bad_channels,
    }
    if what.event is not None:
        line |= _event_of(what.event)
    if what.trial is not None:
        line["trial"] = what.trial
    if what.state is not None:
        line["state"] = what.state.name
        line |= {key: value for key, value in encode(what.state).items() if key != "name" and value not in (None, [])}
    return line


def _event_of(event: Event) -> dict[str, object]:
    in_pause = math.isnan(event.onset)
    return {
        "onset": None if in_pause else event.onset,
        "description": event.description,
        "marker_delay": None if in_pause else round(event.marker_delay, 6),
    }
