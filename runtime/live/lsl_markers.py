"""Reads streams of markers of the Lab Streaming Layer."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import deque
from typing import Any

from sjepa_deploy.eeg.events import event_name
from sjepa_deploy.errors import StreamError
from sjepa_deploy.runtime.live.lsl import CORRECT_EVERY_S, find_stream, require_pylsl
from sjepa_deploy.runtime.live.markers import Event
from sjepa_deploy.runtime.live.sources import Chunk, Incident

MOST_WAITING = 10_000
"""Markers that wait for the decoder; what is more is left out, and counted."""

LOOK_S = 0.2
"""Longest wait for a marker in seconds, after which the thread looks whether it is to end."""

ANSWER_S = 5.0
"""Seconds in which a stream that was found must answer."""


class LslMarkers:
    """Reads a stream of markers, text or numbers, in a thread of its own: the correction of its clock may block for a second.

    The thread puts each marker on this machine's clock and into a queue, and touches nothing else of the decoder. A stream that
    is lost is looked for until it is back.

    Parameters
    ----------
    text : str
        See `sjepa_deploy.runtime.live.lsl.find_stream`.
    timeout : float
        Seconds to wait for the stream to appear.

    Attributes
    ----------
    incidents : deque of Incident
        Losses and returns of the stream.
    n_lost : int
        Markers that were left out, as too many waited.

    Raises
    ------
    StreamError
        If there is no such stream, or it has several channels or a rate.
    """

    def __init__(self, text: str, *, timeout: float = 3.0) -> None:
        self._pylsl = require_pylsl()
        self._text = text
        self._found = find_stream(text, timeout)
        self.incidents: deque[Incident] = deque()
        self.n_lost = 0
        self._queue: queue.Queue[Event] = queue.Queue(MOST_WAITING)
        self._closing = threading.Event()
        name, n_chans = self._found.name(), self._found.channel_count()
        if n_chans != 1 or self._found.nominal_srate() != 0:
            raise StreamError(
                f"{name} has {n_chans} channels at {self._found.nominal_srate():g} Hz, which is no stream of markers.",
                "Name a stream of one channel without a rate; a trigger channel of the EEG is channel:NAME.",
            )
        self._inlet: Any = self._open()
        self._thread = threading.Thread(target=self._keep_reading, name=f"markers of {name}", daemon=True)
        self._thread.start()

    def hear(self, chunk: Chunk, offset: float, began: float) -> None:
        """Do nothing: the markers do not depend on samples."""

    def read(self) -> list[Event]:
        """Return the events whose markers have come since the last call."""
        events = []
        with contextlib.suppress(queue.Empty):
            while True:
                events.append(self._queue.get_nowait())
        return events

    def rest(self) -> list[Event]:
        """Return no event: what will come is not known."""
        return []

    def close(self) -> None:
        """Leave the stream."""
        self._closing.set()
        self._thread.join(ANSWER_S)

    def _open(self) -> Any:
        inlet = self._pylsl.StreamInlet(self._found, recover=False, processing_flags=0)
        try:
            inlet.open_stream(ANSWER_S)
            self._correction = inlet.time_correction(ANSWER_S)
        except (self._pylsl.util.TimeoutError, self._pylsl.util.LostError) as error:
            raise StreamError(f"{self._found.name()} does not answer ({error}).", "Check its app and the firewall.") from error
        self._correct_at = self._pylsl.local_clock() + CORRECT_EVERY_S
        return inlet

    def _keep_reading(self) -> None:
        while not self._closing.is_set():
            try:
                if self._inlet is None:
                    self._reconnect()
                else:
                    self._take()
            except self._pylsl.util.LostError:
                self._inlet = None
                self._tell("lost", f"The markers {self._found.name()} were lost.")
        if self._inlet is not None:
            self._inlet.close_stream()

    def _take(self) -> None:
        sample, stamp = self._inlet.pull_sample(LOOK_S)
        now = self._pylsl.local_clock()
        if sample is not None:
            description = event_name(sample[0])
            try:
                self._queue.put_nowait(Event(stamp + self._correction, description, now, self._found.name()))
            except queue.Full:
                self.n_lost += 1
        if now > self._correct_at:
            with contextlib.suppress(self._pylsl.util.TimeoutError):  # the last one holds meanwhile
                self._correction = self._inlet.time_correction(1.0)
            self._correct_at = now + CORRECT_EVERY_S

    def _reconnect(self) -> None:
        try:
            self._found = find_stream(self._text, LOOK_S)
            self._inlet = self._open()
        except StreamError:  # not back yet
            self._closing.wait(LOOK_S)
        else:
            self._tell("reconnected", f"The markers {self._found.name()} are back.")

    def _tell(self, kind: str, text: str) -> None:
        self.incidents.append(Incident(kind=kind, time=self._pylsl.local_clock(), text=text))
