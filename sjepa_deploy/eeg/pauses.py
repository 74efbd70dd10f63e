"""Finds the stretches of a recording that were recorded without a pause."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import mne

PAUSE = "BAD boundary"
"""A pause has this description among the annotations of a recording; MNE uses the same one where it joins recordings."""

_SKIPPED = ("bad_acq_skip", "bad_disconnection")
_CUTS = ("bad boundary", "edge boundary", "boundary", "new segment", "amplifier disconnected")


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Describes a stretch of a recording without a pause.

    Attributes
    ----------
    start, stop : int
        Its samples.
    onset : float
        When its first sample was taken, in seconds of the recording's own time.
    """

    start: int
    stop: int
    onset: float


@dataclass(frozen=True, kw_only=True)
class Told:
    """Holds what reading a recording has shown; ``raw.info["temp"]`` keeps the object.

    Attributes
    ----------
    notes : tuple of str
        For people: what the reader warned of, what was left out or taken in another unit.
    paused : tuple of (int, float)
        Samples before which the recorder had paused, and for how many seconds, where the file tells.
    """

    notes: tuple[str, ...] = ()
    paused: tuple[tuple[int, float], ...] = ()


def told(raw: mne.io.BaseRaw) -> Told:
    """Return what reading `raw` has shown."""
    temp = raw.info.get("temp")
    return temp if isinstance(temp, Told) else Told()


def segments_of(raw: mne.io.BaseRaw) -> tuple[Segment, ...]:
    """Return the stretches between the pauses that the annotations of a recording name.

    A pause is a cut (MNE's "BAD boundary" and "EDGE boundary", EEGLAB's "boundary", BrainVision's "New Segment", ANT's "Amplifier
    disconnected"), or a stretch of samples that were not recorded (MNE's "BAD_ACQ_SKIP", and "BAD_disconnection" of ANT's files).
    The recording's time is that of its samples; the events of these files are given in this time too. Where a file tells how long
    a pause lasted (EDF+D), time goes on after the pause.
    """
    sfreq, n_times = raw.info["sfreq"], raw.n_times
    cuts: set[int] = set()
    skipped: list[tuple[int, int]] = []
    marks = raw.annotations
    for onset, duration, name in zip(marks.onset - raw.first_time, marks.duration, marks.description, strict=True):
        what = str(name).casefold()
        first = min(max(math.ceil(onset * sfreq - 1e-3), 0), n_times)
        if what.startswith(_SKIPPED):
            last = min(max(math.ceil((onset + duration) * sfreq - 1e-3), first), n_times)
            skipped.append((first, last))
            cuts |= {first, last}
        elif what.startswith(_CUTS):
            cuts.add(first)
    paused = [(sample - raw.first_samp, seconds) for sample, seconds in told(raw).paused]
    edges = sorted(cuts | {0, n_times})
    begin, end = np.array(skipped, dtype=np.int64).reshape(-1, 2).T
    return tuple(
        Segment(start=start, stop=stop, onset=start / sfreq + sum(s for sample, s in paused if 0 < sample <= start))
        for start, stop in itertools.pairwise(edges)
        if stop > start and not ((begin <= start) & (start < end)).any()
    )


def time_of(seconds: NDArray[np.float64], segments: Sequence[Segment], sfreq: float) -> NDArray[np.float64]:
    """Return the recording's own time of the point `seconds` of samples after the first sample, as annotations do."""
    starts = np.array([segment.start for segment in segments]) / sfreq
    which = np.maximum(number_of_segment(seconds, segments, sfreq), 0)
    own: NDArray[np.float64] = seconds + (np.array([segment.onset for segment in segments]) - starts)[which]
    return own


def number_of_segment(seconds: NDArray[np.float64], segments: Sequence[Segment], sfreq: float) -> NDArray[np.intp]:
    """Return the number of the segment that holds the point `seconds` of samples after the first one, or precedes its pause."""
    return np.searchsorted(np.array([segment.start for segment in segments]) / sfreq, seconds + 1e-9, side="right") - 1


def sample_time(own: NDArray[np.float64], segments: Sequence[Segment], sfreq: float) -> NDArray[np.float64]:
    """Return the reverse of `time_of`. A time within a pause gives the end of the segment before the pause."""
    onset, start, stop = (np.array([getattr(segment, name) for segment in segments]) for name in ("onset", "start", "stop"))
    which = np.maximum(np.searchsorted(onset, own + 1e-9, side="right") - 1, 0)
    seconds: NDArray[np.float64] = np.minimum(start[which] / sfreq + own - onset[which], stop[which] / sfreq)
    return seconds
