"""Reads the stamps of a stream: which samples follow each other, and where samples are missing."""

from __future__ import annotations

import math
from collections import deque

from sjepa_deploy.errors import StreamError

CONSECUTIVE, REPEATED, BACK, EARLY, RESET, DOUBTFUL = 0, -1, -2, -3, -4, -5
"""Verdicts of `Timeline` on a sample before which no sample is missing.

CONSECUTIVE: the sample follows the last one. REPEATED: the sample has the last one's stamp. BACK: the sample is older than the
last one; ask `Timeline.go_back`. EARLY: leave the sample out. RESET: the clock of the stamps was set back. DOUBTFUL: the sample
follows the last one, unless samples are missing, which the next samples will show.
"""

LARGEST_RATE_ERROR = 0.05
"""Beyond this ratio a stream is not at its nominal rate: a crystal is 0.01 % off, a bad one 0.5 %."""

CONFIRM_S = 0.2
"""Seconds that a small delay must last before it is a loss, at least twice `max_jitter`: a held-up sender has caught up then."""

REGULAR = 0.05
"""Share of a period that a step of regular stamps may be off a whole number of periods.

Stamps that a device counts are off by their rounding; stamps that software takes on arrival are off by far more.
"""

REGULAR_S = 0.5
"""Seconds of regular steps after which stamps count as regular."""

KNOWN_S = 1.6
"""Seconds after which the jitter of irregular stamps is known: eight blocks of `CONFIRM_S`."""

LATE = 0.75
"""Periods above the earliest stamps from which on a stamp is late."""

N_SCATTERS = 5.0
"""No stamp is late within this many times the deviation of the earliest stamps of blocks from the line (three quarters of blocks
deviate less), nor beyond twice the delay of all but 2 % of the stamps."""

MOST_CONFIRM = 3.0
"""Times `CONFIRM_S` that a delay must last at most: twice as long as the delays that passed."""

N_REMEMBERED = 32
"""Blocks by whose earliest stamps the next ones are judged."""


class Timeline:
    """Follows the stamps of a stream sample by sample, so that its verdicts do not depend on chunks.

    There are two kinds of stamps. Of **regular** ones, which a device counted, every step is a whole number of periods, and a
    step of k + 1 periods is a loss of k samples, at once. All other stamps are **irregular**. Their jitter is mostly a delay, so
    the earliest stamps of every fifth of a second lie on a line, and `Timeline` follows this line. A sample that is later
    than this line by `max_jitter` means a loss at once. A smaller delay means a loss when all stamps of `CONFIRM_S` are late.
    What a loss does to the stamps goes neither into the line nor into the measures of jitter.

    Parameters
    ----------
    sfreq : float
        Nominal rate in Hz.
    max_jitter : float
        Seconds beyond which a deviation is a loss at once.
    trusted : bool
        Whether a sample that is later than the jitter of all others is a loss at once.

    Attributes
    ----------
    regular : bool
        Whether the stamps are regular now.
    """

    def __init__(self, sfreq: float, max_jitter: float, *, trusted: bool = False) -> None:
        self._nominal = 1 / sfreq
        self._max_jitter = max(max_jitter, LATE / sfreq)
        self._trusted = trusted
        self._n_block = max(2, round(max(CONFIRM_S, 2 * max_jitter) * sfreq))
        self._n_regular_needed = max(16, round(REGULAR_S * sfreq))
        self._most_early = max(3, round(sfreq))
        self._gain = min(0.1, 2 / sfreq)
        self.restart()

    def restart(self) -> None:
        """Forget everything: the next sample is the first one."""
        self._last = self._first = math.nan
        self._n = 0  # samples since the last loss
        self._n_known = 0  # samples since the start
        self._period = self._nominal  # of regular steps
        self.regular = False
        self._n_regular = self._n_skipped = 0  # regular steps in a row, and samples that they passed over
        self._was_regular = self._coarse = False
        self._hole, self._n_early = (math.inf, math.inf), 0  # the stamps around the last loss
        self._begin_line(math.nan, self._nominal)

    def place(self, stamp: float) -> int:
        """Take the next stamp and return how many samples are missing before it, or one of the verdicts.

        Raises
        ------
        StreamError
            If the stamp is no finite number.
        """
        step, period = stamp - self._last, self._period
        if self.regular and abs(step - period) < REGULAR * period:
            self._period += 0.02 * (step - period)
            self._accept(stamp)
            return CONSECUTIVE
        if not math.isfinite(stamp):
            raise StreamError(f"A sample is stamped {stamp}.", "Mend the source: every sample needs a finite time stamp.")
        if self._n_known == 0:
            self._last = self._first = stamp
            self._n = self._n_known = 1
            self._begin_line(stamp + period, period)
            return CONSECUTIVE
        if step == 0 and not self._coarse:
            if self._was_regular or self._n_known > self._n_regular_needed:
                return REPEATED
            self._coarse = True  # a packet under one stamp, in which neighbours may be equal
        if step < 0:
            return BACK
        n_skipped = self._follow_steps(stamp, step)
        if n_skipped:
            self._lose(stamp)
            self._begin_line(stamp + self._period, self._period)
            return n_skipped
        if self.regular:
            self._accept(stamp)
            return CONSECUTIVE
        return self._follow_line(stamp)

    def follow(self, stamp: float) -> None:
        """Take a sample that `place` called repeated as the next one all the same: its clock is coarse."""
        self._coarse = True
        self.place(stamp)

    def go_back(self, stamp: float) -> int:
        """Take a sample that `place` called back, and return a verdict.

        Irregular stamps go back by their jitter. Beyond that, a few samples may come out of order, and a late packet may hold as
        many as were missed: they are to be left out (`EARLY`). Or the clock was set back (`RESET`).
        """
        if not self.regular and stamp - self._expected >= -self._late():
            self._n_regular = self._n_skipped = 0
            return self._follow_line(stamp)
        in_hole = self._hole[0] < stamp < self._hole[1] and self._n_early < self._most_early
        if in_hole or (stamp - self._last > -1.0 and self._n_early < 3):
            self._n_early += 1
            return EARLY
        self.restart()
        self.place(stamp)
        return RESET

    @property
    def last(self) -> float:
        """Return the last stamp that was taken; NaN before the first one."""
        return self._last

    @property
    def lost_after(self) -> float:
        """Return the stamp after which the last loss was: it may show only later that samples are missing."""
        return self._hole[0]

    @property
    def doubted(self) -> tuple[float, int] | None:
        """Return after which stamp samples may be missing, and how many, if the next samples have to show it."""
        return (self._hole_if_late, max(1, round(self._least_late / self._slope))) if self._doubtful else None

    @property
    def sfreq(self) -> float | None:
        """Return the rate that the stamps show, in Hz; None before ten seconds, without loss if the stamps are irregular."""
        if self.regular and self._n_known * self._nominal > 10.0:
            return 1 / self._period
        if self._n * self._nominal < 10.0 or self._last <= self._first:
            return None
        return (self._n - 1) / (self._last - self._first)

    @property
    def rate_error(self) -> float:
        """Return the ratio by which `sfreq` may be off, because of the jitter of its first and last stamp."""
        return 0.0 if self.regular else 2 * self._reach / max(self._last - self._first, self._nominal)

    def _accept(self, stamp: float) -> None:
        self._last = stamp
        self._n += 1
        self._n_known += 1
        self._n_early = 0

    def _lose(self, stamp: float) -> None:
        self._hole = (min(self._hole_if_late, self._last), stamp)
        self._first = stamp
        self._n = self._n_skipped = 0
        self._accept(stamp)

    def _follow_steps(self, stamp: float, step: float) -> int:
        """Take a step of stamps, and return how many samples are missing if all steps are regular."""
        period = self._period
        n = round(max(0.0, min(step / period, 1e9)))
        self._was_regular = n > 0 and abs(step - n * period) < (REGULAR + min(0.001 * n, 0.2)) * period
        if not self._was_regular:
            if self.regular:
                self.regular = False
                held_up = self._n == 1 and step < 0.5 * period  # for whole periods by chance: what seemed lost comes at once now
                self._begin_line(self._hole[0] + 2 * period if held_up else self._last + period, period)
            self._n_regular = self._n_skipped = 0
            if 0.3 * period < step < 3 * period:  # the rate may not be the nominal one
                self._period += 0.1 * max(-0.02 * period, min(step - period, 0.02 * period))
            return 0
        self._period += 0.02 * (step / n - period)
        self._n_regular += 1
        self._n_skipped += n - 1
        if self._n_regular >= self._n_regular_needed and not self.regular:
            self.regular, self._coarse = True, False
        if not self.regular:
            return 0
        n_skipped, self._n_skipped = self._n_skipped, 0
        return n_skipped

    def _begin_line(self, expected: float, slope: float) -> None:
        self._expected, self._slope = expected, slope
        self._n_blocks = 0
        self._minima: deque[float] = deque(maxlen=N_REMEMBERED)
        self._scatter = 0.0
        self._reach = self._centre = 0.0  # of single stamps above the line
        self._jitter_if_late = (0.0, 0.0)
        self._n_below = 0
        self._longest = 0.0  # time in samples that stamps were late without a loss
        self._begin_block()

    def _begin_block(self) -> None:
        self._n_in_block, self._least = 0, math.inf
        self._n_late, self._least_late, self._doubtful = 0, math.inf, False
        self._hole_if_late = math.inf

    def _late(self) -> float:
        known = self._n_known * self._nominal > KNOWN_S
        if not known:
            return self._max_jitter
        return max(LATE * self._nominal, min(N_SCATTERS * self._scatter, 2 * self._reach))

    def _follow_line(self, stamp: float) -> int:
        """Judge a stamp that does not go back by the line of the earliest stamps."""
        nominal, above = self._nominal, stamp - self._expected
        known, late = self._n_known * nominal > KNOWN_S, self._late()
        beyond = max(late, 2 * self._reach)  # of any stamp so far
        if above - self._centre >= self._max_jitter or (self._trusted and known and above >= max(0.5 * nominal, 2 * self._reach)):
            n_lost = max(1, round((above - (0.0 if self._trusted else self._centre)) / self._slope))
            self._jump(stamp, n_lost)
            return n_lost
        if above < -late:
            self._n_below += 1
            self._accept(stamp)
            self._expected += self._slope
            if self._n_below >= 3:  # what came before was late
                self._expected = stamp + self._slope
                self._n_below = 0
                self._begin_block()
            return CONSECUTIVE
        self._n_below = 0
        if above > late:
            if not self._n_late:
                self._hole_if_late, self._jitter_if_late = self._last, (self._reach, self._centre)
            self._n_late += 1
            self._least_late = min(self._least_late, above)
            if self._n_late >= max(self._n_block, min(2 * self._longest, MOST_CONFIRM * self._n_block)):
                n_lost = max(1, round(self._least_late / self._slope))
                self._reach, self._centre = self._jitter_if_late
                self._jump(stamp, n_lost)
                return n_lost
            self._doubtful |= above > beyond
        else:
            self._longest = max(self._longest, self._n_late)
            if self._doubtful:  # held up: counts as one late sample
                self._reach = self._jitter_if_late[0] + 0.05 * max(nominal, self._jitter_if_late[0])
            self._n_late, self._least_late, self._doubtful = 0, math.inf, False
            self._hole_if_late = math.inf
            self._least = min(self._least, above)
        # The 98th percentile, and the mean, by steps that no single stamp can make large.
        self._reach += 0.05 * max(nominal, self._reach) * (0.98 if above > self._reach else -0.02 if self._reach > 0 else 0.0)
        self._centre += self._gain * (above - self._centre)
        self._n_in_block += 1
        self._expected += self._slope
        self._accept(stamp)
        if self._n_in_block >= self._n_block and not self._n_late:
            self._end_block()
        return DOUBTFUL if self._doubtful else CONSECUTIVE

    def _jump(self, stamp: float, n_lost: int) -> None:
        self._expected += (n_lost + 1) * self._slope
        n_skipped = max(0, self._n_skipped - n_lost)  # what steps have shown since, if they turn out to be regular
        self._lose(stamp)
        self._n_skipped = n_skipped
        self._begin_block()

    def _end_block(self) -> None:
        """Follow the earliest stamp of a block: all of its deviation at first, less and less later."""
        self._n_blocks = j = self._n_blocks + 1
        self._longest *= 0.995
        gain = max(0.3, (4 * j - 2) / (j * (j + 1)))
        drift_gain = max(0.0225, 6 / (j * (j + 1)) if j > 1 else 0.0)
        least = self._least
        self._minima.append(abs(least))
        self._scatter = sorted(self._minima)[3 * len(self._minima) // 4]
        shift = min(1.0, gain) * least
        self._expected += shift
        self._centre -= shift
        self._reach = max(0.0, self._reach - shift)
        slope = self._slope + min(1.0, drift_gain) * least / self._n_in_block
        bound = 1.2 * LARGEST_RATE_ERROR * self._nominal
        self._slope = max(self._nominal - bound, min(slope, self._nominal + bound))
        self._begin_block()
