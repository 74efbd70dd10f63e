"""Gives samples that a device numbers regular stamps."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

BANDWIDTH = 0.01
"""Bandwidth in Hz of the loop by which stamps follow arrivals: so slow that steps are even, within 0.5 % of a period."""

MOST_ERROR_S = 0.05
"""Seconds between a stamp and the arrival for which an arrival counts at most, so that a packet that is held up moves little."""

ASTRAY_S = 0.1
"""Seconds between a stamp and the arrival that are far."""

CONFIRM_S = 0.5
"""Seconds for which samples must be late by over half of all numbers before that many were lost: a burst catches up at once."""

MOST_ASTRAY_S = 10.0
"""Seconds of samples that may be far: a radio link stalls for less."""


class CountedStamps:
    """Gives samples regular stamps by the numbers that a device gives them, and by when they came.

    The number of a sample tells how many samples after the last one it was taken, also when packets arrive in bursts. The stamps
    follow the arrivals as a second-order delay-locked loop does [1]_. Call `begin` first.

    Parameters
    ----------
    sfreq : float
        Nominal rate in Hz.

    Attributes
    ----------
    lost : int
        Samples that were missing among the last ones.
    breaks : list of int
        Rows of the last ones before which so much time passed that the numbers may have begun again: nothing is known of what
        came between.
    astray : bool
        Whether the arrivals have been far from the stamps for so long that the numbers do not count samples.

    References
    ----------
    .. [1] Fons Adriaensen, "Using a DLL to filter time", 2005.
    """

    def __init__(self, sfreq: float) -> None:
        self._period = 1 / sfreq
        omega = 2 * math.pi * BANDWIDTH / sfreq
        self._b, self._c = math.sqrt(2) * omega, omega**2
        self._step = 1.0
        self._largest, self._n_numbers = 0.0, 0  # how many numbers there are; 0: not known before they begin again
        self._number = self._last = self._late_since = math.nan
        self._n_astray, self._most_astray = 0, round(MOST_ASTRAY_S * sfreq)
        self.lost, self.breaks, self.astray = 0, list[int](), False

    def begin(self, numbers: NDArray[np.float64], arrivals: NDArray[np.float64]) -> bool:
        """Take the first samples, and return whether their numbers count them: their steps are equal, but for losses and a wrap.

        The parameters are those of `stamps`.
        """
        steps = np.diff(numbers)
        self._step = float(np.median(steps))
        if not (self._step > 0 and np.mean(steps == self._step) > 0.8):
            return False
        ahead = np.arange(1 - len(numbers), 1) * self._period
        self._number, self._last = float(numbers[-1]), float(np.mean(arrivals - ahead))
        return True

    def stamps(self, numbers: NDArray[np.float64], arrivals: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the stamps of samples.

        Parameters
        ----------
        numbers : ndarray of float64, shape (n_samples,)
            Numbers of the samples, which begin again after the largest one.
        arrivals : ndarray of float64, shape (n_samples,)
            When the samples came, in seconds.
        """
        stamps, self.lost, self.breaks = np.empty(len(arrivals)), 0, []
        for i, (number, arrival) in enumerate(zip(numbers.tolist(), arrivals.tolist(), strict=True)):
            n = self._samples_to(number)
            late = (arrival - self._last) / self._period - n
            if self._n_numbers and late > self._n_numbers / 2:
                if math.isnan(self._late_since):
                    self._late_since = arrival
                    self.breaks.append(i)
                elif arrival - self._late_since > CONFIRM_S:
                    n += self._n_numbers * round(late / self._n_numbers)
                    self._late_since = math.nan
            else:
                self._late_since = math.nan
            self.lost += n - 1
            expected = self._last + n * self._period
            error = max(-MOST_ERROR_S, min(arrival - expected, MOST_ERROR_S))
            self._last = stamps[i] = expected + self._b * error
            self._period += self._c * error
            self._number = number
            self._n_astray = max(0, self._n_astray + (1 if abs(arrival - expected) > ASTRAY_S else -1))
            self.astray |= self._n_astray > self._most_astray
        return stamps

    def _samples_to(self, number: float) -> int:
        """Return how many samples after the last one a sample is, if the numbers have begun again once at most."""
        n = round((number - self._number) / self._step)
        if n <= 0 or self._n_numbers:
            self._n_numbers = max(self._n_numbers, round(max(self._largest, number) / self._step) + 1)
        self._largest = max(self._largest, number)
        return n if n > 0 else n + self._n_numbers
