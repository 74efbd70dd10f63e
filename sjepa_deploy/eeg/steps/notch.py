"""Removes mains hum: a narrow notch at the mains frequency and at its harmonics."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from sjepa_deploy.eeg.steps.base import SETTLED, FloatArray, Flow, scipy_signal
from sjepa_deploy.eeg.steps.checks import check_positive
from sjepa_deploy.eeg.steps.filters import Filter
from sjepa_deploy.errors import SpecError

FORGOTTEN = 1e-9
"""Share of a transient that is left where the zero-phase form runs on a part of a stretch: hum may be 1000 times the EEG."""


@dataclass(frozen=True, kw_only=True)
class Notch(Filter):
    """Removes the mains frequency and its harmonics.

    Each notch is one second-order section (`scipy.signal.iirnotch`). The causal form carries the state of the sections. The
    zero-phase form runs the same sections forwards and backwards (`scipy.signal.sosfiltfilt`), so both forms have their zeros at
    the same frequencies, and the zero-phase form is twice as deep beside them.

    Attributes
    ----------
    freq : float
        Mains frequency in Hz: 50 or 60.
    harmonics : int or None
        Number of notches, at `freq`, 2 `freq` and so on; None are all below the Nyquist frequency. Notches that do not lie below
        the Nyquist frequency of the signal are left out: nothing is there.
    quality : float
        Frequency of a notch divided by its width at -3 dB. 30 makes the notch at 50 Hz 1.7 Hz wide.

    References
    ----------
    S. J. Orfanidis, Introduction to Signal Processing, 1996, section 8.2.2 (the design of `iirnotch`).
    """

    name: ClassVar[str] = "notch"

    freq: float = 50.0
    harmonics: int | None = None
    quality: float = 30.0

    def __post_init__(self) -> None:
        check_positive(self.freq, "The frequency of the notch in Hz")
        check_positive(self.quality, "The quality of the notch")
        if self.harmonics is not None and self.harmonics < 1:
            raise SpecError(f"The notch has {self.harmonics} frequencies.", "Use one or more, or None for all of them.")

    def frequencies(self, sfreq: float) -> tuple[float, ...]:
        """Return the frequencies of the notches of a signal of `sfreq` Hz.

        Raises
        ------
        SpecError
            If not even the first lies below the Nyquist frequency.
        """
        below = math.ceil(sfreq / 2 / self.freq) - 1  # strictly below
        if below < 1:
            raise SpecError(
                f"The notch at {self.freq:g} Hz is not below half the sampling rate of {sfreq:g} Hz.",
                "Put the notch before the resampling, or leave it out: the recording does not hold this frequency.",
            )
        n = below if self.harmonics is None else min(self.harmonics, below)
        return tuple(self.freq * (k + 1) for k in range(n))

    def sections(self, flow: Flow) -> FloatArray:
        """Return one section for each notch, shape (n_notches, 6)."""
        signal = scipy_signal()
        sections: FloatArray = np.concatenate(
            [
                signal.tf2sos(*signal.iirnotch(frequency, self.quality, fs=flow.sfreq))
                for frequency in self.frequencies(flow.sfreq)
            ]
        )
        return sections

    def told(self, flow: Flow) -> str:
        """Return the frequencies."""
        return f"notch-filtered at {', '.join(f'{frequency:g}' for frequency in self.frequencies(flow.sfreq))} Hz"

    def offline(self, data: FloatArray, flow: Flow) -> FloatArray:
        """Return the sections run forwards and backwards. Ends are continued by point reflection, for the settling time."""
        padding = min(math.ceil(self.settling(flow) * flow.sfreq), data.shape[1] - 1)
        filtered: FloatArray = scipy_signal().sosfiltfilt(self.sections(flow), data, axis=1, padlen=padding)
        return filtered

    def reach(self, flow: Flow) -> float:
        """Return the samples in which the slowest pole decays to `FORGOTTEN`."""
        return math.ceil(self.settling(flow) * flow.sfreq * math.log(FORGOTTEN) / math.log(SETTLED))
