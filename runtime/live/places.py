"""Places the windows of events among the samples of a stream. No clock: the places depend on stamps alone, not on chunks.

The rule is that of `sjepa_deploy.eeg.events`, counted from the first sample after the last interruption. The sample of an event
is found between the stamps of the samples around the event, so that the rate of the sender may drift.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sjepa_deploy.eeg.events import nearest_sample, window_start
from sjepa_deploy.errors import StreamError
from sjepa_deploy.runtime.live.counters import Counters
from sjepa_deploy.runtime.live.markers import Event
from sjepa_deploy.runtime.live.schedule import Events
from sjepa_deploy.runtime.live.trials import Trials
from sjepa_deploy.spec import SignalSpec

Reason = Literal["gap", "before start", "past end", "past history", "doubled", "ahead", "late", "paused", "failed"]
"""Why an event has no decision. "late", "paused" and "failed" are said of its window; for the others there is no window."""

MOST_AHEAD_S = 60.0
"""Seconds beyond which an event is not waited for: its stamp is of another clock."""

MOST_WAITING = 10_000
"""Events that wait for their samples at once."""

_COUNTED = {
    "before start": "events_before_start",
    "past end": "events_past_end",
    "past history": "events_past_history",
    "doubled": "events_doubled",
    "ahead": "events_ahead",
}


@dataclass(frozen=True, slots=True)
class Undecided:
    """Says that an event gets no decision.

    Attributes
    ----------
    event : Event
        The event.
    reason : Reason
        Why.
    """

    event: Event
    reason: Reason

    @property
    def cause(self) -> str | None:
        """Return a sentence on what an experimenter should mend; None where the reason says all."""
        if abs(self.event.marker_delay) > MOST_AHEAD_S:
            return (
                f"Markers are stamped over {MOST_AHEAD_S:g} s before or after they come: their clock is another one. Stamp them "
                "with the clock of LSL (`pylsl.local_clock`)."
            )
        if self.reason == "past history":
            return "Markers come when samples of their windows are kept no more. Use a longer --history."
        return f"Over {MOST_WAITING:,} events wait for their samples." if self.reason == "ahead" else None


@dataclass(frozen=True, slots=True)
class Place:
    """Says where the window of an event lies.

    Attributes
    ----------
    event : Event
        The event.
    start : int
        First sample of the window at the model's rate, from the first one after the last interruption.
    behind : int
        Samples at the model's rate that have come since the window's newest one.
    stamp : float
        Stamp of the newest sample of the window on the source's clock.
    trial : float or None
        When the trial of the event began; None if the event is in no trial.
    """

    event: Event
    start: int
    behind: int
    stamp: float
    trial: float | None


@dataclass(eq=False)
class _Stretch:
    """Samples that follow each other."""

    first: bool  # of the stream
    first_made: int
    first_stamp: float
    newest: float = -math.inf
    n_taken: int = 0
    ended: bool = False
    stamps: deque[NDArray[np.float64]] = field(default_factory=deque)

    def take(self, stamps: NDArray[np.float64]) -> None:
        stamps = np.maximum.accumulate(np.maximum(stamps, self.newest))
        self.stamps.append(stamps)
        self.newest = float(stamps[-1])
        self.n_taken += len(stamps)

    def sample_at(self, onset: float, sfreq: float) -> int | None:
        """Return the number of the sample that is nearest to a time in the stretch; None if its stamps are kept no more."""
        if onset <= self.first_stamp:
            return int(nearest_sample(onset - self.first_stamp, sfreq))
        stop, after, above = self.n_taken, math.nan, math.nan
        for stamps in reversed(self.stamps):
            if stamps[0] <= onset:
                k = int(np.searchsorted(stamps, onset, side="right")) - 1
                after = float(stamps[k + 1]) if k + 1 < len(stamps) else above
                step = 1 / sfreq if math.isnan(after) else after - float(stamps[k])
                between = (onset - float(stamps[k])) / step
                return int(nearest_sample(stop - len(stamps) + k + between, 1.0))
            stop, above = stop - len(stamps), float(stamps[0])
        return None


class EventPlaces:
    """Follows the samples of a stream, and says when the window of an event is there.

    Parameters
    ----------
    events : Events
        The events.
    signal : SignalSpec
        The signal of the model.
    sfreq : float
        Rate of the stream in Hz.
    counters : Counters
        Counters of the stream.
    undecided : callable or None
        Called with every event that gets no window.

    Attributes
    ----------
    n_older : int
        Samples at the model's rate that must be kept before the newest window.

    Raises
    ------
    StreamError
        If nothing says where windows begin, or the history is no time.
    """

    def __init__(
        self,
        events: Events,
        signal: SignalSpec,
        sfreq: float,
        *,
        counters: Counters,
        undecided: Callable[[Undecided], None] | None = None,
    ) -> None:
        start = events.start
        if start is None:
            if signal.event_window is None:
                raise StreamError(
                    "The model does not say where its windows lie after events.",
                    "Name their start with --tmin (`Events.start`), in seconds.",
                )
            start = signal.event_window.start
        if not (math.isfinite(events.history) and events.history >= 0):
            raise StreamError(f"A history of {events.history:g} s cannot be kept.", "Give seconds, as 3.")
        self._events, self._start, self._trials = events, start, Trials(events.trial_starts)
        self._sfreq, self._sfreq_model, self._n_times = sfreq, signal.sfreq, signal.n_times
        self._counters, self._tell = counters, undecided
        self.n_older = math.ceil(events.history * signal.sfreq)
        self._n_kept = self.n_older + self._n_times
        # An event may be that much earlier than the end of its window, and a window be made late by the resampler.
        self._kept_s = events.history + max(0.0, start) + 2 * self._n_times / signal.sfreq + 1.0
        self._stretches: deque[_Stretch] = deque()
        self._interrupted = True
        self._n_made = 0
        self._made_at = np.zeros(self._n_kept)
        self._n_added = 0
        self._early: list[tuple[float, int, Event]] = []  # by onset: their samples have not come
        self._pending: list[tuple[int, int, Event, _Stretch]] = []  # by the end of the window: some of its samples have not come
        self._known: dict[tuple[str, int, int], None] = {}  # events that are placed, to know those that come twice

    @property
    def due_in(self) -> int:
        """Return the samples until the next window is there, at least 1; a large number if no event waits."""
        return max(1, self._pending[0][0] - self._n_made) if self._pending else 2**31

    @property
    def began(self) -> float:
        """Return the time of the first sample after the last interruption; -inf if there was none."""
        return self._stretches[-1].first_stamp if self._stretches and not self._stretches[-1].first else -math.inf

    def add(self, event: Event) -> None:
        """Take an event, early or late."""
        newest = self._stretches[-1].newest if self._stretches else math.inf
        self._trials.came(event, newest)
        if not self._events.wants(event.description):
            return
        self._counters.events += 1
        if math.isnan(event.onset):
            self._leave(event, "gap")
        elif event.onset > newest + MOST_AHEAD_S or len(self._early) + len(self._pending) >= MOST_WAITING:
            self._leave(event, "ahead")
        else:
            self._n_added += 1
            heapq.heappush(self._early, (event.onset, self._n_added, event))
            self._place_early()

    def take(self, stamps: NDArray[np.float64]) -> None:
        """Take the stamps of samples of the stream that follow the last ones, before what is made of them (`advance`)."""
        if not len(stamps):
            return
        if self._interrupted:
            first = not self._stretches
            self._stretches.append(_Stretch(first=first, first_made=self._n_made, first_stamp=float(stamps[0])))
            self._interrupted = False
        self._stretches[-1].take(stamps)
        self._place_early()
        self._forget()

    def advance(self, stamps: NDArray[np.float64]) -> None:
        """Count samples that were made at the model's rate, by the stamps of the stream's samples after which they came."""
        kept = stamps[-self._n_kept :]
        stop = self._n_made + len(stamps)
        self._made_at[np.arange(stop - len(kept), stop) % self._n_kept] = kept
        self._n_made = stop

    def due(self) -> Iterator[Place]:
        """Give the places of windows whose samples are there."""
        while self._pending and self._pending[0][0] <= self._n_made:
            end, _, event, stretch = heapq.heappop(self._pending)
            start = end - self._n_times
            if self._n_made - start > self._n_kept:
                self._leave(event, "past history")
                continue
            stamp = float(self._made_at[(end - 1) % self._n_kept])
            yield Place(event, start - stretch.first_made, self._n_made - end, stamp, self._trials.of(event))

    def interrupt(self) -> None:
        """End the stretch: what comes does not follow the last sample."""
        self._end_stretch("gap")

    def finish(self) -> None:
        """Account for all events that wait: no sample comes any more."""
        self._end_stretch("past end")
        while self._early:
            self._leave(heapq.heappop(self._early)[2], "past end")

    def _end_stretch(self, reason: Reason) -> None:
        if self._stretches and not self._interrupted:
            self._stretches[-1].ended = self._interrupted = True
            self._place_early(reason)
        kept = [waiting for waiting in self._pending if waiting[0] <= self._n_made]
        for _, _, event, _ in sorted(waiting for waiting in self._pending if waiting[0] > self._n_made):
            self._leave(event, reason)
        heapq.heapify(kept)
        self._pending = kept

    def _place_early(self, reason: Reason = "gap") -> None:
        """Place the events whose samples have come, and in an ended stretch those half a sample beyond it."""
        if not self._stretches:
            return
        newest = self._stretches[-1]
        limit = newest.newest + 0.5 / self._sfreq if newest.ended else newest.newest
        while self._early and self._early[0][0] <= limit:
            self._place(heapq.heappop(self._early)[2], reason)

    def _place(self, event: Event, reason: Reason) -> None:
        half = 0.5 / self._sfreq
        stretch = next((one for one in reversed(self._stretches) if event.onset >= one.first_stamp - half), None)
        if stretch is None:
            self._leave(event, "before start" if self._stretches[0].first else "past history")
        elif (sample := stretch.sample_at(event.onset, self._sfreq)) is None:
            self._leave(event, "past history")
        elif stretch.ended and (event.onset > stretch.newest + half or sample >= stretch.n_taken):
            self._leave(event, reason)
        else:
            self._wait(event, stretch, sample, reason)

    def _wait(self, event: Event, stretch: _Stretch, sample: int, reason: Reason) -> None:
        same = (event.description, stretch.first_made, sample)
        start = int(window_start(sample, self._sfreq, start=self._start, sfreq_model=self._sfreq_model))
        end = stretch.first_made + start + self._n_times
        if same in self._known:
            self._leave(event, "doubled")
        elif start < 0:
            self._leave(event, "before start" if stretch.first else "gap")
        elif stretch.ended and end > self._end_of(stretch):
            self._leave(event, reason)
        else:
            self._n_added += 1
            heapq.heappush(self._pending, (end, self._n_added, event, stretch))
        self._known[same] = None
        if len(self._known) > MOST_WAITING:
            del self._known[next(iter(self._known))]

    def _end_of(self, stretch: _Stretch) -> int:
        """Return the sample at the model's rate after the last one of a stretch."""
        at = self._stretches.index(stretch) + 1
        return self._stretches[at].first_made if at < len(self._stretches) else self._n_made

    def _forget(self) -> None:
        """Drop stamps that no event of the history can need."""
        oldest = self._stretches[-1].newest - self._kept_s
        while len(self._stretches) > 1 and self._stretches[0].newest < oldest:
            self._stretches.popleft()
        stamps = self._stretches[0].stamps
        while len(stamps) > 1 and float(stamps[0][-1]) < oldest:
            stamps.popleft()

    def _leave(self, event: Event, reason: Reason) -> None:
        if reason == "gap":
            self._counters.windows += 1
            self._counters.skipped_gap += 1
        else:
            name = _COUNTED[reason]
            setattr(self._counters, name, getattr(self._counters, name) + 1)
        if self._tell is not None:
            self._tell(Undecided(event, reason))
