"""Waits for a due time, and keeps the backend warm meanwhile, so that the next call is not the slow one after a pause.

An idle GPU lowers its clock and an idle core loses its caches: the first call after a pause takes longer. `KeepWarm` fills
pauses with dummy calls that never stand in the way of a real one.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

SPIN_S = 5e-4
"""Seconds before a due time in which the clock spins instead of sleeping: Linux wakes a sleeper 50 to 200 us late."""

N_REMEMBERED = 200
"""Calls whose longest is taken for how long the next one may take: one stall is forgotten after so many."""

N_FIRST = 3
"""Dummy calls made at the start, without which nothing would be known of their length."""


class Clock:
    """Tells the time in seconds and waits for a time: asleep while the time is far, spinning when it is near.

    Parameters
    ----------
    spin : float
        Seconds before the due time from which it spins.
    """

    def __init__(self, spin: float = SPIN_S) -> None:
        self.spin = spin

    now = staticmethod(time.perf_counter)

    def wait_until(self, due: float) -> float:
        """Return at `due` or, where that has passed, at once. Returns the time."""
        now = self.now()
        while now < due:
            if due - now > self.spin:
                time.sleep(due - now - self.spin)
            now = self.now()
        return now


class KeepWarm:
    """Makes dummy calls in idle gaps, as long as the calls end before the gap does.

    A dummy call is called a beat. The longest of the last `N_REMEMBERED` calls, dummies and those told to `saw`, tells whether a
    beat ends in time. There is no second thread: dummies run where `beat` or `wait_until` is called.

    Parameters
    ----------
    call : callable
        One call of the backend on a window that is thrown away. `KeepWarm` makes the call three times at once.
    period : float
        Seconds between the end of one call, real or dummy, and the next dummy.
    clock : Clock or None
        Time and waiting; None takes the real one.

    Attributes
    ----------
    n_beats : int
        Dummy calls so far, without the first three.
    busy_s : float
        Seconds spent in those dummy calls.

    Raises
    ------
    ValueError
        If the period is not positive.
    """

    def __init__(self, call: Callable[[], Any], period: float, clock: Clock | None = None) -> None:
        if not period > 0:
            raise ValueError(f"A period of {period} s is none. Use a positive one.")
        self._call, self.period, self._clock = call, period, clock or Clock()
        self._lengths: deque[float] = deque(maxlen=N_REMEMBERED)
        self.n_beats, self.busy_s = 0, 0.0
        for _ in range(N_FIRST):
            self._run()

    @property
    def longest_s(self) -> float:
        """Return the seconds that a call is expected to last."""
        return max(self._lengths)

    def saw(self, started: float, ended: float) -> None:
        """Take note of a real call: the call kept the backend warm, and its length says how long a call takes."""
        self._lengths.append(ended - started)
        self._next = ended + self.period

    def beat(self, until: float) -> bool:
        """Make one dummy call if the call ends before `until`, an instant of the clock. Returns whether the call was made."""
        if self._clock.now() + self.longest_s >= until:
            return False
        self.busy_s += self._run()
        self.n_beats += 1
        return True

    def wait_until(self, due: float) -> float:
        """Wait for `due` with a dummy call every `period`. Returns the time."""
        clock = self._clock
        latest = due - clock.spin
        while self._next < latest:
            clock.wait_until(self._next)
            if not self.beat(latest):
                break
        return clock.wait_until(due)

    def _run(self) -> float:
        started = self._clock.now()
        self._call()
        ended = self._clock.now()
        self.saw(started, ended)
        return ended - started
