"""Compares the stamps of a stream with the arrival of its samples."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable

import numpy as np

from sjepa_deploy.errors import StreamError
from sjepa_deploy.runtime.live.sources import Chunk, Stamps

MOST_AHEAD_S, MOST_BEHIND_S = 0.5, 60.0
"""Seconds that stamps may be ahead of arrival, and behind it, on the source's clock; beyond, they are of another clock."""

SETTLE_S = 15.0
"""Seconds in which the first samples on another clock show how much of their delay was waiting: the quickest counts as none."""

REMEMBER_S = 60.0
"""The quickest arrival of this time, and of as much before, says how soon a sample can be there."""

JUMP_S = 1.0
"""Seconds from which on a loss may be a clock that was set forward."""

N_FIRST = 16
"""Steps of stamps by which the unit of the stamps is judged."""

MOST_FAST = 20.0
"""Periods of most first steps from which on stamps are not in seconds."""


class Arrival:
    """Converts stamps to the clock of their arrival, if the stamps are on another clock.

    Parameters
    ----------
    name : str
        Name of the stream, for messages.
    sfreq : float
        Its nominal rate in Hz.
    report : callable
        Called with the kind and the text of every incident.

    Attributes
    ----------
    offset : float
        Seconds to add to the stamps: 0 while they are on the source's clock.
    began : bool
        Whether there was a chunk.
    """

    def __init__(self, name: str, sfreq: float, report: Callable[[str, str], None]) -> None:
        self._name, self._sfreq, self._report = name, sfreq, report
        self.offset = 0.0
        self._settled_at = -math.inf
        self.began = False
        self._least = self._least_before = math.inf
        self._turn_at = math.inf
        self._first: list[float] | None = []

    def take(self, chunk: Chunk) -> None:
        """Look at the newest sample of a chunk: the first one before its samples are decoded, and each one after that."""
        received = chunk.received
        newest = float(chunk.stamps[-1])
        lag = received - newest
        if received < self._settled_at:
            self.offset = min(self.offset, lag)
        behind = lag - self.offset
        if behind < -MOST_AHEAD_S or (behind > MOST_BEHIND_S and not self.began):
            self._report("clock", f"The stamps are {_words(newest, behind)}; from here on they count from arrival.")
            self.count_from(chunk)
        self.began = True
        if received > self._turn_at or self._turn_at == math.inf:
            self._least_before, self._least = self._least, math.inf
            self._turn_at = received + REMEMBER_S
        self._least = min(self._least, lag)

    def count_from(self, chunk: Chunk) -> None:
        """Let the stamps count from the arrival of `chunk`."""
        self.offset = chunk.received - float(chunk.stamps[-1])
        self._settled_at = chunk.received + SETTLE_S
        self._least, self._least_before = self.offset, math.inf
        self._turn_at = chunk.received + REMEMBER_S

    def jumped(self, chunk: Chunk, row: int, n_lost: int) -> bool:
        """Return whether the clock was set forward before a row, and not n_lost samples lost: what follows is there too soon.

        How soon samples were read after each other says nothing: a decoder that stood still reads a loss of a minute at once.
        """
        seconds = n_lost / self._sfreq
        lag = chunk.received - _newest_from(chunk.stamps, row)
        return seconds > JUMP_S and lag < min(self._least, self._least_before) - 0.5 * seconds < math.inf

    def check_unit(self, stamps: Stamps) -> None:
        """Refuse first stamps that are not in seconds.

        Raises
        ------
        StreamError
            If they are not.
        """
        if self._first is None:
            return
        self._first += stamps[: N_FIRST + 1 - len(self._first)].tolist()
        if len(self._first) <= N_FIRST:
            return
        first, self._first = self._first, None
        steps = [(after - before) * self._sfreq for before, after in itertools.pairwise(first)]
        moved = [step for step in steps if step > 0]
        fast = min(statistics.median(moved), sum(steps) / len(steps)) if moved else 0.0
        if fast > MOST_FAST and statistics.median_low(steps) > 0:
            unit = {3: "milliseconds", 6: "microseconds", 9: "nanoseconds"}.get(round(math.log10(fast)), "another unit")
            raise StreamError(
                f"The stamps of {self._name} are {fast:.3g} periods of its rate apart, as if they were in {unit}.",
                "Let the source stamp in seconds.",
            )


def _newest_from(stamps: Stamps, row: int) -> float:
    """Return the newest stamp from `row` to the next loss or set clock, which may be in the same chunk."""
    jumps = np.flatnonzero(np.abs(np.diff(stamps[row:])) > JUMP_S)
    return float(stamps[row + jumps[0] if len(jumps) else -1])


def _words(newest: float, behind: float) -> str:
    if 1e9 < newest < 4e9:
        return "seconds since 1970, which is not the clock of the stream"
    away = f"{abs(behind):.3g} s" if abs(behind) < 3600 else f"{abs(behind) / 3600:.3g} h"
    if behind < 0:
        return f"{away} in the future"
    return f"{away} old on arrival: they are of another clock, as that of a device which counts from its start"
