"""Keeps the newest state of a live decoder for viewers: the decoder writes in microseconds, and readers never delay it."""

from __future__ import annotations

import bisect
import copy
import math
import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from sjepa_deploy.runtime.decisions.state import STATES, State
from sjepa_deploy.runtime.live.counters import Counters
from sjepa_deploy.runtime.live.decision import Decision
from sjepa_deploy.runtime.live.markers import Event
from sjepa_deploy.runtime.live.places import Undecided
from sjepa_deploy.runtime.live.sources import Incident
from sjepa_deploy.runtime.watch.snapshot import (
    MOST_OUTPUTS,
    TIME_EDGES,
    ChannelQuality,
    Decisions,
    Snapshot,
    StreamFacts,
    StreamState,
    Times,
    Trial,
)
from sjepa_deploy.runtime.watch.traces import Traces

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

T = TypeVar("T")


class _Durations:
    """Counts durations in the bins of `TIME_EDGES`."""

    def __init__(self) -> None:
        self._counts = [0] * (len(TIME_EDGES) + 1)
        self._total = 0.0
        self._largest = float("-inf")

    def add(self, seconds: float) -> None:
        self._counts[bisect.bisect_left(TIME_EDGES, seconds)] += 1
        self._total += seconds
        self._largest = max(self._largest, seconds)

    def copy(self) -> Times:
        largest = self._largest if math.isfinite(self._largest) else float("nan")
        return Times(counts=np.array(self._counts, np.int64), total=self._total, largest=largest)


class Monitor:
    """Takes the decisions and states of a decoder's loop, and hands them to viewers.

    One thread writes: each call takes a few microseconds, allocates nothing that stays, and waits for nobody. Any thread reads:
    `snapshot` copies, and copies again if the loop wrote meanwhile (a seqlock: an odd version means a write is under way).

    Parameters
    ----------
    facts : StreamFacts
        Facts of the bundle that decides. Another bundle with the same channels and classes has facts of its own.
    counters : Counters
        The decoder's own. Every write copies them.
    n_recent : int
        Decisions to keep.
    n_incidents, n_trials, n_events : int
        Incidents, trials and events to keep.
    clock : callable
        The decoder's clock, in seconds. LSL's on Linux is `time.monotonic`.
    traces : Traces or None
        Keeps samples for drawing. None keeps none.
    """

    def __init__(
        self,
        facts: StreamFacts,
        counters: Counters,
        *,
        n_recent: int = 4096,
        n_incidents: int = 64,
        n_trials: int = 64,
        n_events: int = 256,
        clock: Callable[[], float] = time.monotonic,
        traces: Traces | None = None,
    ) -> None:
        n_chans = len(facts.ch_names)
        self.facts = facts
        self.traces = traces or Traces(())
        self._clock = clock
        self._version = 0
        self._state: StreamState = "waiting"
        self._started = clock()
        self._newest_sample = float("nan")
        self._expected_since = self._started
        self._live_counters, self._counters = counters, copy.copy(counters)
        self._n_noted = 0
        self._n_outputs, self._n_classes = len(facts.output_names), len(facts.class_names)
        # index, time, received, decided, state, prediction, probabilities
        self._rows = np.zeros((n_recent, 5 + self._n_outputs + self._n_classes))
        self._flags: list[tuple[str, ...]] = [()] * n_recent
        self._ages, self._latencies = _Durations(), _Durations()
        self._quality_state = np.zeros(n_chans, np.uint8)
        self._rms = np.full(n_chans, np.nan)
        self._repaired = np.zeros(n_chans, np.bool_)
        self._incidents: list[Incident] = []
        self._n_incidents = n_incidents
        self._trials: list[Trial] = []
        self._events: list[Event] = []
        self._kept_trials, self._kept_events = n_trials, n_events
        self._n_trials = 0
        self._states = [0] * len(STATES)
        self._newest: Decision | None = None
        self._bads: tuple[str, ...] = ()
        self._newest_decided: Decision | None = None
        self._newest_event = float("nan")

    def decided(self, decision: Decision) -> None:
        """Take a decision; of the prediction, one value an output name of the facts."""
        prediction = decision.prediction.ravel() if self.facts.output_names else ()
        state = decision.state
        self._version += 1
        try:
            if not decision.held:
                self._keep(decision, prediction, state)
            changed = state is not None and state.name in ("decided", "rejected") and not self._goes_on(state)
            if decision.event is not None or changed:
                self._add_trial(_trial_of(decision, self._n_trials + 1))
            if state is not None:
                self._states[STATES.index(state.name)] += 1
                if state.name == "decided":
                    self._newest_decided = decision
            self._newest = decision
            self._counters = copy.copy(self._live_counters)
        finally:
            self._version += 1

    def _keep(self, decision: Decision, prediction: ArrayLike, state: State | None) -> None:
        slot = self._n_noted % len(self._flags)
        row, stop = self._rows[slot], 5 + self._n_outputs
        row[0] = decision.index
        row[1] = decision.time
        row[2] = decision.received
        row[3] = decision.decided
        row[5:stop] = prediction
        row[4] = -1 if state is None else STATES.index(state.name)
        row[stop:] = state.probabilities if state is not None and state.probabilities else np.nan
        self._flags[slot] = decision.flags
        self._ages.add(decision.age)
        self._latencies.add(decision.latency)
        self._n_noted += 1
        self._state, self._expected_since = "decoding", self._clock()

    def _goes_on(self, state: State) -> bool:
        """Return whether the newest window had the same state and class."""
        last = None if self._newest is None else self._newest.state
        return last is not None and (last.name, last.class_name) == (state.name, state.class_name)

    def _add_trial(self, trial: Trial) -> None:
        self._n_trials += 1
        _push(self._trials, trial, self._kept_trials)

    def left(self, undecided: Undecided) -> None:
        """Take an event that gets no decision."""
        event = undecided.event
        self._version += 1
        try:
            self._add_trial(
                Trial(
                    number=self._n_trials + 1,
                    time=event.onset,
                    event=event.description,
                    outcome="no decision",
                    reason=undecided.reason,
                    marker_delay=event.marker_delay,
                )
            )
            self._counters = copy.copy(self._live_counters)
        finally:
            self._version += 1

    def marked(self, event: Event, *, wanted: bool) -> None:
        """Take an event whose marker came; `wanted` says whether events of its description are decided."""
        self._version += 1
        try:
            _push(self._events, event, self._kept_events)
            if wanted:
                self._newest_event = self._clock()
        finally:
            self._version += 1

    def received(self, newest: float, *, paused: bool = False) -> None:
        """Take the time at which the newest sample arrived, in seconds of the clock, after its chunk was decoded.

        `paused` says whether a command keeps the decoder from deciding.
        """
        self._version += 1
        try:
            if paused:
                self._state = "paused"
            elif self._state in ("waiting", "silent", "reconnecting", "paused"):
                self._state, self._expected_since = "filling", self._clock()
            self._newest_sample = newest
            self._counters = copy.copy(self._live_counters)
        finally:
            self._version += 1

    def set_quality(self, state: ArrayLike, rms: ArrayLike, repaired: ArrayLike = False) -> None:
        """Take the quality of the channels: see `ChannelQuality`."""
        self._version += 1
        try:
            self._quality_state[:] = state
            self._rms[:] = rms
            self._repaired[:] = repaired
        finally:
            self._version += 1

    def set_state(self, state: StreamState) -> None:
        """Take the state of the stream where neither samples nor decisions tell it: "silent", "reconnecting", "stopped"."""
        self._state = state

    def named(self, bads: tuple[str, ...]) -> None:
        """Take the channels of the stream that a command named as bad."""
        self._bads = bads

    def happened(self, incident: Incident) -> None:
        """Take an incident. Of those before, the oldest of the kind that is there most often makes way for it."""
        self._version += 1
        try:
            if len(self._incidents) == self._n_incidents:
                kinds = [each.kind for each in self._incidents]
                del self._incidents[kinds.index(Counter(kinds).most_common(1)[0][0])]
            self._incidents.append(incident)
            self._counters = copy.copy(self._live_counters)
        finally:
            self._version += 1

    def snapshot(self) -> Snapshot:
        """Return a snapshot of everything that the monitor knows now. Takes some 50 us, and never keeps the loop waiting."""
        memory = resident_memory()
        while True:
            version = self._version
            if version % 2 == 0:
                taken = self._take(memory)
                if version == self._version:
                    return taken
            time.sleep(0.0001)

    def _take(self, memory: int) -> Snapshot:
        # tobytes() keeps the interpreter's lock, which copy() gives away: the loop hardly ever gets in between
        rows = np.frombuffer(self._rows.tobytes()).reshape(self._rows.shape)
        flags = tuple(self._flags)
        n, size, now = self._n_noted, len(flags), self._clock()
        limit = self.facts.overdue
        overdue = limit is not None and self._state in ("filling", "decoding") and now - self._expected_since > limit
        if n < size:
            rows, flags = rows[:n], flags[:n]
        else:
            rows, flags = np.roll(rows, -(n % size), axis=0), flags[n % size :] + flags[: n % size]
        return Snapshot(
            facts=self.facts,
            state="no decisions" if overdue else self._state,
            now=now,
            started=self._started,
            newest_sample=self._newest_sample,
            counters=self._counters,
            n_noted=n,
            decisions=Decisions(
                index=rows[:, 0].astype(np.int64),
                time=rows[:, 1],
                received=rows[:, 2],
                decided=rows[:, 3],
                prediction=rows[:, 5 : 5 + self._n_outputs],
                flags=flags,
                state=rows[:, 4].astype(np.int64),
                probabilities=rows[:, 5 + self._n_outputs :],
            ),
            age=self._ages.copy(),
            latency=self._latencies.copy(),
            quality=ChannelQuality(state=self._quality_state.copy(), rms=self._rms.copy(), repaired=self._repaired.copy()),
            incidents=tuple(self._incidents),
            memory=memory,
            newest=self._newest,
            trials=tuple(self._trials),
            events=tuple(self._events),
            states=tuple(self._states),
            bads=self._bads,
            newest_event=self._newest_event,
            newest_decided=self._newest_decided,
        )


def _push(kept: list[T], new: T, most: int) -> None:
    if len(kept) == most:
        del kept[0]
    kept.append(new)


def _trial_of(decision: Decision, number: int) -> Trial:
    state, event = decision.state, decision.event
    outputs = () if state is not None else tuple(decision.prediction.ravel()[:MOST_OUTPUTS].tolist())
    return Trial(
        number=number,
        time=decision.time if event is None else event.onset,
        event=None if event is None else event.description,
        outcome="output" if state is None else state.name,
        reason="" if state is None else state.reason,
        class_name=None if state is None else state.class_name,
        probability=None if state is None else state.probability,
        value=None if state is None else state.value,
        outputs=outputs,
        latency=decision.latency,
        marker_delay=None if event is None else event.marker_delay,
    )


def resident_memory() -> int:
    """Return the resident memory of this process in bytes, or 0 where /proc does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
