"""Standardises signals: by a moving mean and spread, or each window by its own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from sjepa_deploy.eeg.steps.base import (
    SETTLED,
    FloatArray,
    Flow,
    Goal,
    Running,
    StreamStep,
    WindowStep,
    run_offline,
    scipy_signal,
)
from sjepa_deploy.eeg.steps.checks import check_positive
from sjepa_deploy.errors import SpecError


@dataclass(frozen=True, kw_only=True)
class ExponentialStandardise(StreamStep):
    """Standardises each channel by its exponentially moving mean and spread, as braindecode does.

    The definition is that of `braindecode.preprocessing.exponential_moving_standardize` without its initial block: with
    a = `factor_new` and sample x_t, the mean is m_t = sum_i (1-a)^i x_(t-i) / sum_i (1-a)^i, the variance v_t is the same mean
    of (x_t - m_t)^2, and the output is (x_t - m_t) / max(sqrt(v_t), eps). Both forms are causal. braindecode standardises an
    initial block by the mean and spread of the whole block; that looks ahead, and cannot run live.

    Attributes
    ----------
    factor_new : float
        Weight of a new sample, above 0 and below 1. 1e-3 forgets half in 693 samples.
    eps : float
        Least spread to divide by, in the unit at this place. braindecode's 1e-4 suits microvolts; spreads of EEG in volts are
        below it.
    """

    name: ClassVar[str] = "exponential-standardise"
    causal_only: ClassVar[bool] = True
    changes_unit: ClassVar[bool] = True

    factor_new: float = 1e-3
    eps: float = 1e-4

    def __post_init__(self) -> None:
        check_positive(self.eps, "The least spread (eps) of the standardisation")
        if not 0 < self.factor_new < 1:
            raise SpecError(
                f"The weight of a new sample is {self.factor_new:g}.", "Use a factor above 0 and below 1, such as 0.001."
            )

    def told(self, flow: Flow) -> str:
        """Return the factor."""
        return f"standardised by an exponentially moving mean and spread (factor {self.factor_new:g})"

    def settling(self, flow: Flow) -> float:
        """Return the time in which what came before a start loses its weight but for `SETTLED`.

        In samples ln(SETTLED) / ln(1 - a): 4603 for 1e-3, 46 s at 100 Hz.
        """
        return math.log(SETTLED) / math.log1p(-self.factor_new) / flow.sfreq

    def causal(self, flow: Flow) -> Running:
        """Return the moving mean and spread with their state."""
        return _MovingStandardiser(self.factor_new, self.eps, len(flow.ch_names))

    def offline(self, data: FloatArray, flow: Flow) -> FloatArray:
        """Return the causal form: there is no other."""
        return run_offline(self.causal(flow), data)


class _MovingStandardiser(Running):
    """Keeps weighted sums over the past: of samples, of squared distances to the mean, and of the weights.

    Samples are counted from the first one, so that a constant gives exact zeros, and an electrode offset costs no digits.
    """

    def __init__(self, factor_new: float, eps: float, n_chans: int) -> None:
        self._lfilter = scipy_signal().lfilter
        self._feedback, self._eps = np.array([1.0, factor_new - 1.0]), eps
        self._first = np.zeros(n_chans)
        self._sum, self._squares = np.zeros((1, n_chans)), np.zeros((1, n_chans))
        self._weight = np.zeros((1, 1))

    def start(self, sample: FloatArray) -> FloatArray:
        """Start without a past: a constant has no spread, and gives zeros."""
        self._first = sample.copy()
        self._sum[:] = self._squares[:] = 0.0
        self._weight[:] = 0.0
        return np.zeros(len(sample))

    def __call__(self, samples: FloatArray) -> FloatArray:
        """Standardise samples of shape (n_samples, n_chans)."""
        if not len(samples):
            return samples
        weight, self._weight = self._run(np.ones((len(samples), 1)), self._weight)
        moved = samples - self._first
        total, self._sum = self._run(moved, self._sum)
        moved -= total / weight
        squares, self._squares = self._run(moved * moved, self._squares)
        standardised: FloatArray = moved / np.maximum(np.sqrt(squares / weight), self._eps)
        return standardised

    def _run(self, samples: FloatArray, state: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return the weighted sums up to each sample, and the state after the last one."""
        sums: FloatArray
        sums, after = self._lfilter([1.0], self._feedback, samples, axis=0, zi=state)
        return sums, after


@dataclass(frozen=True, kw_only=True)
class ZScore(WindowStep):
    """Standardises each channel of each window by its own mean and spread, or by those of a stretch of the window.

    The spread is the standard deviation of the population (n in the denominator), as in `scipy.stats.zscore`.

    Attributes
    ----------
    start, stop : float or None
        The stretch in seconds from the window's first sample; the sample at `stop` does not belong to it. None is the window's
        end on that side.
    eps : float
        Least spread to divide by, in the unit at this place.
    """

    name: ClassVar[str] = "z-score"
    changes_unit: ClassVar[bool] = True

    start: float | None = None
    stop: float | None = None
    eps: float = 1e-10

    def __post_init__(self) -> None:
        check_positive(self.eps, "The least spread (eps) of the z-score")
        if any(edge is not None and not math.isfinite(edge) for edge in (self.start, self.stop)):
            raise SpecError(
                "The stretch of the z-score has an edge that is no number.", "Use seconds from the window's start, or None."
            )

    def check(self, goal: Goal) -> None:
        """Refuse a stretch that does not lie in the window or has fewer than two samples."""
        first, last = self._stretch(goal)
        if first < 0 or last > goal.n_times or last - first < 2:
            raise SpecError(
                f"The z-score from {self._told()} has no two samples in windows of {goal.n_times / goal.sfreq:g} s.",
                "Use seconds from the window's start, inside the window.",
            )

    def told(self, flow: Flow) -> str:
        """Return the stretch."""
        if self.start is None and self.stop is None:
            return "each channel standardised in each window"
        return f"each channel standardised in each window by its values from {self._told()} of the window"

    def on_windows(self, windows: FloatArray, goal: Goal) -> FloatArray:
        """Return the standardised windows, shape (..., n_chans, n_times)."""
        first, last = self._stretch(goal)
        windows = np.ascontiguousarray(windows)  # sums run along the times, window by window
        centred = windows - windows[..., first:last].mean(axis=-1, keepdims=True)
        stretch = centred[..., first:last]
        spread = np.sqrt((stretch * stretch).mean(axis=-1, keepdims=True))
        standardised: FloatArray = centred / np.maximum(spread, self.eps)
        return standardised

    def _stretch(self, goal: Goal) -> tuple[int, int]:
        """Return the first sample of the stretch, and the one after its last."""
        return (
            0 if self.start is None else round(self.start * goal.sfreq),
            goal.n_times if self.stop is None else round(self.stop * goal.sfreq),
        )

    def _told(self) -> str:
        start = "the start" if self.start is None else f"{self.start:g} s"
        return f"{start} to {'the end' if self.stop is None else f'{self.stop:g} s'}"
