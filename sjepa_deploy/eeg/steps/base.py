"""Defines what a step of a signal is: stored data, a causal form, and an offline form beside it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from sjepa_deploy.errors import MissingDependencyError

FloatArray = NDArray[np.float64]

Phase = Literal["causal", "zero-phase"]
"""Says which form of the steps made the windows that a model learned from."""

SETTLED = 0.01
"""A step has settled when its output differs by less than this share from that of a run that began earlier."""


@dataclass(frozen=True, kw_only=True)
class Goal:
    """Describes the windows that a model takes.

    Attributes
    ----------
    n_chans, n_times : int
        Shape of a window.
    sfreq : float
        Rate in Hz.
    ch_names : tuple of str or None
        Names of the channels, where they are known.
    start : float or None
        Start of a window in seconds after its event, where windows belong to events.
    """

    n_chans: int
    n_times: int
    sfreq: float
    ch_names: tuple[str, ...] | None = None
    start: float | None = None


@dataclass(frozen=True, kw_only=True)
class Flow:
    """Describes a signal at one place of a chain of steps.

    Attributes
    ----------
    ch_names : tuple of str
        Channels in the order of the samples.
    sfreq : float
        Rate in Hz.
    goal : Goal
        What the chain ends with.
    """

    ch_names: tuple[str, ...]
    sfreq: float
    goal: Goal

    def replace(self, **changes: Any) -> Flow:
        """Return a copy with `changes`."""
        return replace(self, **changes)


class Running(ABC):
    """Runs the causal form of a step. Samples go in as they come, and no bit of the output depends on their chunks."""

    @abstractmethod
    def start(self, sample: FloatArray) -> FloatArray:
        """Start anew as if `sample`, shape (n_chans_in,), had been there for ever, and return what then comes out."""

    @abstractmethod
    def __call__(self, samples: FloatArray) -> FloatArray:
        """Take the samples that follow, shape (n_samples, n_chans_in), and return theirs, (n_samples, n_chans_out)."""


@dataclass(frozen=True, kw_only=True)
class Step(ABC):
    """Describes one step of the way from a recording or a stream to the windows of a model.

    A step is data: its fields are stored in the manifest under its `name`. A new step is one file in this folder, and one row in
    `sjepa_deploy.eeg.steps.STEPS`.
    """

    name: ClassVar[str]
    """Name of the step in files."""

    memory: ClassVar[bool] = True
    """Whether the output depends on earlier samples. Steps without memory are also applied to windows that were cut before."""

    changes_unit: ClassVar[bool] = False
    """Whether the output is in another unit than the input, or in none."""

    def check(self, goal: Goal) -> None:  # noqa: B027  # most steps suit every model
        """Refuse a step that does not fit the model.

        Raises
        ------
        SpecError
            If the step does not fit.
        """

    def after(self, flow: Flow) -> Flow:
        """Return the signal after the step."""
        return flow

    def told(self, flow: Flow) -> str:
        """Return a phrase that says what the step does, such as "band-passed 0.5 to 40 Hz"."""
        return self.name

    def settling(self, flow: Flow) -> float:
        """Return after how many seconds the causal form has settled, see `SETTLED`."""
        return 0.0

    def delay(self, hertz: float, flow: Flow) -> float:
        """Return by how many seconds the causal form delays a rhythm of `hertz`."""
        return 0.0


@dataclass(frozen=True, kw_only=True)
class StreamStep(Step):
    """Describes a step on continuous samples."""

    causal_only: ClassVar[bool] = False
    """Whether the offline form is the causal one."""

    @abstractmethod
    def causal(self, flow: Flow) -> Running:
        """Return the form that runs live."""

    @abstractmethod
    def offline(self, data: FloatArray, flow: Flow) -> FloatArray:
        """Return the zero-phase form of a whole stretch without a pause, shape (n_chans, n_samples).

        The causal form of the stretch where a step has no zero-phase form.
        """

    def reach(self, flow: Flow) -> float:
        """Return on how many samples before and after a sample its offline form depends, but for 1e-6; infinity: on them all."""
        return math.inf if self.memory else 0.0


@dataclass(frozen=True, kw_only=True)
class WindowStep(Step):
    """Describes a step on windows, the same in both phases. Window steps follow all steps on samples."""

    memory: ClassVar[bool] = False

    @abstractmethod
    def on_windows(self, windows: FloatArray, goal: Goal) -> FloatArray:
        """Return windows, shape (..., n_chans, n_times). The result for a window does not depend on the windows beside it."""


def scipy_signal() -> Any:
    """Return `scipy.signal`.

    Raises
    ------
    MissingDependencyError
        If SciPy is not installed.
    """
    try:
        import scipy.signal
    except ImportError as error:
        raise MissingDependencyError("SciPy", "stream") from error
    return scipy.signal


def mne_filter() -> Any:
    """Return `mne.filter`.

    Raises
    ------
    MissingDependencyError
        If MNE is not installed.
    """
    try:
        import mne.filter
    except ImportError as error:
        raise MissingDependencyError("MNE-Python", "eeg") from error
    return mne.filter


def run_offline(running: Running, data: FloatArray) -> FloatArray:
    """Return the causal form of a whole stretch, shape (n_chans, n_samples): it starts on the first sample."""
    samples = np.ascontiguousarray(data.T)
    running.start(samples[0])
    return np.ascontiguousarray(running(samples).T)
