"""Keeps the events of a run for its record, and gives those of a record to a decoder again."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from sjepa_deploy.runtime.live.decoder import Decoder
from sjepa_deploy.runtime.live.markers import Event
from sjepa_deploy.runtime.live.sources import Chunk, Incident


@dataclass(frozen=True, kw_only=True)
class RecordedEvent:
    """Holds an event, and when the decoder was given it.

    Attributes
    ----------
    event : Event
        The event.
    n_samples : int
        Samples of the stream that the decoder had been given by then.
    offset : float
        Seconds that bring the stamps of samples to the clock of the event.
    """

    event: Event
    n_samples: int
    offset: float


def recorded_event(decoder: Decoder, event: Event) -> RecordedEvent:
    """Return an event that `decoder` is given now."""
    return RecordedEvent(event=event, n_samples=decoder.counters.samples, offset=decoder.windows.offset)


class RecordedMarkers:
    """Gives the events of a record to a decoder after the samples after which they came then."""

    def __init__(self, events: Sequence[RecordedEvent]) -> None:
        self.incidents: deque[Incident] = deque()
        self.n_lost = 0
        self._events = deque(events)
        self._n_heard = 0

    def hear(self, chunk: Chunk, offset: float, began: float) -> None:
        """Count samples that were decoded."""
        self._n_heard += len(chunk.stamps)

    def read(self) -> list[Event]:
        """Return the events that had come by now."""
        events = []
        while self._events and self._events[0].n_samples <= self._n_heard:
            events.append(self._events.popleft().event)
        return events

    def rest(self) -> list[Event]:
        """Return no event: those after the last sample of a record that was cut off have no samples."""
        return []

    def close(self) -> None:
        """Release nothing."""
