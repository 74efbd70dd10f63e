"""Filters a live stream and reduces its rate: the causal twin of `sjepa_deploy.eeg.recording.fit_recording`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sjepa_deploy.eeg.reference import average_reference
from sjepa_deploy.eeg.resample import RATE_TOLERANCE
from sjepa_deploy.errors import MissingDependencyError, StreamError
from sjepa_deploy.spec import ModelSpec, Preprocessing

if TYPE_CHECKING:
    from collections.abc import Sequence

FloatArray = NDArray[np.float64]

BAND_ORDER = 2
"""Order of the Butterworth high-pass and low-pass at the band's edges."""

STOP_ORDER, STOP_DB = 8, 40.0
"""Order and attenuation of the Chebyshev-II low-pass before the rate is reduced: it stops from the new Nyquist frequency on."""

HALF_TAPS = 8
"""Input samples on each side of an output sample that lies between two."""

MAX_UP = 1000
"""Largest numerator of a ratio of rates whose phases of the interpolation are kept; beyond it each is made when it is due."""


def _scipy_signal() -> Any:
    try:
        import scipy.signal
    except ImportError as error:
        raise MissingDependencyError("SciPy", "stream") from error
    return scipy.signal


def ratio_of_rates(sfreq_in: float, sfreq_out: float) -> Fraction:
    """Return output samples for each input sample: a ratio of small integers, or one that is equal to 1e-15.

    Raises
    ------
    StreamError
        If the input is slower than the output by more than `RATE_TOLERANCE`.
    """
    if sfreq_in < sfreq_out * (1 - RATE_TOLERANCE):
        raise StreamError(
            f"The stream has {sfreq_in:g} Hz, the model {sfreq_out:g} Hz.",
            "Stream at the model's rate or above: upsampling cannot bring back what was not recorded.",
        )
    ratio = Fraction(sfreq_out / sfreq_in).limit_denominator(100_000)
    if ratio.numerator > MAX_UP or not math.isclose(float(ratio), sfreq_out / sfreq_in, rel_tol=1e-9):
        return Fraction(sfreq_out) / Fraction(sfreq_in)  # of the floating-point numbers themselves
    return ratio


def design_sos(preprocessing: Preprocessing, sfreq_in: float, sfreq_out: float) -> FloatArray:
    """Return the second-order sections of the band-pass and the low-pass before the decimation, shape (n_sections, 6).

    The band's edges are those of the preprocessing, at the input's rate. An empty array means no filter.
    """
    signal = _scipy_signal()
    sections = []
    if preprocessing.l_freq is not None:
        sections.append(signal.butter(BAND_ORDER, preprocessing.l_freq, "highpass", fs=sfreq_in, output="sos"))
    if preprocessing.h_freq is not None:
        sections.append(signal.butter(BAND_ORDER, preprocessing.h_freq, "lowpass", fs=sfreq_in, output="sos"))
    if ratio_of_rates(sfreq_in, sfreq_out) < 1:
        sections.append(signal.cheby2(STOP_ORDER, STOP_DB, sfreq_out / 2, "lowpass", fs=sfreq_in, output="sos"))
    return np.concatenate(sections) if sections else np.empty((0, 6))


class CausalFilter:
    """Filters by second-order sections with carried state: the output does not depend on how the input is cut into chunks.

    The filter starts on the steady state of the first sample (`scipy.signal.sosfilt_zi`), so that an electrode offset makes no
    transient.

    Parameters
    ----------
    sos : ndarray, shape (n_sections, 6)
        The filter; none passes its input on.
    n_chans : int
        Number of channels.
    """

    def __init__(self, sos: FloatArray, n_chans: int) -> None:
        self._sos = sos
        self._sosfilt = _scipy_signal().sosfilt
        self._zi: FloatArray = np.zeros((0, 2)) if not len(sos) else _scipy_signal().sosfilt_zi(sos)
        self._state = np.zeros((len(sos), 2, n_chans))

    def start(self, sample: FloatArray, channels: Sequence[int] | slice = slice(None)) -> None:
        """Start `channels` as if `sample`, shape (n_chans,), had been there for ever."""
        self._state[:, :, channels] = self._zi[:, :, None] * sample[channels]

    def __call__(self, samples: FloatArray) -> FloatArray:
        """Filter samples of shape (n_samples, n_chans)."""
        if not len(self._sos) or not len(samples):
            return samples
        filtered: FloatArray
        filtered, self._state = self._sosfilt(self._sos, samples, axis=0, zi=self._state)
        return filtered


class RateReducer:
    """Reduces the rate: takes every n-th sample or, where the ratio is no integer, interpolates by a windowed sinc.

    Output sample k comes out with input sample k / ratio, rounded down. The sample is the signal at that point; where it is
    interpolated, `HALF_TAPS` input samples before that point.

    Parameters
    ----------
    ratio : Fraction
        Output samples for each input sample: at most 1, but for a crystal's error.
    n_chans : int
        Number of channels.
    """

    def __init__(self, ratio: Fraction, n_chans: int) -> None:
        self._up, self._down = ratio.numerator, ratio.denominator
        self._half = HALF_TAPS if self._up > 1 else 0
        self._recent = np.zeros((2 * self._half, n_chans))
        self._taps = _sinc_taps(np.arange(self._up) / self._up, self._half) if self._up <= MAX_UP else None
        self.start()

    def start(self, sample: FloatArray | None = None) -> None:
        """Start at the next input sample, as if `sample` had been there for ever."""
        self._position = 0  # the next output sample, in input samples x up, from the next input sample on
        self._recent[:] = 0.0 if sample is None else sample

    def __call__(self, samples: FloatArray) -> tuple[FloatArray, list[int]]:
        """Take samples, shape (n_samples, n_chans), and return those at the new rate and the rows after which each came out."""
        n, up = len(samples), self._up
        if not self._half:
            rows = range(self._position, n, self._down)
            self._position += len(rows) * self._down - n
            return samples[rows.start : n : self._down], list(rows)
        line = np.concatenate([self._recent, samples])  # row i is input sample i - 2 * half
        made, rows_out = [], []
        while (newest := self._position // up) < n:
            phase = self._position % up
            taps = _sinc_taps(np.array([phase / up]), self._half)[0] if self._taps is None else self._taps[phase]
            first = newest + 1  # of the 2 * half rows that end with `newest`
            out = taps[0] * line[first]
            for k in range(1, 2 * self._half):  # one by one: the sum must not depend on how BLAS cuts it
                out += taps[k] * line[first + k]
            made.append(out)
            rows_out.append(newest)
            self._position += self._down
        self._position -= n * up
        self._recent = line[n:].copy()
        return (np.array(made) if made else samples[:0]), rows_out


def _sinc_taps(phases: FloatArray, half: int) -> FloatArray:
    """Return the interpolation between input samples at each phase, shape (n, 2 * half): Kaiser-windowed, of unit sum."""
    if not half:
        return np.empty((0, 0))
    away = np.arange(-half + 1, half + 1)[None, :] - phases[:, None]
    window = np.i0(8.0 * np.sqrt(np.clip(1 - (away / half) ** 2, 0, None))) / np.i0(8.0)
    taps = np.sinc(away) * window
    unit: FloatArray = taps / taps.sum(axis=1, keepdims=True)
    return unit


@dataclass(frozen=True, kw_only=True)
class AlgorithmicDelay:
    """Says by how many seconds the filters delay a rhythm.

    Attributes
    ----------
    at_hz : tuple of (float, float)
        Frequency in Hz and delay.
    """

    at_hz: tuple[tuple[float, float], ...]


def algorithmic_delay(sos: FloatArray, sfreq_in: float, ratio: Fraction) -> AlgorithmicDelay:
    """Return the group delay of the sections, -d(phase)/d(omega), plus that of the interpolation."""
    late = HALF_TAPS / sfreq_in if ratio.numerator > 1 else 0.0
    at = []
    for hertz in (2.0, 4.0, 10.0, 20.0):
        if hertz >= 0.4 * sfreq_in * float(ratio):
            continue
        step = hertz * 1e-3
        turn = np.exp(-2j * np.pi * np.array([hertz - step, hertz + step]) / sfreq_in)
        response = np.ones(2, complex)
        for b0, b1, b2, a0, a1, a2 in sos:
            response *= (b0 + b1 * turn + b2 * turn**2) / (a0 + a1 * turn + a2 * turn**2)
        phase = float(np.angle(response[1] / response[0]))
        at.append((hertz, -phase / (2 * np.pi * 2 * step) + late))
    return AlgorithmicDelay(at_hz=tuple(at))


class Preprocessor:
    """Preprocesses one stream for one model: filter, rate, channels and reference.

    In this order: causal band-pass and low-pass, reduction of the rate, channels by a matrix (which interpolates), average
    reference. Every step gives the same bits for any chunks.

    Parameters
    ----------
    spec : ModelSpec
        The model.
    sfreq : float
        Rate of the stream in Hz.
    matrix : ndarray, shape (n_chans of the model, n_chans of the stream)
        Channels of the model from those of the stream, see `sjepa_deploy.eeg.interpolation`.

    Raises
    ------
    StreamError
        If one channel is to be referenced to the average of one.
    """

    def __init__(self, spec: ModelSpec, sfreq: float, matrix: FloatArray) -> None:
        self.ratio = ratio_of_rates(sfreq, spec.sfreq)
        self.sos = design_sos(spec.preprocessing, sfreq, spec.sfreq)
        self.delay = algorithmic_delay(self.sos, sfreq, self.ratio)
        n_in = matrix.shape[1]
        self._filter = CausalFilter(self.sos, n_in)
        self._reducer = RateReducer(self.ratio, n_in)
        self._average = spec.preprocessing.reference == "average"
        if self._average and spec.n_chans == 1:
            raise StreamError(
                "Nothing is left of one channel that is referenced to the average of one.",
                "Export the model with --reference none.",
            )
        self.set_matrix(matrix)

    def set_matrix(self, matrix: FloatArray) -> None:
        """Use another matrix from the next sample on."""
        single = ((matrix != 0).sum(axis=1) == 1) & (matrix.max(axis=1) == 1.0)
        self._picks = matrix.argmax(axis=1)
        self._as_it_is = bool(single.all()) and np.array_equal(self._picks, np.arange(matrix.shape[1]))
        self._mixed = np.flatnonzero(~single)
        self._weights = np.ascontiguousarray(matrix[self._mixed])

    def start(self, sample: FloatArray) -> None:
        """Start on `sample`, shape (n_chans of the stream,), as if it had been there for ever."""
        self._filter.start(sample)
        self._reducer.start(self._filter_of_constant(sample))

    def restart_channels(self, channels: Sequence[int], sample: FloatArray) -> None:
        """Start some channels of the stream anew on their values in `sample`."""
        self._filter.start(sample, channels)

    def __call__(self, samples: FloatArray) -> tuple[FloatArray, list[int]]:
        """Take samples of the stream, shape (n_samples, n_chans of the stream).

        Returns
        -------
        samples : ndarray, shape (n_out, n_chans of the model)
            Samples at the model's rate.
        rows : list of int
            The row of the input after which each of them came out.
        """
        reduced, rows = self._reducer(self._filter(samples))
        if not rows:
            return np.empty((0, len(self._picks))), rows
        # Sums run over contiguous rows, one sample at a time: else their order, and the last bit, would depend on the chunk.
        fitted = np.ascontiguousarray(reduced if self._as_it_is else reduced[:, self._picks])
        if len(self._mixed):
            for i, sample in enumerate(reduced):
                fitted[i, self._mixed] = (self._weights * sample).sum(axis=1)
        if self._average:
            fitted = average_reference(fitted, axis=1)
        return fitted, rows

    def _filter_of_constant(self, sample: FloatArray) -> FloatArray:
        """Return what the filter gives for a sample that was there for ever: its gain at 0 Hz times the sample."""
        gain = 1.0
        for b0, b1, b2, a0, a1, a2 in self.sos:
            gain *= (b0 + b1 + b2) / (a0 + a1 + a2)
        return gain * sample
