"""Brings recordings to a model's sampling rate: exact in time at every rate, whatever else is in the file."""

from __future__ import annotations

import math

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from sjepa_deploy.errors import RecordingError

RATE_TOLERANCE = 1e-3
"""Share by which a recording may be slower than the model: a crystal's error, or a rate that a driver has estimated."""

PASS = 0.9
"""Share of the lower Nyquist frequency up to which the resampler passes everything; from that frequency on it stops."""

STOP_DB = 100.0
"""Attenuation in dB from the lower Nyquist frequency on."""

_PHASE_STEP = 1e-9  # of an input sample: phases that are equal to this share their taps (2 ps at 500 Hz)
_BLOCK = 1 << 21  # float64 values that are gathered at once: 16 MB


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
    if math.isclose(sfreq_in, sfreq_out, rel_tol=1e-9) or n_times == 0:
        return data
    nyquist = min(1.0, sfreq_out / sfreq_in)  # the lower one, in half cycles a sample of the input
    cutoff, width = nyquist * (1 + PASS) / 2, nyquist * (1 - PASS)
    half = math.ceil((STOP_DB - 7.95) / (2.285 * np.pi * width) / 2)
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
