"""Keeps the newest state of a live decoder for viewers: the decoder writes in microseconds, and readers never delay it."""

from __future__ import annotations

import bisect
import copy
import math
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from sjepa_deploy.runtime.live.counters import Counters
from sjepa_deploy.runtime.live.decision import Decision
from sjepa_deploy.runtime.live.sources import Incident
from sjepa_deploy.spec import Position, Unit

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

StreamState = Literal["waiting", "filling", "decoding", "no decisions", "silent", "reconnecting", "stopped"]
STREAM_STATES: tuple[StreamState, ...] = get_args(StreamState)
"""States of a decoder, in the order of `StreamState`.

No source yet; the window is not whole yet; decisions come; samples come and decisions are overdue; no samples come; the source is
lost; the end.
"""

_RENARD = (1.0, 1.25, 1.6, 2.0, 2.5, 3.15, 4.0, 5.0, 6.3, 8.0)  # ISO 3's R10: equal steps on a log axis, in round numbers
TIME_EDGES: tuple[float, ...] = (*(round(step * 10.0**decade, 9) for decade in range(-5, 1) for step in _RENARD), 10.0)
"""Upper edges of the bins of ages and latencies in seconds, 10 us to 10 s, ten a decade. One more bin holds later values."""

SAMPLES_FOR_P99 = 100
"""A 99th percentile of fewer values than this would be their largest, and is not given."""

SKIPS = {
    "skipped_late": "late",
    "skipped_gap": "gap",
    "skipped_paused": "paused",
    "held": "held",
    "failed": "backend failed",
}
"""Reasons why a window has no decision of its own: the counter, and the reason in words."""

Measure = Literal["age", "latency"]


@dataclass(frozen=True, kw_only=True)
class StreamFacts:
    """Holds the facts that do not change while a stream is decoded.

    Attributes
    ----------
    bundle, bundle_hash : str
        Name of the bundle, and the digest of its manifest.
    backend, source : str
        What runs the model, and where the samples come from.
    ch_names : tuple of str
        Channels of the model in its order.
    positions : tuple of (float, float, float) or None
        Where they are, in metres in the head frame (MNE's). None where the bundle does not say.
    sfreq : float
        Sampling rate of the model in Hz.
    unit : {"nV", "uV", "mV", "V"}
        Unit of `ChannelQuality.rms`.
    hop, deadline : float
        Seconds from one window to the next, and the age at which a decision misses its deadline.
    overdue : float or None
        Seconds without a decision, while samples come, after which the state is "no decisions".
    output_names : tuple of str
        One name for each value of a decision; empty for a base model, whose features are not shown.
    random_weights : bool
        Whether the weights are random, so that decisions mean nothing.
    """

    bundle: str
    bundle_hash: str
    backend: str
    source: str
    ch_names: tuple[str, ...]
    positions: tuple[Position, ...] | None
    sfreq: float
    unit: Unit
    hop: float
    deadline: float
    overdue: float | None
    output_names: tuple[str, ...]
    random_weights: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Decisions:
    """Holds the newest decisions by column, oldest first.

    Times are seconds of the decoder's clock; see `Decision` for their meaning.

    Attributes
    ----------
    index : array of int64, shape (n,)
        Number of the window, counted from the start of the stream.
    time, received, decided : array of float64, shape (n,)
        Stamp of the newest sample in the window, when this sample arrived, when the prediction was there.
    prediction : array of float64, shape (n, n_outputs)
        Output of the model.
    flags : tuple of tuple of str, length n
        `Decision.flags`.
    """

    index: NDArray[np.int64]
    time: NDArray[np.float64]
    received: NDArray[np.float64]
    decided: NDArray[np.float64]
    prediction: NDArray[np.float64]
    flags: tuple[tuple[str, ...], ...]

    @property
    def latency(self) -> NDArray[np.float64]:
        """Return the seconds from the arrival of each window's newest sample to the decision."""
        return self.decided - self.received

    @property
    def age(self) -> NDArray[np.float64]:
        """Return the seconds from the stamp of each window's newest sample to the decision. The deadline counts in them."""
        return self.decided - self.time

    def __len__(self) -> int:
        return len(self.index)


@dataclass(frozen=True, kw_only=True, eq=False)
class Times:
    """Says how long all decisions since the start took.

    Attributes
    ----------
    counts : array of int64, shape (len(TIME_EDGES) + 1,)
        Decisions in the bins of `TIME_EDGES`.
    total, largest : float
        Sum and maximum in seconds; the maximum is NaN before any decision.
    """

    counts: NDArray[np.int64]
    total: float
    largest: float


@dataclass(frozen=True, kw_only=True, eq=False)
class ChannelQuality:
    """Holds the quality of each channel.

    Attributes
    ----------
    state : array of uint8, shape (n_chans,)
        A `ChannelState` for each channel.
    rms : array of float64, shape (n_chans,)
        Root mean square in the model's unit; NaN where unknown.
    repaired : array of bool, shape (n_chans,)
        Whether the model gets an interpolation in place of the channel.
    """

    state: NDArray[np.uint8]
    rms: NDArray[np.float64]
    repaired: NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, eq=False)
class Snapshot:
    """Holds everything that a monitor knows at one moment.

    Attributes
    ----------
    facts : StreamFacts
        Facts that do not change.
    state : str
        A `StreamState`.
    now, started, newest_sample : float
        Seconds of the decoder's clock: the moment of the snapshot, the start, the arrival of the newest sample (NaN before any).
    counters : Counters
        A copy of the decoder's own.
    n_noted : int
        Decisions since the monitor began, of which `decisions` holds the newest.
    decisions : Decisions
        The newest ones.
    age, latency : Times
        Ages and latencies of the decisions since the monitor began.
    quality : ChannelQuality
        Quality of the channels.
    incidents : tuple of Incident
        Newest incidents, oldest first.
    memory : int
        Resident memory of the process in bytes; 0 where the system does not say.
    """

    facts: StreamFacts
    state: StreamState
    now: float
    started: float
    newest_sample: float
    counters: Counters
    n_noted: int
    decisions: Decisions
    age: Times
    latency: Times
    quality: ChannelQuality
    incidents: tuple[Incident, ...]
    memory: int

    @property
    def skips(self) -> dict[str, int]:
        """Return the number of windows without a decision of their own, by reason."""
        return {reason: getattr(self.counters, name) for name, reason in SKIPS.items()}

    @property
    def n_skipped(self) -> int:
        """Return the number of windows without a decision of their own."""
        return sum(self.skips.values())

    def percentile(self, of: Measure, q: float) -> float:
        """Return a percentile in seconds over the newest decisions, raw; NaN where there are too few for it."""
        values: NDArray[np.float64] = getattr(self.decisions, of)
        if not len(values) or (q >= 99 and len(values) < SAMPLES_FOR_P99):
            return float("nan")
        return float(np.percentile(values, q))


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
        Facts that do not change.
    counters : Counters
        The decoder's own. Every write copies them.
    n_recent : int
        Decisions to keep.
    n_incidents : int
        Incidents to keep.
    clock : callable
        The decoder's clock, in seconds. LSL's on Linux is `time.monotonic`.
    """

    def __init__(
        self,
        facts: StreamFacts,
        counters: Counters,
        *,
        n_recent: int = 4096,
        n_incidents: int = 64,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        n_chans = len(facts.ch_names)
        self.facts = facts
        self._clock = clock
        self._version = 0
        self._state: StreamState = "waiting"
        self._started = clock()
        self._newest_sample = float("nan")
        self._expected_since = self._started
        self._live_counters, self._counters = counters, copy.copy(counters)
        self._n_noted = 0
        self._rows = np.zeros((n_recent, 4 + len(facts.output_names)))  # index, time, received, decided, prediction
        self._flags: list[tuple[str, ...]] = [()] * n_recent
        self._ages, self._latencies = _Durations(), _Durations()
        self._quality_state = np.zeros(n_chans, np.uint8)
        self._rms = np.full(n_chans, np.nan)
        self._repaired = np.zeros(n_chans, np.bool_)
        self._incidents: list[Incident] = []
        self._n_incidents = n_incidents

    def decided(self, decision: Decision) -> None:
        """Take a decision; of the prediction, one value an output name of the facts."""
        prediction = decision.prediction.ravel() if self.facts.output_names else ()
        slot = self._n_noted % len(self._flags)
        row = self._rows[slot]
        self._version += 1
        try:
            row[0] = decision.index
            row[1] = decision.time
            row[2] = decision.received
            row[3] = decision.decided
            row[4:] = prediction
            self._flags[slot] = decision.flags
            self._ages.add(decision.age)
            self._latencies.add(decision.latency)
            self._n_noted += 1
            self._state, self._expected_since = "decoding", self._clock()
            self._counters = copy.copy(self._live_counters)
        finally:
            self._version += 1

    def received(self, newest: float) -> None:
        """Take the time at which the newest sample arrived, in seconds of the clock, after its chunk was decoded."""
        self._version += 1
        try:
            if self._state in ("waiting", "silent", "reconnecting"):
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
                prediction=rows[:, 4:],
                flags=flags,
            ),
            age=self._ages.copy(),
            latency=self._latencies.copy(),
            quality=ChannelQuality(state=self._quality_state.copy(), rms=self._rms.copy(), repaired=self._repaired.copy()),
            incidents=tuple(self._incidents),
            memory=memory,
        )


def resident_memory() -> int:
    """Return the resident memory of this process in bytes, or 0 where /proc does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
