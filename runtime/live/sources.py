"""Defines what a source of samples is, and the sources that need no network. LSL is in `runtime.live.lsl`."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sjepa_deploy.eeg.info import StreamInfo
from sjepa_deploy.eeg.synthetic import eeg_windows
from sjepa_deploy.errors import StreamError
from sjepa_deploy.spec import SignalSpec

Samples = NDArray[Any]
Stamps = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Holds samples as they were received.

    Attributes
    ----------
    samples : ndarray, shape (n_samples, n_chans)
        In the stream's unit and type.
    stamps : ndarray of float64, shape (n_samples,)
        When each sample was taken, in seconds of the source's clock.
    received : float
        When the chunk arrived, in seconds of the same clock.
    restarted : bool
        Whether the stream was interrupted before this chunk, such that nothing is known of what came between.
    correction : float
        Seconds in `stamps` that bring the sender's own stamps to the source's clock.
    """

    samples: Samples
    stamps: Stamps
    received: float
    restarted: bool = False
    correction: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Incident:
    """Describes something that happened to a stream, for the record and for people.

    Attributes
    ----------
    kind : str
        From the source: "flushed", "lost", "reconnected". From the decoder: "gap", "interruption", "clock", "clock reset",
        "bridged", "rate", "channel", "silent", "deadline", "unanswered", "mark", "bundle". From what stands beside:
        "record", "out", "feedback", "shadow".
    time : float
        Seconds of the source's clock.
    text : str
        One sentence.
    sample : int
        Number of samples received before the incident.
    """

    kind: str
    time: float
    text: str
    sample: int = 0


class Source(Protocol):
    """Gives the samples of one stream. One thread reads the source; any thread may append to `incidents`.

    Attributes
    ----------
    info : StreamInfo
        Channels, rate and unit of the stream.
    incidents : deque of Incident
        Incidents of the connection. The decoder takes them out.
    n_flushed : int
        Samples that were dropped so far, as they had been sent before the first `read`.
    live : bool
        Whether samples come whether or not somebody reads them. A recording that is decoded as fast as possible waits.
    """

    info: StreamInfo
    incidents: deque[Incident]
    n_flushed: int
    live: bool

    @property
    def ended(self) -> bool:
        """Return whether no sample will come any more."""
        ...

    def read(self, timeout: float) -> Chunk | None:
        """Return the samples that have arrived, at least one, waiting for it up to `timeout` seconds; None if nothing came."""
        ...

    def clock(self) -> float:
        """Return the time now on the clock of the stamps."""
        ...

    def close(self) -> None:
        """Release what the source holds."""
        ...


class ReplaySource:
    """Hands out samples in memory when they are due.

    The clock starts at 0 with the first sample. Sample i is due, and stamped, at i / sfreq of this clock, which runs `speed`
    times as fast as the wall's. At infinite speed the clock is virtual: it stands at the newest sample handed out.

    Parameters
    ----------
    info : StreamInfo
        Channels, rate and unit of the samples.
    samples : ndarray, shape (n_samples, n_chans), or callable
        The samples, or a function of (start, stop) that returns them.
    n_samples : int or None
        Number of samples, if `samples` is a function; None for no end.
    speed : float
        Seconds of the stream in one second.
    chunk : int or callable
        Samples that the device sends at once, or a function that returns how many it sends next.
    stamps : ndarray or None
        Stamps in place of those that are due. Infinite speed only.
    breaks : sequence of int
        Samples before which the recorder had paused: a chunk begins with each, and says that the stream was interrupted.
    plan : sequence of (float, str) or None
        Events of a recording: seconds of this clock and description, NaN for an event in a pause. None if it is no recording.
    when : callable
        Returns the seconds of this clock for seconds of the recording's own time, NaN for a time in a pause.
    """

    def __init__(
        self,
        info: StreamInfo,
        samples: Samples | Callable[[int, int], Samples],
        *,
        n_samples: int | None = None,
        speed: float = 1.0,
        chunk: int | Callable[[], int] = 1,
        stamps: Stamps | None = None,
        breaks: Sequence[int] = (),
        plan: Sequence[tuple[float, str]] | None = None,
        when: Callable[[NDArray[np.float64]], NDArray[np.float64]] = lambda seconds: seconds,
    ) -> None:
        if not speed > 0:
            raise StreamError(f"The speed is {speed:g}.", "Use 1 for real time, or `inf` for as fast as possible.")
        self.info, self.plan, self.when = info, plan, when
        self.incidents: deque[Incident] = deque()
        self.n_flushed = 0
        self.live = math.isfinite(speed)
        if isinstance(samples, np.ndarray):
            n_samples = len(samples)
        self._samples, self._n_samples, self._stamps = samples, n_samples, stamps
        self._speed, self._breaks = speed, tuple(sorted(breaks))
        self._chunk = chunk if callable(chunk) else (lambda: chunk)
        self._size = max(1, self._chunk())
        self._next = 0
        self._started: float | None = None
        self._now = 0.0

    @property
    def ended(self) -> bool:
        """Return whether all samples were handed out."""
        return self._n_samples is not None and self._next >= self._n_samples

    def read(self, timeout: float) -> Chunk | None:
        """Return the samples that are due, in whole chunks of the device."""
        if self.ended:
            return None
        if self._started is None:
            self._started = time.monotonic()
        start, stop = self._next, self._next + self._size
        if self.live:
            due_in = ((stop - 1) / self.info.sfreq - self.clock()) / self._speed
            if due_in > timeout:
                time.sleep(timeout)
                return None
            if due_in > 0:
                time.sleep(due_in)
            while (stop + self._size - 1) / self.info.sfreq <= self.clock() and stop - start < 4096:
                stop += self._size  # what has become due meanwhile
        if self._n_samples is not None:
            stop = min(stop, self._n_samples)
        if (cut := next((at for at in self._breaks if start < at < stop), None)) is not None:
            stop = cut
        self._next, self._size = stop, max(1, self._chunk())
        samples = self._samples[start:stop] if isinstance(self._samples, np.ndarray) else self._samples(start, stop)
        stamps = np.arange(start, stop) / self.info.sfreq if self._stamps is None else self._stamps[start:stop]
        if not self.live:
            self._now = float(stamps[-1])
        return Chunk(samples, stamps, self.clock(), restarted=start in self._breaks)

    def clock(self) -> float:
        """Return the seconds since the first sample."""
        if not self.live or self._started is None:
            return self._now
        return (time.monotonic() - self._started) * self._speed

    def close(self) -> None:
        """Release nothing."""


def synthetic_source(
    signal: SignalSpec,
    *,
    sfreq: float | None = None,
    speed: float = 1.0,
    chunk: int | Callable[[], int] = 1,
    n_samples: int | None = None,
) -> ReplaySource:
    """Return endless synthetic EEG of a model's channels: the same minute again and again, with electrode offsets.

    Parameters
    ----------
    signal : SignalSpec
        The signal of the model.
    sfreq : float or None
        Rate of the stream in Hz; None takes the model's.
    speed, chunk
        See `ReplaySource`.
    n_samples : int or None
        Number of samples; None for no end.
    """
    rate = sfreq or signal.sfreq
    rng = np.random.default_rng(0)
    n_loop = round(60 * rate)
    loop = eeg_windows(1, signal.n_chans, n_loop, rate, rng)[0].T + rng.uniform(-2e4, 2e4, signal.n_chans).astype(np.float32)
    loop = np.concatenate([loop, loop])  # so that every stretch of up to a minute is one slice

    def stretch(start: int, stop: int) -> Samples:
        first = start % n_loop
        return loop[first : first + stop - start]

    names = signal.ch_names or tuple(f"EEG{i:03d}" for i in range(1, signal.n_chans + 1))
    info = StreamInfo(name="synthetic", ch_names=names, sfreq=rate, unit="uV")
    return ReplaySource(info, stretch, n_samples=n_samples, speed=speed, chunk=chunk)
