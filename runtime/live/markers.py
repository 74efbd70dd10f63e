"""Defines the events of a live stream, and the sources of their markers that need no network. LSL is in `lsl_markers`."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from sjepa_deploy.eeg.events import event_name
from sjepa_deploy.eeg.info import StreamInfo
from sjepa_deploy.errors import StreamError, listed
from sjepa_deploy.runtime.live.sources import Chunk, Incident


@dataclass(frozen=True, slots=True)
class Event:
    """Describes an event of a live stream, as its marker told it.

    Attributes
    ----------
    onset : float
        When it was, in seconds of the source's clock. NaN if it was during a pause of a recording.
    description : str
        What it is called.
    arrived : float
        When its marker came, in seconds of the same clock.
    stream : str
        Name of the stream of markers.
    """

    onset: float
    description: str
    arrived: float
    stream: str = "events"

    @property
    def marker_delay(self) -> float:
        """Return the seconds from the event to the arrival of its marker."""
        return self.arrived - self.onset


class MarkerSource(Protocol):
    """Gives the events of one stream of markers. The decoder's thread alone calls the methods.

    Attributes
    ----------
    incidents : deque of Incident
        Incidents of the connection. The decoder takes them out.
    n_lost : int
        Markers that were left out, as too many waited.
    """

    incidents: deque[Incident]
    n_lost: int

    def hear(self, chunk: Chunk, offset: float, began: float) -> None:
        """Look at samples that came.

        `offset` seconds bring their stamps to the source's clock. `began` is the time of the first one after the last loss, on
        that clock.
        """
        ...

    def read(self) -> list[Event]:
        """Return the events whose markers have come since the last call, without waiting."""
        ...

    def rest(self) -> list[Event]:
        """Return the events that are still to come when the source of samples has ended."""
        ...

    def close(self) -> None:
        """Release what the source holds."""
        ...


class PlannedMarkers:
    """Gives events that are known in advance, as those of a recording, when the clock reaches them.

    Parameters
    ----------
    plan : iterable of (float, str) or (float, str, float)
        Onset in seconds of the source's clock, description, and seconds by which the marker comes later, in the order in which
        the markers come. It may be endless.
    clock : callable
        The time now on the source's clock.

    Attributes
    ----------
    names : Counter of str or None
        How often each description will come; None where the plan is no sequence, and nobody knows.
    """

    def __init__(self, plan: Iterable[tuple[float, str] | tuple[float, str, float]], clock: Callable[[], float]) -> None:
        self.names = Counter(planned[1] for planned in plan) if isinstance(plan, Sequence) else None
        self._plan, self._clock = iter(plan), clock
        self._next: Event | None = self._following()
        self.incidents: deque[Incident] = deque()
        self.n_lost = 0

    def hear(self, chunk: Chunk, offset: float, began: float) -> None:
        """Do nothing: the plan does not depend on samples."""

    def read(self) -> list[Event]:
        """Return the events whose markers have come by now."""
        return self._until(self._clock())

    def rest(self) -> list[Event]:
        """Return the events that are still to come."""
        return self._until(math.inf)

    def close(self) -> None:
        """Release nothing."""

    def _until(self, now: float) -> list[Event]:
        events = []
        while self._next is not None and not self._next.arrived > now:  # NaN: during a pause
            events.append(self._next)
            self._next = self._following()
        return events

    def _following(self) -> Event | None:
        if (planned := next(self._plan, None)) is None:
            return None
        onset, description, *delay = planned
        return Event(onset, description, onset + sum(delay))


class RepeatedMarkers(PlannedMarkers):
    """Gives an event every so many seconds of the source's clock, without end, to try a decoder of events.

    Parameters
    ----------
    every : float
        Seconds from one event to the next.
    clock : callable
        The time now on the source's clock.
    description : str
        What the events are called.
    """

    def __init__(self, every: float, clock: Callable[[], float], description: str = "event") -> None:
        if not (math.isfinite(every) and every > 0):
            raise StreamError(f"An event every {every:g} s cannot be.", "Give a positive number of seconds.")
        super().__init__(((every * k, description) for k in _counted()), clock)

    def rest(self) -> list[Event]:
        """Return no event: those after the end were not planned for the stream."""
        return []


class ChannelMarkers:
    """Finds events in a trigger channel of the stream: where the value rises, as `mne.find_events` does. The value is the name.

    Parameters
    ----------
    info : StreamInfo
        The stream.
    name : str
        The channel.
    mask : int or None
        Bits of the value that count, as `mask` of `mne.find_events`. None takes the whole value.
    debounce : float
        Seconds for which a value must stay the same: shorter ones, as of lines that do not switch at once, are no values. The
        event is at the first sample of its value, and its marker comes that much later.

    Raises
    ------
    StreamError
        If the stream has no such channel, the mask has no bits, or the time is none.
    """

    def __init__(self, info: StreamInfo, name: str, *, mask: int | None = None, debounce: float = 0.0) -> None:
        names = [one.casefold() for one in info.ch_names]
        if name.casefold() not in names:
            raise StreamError(
                f"{info.name} has no channel {name}; its channels are {listed(info.ch_names)}.", "Name the trigger channel."
            )
        if mask is not None and mask <= 0:
            raise StreamError(f"The mask {mask} has no bits.", "Use for example mask=255 for the lowest eight.")
        if not (math.isfinite(debounce) and debounce >= 0):
            raise StreamError(f"A value cannot last for {debounce:g} s.", "Give seconds, as debounce=0.005.")
        self._column, self._mask = names.index(name.casefold()), mask
        self._least = max(1, math.ceil(debounce * info.sfreq - 1e-6))
        self._value: float | None = None  # that counts
        self._newest: float | None = None
        self._since, self._n = math.nan, 0  # onset of the newest value, and for how many samples it has lasted
        self._found: list[Event] = []
        self.incidents: deque[Incident] = deque()
        self.n_lost = 0

    def hear(self, chunk: Chunk, offset: float, began: float) -> None:
        """Look for rising values. The first value of all is no event, and nobody knows when one rose that rose in a loss."""
        for value, stamp in zip(chunk.samples[:, self._column].tolist(), chunk.stamps.tolist(), strict=True):
            if not math.isfinite(value):
                continue
            if self._mask is not None:
                value = round(value) & self._mask
            if value != self._newest:
                onset = stamp + offset
                self._newest, self._n = value, 0
                self._since = math.nan if onset == began else onset
            self._n += 1
            if self._n >= self._least and value != self._value:
                if self._value is not None and value > self._value:
                    self._found.append(Event(self._since, event_name(value), chunk.received))
                self._value = value

    def read(self) -> list[Event]:
        """Return the events that were found since the last call."""
        found, self._found = self._found, []
        return found

    def rest(self) -> list[Event]:
        """Return no event: all were found with their samples."""
        return []

    def close(self) -> None:
        """Release nothing."""


def _counted() -> Iterable[int]:
    k = 1
    while True:
        yield k
        k += 1
