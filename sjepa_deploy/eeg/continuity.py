"""Finds the samples of a stream that do not follow the last one: by their stamps, and by whether they came already."""

from __future__ import annotations

import bisect
import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sjepa_deploy.eeg.timeline import BACK, CONSECUTIVE, DOUBTFUL, EARLY, REPEATED, RESET, Timeline

REMEMBERED_S = 2.0
"""Seconds of samples among which one that comes late is looked for, to know it if it was sent again."""

SAME_STAMP_S = 1e-6
"""Seconds within which two stamps are one, but for the rounding of seconds since 1970 and of corrections that were taken off.

Some senders fill a loss with samples that they sent before: their stamps are new ones, and these samples stay.
"""

MAX_JITTER_S = 0.1
"""Seconds beyond which a deviation of a stamp is a loss at once, as a rule."""

HINDSIGHT_S = 1.0
"""Seconds after which the stamps of a recording show whether samples were lost or the sender was held up."""

Samples = NDArray[Any]
Stamps = NDArray[np.float64]


class Continuity:
    """Follows a stream chunk by chunk. The verdicts do not depend on the chunks.

    Parameters
    ----------
    sfreq, max_jitter, trusted
        See `Timeline`.

    Attributes
    ----------
    timeline : Timeline
        What the stamps say.
    """

    def __init__(self, sfreq: float, max_jitter: float, *, trusted: bool = False) -> None:
        self.timeline = Timeline(sfreq, max_jitter, trusted=trusted)
        self._half_period = 0.5 / sfreq
        self._recent: deque[tuple[Samples, Stamps]] = deque()
        self._start = 0  # samples before this chunk
        self._again: int | None = None  # position of the sample that the last one repeated
        self._n_recent, self._most_recent = 0, round(REMEMBERED_S * sfreq)

    def breaks(self, samples: Samples, stamps: Stamps, *, restarted: bool = False) -> Iterator[tuple[int, int]]:
        """Take samples and yield the row and the verdict of each that does not just follow the last one.

        Parameters
        ----------
        samples : ndarray, shape (n_samples, n_chans)
            Samples in the order in which they came.
        stamps : ndarray, shape (n_samples,)
            Their stamps in seconds on the clock of the sender.
        restarted : bool
            Whether the stream was interrupted before these samples: the first one that counts is yielded in any case.

        Yields
        ------
        row : int
            Row of the sample.
        verdict : int
            How many samples are missing before the sample, or `CONSECUTIVE` (after a restart), `REPEATED`, `EARLY`, `RESET`,
            `DOUBTFUL`.

        Raises
        ------
        StreamError
            If a stamp is no finite number.
        """
        timeline = self.timeline
        for row, stamp in enumerate(stamps.tolist()):
            if self._again is not None and self._is_at(self._again + 1, samples, stamps, row):
                self._again += 1
                yield row, REPEATED
                continue
            self._again = None
            if 0 < stamp - timeline.last < self._half_period and self._came(samples, stamps, row):
                yield row, REPEATED
                continue
            verdict = timeline.place(stamp)
            if verdict == CONSECUTIVE and not restarted:
                continue
            if verdict == REPEATED and not self._came(samples, stamps, row):
                timeline.follow(stamp)
                continue
            if verdict == BACK:
                verdict = REPEATED if self._came(samples, stamps, row) else timeline.go_back(stamp)
                if verdict == CONSECUTIVE and not restarted:
                    continue
            yield row, verdict
            restarted = restarted and verdict in (REPEATED, EARLY)
        self._start += len(stamps)
        self._recent.append((samples, stamps))
        self._n_recent += len(stamps)
        while self._n_recent - len(self._recent[0][1]) >= self._most_recent:
            self._n_recent -= len(self._recent.popleft()[1])

    def _came(self, samples: Samples, stamps: Stamps, row: int) -> bool:
        """Find out whether a sample of the same stamp and values came already, as of a block that is sent again."""
        stamp, sample = float(stamps[row]), samples[row]
        self._again = _found(sample, stamp, samples[:row], stamps[:row], self._start)
        start = self._start
        for before, their_stamps in reversed(self._recent):
            if self._again is not None or their_stamps[-1] < stamp - 1.0:
                break
            start -= len(their_stamps)
            self._again = _found(sample, stamp, before, their_stamps, start)
        return self._again is not None

    def _is_at(self, position: int, samples: Samples, stamps: Stamps, row: int) -> bool:
        """Return whether a sample is the one that came at `position` among all: the next one of a block that is sent again."""
        start, before, their_stamps = self._start, samples[:row], stamps[:row]
        recent = reversed(self._recent)
        while position < start:
            before, their_stamps = next(recent, (samples[:0], stamps[:0]))
            if not len(their_stamps):
                return False
            start -= len(their_stamps)
        k = position - start
        return _found(samples[row], float(stamps[row]), before[k : k + 1], their_stamps[k : k + 1], 0) is not None


def _found(sample: Samples, stamp: float, samples: Samples, stamps: Stamps, start: int) -> int | None:
    """Return at which position, counted from `start`, there is a sample of the same stamp and values."""
    if len(stamps) == 1:  # chunks of one sample are many
        same = abs(float(stamps[0]) - stamp) < SAME_STAMP_S and _same(sample, samples[0])
        return start if same else None
    near = np.flatnonzero(np.abs(stamps - stamp) < SAME_STAMP_S)
    return next((start + int(k) for k in near if _same(sample, samples[k])), None)


@dataclass(frozen=True, kw_only=True, eq=False)
class Stretches:
    """Describes which samples of a recorded stream follow each other.

    Attributes
    ----------
    rows : ndarray of int
        Rows of the samples, without those that came again or late.
    cuts : tuple of (int, int)
        Places in `rows` before which samples are missing, or the stream was interrupted, and how many samples are missing.
    n_repeated, n_early, n_resets : int
        Samples that came again, samples that came late, and how often the clock of the stamps was set back.
    """

    rows: NDArray[np.intp]
    cuts: tuple[tuple[int, int], ...]
    n_repeated: int
    n_early: int
    n_resets: int


def stretches_of(samples: Samples, stamps: Stamps, sfreq: float, *, restarts: Sequence[int] = ()) -> Stretches:
    """Find the stretches without a loss in a recorded stream, by the verdicts of live decoding.

    A loss that shows only some time later, as in the first half second and through jitter, is put where it was.

    Parameters
    ----------
    samples : ndarray, shape (n_samples, n_chans)
        Samples in the order in which they came.
    stamps : ndarray, shape (n_samples,)
        Their stamps in seconds on the clock of the sender.
    sfreq : float
        Nominal rate in Hz.
    restarts : sequence of int
        Rows before which the stream was interrupted.

    Raises
    ------
    StreamError
        If a stamp is no finite number.
    """
    continuity, size, n = Continuity(sfreq, MAX_JITTER_S), max(1, round(HINDSIGHT_S * sfreq)), len(stamps)
    kept, lost_before = np.ones(n, np.bool_), dict[int, int]()
    shown = dict[int, tuple[int, int]]()  # for each loss the row that showed it, and its size
    counts = dict.fromkeys((REPEATED, EARLY, RESET), 0)
    edges = sorted({*range(0, n, size), *restarts, n})
    first, edges_of_clock = 0, [0]  # rows of the stretch, and before which stamps say nothing of what follows
    for start, stop in itertools.pairwise(edges):
        restarted = start in restarts
        for row, verdict in continuity.breaks(samples[start:stop], stamps[start:stop], restarted=restarted):
            at = start + row
            if verdict in counts:
                counts[verdict] += 1
            if verdict in (REPEATED, EARLY):
                kept[at] = False
                continue
            if verdict == DOUBTFUL and not restarted:
                continue
            where = {at: max(0, verdict)}
            if verdict == RESET or restarted:
                edges_of_clock.append(at)
            if verdict > 0 and not restarted:
                inside = first + np.flatnonzero(kept[first : at + 1])
                where = _holes(inside, stamps[inside], verdict, continuity.timeline, sfreq)
                regular = continuity.timeline.regular
                shown |= {place: (place, lost) if regular else (at, verdict) for place, lost in where.items()}
            lost_before |= where
            restarted, first = False, max(where)
    if (doubted := continuity.timeline.doubted) is not None:  # at the end
        after = first + np.flatnonzero(kept[first:] & (stamps[first:] == doubted[0]))
        lost_before[int(after[-1]) + 1] = doubted[1]
    rows = np.flatnonzero(kept)
    late = stamps - (np.cumsum(kept) - 1) / sfreq
    late[~kept] = np.inf
    cuts = []
    for at in sorted(lost_before):
        place, n_lost = int(np.searchsorted(rows, at)), lost_before[at]
        if at in shown:
            showed, size_of_loss = shown[at]
            edge = bisect.bisect(edges_of_clock, at)
            begin, end = edges_of_clock[edge - 1], [*edges_of_clock, n][edge]
            rise = late[showed:end][:size].min() - late[begin:at][-size:].min()
            if rise < 0.25 * size_of_loss / sfreq:  # the sender was held up, and has caught up since
                continue
        if place < len(rows):
            cuts.append((place, n_lost))
    return Stretches(rows=rows, cuts=tuple(cuts), n_repeated=counts[REPEATED], n_early=counts[EARLY], n_resets=counts[RESET])


def _holes(rows: NDArray[np.intp], stamps: Stamps, n_lost: int, timeline: Timeline, sfreq: float) -> dict[int, int]:
    """Return the rows of a stretch before which samples are missing, once `n_lost` are found before the last of its rows."""
    if timeline.regular:
        jumps = np.rint(np.diff(stamps) * sfreq).astype(int) - 1
        found = np.flatnonzero(jumps > 0)[::-1]
        found = found[: int(np.searchsorted(np.cumsum(jumps[found]), n_lost)) + 1]  # several before it was known that they are
        return {int(rows[k + 1]): int(jumps[k]) if len(found) > 1 else n_lost for k in found} or {int(rows[-1]): n_lost}
    before = np.flatnonzero(stamps[:-1] == timeline.lost_after)
    earliest = int(before[-1]) if len(before) else len(rows) - 2
    largest = earliest + int(np.diff(stamps[earliest:]).argmax())
    return {int(rows[earliest + 1]): 0, int(rows[largest + 1]): n_lost}  # what is between them is in no window


def _same(one: Samples, other: Samples) -> bool:
    return np.array_equal(one, other, equal_nan=one.dtype.kind == "f")
