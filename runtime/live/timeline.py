"""Reads the stamps of a stream: which samples follow each other, and where samples are missing."""

from __future__ import annotations

import math

from sjepa_deploy.errors import StreamError

CONSECUTIVE, REPEATED, EARLY, RESET = 0, -1, -2, -3
"""What `Timeline.place` returns where no sample is missing: the sample follows the last one; it has the last one's stamp; it is
older than the last one, and to be left out; the clock of the stamps was set back, and nothing is known of what came between."""

LARGEST_RATE_ERROR = 0.05
"""Beyond this ratio a stream is not at its nominal rate: a crystal is 0.01 % off, a bad one 0.5 %."""

CONFIRM_S = 0.2
"""Seconds that a small delay must last before it is a loss, at least twice `max_jitter`: a held-up sender has caught up then."""

N_JITTER = 4
"""Mean deviations that one stamp may be off without suspicion."""


class Timeline:
    """Follows the stamps of a stream sample by sample, so that its verdicts do not depend on chunks.

    A second-order loop predicts each stamp, and follows a drift of the device's clock. A stamp that is later than predicted by
    `max_jitter` means a loss at once. A smaller delay means a loss when the delay lasts for `CONFIRM_S`: stamps made in software
    are late when their process was held up, and the following ones are not. With regular stamps a single lost sample is found in
    this way. With irregular stamps a loss is found beyond their jitter, which is measured.

    Parameters
    ----------
    sfreq : float
        Nominal rate in Hz.
    max_jitter : float
        Seconds beyond which a deviation is a loss at once.
    trusted : bool
        Whether the stamps are regular: then half a sample of deviation is a loss at once.
    """

    def __init__(self, sfreq: float, max_jitter: float, *, trusted: bool = False) -> None:
        self._nominal = 1 / sfreq
        self._max_jitter = max(max_jitter, 0.75 / sfreq)
        self._n_confirm = 1 if trusted else max(2, round(max(CONFIRM_S, 2 * max_jitter) * sfreq))
        self._gain = min(0.1, 2 / sfreq)  # a time constant of half a second
        self._drift_gain = self._gain**2 / 4  # critically damped
        self._spread_gain = min(0.1, 1 / sfreq)
        self.restart()

    def restart(self) -> None:
        """Forget everything: the next sample is the first one."""
        self._period = self._nominal
        self._spread = 0.0  # mean deviation
        self._n_known = 0  # samples since then
        self._n = 0  # samples since the last loss
        self._n_early = 0
        self._n_late, self._least_late = 0, 0.0
        self._first = self._last = self._expected = math.nan

    def place(self, stamp: float) -> int:
        """Take the next stamp and return how many samples are missing before it, or one of the negative verdicts."""
        if self._n == 0:
            self._anchor(stamp)
            return CONSECUTIVE
        if stamp == self._last:
            return REPEATED
        residual = stamp - self._expected
        # During the first second neither the jitter nor the drift is known.
        known = self._n_known * self._nominal > 1.0
        tolerance = max(0.5 * self._period, N_JITTER * self._spread) if known else self._max_jitter
        if -tolerance < residual < tolerance:
            self._n_late = 0
            self._accept(stamp, residual)
            return CONSECUTIVE
        if tolerance <= residual < self._max_jitter:
            self._least_late = min(residual, self._least_late) if self._n_late else residual
            self._n_late += 1
            if self._n_late < self._n_confirm:
                self._accept(stamp, 0.0, deviation=residual)  # not followed: it may be over soon
                return CONSECUTIVE
            n_lost = max(1, round(self._least_late / self._period))
            self._expected += n_lost * self._period
            self._lose(stamp, self._expected + self._period)
            return n_lost
        if residual > 0:
            n_lost = max(1, round(residual / self._period))
            self._lose(stamp, stamp + self._period)
            return n_lost
        if stamp > self._last:  # it was late before
            self._accept(stamp, 0.0)
            self._expected = stamp + self._period
            return CONSECUTIVE
        if residual > -1.0 and self._n_early < 3:
            self._n_early += 1
            return EARLY
        self.restart()
        self._anchor(stamp)  # which refuses NaN
        return RESET

    def follow(self, stamp: float) -> None:
        """Take a sample that `place` called repeated as the next one all the same: its clock is coarse."""
        self._accept(stamp, stamp - self._expected)

    @property
    def sfreq(self) -> float | None:
        """The rate that the stamps show, in Hz; None before ten seconds without loss."""
        if self._n * self._nominal < 10.0 or self._last <= self._first:
            return None
        return (self._n - 1) / (self._last - self._first)

    def _anchor(self, stamp: float) -> None:
        if not math.isfinite(stamp):
            raise StreamError(f"A sample is stamped {stamp}.", "Mend the source: every sample needs a finite time stamp.")
        self._lose(stamp, stamp + self._period)

    def _lose(self, stamp: float, expected: float) -> None:
        self._first = self._last = stamp
        self._expected = expected
        self._n = 1
        self._n_known += 1
        self._n_early = self._n_late = 0

    def _accept(self, stamp: float, residual: float, deviation: float | None = None) -> None:
        self._last = stamp
        self._n += 1
        self._n_known += 1
        self._n_early = 0
        self._spread += self._spread_gain * (abs(residual if deviation is None else deviation) - self._spread)
        self._period += self._drift_gain * residual
        self._expected += self._period + self._gain * residual
