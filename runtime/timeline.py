"""What the stamps say: which samples follow each other, and where some are missing."""

from __future__ import annotations

import math

from sjepa_deploy.errors import StreamError

CONSECUTIVE, REPEATED, EARLY, RESET = 0, -1, -2, -3
"""What `Timeline.place` returns where no sample is missing: the sample follows the last one; it has the last one's stamp; it is
older than the last one, and to be left out; the clock of the stamps was set back, and nothing is known of what came between."""

LARGEST_RATE_ERROR = 0.05
"""Beyond this ratio a stream is not at its nominal rate: a crystal is 0.01 % off, a bad one 0.5 %."""


class Timeline:
    """Follows the stamps of a stream sample by sample, so that its verdicts do not depend on chunks.

    A second-order loop predicts each stamp, and follows a drift of the device's clock. A stamp that is further from the prediction
    than the jitter explains is a loss. The jitter is measured: with the regular stamps of most amplifiers one lost sample is seen,
    with stamps made on arrival of radio packets only a loss beyond their jitter can be.

    Parameters
    ----------
    sfreq : float
        Nominal rate in Hz.
    max_jitter : float
        Seconds beyond which a deviation is always a loss. It holds alone during the first second.
    """

    def __init__(self, sfreq: float, max_jitter: float) -> None:
        self._nominal = 1 / sfreq
        self._max_jitter = max(max_jitter, 0.75 / sfreq)
        self._gain = min(0.1, 2 / sfreq)  # a time constant of half a second
        self._drift_gain = self._gain**2 / 4  # critically damped
        self._spread_gain = min(0.1, 1 / sfreq)
        self.restart()

    def restart(self) -> None:
        """Forget everything: the next sample is the first one."""
        self._period = self._nominal
        self._spread = 0.0
        self._n_known = 0  # samples since then
        self._n = 0  # samples since the last loss
        self._early = 0
        self._first = self._last = self._expected = math.nan

    def place(self, stamp: float) -> int:
        """Take the next stamp and return how many samples are missing before it, or one of the negative verdicts."""
        if self._n == 0:
            self._anchor(stamp)
            return CONSECUTIVE
        if stamp == self._last:
            return REPEATED
        residual = stamp - self._expected
        # During the first second the jitter is not known.
        tolerance = self._max_jitter
        if self._n_known * self._nominal > 1.0:
            tolerance = min(tolerance, max(0.5 * self._period, 6 * self._spread))
        if abs(residual) < tolerance:
            self._accept(stamp, residual)
            return CONSECUTIVE
        if residual > 0:
            self._anchor(stamp)
            return max(1, round(residual / self._period))
        if -1.0 < residual < 0 and self._early < 3:
            self._early += 1
            return EARLY
        self.restart()
        self._anchor(stamp)  # which refuses NaN
        return RESET

    def follow(self, stamp: float) -> None:
        """Take a sample that `place` called repeated as the next one all the same: its clock is coarse."""
        self._accept(stamp, stamp - self._expected)

    @property
    def sfreq(self) -> float | None:
        """The rate that the stamps show, in Hz; None before ten seconds without interruption."""
        if self._n * self._nominal < 10.0 or self._last <= self._first:
            return None
        return (self._n - 1) / (self._last - self._first)

    def _anchor(self, stamp: float) -> None:
        if not math.isfinite(stamp):
            raise StreamError(f"A sample is stamped {stamp}.", "Mend the source: every sample needs a finite time stamp.")
        self._first = self._last = stamp
        self._expected = stamp + self._period
        self._n = 1
        self._n_known += 1
        self._early = 0

    def _accept(self, stamp: float, residual: float) -> None:
        self._last = stamp
        self._n += 1
        self._n_known += 1
        self._early = 0
        self._spread += self._spread_gain * (abs(residual) - self._spread)
        self._period += self._drift_gain * residual
        self._expected += self._period + self._gain * residual
