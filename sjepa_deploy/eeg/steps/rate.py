"""Brings signals to a model's sampling rate, at every ratio of rates.

Sample k after the step belongs to the time k / sfreq after the first sample of its stretch, in both forms: the zero-phase form is
the signal at this very time, and the causal form delays the signal by what `Resample.delay` states. A place between two samples,
such as an event's, moves to the nearest sample, by half a sample at most (`sjepa_deploy.eeg.recording.sample_at`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from sjepa_deploy.eeg.steps.base import FloatArray, Flow, Phase, Running, StreamStep, scipy_signal
from sjepa_deploy.eeg.steps.filters import NO_SECTIONS, CausalFilter, group_delay, settling_of
from sjepa_deploy.errors import RecordingError, StreamError

RATE_TOLERANCE = 1e-3
"""Share by which a recording may be slower than the model: a crystal's error, or a rate that a driver has estimated."""

PASS = 0.9
"""Share of the lower Nyquist frequency up to which the resampler passes everything; from that frequency on it stops."""

STOP_DB = 100.0
"""Attenuation in dB of the zero-phase form from the lower Nyquist frequency on."""

CAUSAL_ORDER, CAUSAL_STOP_DB = 8, 40.0
"""Order and attenuation of the causal form's Chebyshev-II low-pass: it stops from the new Nyquist frequency on."""

HALF_TAPS = 8
"""Input samples on each side of an output sample of the causal form that lies between two."""

MAX_UP = 1000
"""Largest numerator of a ratio of rates whose phases of the interpolation are kept; beyond it each is made when it is due."""

_PHASE_STEP = 1e-9  # of an input sample: phases that are equal to this share their taps (2 ps at 500 Hz)
_BLOCK = 1 << 21  # float64 values that are gathered at once: 16 MB


@dataclass(frozen=True, kw_only=True)
class Resample(StreamStep):
    """Brings the signal to the model's rate."""

    name: ClassVar[str] = "resample"

    def after(self, flow: Flow) -> Flow:
        """Return the signal at the model's rate."""
        return flow.replace(sfreq=flow.goal.sfreq)

    def told(self, flow: Flow) -> str:
        """Return both rates."""
        same = same_rate(flow.sfreq, flow.goal.sfreq)
        return "" if same else f"resampled from {flow.sfreq:g} to {flow.goal.sfreq:g} Hz"

    def sections(self, flow: Flow) -> FloatArray:
        """Return the sections of the low-pass that runs before the rate is reduced, shape (n_sections, 6)."""
        if ratio_of_rates(flow.sfreq, flow.goal.sfreq) >= 1:
            return NO_SECTIONS
        sections: FloatArray = scipy_signal().cheby2(
            CAUSAL_ORDER, CAUSAL_STOP_DB, flow.goal.sfreq / 2, "lowpass", fs=flow.sfreq, output="sos"
        )
        return sections

    def reducer(self, flow: Flow) -> RateReducer:
        """Return the part of the causal form that follows the low-pass."""
        return RateReducer(ratio_of_rates(flow.sfreq, flow.goal.sfreq), len(flow.ch_names))

    def causal(self, flow: Flow) -> Running:
        """Return low-pass and reduction in one."""
        return _LowPassedReducer(CausalFilter(self.sections(flow), len(flow.ch_names)), self.reducer(flow))

    def offline(self, data: FloatArray, flow: Flow) -> FloatArray:
        """Return the signal at the times of the new rate, see `resample`."""
        return resample(data, flow.sfreq, flow.goal.sfreq)

    def reach(self, flow: Flow) -> float:
        """Return half of the window, and infinity where no sample of the one rate meets one of the other."""
        if same_rate(flow.sfreq, flow.goal.sfreq):
            return 0.0
        ratio, exact = ratio_of_rates(flow.sfreq, flow.goal.sfreq), Fraction(flow.goal.sfreq) / Fraction(flow.sfreq)
        drift = abs(ratio / exact - 1) > 1e-14  # 24 h at 1 kHz: 1e-6 of a sample
        return math.inf if drift else float(_half_window(flow.sfreq, flow.goal.sfreq)[0])

    def n_times(self, n_times: int, flow: Flow, phase: Phase) -> int:
        """Return how many samples come of `n_times`."""
        sfreq, goal = flow.sfreq, flow.goal.sfreq
        if phase == "causal":
            return math.ceil(n_times * ratio_of_rates(sfreq, goal))
        return n_times if same_rate(sfreq, goal) else resampled_n_times(n_times, sfreq, goal)

    def settling(self, flow: Flow) -> float:
        """Return the time in which the low-pass decays, and that of the interpolation's samples."""
        between = ratio_of_rates(flow.sfreq, flow.goal.sfreq).numerator > 1
        return settling_of(self.sections(flow), flow.sfreq) + (2 * HALF_TAPS / flow.sfreq if between else 0.0)

    def delay(self, hertz: float, flow: Flow) -> float:
        """Return the delay of the low-pass and of the interpolation."""
        between = ratio_of_rates(flow.sfreq, flow.goal.sfreq).numerator > 1
        return group_delay(self.sections(flow), flow.sfreq, hertz) + (HALF_TAPS / flow.sfreq if between else 0.0)


class _LowPassedReducer(Running):
    def __init__(self, low_pass: CausalFilter, reducer: RateReducer) -> None:
        self._low_pass, self._reducer = low_pass, reducer

    def start(self, sample: FloatArray) -> FloatArray:
        return self._reducer.start(self._low_pass.start(sample))

    def __call__(self, samples: FloatArray) -> FloatArray:
        return self._reducer(self._low_pass(samples))


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


class RateReducer(Running):
    """Reduces the rate: takes every n-th sample or, where the ratio is no integer, interpolates by a windowed sinc.

    Output sample k comes out with input sample k / ratio, rounded down. The sample is the signal at that point; where it is
    interpolated, `HALF_TAPS` input samples before that point.

    Parameters
    ----------
    ratio : Fraction
        Output samples for each input sample: at most 1, but for a crystal's error.
    n_chans : int
        Number of channels.

    Attributes
    ----------
    rows : list of int
        The row of the last input after which each sample of the last output came out.
    """

    def __init__(self, ratio: Fraction, n_chans: int) -> None:
        self._up, self._down = ratio.numerator, ratio.denominator
        self._half = HALF_TAPS if self._up > 1 else 0
        self._recent = np.zeros((2 * self._half, n_chans))
        self._taps = _sinc_taps(np.arange(self._up) / self._up, self._half) if self._up <= MAX_UP else None
        self._position = 0  # the next output sample, in input samples x up, from the next input sample on
        self.rows: list[int] = []

    def start(self, sample: FloatArray) -> FloatArray:
        """Start at the next input sample, as if `sample` had been there for ever."""
        self._position = 0
        self._recent[:] = sample
        return sample

    def __call__(self, samples: FloatArray) -> FloatArray:
        """Take samples, shape (n_samples, n_chans), and return those at the new rate."""
        n, up = len(samples), self._up
        if not self._half:
            rows = range(self._position, n, self._down)
            self._position += len(rows) * self._down - n
            self.rows = list(rows)
            return samples[rows.start : n : self._down]
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
        self.rows = rows_out
        return np.array(made) if made else samples[:0]


def _sinc_taps(phases: FloatArray, half: int) -> FloatArray:
    """Return the interpolation between input samples at each phase, shape (n, 2 * half): Kaiser-windowed, of unit sum."""
    if not half:
        return np.empty((0, 0))
    away = np.arange(-half + 1, half + 1)[None, :] - phases[:, None]
    window = np.i0(8.0 * np.sqrt(np.clip(1 - (away / half) ** 2, 0, None))) / np.i0(8.0)
    taps = np.sinc(away) * window
    unit: FloatArray = taps / taps.sum(axis=1, keepdims=True)
    return unit


def check_rate(sfreq: float, sfreq_of_model: float, what: str = "recording") -> None:
    """Refuse a rate below the model's.

    Parameters
    ----------
    sfreq, sfreq_of_model : float
        Rates in Hz.
    what : str
        What has the rate, for the message.

    Raises
    ------
    RecordingError
        If `sfreq` is lower than `sfreq_of_model` by more than `RATE_TOLERANCE`.
    """
    if sfreq < sfreq_of_model * (1 - RATE_TOLERANCE):
        raise RecordingError(
            f"The {what} is sampled at {sfreq:g} Hz, the model at {sfreq_of_model:g} Hz.",
            "Record at the model's rate or above: upsampling cannot bring back what was not recorded.",
        )


def same_rate(sfreq_in: float, sfreq_out: float) -> bool:
    """Return whether two rates in Hz are taken as one."""
    return math.isclose(sfreq_in, sfreq_out, rel_tol=1e-9)


def resampled_n_times(n_times: int, sfreq_in: float, sfreq_out: float) -> int:
    """Return the number of samples at `sfreq_out`, the first at time 0, between the first and the last of `n_times` samples."""
    return math.floor((n_times - 1) * (sfreq_out / sfreq_in) * (1 + 1e-12) + 1e-9) + 1 if n_times else 0


def resample(data: NDArray[np.float64], sfreq_in: float, sfreq_out: float) -> NDArray[np.float64]:
    """Return a signal at the times k / `sfreq_out`, k = 0, 1, ...

    Each sample is a sum of the samples around it, weighted by a sinc in a Kaiser window that is centred on the sample's very
    time. So no sample depends on the length of the signal, nor on samples further away than the window (0.64 s at 100 Hz). The
    rates need not have a ratio of integers. The sinc cuts off between `PASS` and all of the lower Nyquist frequency. The weights
    sum to one: offsets pass as they are. Ends are continued by point reflection, as MNE does.

    Parameters
    ----------
    data : ndarray of float64, shape (n_chans, n_times)
        The signal at `sfreq_in`; sample i was taken at i / `sfreq_in`.
    sfreq_in, sfreq_out : float
        Rates in Hz.

    Returns
    -------
    ndarray of float64, shape (n_chans, n_out)
        The signal at `sfreq_out`. The same array if the rates are equal.

    References
    ----------
    Window and its length: Kaiser's formulas, Oppenheim and Schafer, Discrete-Time Signal Processing, 3rd ed., section 7.5.3.
    """
    n_times = data.shape[1]
    n_out = resampled_n_times(n_times, sfreq_in, sfreq_out)
    if same_rate(sfreq_in, sfreq_out) or n_times == 0:
        return data
    half, cutoff = _half_window(sfreq_in, sfreq_out)
    padded = _continued(data, half)
    around = sliding_window_view(padded, 2 * half, axis=1).swapaxes(0, 1)  # (n, n_chans, 2 * half), a view
    position = np.arange(n_out) * (sfreq_in / sfreq_out)
    before = np.floor(position + _PHASE_STEP / 2).astype(np.intp)
    phases, which = np.unique(np.rint((position - before) / _PHASE_STEP), return_inverse=True)
    out = np.empty((n_out, len(data)))
    step = max(1, _BLOCK // (2 * half * len(data)))
    taps = _taps(phases * _PHASE_STEP, half, cutoff) if len(phases) <= 4096 else None
    for start in range(0, n_out, step):
        rows = which[start : start + step]
        weights = _taps(phases[rows] * _PHASE_STEP, half, cutoff) if taps is None else taps[rows]
        # rows `before - half + 1` to `before + half` of the signal, which the padding has moved by half
        out[start : start + step] = np.matmul(around[before[start : start + step] + 1], weights[:, :, None])[..., 0]
    return np.ascontiguousarray(out.T)


def _half_window(sfreq_in: float, sfreq_out: float) -> tuple[int, float]:
    """Return half the samples of the window of `resample`, and where its sinc cuts off in half cycles a sample of the input."""
    nyquist = min(1.0, sfreq_out / sfreq_in)  # the lower one
    width = nyquist * (1 - PASS)
    return math.ceil((STOP_DB - 7.95) / (2.285 * np.pi * width) / 2), nyquist * (1 + PASS) / 2


def _taps(phase: NDArray[np.float64], half: int, cutoff: float) -> NDArray[np.float64]:
    """Return the weights of the 2 * half samples around each point, shape (n_phases, 2 * half)."""
    beta = 0.1102 * (STOP_DB - 8.7)
    away = np.arange(-half + 1, half + 1)[None, :] - phase[:, None]
    window = np.i0(beta * np.sqrt(np.clip(1 - (away / half) ** 2, 0, None)))
    taps = np.where(np.abs(away) < half, np.sinc(cutoff * away) * window, 0.0)  # as many on either side
    unit: NDArray[np.float64] = taps / taps.sum(axis=1, keepdims=True)
    return unit


def _continued(data: NDArray[np.float64], n: int) -> NDArray[np.float64]:
    """Return `data` with n samples more on each side: its point reflection, and where that is too short, its last value."""
    inner = min(n, data.shape[1] - 1)
    first, last = data[:, :1], data[:, -1:]
    before = 2 * first - data[:, inner:0:-1]
    after = 2 * last - data[:, -2 : -2 - inner : -1] if inner else data[:, :0]
    parts = [
        np.repeat(before[:, :1] if inner else first, n - inner, axis=1),
        before,
        data,
        after,
        np.repeat(after[:, -1:] if inner else last, n - inner, axis=1),
    ]
    return np.concatenate(parts, axis=1)
