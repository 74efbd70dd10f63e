"""What a live decoder tells about itself: fed by its loop in microseconds, read by others without ever holding it up."""

from __future__ import annotations

import bisect
import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from sjepa_deploy.spec import Position, Unit

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

StreamState = Literal["waiting", "filling", "decoding", "silent", "reconnecting", "stopped"]
STREAM_STATES: tuple[StreamState, ...] = ("waiting", "filling", "decoding", "silent", "reconnecting", "stopped")
"""Waiting for a source; window not yet whole; decisions come; no samples come; source lost; ended."""

_RENARD = (1.0, 1.25, 1.6, 2.0, 2.5, 3.15, 4.0, 5.0, 6.3, 8.0)  # ISO 3's R10: equal steps on a log axis, in round numbers
LATENCY_EDGES: tuple[float, ...] = (*(round(step * 10.0**decade, 9) for decade in range(-5, 1) for step in _RENARD), 10.0)
"""Upper edges of the latency bins in seconds, 10 us to 10 s, ten a decade. One more bin holds what is later."""

MAX_NAMES = 64
"""Different counters, or reasons to skip, that a monitor takes: names are literals of the code, never made from data."""

SAMPLES_FOR_P99 = 100
"""A 99th percentile of fewer latencies than this would be their largest, and is not given."""


@dataclass(frozen=True, kw_only=True)
class StreamFacts:
    """What does not change while a stream is decoded.

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
    unit : {"uV", "mV", "V"}
        Unit of `ChannelQuality.rms`.
    hop, deadline : float
        Seconds from one window to the next, and from the time a decision is due to when it misses its deadline.
    output_names : tuple of str
        One name a value of a decision; empty for a base model, whose features nobody watches.
    random_weights : bool
        Whether the decisions mean nothing.
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
    output_names: tuple[str, ...]
    random_weights: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Decisions:
    """The newest decisions, oldest first. Times are seconds of the decoder's clock.

    Attributes
    ----------
    index : array of int64, shape (n,)
        Number of the window, counted from the start of the stream.
    time, due, decided : array of float64, shape (n,)
        Stamp of the newest sample in the window, when the decision was due, when it was there.
    prediction : array of float64, shape (n, n_outputs)
        What the model said.
    flags : tuple of tuple of str, length n
        What the decoder says about the window, such as "repaired" or "bridged".
    """

    index: NDArray[np.int64]
    time: NDArray[np.float64]
    due: NDArray[np.float64]
    decided: NDArray[np.float64]
    prediction: NDArray[np.float64]
    flags: tuple[tuple[str, ...], ...]

    @property
    def latency(self) -> NDArray[np.float64]:
        """Seconds from when each decision was due to when it was there."""
        return self.decided - self.due

    @property
    def age(self) -> NDArray[np.float64]:
        """Seconds from the stamp of each window's newest sample to the decision."""
        return self.decided - self.time

    def __len__(self) -> int:
        return len(self.index)


@dataclass(frozen=True, kw_only=True, eq=False)
class ChannelQuality:
    """How the channels are.

    Attributes
    ----------
    state : array of uint8, shape (n_chans,)
        A `ChannelState` each.
    rms : array of float64, shape (n_chans,)
        Root mean square in the model's unit; NaN where unknown.
    repaired : array of bool, shape (n_chans,)
        Whether the model gets an interpolation in place of the channel.
    """

    state: NDArray[np.uint8]
    rms: NDArray[np.float64]
    repaired: NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Incident:
    """Something that happened to the stream at `time` (seconds of the decoder's clock)."""

    time: float
    text: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Snapshot:
    """Everything that a monitor knows at one moment: windows are decisions and skips, to the last one.

    Attributes
    ----------
    facts : StreamFacts
        What does not change.
    state : str
        A `StreamState`.
    now, started, newest_sample : float
        Seconds of the decoder's clock: the moment of the snapshot, the start, the stamp of the newest sample (NaN before any).
    counters, skips : dict of str to int
        What was counted, and windows without a decision by reason.
    n_decisions, n_misses : int
        Decisions made; decisions later than the deadline, and windows skipped because they were late.
    miss_run, longest_miss_run : int
        Misses in a row, now and at worst.
    decisions : Decisions
        The newest ones.
    latency_counts : array of int64, shape (len(LATENCY_EDGES) + 1,)
        All latencies since the start in the bins of `LATENCY_EDGES`.
    latency_sum, latency_max, age_max : float
        In seconds, of all decisions since the start (NaN before any).
    quality : ChannelQuality
        How the channels are.
    incidents : tuple of Incident
        What happened last, oldest first.
    memory : int
        Resident memory of the process in bytes; 0 where the system does not say.
    """

    facts: StreamFacts
    state: StreamState
    now: float
    started: float
    newest_sample: float
    counters: dict[str, int]
    skips: dict[str, int]
    n_decisions: int
    n_misses: int
    miss_run: int
    longest_miss_run: int
    decisions: Decisions
    latency_counts: NDArray[np.int64]
    latency_sum: float
    latency_max: float
    age_max: float
    quality: ChannelQuality
    incidents: tuple[Incident, ...]
    memory: int

    @property
    def n_skipped(self) -> int:
        """Windows without a decision."""
        return sum(self.skips.values())

    @property
    def n_windows(self) -> int:
        """Windows that a decision was due for."""
        return self.n_decisions + self.n_skipped

    def percentile(self, of: Literal["latency", "age"], q: float) -> float:
        """Return a percentile in seconds over the newest decisions, raw; NaN where there are too few for it."""
        values: NDArray[np.float64] = getattr(self.decisions, of)
        if not len(values) or (q >= 99 and len(values) < SAMPLES_FOR_P99):
            return float("nan")
        return float(np.percentile(values, q))


class Monitor:
    """What a decoder's loop writes and its viewers read.

    One thread writes: each call takes a few microseconds, allocates nothing that stays, and waits for nobody. Any thread reads:
    `snapshot` copies, and copies again if the loop wrote meanwhile (a seqlock: an odd version means a write is under way).

    Parameters
    ----------
    facts : StreamFacts
        What does not change.
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
        self._counters: dict[str, int] = {}
        self._skips: dict[str, int] = {}
        self._n_decisions = self._n_misses = self._miss_run = self._longest_miss_run = 0
        self._rows = np.zeros((n_recent, 4 + len(facts.output_names)))  # index, time, due, decided, prediction
        self._flags: list[tuple[str, ...]] = [()] * n_recent
        self._latency_counts = [0] * (len(LATENCY_EDGES) + 1)
        self._latency_sum = 0.0
        self._latency_max = self._age_max = float("-inf")
        self._quality_state = np.zeros(n_chans, np.uint8)
        self._rms = np.full(n_chans, np.nan)
        self._repaired = np.zeros(n_chans, np.bool_)
        self._incidents: deque[tuple[float, str]] = deque(maxlen=n_incidents)

    def decided(
        self, *, index: int, time: float, due: float, decided: float, prediction: ArrayLike, flags: tuple[str, ...] = ()
    ) -> None:
        """Note a decision.

        Parameters
        ----------
        index : int
            Number of the window.
        time, due, decided : float
            Stamp of the newest sample in the window, when the decision was due, when it was there; seconds of the clock.
        prediction : array-like, shape (n_outputs,)
            One value an output name; anything for a base model.
        flags : tuple of str
            What is to be said about the window.
        """
        latency = decided - due
        missed = latency > self.facts.deadline
        slot = self._n_decisions % len(self._flags)
        row = self._rows[slot]
        self._version += 1
        try:
            row[0] = index
            row[1] = time
            row[2] = due
            row[3] = decided
            if self.facts.output_names:
                row[4:] = prediction
            self._flags[slot] = flags
            self._latency_counts[bisect.bisect_left(LATENCY_EDGES, latency)] += 1
            self._latency_sum += latency
            self._latency_max = max(self._latency_max, latency)
            self._age_max = max(self._age_max, decided - time)
            self._n_decisions += 1
            if missed:
                self._miss()
            else:
                self._miss_run = 0
        finally:
            self._version += 1

    def skipped(self, reason: str, *, late: bool = False) -> None:
        """Note a window that no decision is made for; one that is skipped because it is `late` has missed its deadline."""
        self._version += 1
        try:
            self._skips[reason] = self._skips.get(reason, 0) + 1
            assert len(self._skips) <= MAX_NAMES
            if late:
                self._miss()
        finally:
            self._version += 1

    def received(self, n_samples: int, newest: float) -> None:
        """Note samples from the source, and the stamp of the newest one in seconds of the clock."""
        self._version += 1
        try:
            self._counters["samples received"] = self._counters.get("samples received", 0) + n_samples
            self._newest_sample = newest
        finally:
            self._version += 1

    def count(self, name: str, n: int = 1) -> None:
        """Add `n` to a counter, which is there once it was counted. Words with spaces, such as "samples lost"."""
        self._version += 1
        try:
            self._counters[name] = self._counters.get(name, 0) + n
            assert len(self._counters) <= MAX_NAMES
        finally:
            self._version += 1

    def set_quality(self, state: ArrayLike, rms: ArrayLike, repaired: ArrayLike = False) -> None:
        """Note how the channels are: see `ChannelQuality`."""
        self._version += 1
        try:
            self._quality_state[:] = state
            self._rms[:] = rms
            self._repaired[:] = repaired
        finally:
            self._version += 1

    def set_state(self, state: StreamState) -> None:
        """Note what the stream is doing."""
        self._state = state

    def incident(self, text: str) -> None:
        """Note that something happened, in a few words for the viewers."""
        self._version += 1
        try:
            self._incidents.append((self._clock(), text))
        finally:
            self._version += 1

    def _miss(self) -> None:
        self._n_misses += 1
        self._miss_run += 1
        self._longest_miss_run = max(self._longest_miss_run, self._miss_run)

    def snapshot(self) -> Snapshot:
        """Return everything as it is now. Takes some 50 us, and never keeps the loop waiting."""
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
        n, size = self._n_decisions, len(flags)
        if n < size:
            rows, flags = rows[:n], flags[:n]
        else:
            rows, flags = np.roll(rows, -(n % size), axis=0), flags[n % size :] + flags[: n % size]
        return Snapshot(
            facts=self.facts,
            state=self._state,
            now=self._clock(),
            started=self._started,
            newest_sample=self._newest_sample,
            counters=self._counters.copy(),
            skips=self._skips.copy(),
            n_decisions=n,
            n_misses=self._n_misses,
            miss_run=self._miss_run,
            longest_miss_run=self._longest_miss_run,
            decisions=Decisions(
                index=rows[:, 0].astype(np.int64),
                time=rows[:, 1],
                due=rows[:, 2],
                decided=rows[:, 3],
                prediction=rows[:, 4:],
                flags=flags,
            ),
            latency_counts=np.array(self._latency_counts, np.int64),
            latency_sum=self._latency_sum,
            latency_max=self._latency_max if n else float("nan"),
            age_max=self._age_max if n else float("nan"),
            quality=ChannelQuality(state=self._quality_state.copy(), rms=self._rms.copy(), repaired=self._repaired.copy()),
            incidents=tuple(Incident(time=when, text=text) for when, text in tuple(self._incidents)),
            memory=memory,
        )


def resident_memory() -> int:
    """Return the resident memory of this process in bytes, or 0 where /proc does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
