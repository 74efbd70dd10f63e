"""Writes what happens in a run as JSON lines."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path

from sjepa_deploy.errors import StreamError
from sjepa_deploy.runtime.live.commands import Status
from sjepa_deploy.runtime.live.decoder import Decoder
from sjepa_deploy.runtime.live.messages import Messages, Told

MOST_LINES = 10_000
"""Lines that wait for a reader that stalls; what is more is left out, and counted."""

LAST_LINES_S = 5.0
"""Seconds that a reader has at the end."""


class LineWriter:
    """Appends decisions, events without one, incidents and commands to a file, one JSON object a line, after a line on the run.

    A slow reader delays nothing.

    A thread of its own writes the lines, past Python's buffers: when a reader has stopped, the end of the process would wait for
    a buffer's lock.

    Parameters
    ----------
    path : Path
        File to append to; ``-`` is standard output.
    messages : Messages
        Makes the lines.
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

    def __init__(self, path: Path, messages: Messages, on_failure: Callable[[str], object], *, patient: bool = False) -> None:
        self._path, self._messages, self._on_failure, self._patient = path, messages, on_failure, patient
        self._queue: queue.Queue[Told | None] = queue.Queue(MOST_LINES)
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

    def put(self, what: Told) -> None:
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
                lines = [self._messages.of(what)] if self._wrote else [self._messages.head(), self._messages.of(what)]
                text = memoryview("".join(json.dumps(line, allow_nan=False) + "\n" for line in lines).encode())
                while text:
                    text = text[self._file.write(text) :]
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
    """Write what happens in the run of `decoder` to `path` from now on. Close the writer after the run.

    Parameters
    ----------
    decoder : Decoder
        Its decisions wait for the reader only where its source does (`Source.live` is False).
    path : Path
        See `LineWriter`.
    """
    lines = LineWriter(path, Messages(decoder), lambda why: decoder.note("out", why), patient=not decoder.source.live)
    decoder.on_decision(lines.put)
    decoder.on_incident(lines.put)
    decoder.on_undecided(lines.put)
    decoder.on_command(lambda executed: None if isinstance(executed.command, Status) else lines.put(executed))
    return lines
